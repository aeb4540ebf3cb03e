"""Decoding sessions of a model on this machine: with the model's own cache where that works, without one
elsewhere.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from textrl_swarm.policies.generation import DecodingSession

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]  # the decoder with the adapter applied: (tokens, **options) -> its output


class CachedSession:
    """Keeps the model's own kind of cache.

    Args:
        passes_positions: give the decoder position_ids: some models do not count what the cache holds.
    """

    def __init__(self, forward: Forward, passes_positions: bool):
        self._forward = forward
        self._passes_positions = passes_positions
        self._cache: Any = None
        self._seen = 0

    def step(self, tokens: Tensor) -> Tensor:
        """See DecodingSession."""
        start = self._seen
        self._seen += tokens.shape[1]
        options = {}
        if self._passes_positions:
            options["position_ids"] = torch.arange(start, self._seen, device=tokens.device)[None]
        with torch.no_grad():
            output = self._forward(tokens, past_key_values=self._cache, use_cache=True, **options)
        self._cache = output.past_key_values
        return output.last_hidden_state


class RecomputingSession:
    """Computes the whole sequence anew for every token, for models without a cache that works."""

    def __init__(self, forward: Forward):
        self._forward = forward
        self._tokens: Tensor | None = None

    def step(self, tokens: Tensor) -> Tensor:
        """See DecodingSession."""
        self._tokens = tokens if self._tokens is None else torch.cat([self._tokens, tokens], dim=1)
        with torch.no_grad():
            output = self._forward(self._tokens, use_cache=False)
        return output.last_hidden_state[:, -tokens.shape[1] :]


def choose_session(
    decoder: nn.Module, forward: Forward, tokens: Tensor, hidden: Tensor, tolerance: float, model_name: str
) -> Callable[[], DecodingSession]:
    """The fastest kind of session that finds `hidden`, the last hidden states of `tokens`.

    Each kind is tried with all tokens but the last at once, and then the last alone.

    Args:
        decoder: whose signature says what it takes.
        tolerance: as `is_close`.
        model_name: for the warning that the model cannot use a cache.
    """
    takes = inspect.signature(decoder.forward).parameters
    reason = "its forward takes no past_key_values"
    if "past_key_values" in takes:
        # without positions too: RoBERTa's begin elsewhere, for example
        for passes_positions in (True, False) if "position_ids" in takes else (False,):
            try:
                session = CachedSession(forward, passes_positions)
                session.step(tokens[:, :-1])
                last = session.step(tokens[:, -1:])
            except Exception as error:  # models raise anything at a cache or positions they do not expect
                reason = repr(error)
                continue
            if is_close(last, hidden[:, -1:], tolerance):
                return partial(CachedSession, forward, passes_positions)
            reason = "with a cache the model computes something else"
    logger.warning(
        "%s cannot be used with an attention cache (%s): generation computes the whole sequence anew for "
        "every token, which is slow",
        model_name,
        reason,
    )
    return partial(RecomputingSession, forward)


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether no number differs by more than `tolerance` times the largest expected one."""
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())
