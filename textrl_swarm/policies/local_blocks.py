"""The blocks of a model on this machine, entered at the first adapted one, and computed again in backward.

Knows nothing about adapters; transformers' own decoder makes masks and positions in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from textrl_swarm.errors import ModelError


class LocalBlocks:
    """Takes the place of the blocks' `forward` until `restore`.

    Args:
        blocks: all blocks, in the model's order.
        first: the first one that is trained.
        recompute: keep only the inputs of trained blocks for backward, which runs each block once more.

    Source: Chen et al. 2016, arXiv 1604.06174 (recomputing in backward).
    """

    def __init__(self, blocks: nn.ModuleList, first: int, *, recompute: bool):
        self._blocks = blocks
        self._first = first
        self._recompute = recompute
        self._is_recording = False
        self._given: Tensor | None = None
        self._are_tuples: dict[int, int] = {}
        """Block below the first trained one -> entries of the tuple that it returns; 0 = a tensor."""
        self._own = [vars(block).get("forward") for block in blocks]  # accelerate sets one
        for index, block in enumerate(blocks):
            block.forward = partial(self._forward, index, block.forward)

    def restore(self) -> None:
        """Gives the blocks their own `forward` back."""
        for block, own in zip(self._blocks, self._own, strict=True):
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own

    def below(self, run: Callable[[], object]) -> Tensor:
        """(B, S, H) input of the first trained block in a run of the decoder, which ends there."""
        self._is_recording = True
        try:
            run()
        except _Reached as reached:
            return reached.hidden
        finally:
            self._is_recording = False
        raise ModelError(f"block {self._first} was not run")

    @contextmanager
    def entered(self, hidden: Tensor) -> Iterator[None]:
        """Inside, a run of the decoder skips the blocks below the first trained one, which gets `hidden`."""
        self._given = hidden
        try:
            yield
        finally:
            self._given = None

    def _forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index < self._first:
            if self._given is not None:
                return self._unchanged(index)
            output = forward(*args, **kwargs)
            self._are_tuples[index] = len(output) if isinstance(output, tuple) else 0
            return output
        if index == self._first:
            if self._is_recording:
                raise _Reached(args[0] if args else kwargs["hidden_states"])
            if self._given is not None and args:
                args = (self._given, *args[1:])
            elif self._given is not None:
                kwargs["hidden_states"] = self._given
        if self._recompute and is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    def _unchanged(self, index: int) -> Any:
        entries = self._are_tuples[index]
        return (self._given, *[None] * (entries - 1)) if entries else self._given


class _Reached(Exception):
    """Ends a run at the first trained block."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden
