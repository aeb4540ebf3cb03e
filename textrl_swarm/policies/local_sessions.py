"""Decoding sessions of a model on this machine: with caches in place where that works, with the model's own
cache or without one elsewhere.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from textrl_swarm.decoders.caches import CacheSpec, copy_rows, fresh, keep_rows
from textrl_swarm.decoders.chunks import Chunk, Step, mask_of, positions_of
from textrl_swarm.decoders.planner import cache_layers
from textrl_swarm.policies.sessions import DecodingSession, Pending

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]  # the decoder with the adapter applied: (tokens, **options) -> its output


class LocalSession(DecodingSession):
    """Runs a step when it is asked for."""

    def run(self, steps: Sequence[Step]) -> Pending[list[Tensor]]:
        """See DecodingSession."""
        outputs = []
        with torch.no_grad():
            for step in steps:
                hidden = self._run(step.inputs, step.chunk)
                outputs.append(hidden[:, -1:] if step.last_only else hidden)
        return Pending.done(outputs)

    def _run(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        raise NotImplementedError


# ------------------------------------------------------------------------------------ caches in place


@dataclass(frozen=True)
class _BlockCache:
    """What one block of the model keeps."""

    spec: CacheSpec
    dtype: torch.dtype
    device: torch.device


class CacheBlueprint:
    """What the blocks of a model keep, found by running it on one token and on two.

    Args:
        config: of the decoder.
        forward: see Forward.
        takes: names that the decoder's forward knows.
        tokens: (1, n >= 2) int64.

    Raises:
        Exception: whatever models raise that keep something else than transformers' own cache layers.
    """

    def __init__(self, config: Any, forward: Forward, takes: Sequence[str], tokens: Tensor):
        self.forward = forward
        self._argument = "cache_params" if "cache_params" in takes else "past_key_values"
        self._takes_positions = "position_ids" in takes
        templates = cache_layers(config)
        seen = []
        for length in (1, 2):
            layers = [fresh(template) for template in templates]
            forward(tokens[:, :length], **self._options(Cache(layers=layers)))
            seen.append(layers)
        self.blocks = []
        for template, one, two in zip(templates, *seen, strict=True):
            spec = CacheSpec.of(template, one, two)
            example = getattr(one, "keys", None)
            self.blocks.append(_BlockCache(spec, *_kind_of(example, one, tokens.device)))

    def _options(self, cache: Cache) -> dict[str, Any]:
        return {self._argument: cache, "use_cache": True}

    def options(self, cache: Cache, chunk: Chunk, tokens: Tensor) -> dict[str, Any]:
        """What the decoder's forward takes beside the tokens of a chunk."""
        options = self._options(cache)
        length = tokens.shape[1]
        if chunk.padding:
            options["attention_mask"] = mask_of(chunk.padding, chunk.past + length, tokens.device)
        if self._takes_positions:
            options["position_ids"] = positions_of(chunk.padding or (0,), chunk.past, length, tokens.device)
        return options


class InPlaceSession(LocalSession):
    """Keeps caches of a fixed size and writes into them: transformers' own copy the whole past for every
    token.
    """

    def __init__(self, blueprint: CacheBlueprint, rows: int, max_length: int):
        self._blueprint = blueprint
        self._caches: list[list[Tensor]] = []
        for block in blueprint.blocks:
            shapes = block.spec.tensors(rows, max_length, block.dtype)
            self._caches.append([torch.empty(s, dtype=dtype, device=block.device) for s, dtype in shapes])

    def _run(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        if chunk.keep:
            for tensors in self._caches:
                keep_rows(tensors, chunk.keep)
        layers = []
        for block, tensors in zip(self._blueprint.blocks, self._caches, strict=True):
            layers.append(block.spec.layer(block.spec.part(tensors, chunk, len(tokens)), chunk.past))
        options = self._blueprint.options(Cache(layers=layers), chunk, tokens)
        hidden = self._blueprint.forward(tokens, **options).last_hidden_state
        for tensors in self._caches:
            copy_rows(tensors, chunk, len(tokens))
        return hidden


def _kind_of(example: Tensor | None, layer: Any, device: torch.device) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of keys and values; of a block without them, of nothing in particular."""
    if example is not None:
        return example.dtype, example.device
    return torch.float32, getattr(layer, "device", None) or device


# ----------------------------------------------------------------------------------- the model's own


class CachedSession(LocalSession):
    """Keeps the model's own kind of cache, of rows of equal length.

    Args:
        passes_positions: give the decoder position_ids: some models do not count what the cache holds.
    """

    def __init__(self, forward: Forward, passes_positions: bool, rows: int, max_length: int):
        self._forward = forward
        self._passes_positions = passes_positions
        self._cache: Any = None

    def _run(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        if chunk.keep:
            self._cache.batch_select_indices(torch.tensor(chunk.keep, device=tokens.device))
        options = {}
        if self._passes_positions:
            options["position_ids"] = positions_of((0,), chunk.past, tokens.shape[1], tokens.device)
        output = self._forward(tokens, past_key_values=self._cache, use_cache=True, **options)
        self._cache = output.past_key_values
        return output.last_hidden_state


class RecomputingSession(LocalSession):
    """Computes the whole sequences anew for every token, for models without a cache that works."""

    def __init__(self, forward: Forward, rows: int, max_length: int):
        self._forward = forward
        self._tokens: Tensor | None = None

    def _run(self, tokens: Tensor, chunk: Chunk) -> Tensor:
        before = self._tokens
        if before is not None:
            before = before[list(chunk.keep)] if chunk.keep else before
            self._tokens = torch.cat([before, tokens], dim=1)
        else:
            self._tokens = tokens
        output = self._forward(self._tokens, use_cache=False)
        return output.last_hidden_state[:, -tokens.shape[1] :]


# ------------------------------------------------------------------------------------------- the choice

NewSession = Callable[[int, int], DecodingSession]  # rows, tokens in each -> a session


@dataclass(frozen=True)
class Sessions:
    """How a model generates."""

    new: NewSession

    takes_padding: bool
    """Whether rows of unequal length may share a session."""


def choose_session(
    decoder: nn.Module,
    config: Any,
    forward: Forward,
    tokens: Tensor,
    hidden: Tensor,
    tolerance: float,
    model_name: str,
) -> Sessions:
    """The fastest kind of session that finds `hidden`, the last hidden states of `tokens`.

    Each kind is tried with all tokens but the last at once, and then the last alone.

    Args:
        decoder: whose signature says what it takes.
        config: of the decoder.
        tokens: (1, n) int64.
        tolerance: as `is_close`.
        model_name: for the warning that the model cannot use a cache.
    """
    reason = "its forward takes no past_key_values"
    for new in _candidates(decoder, config, forward, tokens):
        if isinstance(new, Exception):
            reason = repr(new)
            continue
        try:
            found = _last_states(new(1, tokens.shape[1]), tokens)
        except Exception as error:  # models raise anything at a cache or positions they do not expect
            reason = repr(error)
            continue
        if is_close(found, hidden[:, -1:], tolerance):
            return Sessions(new, _takes_padding(new, tokens, hidden, tolerance))
        reason = "with a cache the model computes something else"
    logger.warning(
        "%s cannot be used with an attention cache (%s): generation computes the whole sequence anew for "
        "every token, which is slow",
        model_name,
        reason,
    )
    return Sessions(partial(RecomputingSession, forward), takes_padding=False)


def _candidates(
    decoder: nn.Module, config: Any, forward: Forward, tokens: Tensor
) -> Iterator[NewSession | Exception]:
    takes = list(inspect.signature(decoder.forward).parameters)
    if "past_key_values" in takes or "cache_params" in takes:
        try:
            with torch.no_grad():
                yield partial(InPlaceSession, CacheBlueprint(config, forward, takes, tokens))
        except Exception as error:  # as above
            yield error
    if "past_key_values" in takes:
        # without positions too: RoBERTa's begin elsewhere, for example
        for passes_positions in (True, False) if "position_ids" in takes else (False,):
            yield partial(CachedSession, forward, passes_positions)


def _last_states(session: DecodingSession, tokens: Tensor) -> Tensor:
    session.step(tokens[:, :-1])
    return session.step(tokens[:, -1:])


def _takes_padding(new: NewSession, tokens: Tensor, hidden: Tensor, tolerance: float) -> bool:
    """Whether a second row, which has only the first and the second token, comes out as the first one did."""
    last = tokens.shape[1] - 1
    padding = (0, last - 1)
    rows = torch.stack([tokens[0, :last], tokens[0, :1].expand(last)])
    try:
        session = new(2, last + 1)
        session.run([Step(rows, Chunk(0, padding=padding))]).result()
        token = torch.stack([tokens[0, -1:], tokens[0, 1:2]])
        (found,) = session.run([Step(token, Chunk(last, padding=padding))]).result()
    except Exception:  # as above
        return False
    return is_close(found[0], hidden[0, -1:], tolerance) and is_close(found[1], hidden[0, 1:2], tolerance)


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether no number differs by more than `tolerance` times the largest expected one."""
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())
