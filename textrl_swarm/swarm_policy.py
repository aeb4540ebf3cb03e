"""A policy whose transformer blocks are held by servers of a Petals swarm.

The client has the embeddings, the final norm, the output embeddings, the fp32 master copy of the adapter and the value head; servers
hold the blocks and apply the adapter. The gradients that come back are added to the client's parameters by autograd, like any others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from textrl_swarm.adapters import choose_targets, first_adapted_block, initial_tensor, lora_config
from textrl_swarm.base_model import default_dht_prefix, hub_name, read_config
from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.policy import Policy
from textrl_swarm.swarm import compat
from textrl_swarm.value_head import ValueHead


def load_swarm_policy(
    model, initial_peers: Sequence[str] | None, dht_prefix: str | None, quantization, lora: LoraSettings, dtype, device, seed: int, *,
    tokenizer=None, timeouts=None,
) -> SwarmPolicy:  # fmt: skip
    """See `policy.load_policy`."""
    if quantization is not None:
        raise ConfigError(
            f"quantization={quantization!r} is for local models; in a swarm the servers hold the weights: "
            "start them with `textrl-swarm serve MODEL --quant_type int8` (or nf4)"
        )
    if not isinstance(model, nn.Module):
        config = read_config(model)  # before anything of petals is loaded
        if config.model_type != "bloom":
            raise ModelError(
                f"{model} is a {config.model_type} model; the swarm parts train BLOOM models (use it locally: initial_peers=None)"
            )
    compat.require_petals()
    from transformers import AutoTokenizer

    from textrl_swarm.swarm.client import ModelFingerprint, SwarmClient, load_client_model
    from textrl_swarm.swarm.rpc import Timeouts

    timeouts = timeouts or Timeouts()
    owns_dht = not isinstance(model, nn.Module)
    if owns_dht:
        name = hub_name(model)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
        model = load_client_model(name, initial_peers, dht_prefix or default_dht_prefix(model), dtype, timeouts)
        model.to(device or "cpu")
    elif initial_peers is not None:
        raise ConfigError("a petals model already knows its swarm: leave initial_peers out, or pass the model's name instead")
    elif tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    config = model.config
    manager = model.transformer.h.sequence_manager
    client = SwarmClient(
        manager.dht, manager.state.p2p, config.dht_prefix,
        ModelFingerprint(config.model_type, config.hidden_size, config.vocab_size, config.num_hidden_layers), timeouts, owns_dht=owns_dht,
    )  # fmt: skip
    try:
        return SwarmPolicy(model, client, lora, seed, tokenizer)
    except BaseException:
        client.close()
        raise


class SwarmPolicy(Policy):
    """BLOOM with its blocks in a swarm.

    Args:
        model: a petals DistributedBloomForCausalLM: the client's own parts.
        client: the chain of remote blocks.
    """

    length_limit_reason = "the servers' cache (--attn_cache_tokens, --inference_max_length)"

    def __init__(self, model: nn.Module, client, lora: LoraSettings, seed: int, tokenizer):
        config = model.config
        self.base_model, self.tokenizer, self.lora = str(model.name_or_path), tokenizer, lora
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.device = model.transformer.word_embeddings.weight.device
        self.max_length, self.max_session_tokens = client.chain.limits.max_length, client.chain.limits.cache_tokens
        self.traffic = client.traffic
        self.num_servers = len(client.spans)
        self._model, self._client = model.requires_grad_(False), client
        self._num_blocks = config.num_hidden_layers
        self._first = first_adapted_block(self._num_blocks, lora.layers)
        self._targets = choose_targets(client.linears, lora.targets)
        self.peft_config = lora_config(lora, self._targets, self._num_blocks, "h", self.base_model)
        self._parameters: dict[str, nn.Parameter] = {}
        for block in range(self._first, self._num_blocks):
            for path, (fan_in, fan_out) in self._targets.items():
                for part, shape in (("A", (lora.r, fan_in)), ("B", (fan_out, lora.r))):
                    name = _name(block, path, part)
                    self._parameters[name] = nn.Parameter(initial_tensor(name, shape, seed).to(self.device))
        self.value_head = ValueHead(self.hidden_size, seed=seed).to(self.device)
        self._snapshot = None

    def features(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self._client.blocks(self._embed(tokens), 0, self._first)

    def hidden_states(self, features: Tensor) -> Tensor:
        if not self._adapter_on:
            hidden = self._client.blocks(features, self._first, self._num_blocks)
        else:
            flats = self._flats()
            hidden = self._client.blocks(features, self._first, self._num_blocks, self._take_snapshot(flats), flats)
        return self._model.transformer.ln_f(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        return self._model.lm_head(hidden.to(self._model.lm_head.weight.dtype))

    @contextmanager
    def session(self, rows: int, max_length: int) -> Iterator[_SwarmSession]:
        snapshot = self._take_snapshot(self._flats()) if self._adapter_on else None
        with self._client.session(snapshot, max_length=max_length) as session:
            yield _SwarmSession(self, session)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def close(self) -> None:
        """Leaves the swarm."""
        self._client.close()

    def _embed(self, tokens: Tensor) -> Tensor:
        transformer = self._model.transformer
        return transformer.word_embeddings_layernorm(transformer.word_embeddings(tokens))

    def _flats(self) -> dict[int, Tensor]:
        """Block index -> its adapter tensors as one flat fp32 vector in the protocol's layout, differentiable."""
        return {
            block: torch.cat([self._parameters[_name(block, path, part)].flatten() for path in self._targets for part in "AB"])
            for block in range(self._first, self._num_blocks)
        }

    def _take_snapshot(self, flats: Mapping[int, Tensor]):
        """What servers are sent; made anew only when a number changed since, however it was changed."""
        from textrl_swarm.swarm.protocol import AdapterSnapshot

        blocks = {block: flat.detach().float().cpu() for block, flat in flats.items()}
        if self._snapshot is None or not all(torch.equal(flat, self._snapshot.blocks[block]) for block, flat in blocks.items()):
            self._snapshot = AdapterSnapshot.take(self.lora.r, float(self.lora.alpha), self._targets, blocks)
        return self._snapshot


class _SwarmSession:
    def __init__(self, policy: SwarmPolicy, session):
        self._policy, self._session = policy, session

    def step(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self._session.step(self._policy._embed(tokens))
            return self._policy._model.transformer.ln_f(hidden)


def _name(block: int, path: str, part: str) -> str:
    return f"base_model.model.transformer.h.{block}.{path}.lora_{part}.weight"
