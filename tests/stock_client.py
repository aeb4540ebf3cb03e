"""A stock Petals client, as somebody else would write it; test_swarm.py compares it with plain transformers.

Also a program: `python stock_client.py MODEL PEER...` prints the answers as one line of JSON.
"""

from __future__ import annotations

import faulthandler
import json
import sys

import torch

from textrl_swarm.swarm.compat import install_import_hook

install_import_hook()


def talk(model_name: str, peers: list[str]) -> dict[str, list]:
    from petals import DistributedBloomForCausalLM

    from textrl_swarm.models.base_model import resolve

    model = DistributedBloomForCausalLM.from_pretrained(
        model_name,
        initial_peers=peers,
        dht_prefix=resolve(model_name).dht_prefix,
        max_retries=5,
        request_timeout=20,
    )
    try:
        tokens = torch.tensor([[9, 8, 7, 30, 31], [50, 51, 52, 53, 54]])
        embeddings = model.transformer.word_embeddings(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logits.square().mean().backward()
        return {
            "tokens": tokens.tolist(),
            "logits": logits.tolist(),
            "embedding_grad": embeddings.grad.tolist(),
            "session": _greedy_by_session(model, tokens, 8).tolist(),
            "generate": model.generate(
                tokens, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
            ).tolist(),
        }
    finally:
        end(model)


def _greedy_by_session(model, tokens: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    transformer = model.transformer
    with (
        torch.no_grad(),
        transformer.h.inference_session(max_length=tokens.shape[1] + max_new_tokens) as session,
    ):
        fed = 0
        for _ in range(max_new_tokens):
            hidden = session.step(
                transformer.word_embeddings_layernorm(transformer.word_embeddings(tokens[:, fed:]))
            )
            fed = tokens.shape[1]
            chosen = model.lm_head(transformer.ln_f(hidden[:, -1])).argmax(dim=-1)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens


def end(model) -> None:
    """Stock petals leaves its daemon and its DHT process to the end of the program."""
    from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker

    manager = model.transformer.h.sequence_manager
    manager.shutdown()
    RemoteExpertWorker.run_coroutine(manager.state.p2p.shutdown())
    manager.dht.shutdown()
    manager.dht.join()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # s; should it hang, say where
    print(json.dumps(talk(sys.argv[1], sys.argv[2:])))
