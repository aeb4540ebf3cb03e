"""A policy whose transformer blocks are held by servers of a Petals swarm.

The client has the embeddings, the final norm, the output embeddings, the fp32 master copy of the adapter and
the value head; servers hold the blocks and apply the adapter. Autograd adds the gradients that come back to
the client's parameters, like any others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from textrl_swarm.config import LoraSettings, Timeouts
from textrl_swarm.errors import ConfigError
from textrl_swarm.models.adapters import (
    choose_targets,
    first_adapted_block,
    initial_tensor,
    lora_config,
    weight_name,
)
from textrl_swarm.models.base_model import BaseModel, resolve
from textrl_swarm.models.digests import checkpoint_digests
from textrl_swarm.models.pretrained import find_tokenizer, require_finite
from textrl_swarm.models.texts import generation_config
from textrl_swarm.models.value_head import ValueHead
from textrl_swarm.policies.base import Policy
from textrl_swarm.swarm import compat
from textrl_swarm.swarm.protocol import AdapterLayout, AdapterSnapshot, require_servable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from textrl_swarm.swarm.client.connection import SwarmClient
    from textrl_swarm.swarm.client.session import GenerationSession

_BLOCKS_PATH = "transformer.h"  # of the list of blocks in BLOOM


def load_remote_policy(
    model: str | Path | BaseModel | nn.Module,
    *,
    initial_peers: Sequence[str] | None,
    dht_prefix: str | None,
    quantization: str | None,
    lora: LoraSettings,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None,
    timeouts: Timeouts,
) -> RemotePolicy:
    """See `loading.load_policy`."""
    if quantization is not None:
        raise ConfigError(
            f"quantization={quantization!r} is for local models; in a swarm the servers hold the weights: "
            "start them with `textrl-swarm serve MODEL --quant_type int8` (or nf4)"
        )
    base = None
    if not isinstance(model, nn.Module):
        base = resolve(model)
        require_servable(base)  # before anything of petals is loaded
    elif initial_peers is not None:
        raise ConfigError(
            "a petals model already knows its swarm: leave initial_peers out, or pass the model's name "
            "instead"
        )
    compat.require_petals()
    from textrl_swarm.swarm.client.connection import ModelFingerprint, SwarmClient, check_addresses, join
    from textrl_swarm.swarm.client.parts import load_parts

    if base is not None:
        addresses = check_addresses([] if initial_peers is None else initial_peers)
        parts: Any = load_parts(base, dtype, device)
        config, prefix = base.config, dht_prefix or base.dht_prefix
    else:
        parts = model
        config, prefix = parts.config, parts.config.dht_prefix
    name = str(parts.name_or_path)
    require_finite(parts, name)
    tokenizer = tokenizer or find_tokenizer(name)
    checkpoint = checkpoint_digests(name, _BLOCKS_PATH)
    if base is not None:
        dht, p2p = join(addresses, timeouts.connect_s)
    else:
        manager = parts.transformer.h.sequence_manager
        dht, p2p = manager.dht, manager.state.p2p
    fingerprint = ModelFingerprint(
        config.model_type, config.hidden_size, config.vocab_size, config.num_hidden_layers
    )
    client = SwarmClient(
        dht, p2p, prefix, fingerprint, timeouts, checkpoint=checkpoint, owns_dht=base is not None
    )
    try:
        return RemotePolicy(parts, config, client, lora, seed, tokenizer)
    except BaseException:
        client.close()
        raise


class RemotePolicy(Policy):
    """BLOOM with its blocks in a swarm.

    Args:
        model: the client's own parts: a BLOOM model whose blocks are not used, or a petals
            DistributedBloomForCausalLM.
        config: of the whole model.
        client: the chain of remote blocks.
    """

    length_limit_reason = "the servers' cache (--attn_cache_tokens, --inference_max_length)"

    def __init__(
        self,
        model: Any,
        config: PretrainedConfig,
        client: SwarmClient,
        lora: LoraSettings,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.base_model = str(model.name_or_path)
        self.tokenizer = tokenizer
        self.generation_config = generation_config(model)
        self.lora = lora
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.device = model.transformer.word_embeddings.weight.device
        self.max_length = client.chain.limits.max_length
        self.max_session_tokens = client.chain.limits.cache_tokens
        self.traffic = client.traffic
        self.num_servers = len(client.spans)
        self._model = model.requires_grad_(False)
        self._client = client
        self._num_blocks = config.num_hidden_layers
        self._first = first_adapted_block(self._num_blocks, lora.layers)
        self._layout = AdapterLayout(lora.r, choose_targets(client.linears, lora.targets))
        self.peft_config = lora_config(
            lora, self._layout.targets, self._num_blocks, _BLOCKS_PATH.rsplit(".", 1)[-1], self.base_model
        )
        self._parameters = self._initial_parameters(seed)
        self.value_head = ValueHead(self.hidden_size, seed=seed).to(self.device)
        self._snapshot: AdapterSnapshot | None = None

    def _initial_parameters(self, seed: int) -> dict[str, nn.Parameter]:
        parameters = {}
        for block in self._adapted_blocks:
            for path, (fan_in, fan_out) in self._layout.targets.items():
                shapes = {"A": (self._layout.r, fan_in), "B": (fan_out, self._layout.r)}
                for part, shape in shapes.items():
                    name = _name(block, path, part)
                    parameters[name] = nn.Parameter(initial_tensor(name, shape, seed).to(self.device))
        return parameters

    @property
    def _adapted_blocks(self) -> range:
        return range(self._first, self._num_blocks)

    def features(self, tokens: Tensor) -> Tensor:
        """The output (B, S, H) of the blocks below the adapted ones."""
        with torch.no_grad():
            return self._client.blocks(self._embed(tokens), 0, self._first)

    def hidden_states(self, features: Tensor) -> Tensor:
        """See Policy."""
        if not self._adapter_on:
            hidden = self._client.blocks(features, self._first, self._num_blocks)
        else:
            flats = self._flats()
            snapshot = self._take_snapshot(flats)
            hidden = self._client.blocks(features, self._first, self._num_blocks, snapshot, flats)
        return self._model.transformer.ln_f(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        """See Policy."""
        return self._model.lm_head(hidden.to(self._model.lm_head.weight.dtype))

    @contextmanager
    def session(self, rows: int, max_length: int) -> Iterator[_RemoteSession]:
        """See Policy; the caches are on the servers."""
        snapshot = self._take_snapshot(self._flats()) if self._adapter_on else None
        with self._client.session(snapshot, max_length=max_length) as session:
            yield _RemoteSession(self, session)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """See Policy."""
        return self._parameters

    def close(self) -> None:
        """Leaves the swarm."""
        self._client.close()

    def _embed(self, tokens: Tensor) -> Tensor:
        transformer = self._model.transformer
        return transformer.word_embeddings_layernorm(transformer.word_embeddings(tokens))

    def _flats(self) -> dict[int, Tensor]:
        """Block index -> its adapter tensors as one flat fp32 vector in the protocol's layout,
        differentiable.
        """
        flats = {}
        for block in self._adapted_blocks:
            matrices = {}
            for path in self._layout.targets:
                a = self._parameters[_name(block, path, "A")]
                b = self._parameters[_name(block, path, "B")]
                matrices[path] = (a, b)
            flats[block] = self._layout.flatten(matrices)
        return flats

    def _take_snapshot(self, flats: Mapping[int, Tensor]) -> AdapterSnapshot:
        """What servers get; made anew only when a number changed since, however it was changed."""
        blocks = {block: flat.detach().float().cpu() for block, flat in flats.items()}
        last = self._snapshot
        if last is None or not all(torch.equal(flat, last.blocks[block]) for block, flat in blocks.items()):
            last = self._snapshot = AdapterSnapshot.take(self._layout, float(self.lora.alpha), blocks)
        return last


class _RemoteSession:
    def __init__(self, policy: RemotePolicy, session: GenerationSession):
        self._policy = policy
        self._session = session

    def step(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self._session.step(self._policy._embed(tokens))
            return self._policy._model.transformer.ln_f(hidden)


def _name(block: int, path: str, part: str) -> str:
    return weight_name(f"{_BLOCKS_PATH}.{block}.{path}", part)
