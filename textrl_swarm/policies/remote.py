"""A policy whose transformer blocks are held by servers of a Petals swarm.

The client has the embeddings, the final norm, the output embeddings, the fp32 master copy of the adapter and
the value head; servers hold the blocks and apply the adapter. Autograd adds the gradients that come back to
the client's parameters, like any others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from textrl_swarm.config import (
    Codec,
    LoraSettings,
    ServerChecks,
    SwarmAccess,
    Timeouts,
    checked_local_blocks,
)
from textrl_swarm.decoders.chunks import Step
from textrl_swarm.decoders.sharing import SharedPrefix, shared_prefix
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.errors import ConfigError
from textrl_swarm.models.adapters import (
    adapted_paths,
    initial_tensor,
    matched_layers,
    model_lora_config,
    weight_name,
)
from textrl_swarm.models.base_model import BaseModel, resolve
from textrl_swarm.models.digests import checkpoint_digests
from textrl_swarm.models.pretrained import find_tokenizer, require_finite
from textrl_swarm.models.texts import generation_config
from textrl_swarm.models.value_head import ValueHead
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.codec_loss import compared, probe
from textrl_swarm.policies.sessions import DecodingSession, Pending
from textrl_swarm.swarm import compat
from textrl_swarm.swarm.protocol import MICRO_BATCH_TOKENS, AdapterLayout, AdapterSnapshot, require_servable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textrl_swarm.decoders.outside import Outside
    from textrl_swarm.swarm.client.connection import SwarmClient
    from textrl_swarm.swarm.client.end_blocks import EndSession
    from textrl_swarm.swarm.client.session import GenerationSession


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
    codec: Codec | None,
    checks: ServerChecks | None,
    access: SwarmAccess,
    local_blocks: Sequence[int],
) -> RemotePolicy:
    """See `loading.load_policy`."""
    if quantization is not None:
        raise ConfigError(
            f"quantization={quantization!r} is for local models; in a swarm the servers hold the weights: "
            "start them with `textrl-swarm serve MODEL --quant_type int8` (or nf4)"
        )
    base = boundary = None
    if not isinstance(model, nn.Module):
        base = resolve(model)
        boundary = require_servable(base)  # before anything of petals is loaded
    elif initial_peers is not None:
        raise ConfigError(
            "a petals model already knows its swarm: leave initial_peers out, or pass the model's name "
            "instead"
        )
    ends_of = checked_local_blocks(local_blocks)
    if any(ends_of) and base is None:
        raise ConfigError("local_blocks needs the model's files: pass its name or directory")
    compat.require_petals()
    from textrl_swarm.swarm.access import read_secret
    from textrl_swarm.swarm.client.connection import ModelFingerprint, SwarmClient, check_addresses, join
    from textrl_swarm.swarm.client.end_blocks import EndBlocks, load_ends
    from textrl_swarm.swarm.client.own_blocks import OwnBlocks
    from textrl_swarm.swarm.client.parts import load_parts, parts_of

    if base is not None:
        addresses = check_addresses([] if initial_peers is None else initial_peers)
        secret = read_secret(access.secret_file)
        parts = load_parts(base, dtype, device)
        ends = load_ends(base, ends_of, parts.skeleton.dtype, parts.device)
        prefix = dht_prefix or base.dht_prefix
    else:
        theirs: Any = model
        if access.identity is not None or access.secret_file is not None:
            raise ConfigError(
                "a petals model is in its swarm already: leave access.identity and access.secret_file "
                "out, or pass the model's name instead"
            )
        secret = None
        parts = parts_of(theirs)
        ends = EndBlocks({}, range(parts.skeleton.num_blocks))
        require_finite(theirs, theirs.name_or_path)
        prefix = theirs.config.dht_prefix
    config = parts.skeleton.config
    tokenizer = tokenizer or find_tokenizer(parts.name)
    own = None
    if checks is not None and checks.here:
        if base is None:
            raise ConfigError("checks.here=True needs the model's files: pass its name or directory")
        own = OwnBlocks(base)
    checkpoint = checkpoint_digests(parts.name, parts.skeleton.blocks_path)
    if base is not None:
        dht, p2p = join(addresses, timeouts.connect_s, access.identity)
    else:
        manager = theirs.transformer.h.sequence_manager
        dht, p2p = manager.dht, manager.state.p2p
    fingerprint = ModelFingerprint(
        config.model_type, config.hidden_size, config.vocab_size, config.num_hidden_layers
    )
    client = SwarmClient(
        dht,
        p2p,
        prefix,
        fingerprint,
        timeouts,
        checkpoint=checkpoint,
        ends=ends,
        checks=checks,
        own=own,
        secret=secret,
        allowed=access.allowed_servers,
        boundary=boundary,
        owns_dht=base is not None,
    )
    try:
        policy = RemotePolicy(parts, client, lora, seed, tokenizer)
        if codec is not None:
            policy.use_codec(codec)
        return policy
    except BaseException:
        client.close()
        raise


class RemotePolicy(Policy):
    """A decoder with its blocks in a swarm.

    Args:
        parts: what is outside of the blocks.
        client: the chain of remote blocks.
    """

    length_limit_reason = "the servers' cache (--attn_cache_tokens, --inference_max_length)"

    def __init__(
        self,
        parts: Outside,
        client: SwarmClient,
        lora: LoraSettings,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        skeleton = parts.skeleton
        self.base_model = parts.name
        self.tokenizer = tokenizer
        self.generation_config = generation_config(skeleton.model)
        self.lora = lora
        self.hidden_size = parts.head_size
        self.vocab_size = parts.vocab_size
        self.device = parts.device
        limits = client.chain.limits
        self.max_length = limits.max_length
        self.max_session_tokens = limits.cache_tokens
        self.session_row_tokens = limits.cache_row_tokens
        self.max_step_tokens = min(limits.max_batch_tokens, MICRO_BATCH_TOKENS)
        self.takes_padding = client.takes_padding
        self.traffic = client.traffic
        self.checks_answers = client.chain.checks is not None
        self.num_servers = self.sessions_at_once = len(client.spans)
        self._parts = parts
        self._client = client
        self._num_blocks = skeleton.num_blocks
        blueprint = Skeleton(skeleton.model.config, skeleton.dtype)
        self.peft_config = model_lora_config(lora, blueprint.model, self.base_model, self._find_unused)
        self._layouts = self._choose_layouts(blueprint)
        self._names = self._choose_names(blueprint)
        self._first = min(self._layouts)
        self._parameters = self._initial_parameters(seed)
        self.value_head = ValueHead(self.hidden_size, seed=seed).to(self.device)
        self._snapshot: AdapterSnapshot | None = None

    def use_codec(self, codec: Codec) -> None:
        """From now on hidden states travel in fewer bits; `codec_loss` says what that costs.

        Raises:
            ConfigError: it costs more than it may; nothing is changed then.
        """
        if self._client.carries_more:
            raise ConfigError(
                f"codec={codec.kind}: blocks of {self.base_model} hand on whole numbers beside hidden "
                "states, which must arrive exactly; leave codec out"
            )
        exact = self.trusted(lambda: probe(self))
        self._client.use_codec(codec.kind)
        loss = compared(exact, self.trusted(lambda: probe(self)))
        if not (loss.nats <= codec.max_nats and loss.cosine >= codec.min_cosine):
            self._client.use_codec(None)
            raise ConfigError(
                f"codec={codec.kind} changes logprobs of {self.base_model} by {loss.nats:.4f} nats "
                f"(max_nats: {codec.max_nats:g}) and leaves a cosine of {loss.cosine:.6f} between gradients "
                f"(min_cosine: {codec.min_cosine:g}); leave codec out, "
                f"{'take fp16, ' if codec.kind == 'int8' else ''}or allow that much"
            )
        self.codec_loss = loss

    def _find_unused(self, layers: Mapping[str, str]) -> set[str]:
        """Layers that the servers have found to be without a use; see `never_called`."""
        used = {path for linears in self._client.linears.values() for path in linears}
        return {path for path in layers.values() if path not in used}

    def _choose_layouts(self, blueprint: Skeleton) -> dict[int, AdapterLayout]:
        """Block -> its adapted layers, as PEFT will find them by `peft_config`."""
        adapted = matched_layers(self.peft_config, blueprint.model)
        layouts = {}
        for block in range(self._num_blocks):
            prefix, linears = blueprint.block_prefix(block), self._client.linears[block]
            # In the order of the layers: a set's own differs from run to run, and rounding with it.
            targets = {path: sizes for path, sizes in linears.items() if f"{prefix}{path}" in adapted}
            if targets:
                layouts[block] = AdapterLayout(self.lora.r, targets)
        return layouts

    def _initial_parameters(self, seed: int) -> dict[str, nn.Parameter]:
        parameters = {}
        for (block, path), names in self._names.items():
            shapes = self._layouts[block].targets[path].shapes(self.lora.r)
            for name, shape in zip(names, shapes, strict=True):
                parameters[name] = nn.Parameter(initial_tensor(name, shape, seed).to(self.device))
        return parameters

    def _choose_names(self, blueprint: Skeleton) -> dict[tuple[int, str], tuple[str, str]]:
        """Block, path of an adapted layer -> PEFT's names of A and B."""
        names = {}
        for block, layout in self._layouts.items():
            prefix = blueprint.block_prefix(block)
            for path, own in adapted_paths(blueprint.blocks[block], layout.targets).items():
                names[block, path] = weight_name(f"{prefix}{own}", "A"), weight_name(f"{prefix}{own}", "B")
        return names

    def features(self, tokens: Tensor) -> Tensor:
        """See Policy."""
        keeps = self._first > 0 and self.keeps_features(tokens, self._parts.skeleton.dtype)
        return self._below(tokens, shared_prefix(tokens)) if keeps else tokens

    def _below(self, tokens: Tensor, shared: SharedPrefix | None) -> Tensor:
        with torch.no_grad():
            return self._client.blocks(self._parts.embed(tokens), 0, self._first, shared=shared)

    def hidden_states(self, features: Tensor) -> Tensor:
        """See Policy."""
        shared = shared_prefix(features)
        if not features.is_floating_point():
            features = self._below(features, shared)
        if not self._adapter_on:
            hidden = self._client.blocks(features, self._first, self._num_blocks, shared=shared)
        else:
            flats = self._flats()
            snapshot = self._take_snapshot(flats)
            hidden = self._client.blocks(features, self._first, self._num_blocks, snapshot, flats, shared)
        return self._parts.finish(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        """See Policy."""
        return self._parts.logits(hidden)

    @contextmanager
    def session(self, rows: int, max_length: int) -> Iterator[_RemoteSession]:
        """See Policy; the caches are on the servers."""
        snapshot = self._take_snapshot(self._flats()) if self._adapter_on else None
        with self._client.session(snapshot, rows=rows, max_length=max_length) as session:
            ends = self._client.end_session(snapshot, rows=rows, max_length=max_length)
            yield _RemoteSession(self._parts, ends, session)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """See Policy."""
        return self._parameters

    def close(self) -> None:
        """Leaves the swarm."""
        self._client.close()

    def _flats(self) -> dict[int, Tensor]:
        """Block index -> its adapter tensors as one flat fp32 vector in the protocol's layout,
        differentiable.
        """
        flats = {}
        for block, layout in self._layouts.items():
            matrices = {}
            for path in layout.targets:
                a, b = self._names[block, path]
                matrices[path] = self._parameters[a], self._parameters[b]
            flats[block] = layout.flatten(matrices)
        return flats

    def _take_snapshot(self, flats: Mapping[int, Tensor]) -> AdapterSnapshot:
        """What servers get; made anew only when a number changed since, however it was changed."""
        blocks = {block: flat.detach().float().cpu() for block, flat in flats.items()}
        last = self._snapshot
        if last is None or not all(torch.equal(flat, last.blocks[block]) for block, flat in blocks.items()):
            last = self._snapshot = AdapterSnapshot.take(self._layouts, self.lora.scale * self.lora.r, blocks)
        return last


class _RemoteSession(DecodingSession):
    def __init__(self, parts: Outside, ends: EndSession, session: GenerationSession):
        self._parts = parts
        self._ends = ends
        self._session = session

    def run(self, steps: Sequence[Step]) -> Pending[list[Tensor]]:
        """See DecodingSession."""
        parts, ends = self._parts, self._ends
        given = []
        with torch.no_grad():
            for step in steps:
                hidden = parts.embed(step.inputs, step.chunk.past, step.chunk.padding)
                given.append(ends.before(replace(step, inputs=hidden)))
        dtype = hidden.dtype

        def finish(outputs: list[Tensor]) -> list[Tensor]:
            found = []
            with torch.no_grad():
                for step, output in zip(steps, outputs, strict=True):
                    found.append(parts.finish(ends.behind(step, output.to(parts.device, dtype))))
            return found

        return Pending(self._session.run(given), finish)
