"""What the swarm costs: our client against petals' own on the same servers, and against the model here.

    python benchmarks/swarm_speed.py [--servers 2] [--repeats 5] [--hidden 256]

Prints a table of medians. Contenders take turns within each repeat, so that a slow minute of the machine hits
all of them. Everything is on loopback: latency of a real network is not in these figures.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable

import torch
from harness import in_turn, report
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LocalSwarm, LoraSettings, SamplingConfig, load_policy
from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.swarm.client.chain import run_in_background


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        model = random_bloom(directory + "/bloom", hidden=options.hidden, layers=4)
        with contextlib.ExitStack() as stack:
            swarm = stack.enter_context(LocalSwarm(model, options.servers))
            contenders = make_contenders(model, swarm, options, stack)
            times = in_turn({name: action for name, (action, _) in contenders.items()}, options.repeats)
    rows = []
    for name, seconds in times.items():
        rate = f"{contenders[name][1] / seconds.median:.0f}"
        petals = times.get(f"{name.partition(',')[0]}, petals")
        ratio = "" if petals is None else f"{seconds.ratio(petals):.2f}"
        rows.append([name, f"{seconds.median:.3f}", seconds.spread, rate, ratio])
    title = (
        f"{options.servers} servers, hidden {options.hidden}, 4 blocks, {options.rows} rows; median of "
        f"{options.repeats}"
    )
    report(title, ["what", "seconds", "spread", "tokens/s", "ratio to petals"], rows)


def make_contenders(
    model, swarm, options, stack: contextlib.ExitStack
) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (action, tokens that it processes)."""
    from petals import DistributedBloomForCausalLM

    prompt = [list(range(10, 18))] * options.rows
    # Nothing ends early: all contenders do the same work.
    sampling = SamplingConfig(max_new_tokens=options.new_tokens, do_sample=False, stop_token_ids=())
    tokens = torch.randint(2, 100, (options.rows, 40))
    remote = stack.enter_context(
        load_policy(model, initial_peers=swarm.initial_peers, lora=LoraSettings(r=8))
    )
    local = stack.enter_context(load_policy(model, lora=LoraSettings(r=8)))
    stock = DistributedBloomForCausalLM.from_pretrained(
        model, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix, show_route=False
    )
    manager = stock.transformer.h.sequence_manager
    stack.callback(manager.dht.shutdown)
    stack.callback(lambda: run_in_background(manager.state.p2p.shutdown()))
    decoded, passed = options.rows * options.new_tokens, tokens.numel()

    def forward_backward(policy):
        policy(tokens).logits.logsumexp(-1).mean().backward()

    def push():
        with torch.no_grad():
            next(iter(remote.adapter_parameters().values())).add_(1e-6)
            remote(tokens[:1, :1])

    def stock_generate():
        with torch.inference_mode():
            stock.generate(
                torch.tensor(prompt), max_new_tokens=options.new_tokens, do_sample=False, eos_token_id=None
            )

    def stock_backward():
        embeddings = stock.transformer.word_embeddings(tokens).detach().requires_grad_(True)
        stock(inputs_embeds=embeddings).logits.logsumexp(-1).mean().backward()

    return {
        "generate, this machine": (lambda: local.generate(prompt, sampling), decoded),
        "generate, ours with an adapter": (lambda: remote.generate(prompt, sampling), decoded),
        "generate, petals": (stock_generate, decoded),
        "forward + backward, this machine": (lambda: forward_backward(local), passed),
        "forward + backward, ours with LoRA gradients": (lambda: forward_backward(remote), passed),
        "forward + backward, petals": (stock_backward, passed),
        "push a changed adapter, one-token forward": (push, 1),
    }


if __name__ == "__main__":
    main()
