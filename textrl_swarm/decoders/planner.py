"""What each block of a decoder is called with, computed by transformers' own decoder.

The decoder runs on a model without weights whose blocks are recorders: masks, rotary embeddings, alibi and
positions come out as that architecture's own code makes them, whatever its layers are.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from textrl_swarm.decoders.boundary import Boundary
from textrl_swarm.decoders.caches import planned
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.decoders.stand_ins import StandIns
from textrl_swarm.errors import ModelError


@dataclass(frozen=True)
class Call:
    """The arguments of one block beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def ready(
        self, stand_in: Cache | None, cache: Cache | None, parts: Mapping[str, Tensor | None] | None = None
    ) -> Call:
        """The same for one use: with the cache of a generation in the place of the one that was planned with,
        what the block before handed on, and containers of its own, which blocks may write into (Gemma 4).
        """

        def one(value: Any) -> Any:
            if stand_in is not None and value is stand_in:
                return cache
            return copy.copy(value) if isinstance(value, (dict, list, UserDict)) else value

        kwargs = {name: one(value) for name, value in self.kwargs.items()}
        return Call(tuple(map(one, self.args)), {**kwargs, **(parts or {})})


@dataclass(frozen=True)
class Plan:
    """One call per block."""

    calls: Mapping[int, Call]

    cache: Cache | None
    """Stands for the cache among the arguments."""


class Planner:
    """Plans for one model.

    Args:
        config: of the whole model.
        dtype: in which the blocks compute.
        device: on which they do.
        name: of the model, for messages.

    Raises:
        ModelError: blocks that need more than one hidden state and what positions give.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        name: str = "the model",
    ):
        self.dtype, self.device = dtype, torch.device(device)
        self._name = name
        skeleton = Skeleton(config, dtype)
        self.num_blocks, self.hidden_size = skeleton.num_blocks, skeleton.hidden_size
        self.heads: int = getattr(skeleton.config, "num_attention_heads", None) or 1
        self.templates = cache_layers(skeleton.config)
        self._skeleton = skeleton
        self._records: list[tuple[int, Call, Any]] = []
        self._last: tuple[tuple[Any, ...], Plan] | None = None
        _hollow_out(skeleton, self.device)
        stand_ins = StandIns(skeleton, self._record)
        problem = stand_ins.choose_form(self._is_planned)
        if problem is not None:
            raise self.refusal(problem)
        self._require_independence()
        self.boundary = Boundary(self.hidden_size, self._parts(stand_ins))

    def plan(self, rows: int, length: int, past: int | None, padding: tuple[int, ...] = ()) -> Plan:
        """For hidden states (rows, length, H).

        Args:
            past: tokens in the cache; None = there is no cache.
            padding: see Chunk.
        """
        key = rows, length, past, padding
        if self._last is None or self._last[0] != key:
            self._last = key, self._plan(torch.zeros(1, 1, 1), rows, length, past, padding)
        return self._last[1]

    def _plan(
        self, values: Tensor, rows: int, length: int, past: int | None, padding: tuple[int, ...] = ()
    ) -> Plan:
        shape = rows, length, self.hidden_size
        cache = None
        if past is not None:
            cache = Cache(layers=[planned(template, past) for template in self.templates])
        # What is made in inference mode could take no part in a later backward.
        with torch.inference_mode(False), torch.no_grad():
            self._records = []
            embeddings = values.to(self.device, self.dtype).expand(shape)
            with suppress(_Planned):
                self._skeleton.run_decoder(past or 0, cache, padding, inputs_embeds=embeddings)
        self._require_one_hidden_state(shape)
        return Plan({block: call for block, call, _ in self._records}, cache)

    def _record(self, block: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self._records.append((block, Call(args, kwargs), hidden))
        if block == self.num_blocks - 1:
            raise _Planned
        return hidden

    def _is_planned(self) -> bool:
        for past in (None, 5):
            self._plan(torch.zeros(2, 3, self.hidden_size), 2, 3, past)
        return True

    def _parts(self, stand_ins: StandIns) -> tuple[str, ...]:
        """The argument by which blocks are handed what the ones before returned beside hidden states."""
        marked = stand_ins.second = object()
        try:
            calls = self._plan(torch.zeros(1, 1, 1), 2, 3, None).calls.values()
        except Exception:  # a decoder that computes with the second part of an answer does not hand it on
            return ()
        finally:
            stand_ins.second = None
        return tuple({name: None for call in calls for name, value in call.kwargs.items() if value is marked})

    def _require_one_hidden_state(self, shape: tuple[int, ...]) -> None:
        seen = [block for block, _, _ in self._records]
        if seen != list(range(self.num_blocks)):
            raise ModelError(f"its decoder calls them in the order {seen}, not once each")
        for block, _, hidden in self._records:
            if not isinstance(hidden, Tensor) or hidden.shape != shape:
                got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                raise ModelError(f"block {block} is given {got} where one hidden state is {shape}")

    def _require_independence(self) -> None:
        """Whatever blocks are given must not depend on the embeddings, which servers do not have."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((2, 3, self.hidden_size), generator=generator)
        plans = [self._plan(values, 2, 3, None) for values in (torch.zeros(1, 1, 1), noise)]
        for block in range(self.num_blocks):
            calm, noisy = (plan.calls[block] for plan in plans)
            if not _same((calm.args, dict(calm.kwargs)), (noisy.args, dict(noisy.kwargs))):
                raise self.refusal(f"block {block} is given something computed from the embeddings")

    def refusal(self, reason: str) -> ModelError:
        """The error for blocks that cannot be served one by one."""
        return ModelError(
            f"the blocks of {self._name} cannot be served one by one: {reason} "
            "(train it on this machine: leave initial_peers out)"
        )


def cache_layers(config: PretrainedConfig) -> list[Any]:
    """Transformers' own cache layer of each block."""
    return list(DynamicCache(config=config).layers)


class _Planned(Exception):
    """Ends a decoder's forward after the last block."""


def _hollow_out(skeleton: Skeleton, device: torch.device) -> None:
    """Leaves nothing with weights in the decoder but its blocks, and moves its buffers."""
    decoder = skeleton.decoder
    for path, module in list(decoder.named_modules()):
        full_path = f"{skeleton.decoder_path}.{path}" if skeleton.decoder_path else path
        if not path or full_path.startswith(f"{skeleton.blocks_path}."):
            continue
        if any(True for _ in module.parameters(recurse=False)):
            stub = _ZeroEmbedding(module, device) if isinstance(module, nn.Embedding) else _Through()
            decoder.set_submodule(path, stub)
    for name, buffer in list(decoder.named_buffers()):  # the rotary frequencies
        path, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(path), leaf, buffer.to(device))


class _ZeroEmbedding(nn.Module):
    def __init__(self, embedding: nn.Embedding, device: torch.device):
        super().__init__()
        weight = embedding.weight
        self.register_buffer("zero", torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=device))

    @property
    def weight(self) -> Tensor:
        raise ModelError("its decoder reads the embeddings' matrix, which servers do not have")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.get_buffer("zero")  # OPT looks positions up with a mask, which is longer than the chunk


class _Through(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return True
