"""One micro-batch on its way back through a chain of servers: what is left to do, and to do once more."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch import Tensor

from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.swarm.client.routing import Span


@dataclass
class Piece:
    """What one server computed, and has to go back through."""

    span: Span

    inputs: Tensor | None
    """(b, S, W) of its first block; None = the server before handed them over, and they are kept there."""

    kept: str | None = None
    """Name under which the server keeps the inputs; None = it does not."""

    grad: Tensor | None = None
    """(b, S, W) with respect to the output of its last block, once it is known."""


Trail = list[Piece]  # which server computed which blocks from which input, in their order


class MicroBatchBackward:
    """One micro-batch on its way back through the chain.

    Args:
        grad: with respect to its output.
        trail: of its forward.
        packed: how rows lie in all of these tensors.

    Attributes:
        start: its first block.
        inputs: (b, S, W) of that block.
    """

    def __init__(self, grad: Tensor, trail: Trail, packed: PackedRows | None = None):
        assert trail[0].inputs is not None, "the client had them"
        self.start, self.inputs = trail[0].span.start, trail[0].inputs
        self.packed = packed
        self.left = [replace(piece) for piece in trail]
        self.left[-1].grad = grad
        self.finished: list[Piece] = []  # from the last to the first

    def needs_input_grad(self, of_the_first: bool) -> bool:
        """Whether somebody waits for the gradient of the last piece's inputs."""
        return self.left[-2].grad is None if len(self.left) > 1 else of_the_first

    def finish_last(self, grad_input: Tensor | None) -> None:
        """Hands the gradient of the last piece's inputs to the piece before."""
        self.left[-1].kept = None  # once used, the server forgets them
        self.finished.append(self.left.pop())
        if self.left and self.left[-1].grad is None:
            self.left[-1].grad = grad_input

    def replace_last(self, trail: Trail) -> None:
        """The last piece's blocks are other servers' now."""
        grad = self.left.pop().grad
        self.left += trail
        self.left[-1].grad = grad

    def again(self, blocks: set[int]) -> MicroBatchBackward:
        """The same way back for the pieces that hold some of these blocks."""
        again = copy.copy(self)
        again.finished = []
        again.left = []
        for piece in reversed(self.finished):
            if not blocks.isdisjoint(range(piece.span.start, piece.span.stop)):
                again.left.append(piece)
        return again
