"""Gradients of adapters, summed over the micro-batches of one backward before they travel.

Micro-batches arrive in any order and perhaps twice; the sum is always taken in their own order, each once, so
that it is the same to the bit. Lives in the compute process. Knows nothing about blocks or adapters.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class _Sum:
    count: int
    next: int = 0  # index of the micro-batch that is to be added
    total: Tensor | None = None
    early: dict[int, Tensor] = field(default_factory=dict)  # those that came before their turn

    @property
    def nbytes(self) -> int:
        tensors = [*self.early.values(), *([] if self.total is None else [self.total])]
        return sum(tensor.nbytes for tensor in tensors)


class GradientSums:
    """Unfinished sums, and finished ones for clients that did not get the answer.

    Args:
        max_bytes: of all of them; those that were used least recently go first.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._sums: OrderedDict[tuple[str, int], _Sum] = OrderedDict()

    def add(self, name: tuple[str, int], index: int, count: int, gradient: Tensor) -> Tensor | None:
        """Adds micro-batch `index` of `count` once; returns the sum when it is complete."""
        found = self._sums.setdefault(name, _Sum(count))
        self._sums.move_to_end(name)
        if index >= found.next:
            found.early[index] = gradient
        while found.next in found.early:
            following = found.early.pop(found.next)
            found.total = following if found.total is None else found.total + following
            found.next += 1
        self._make_room()
        return found.total if found.next == found.count else None

    def _make_room(self) -> None:
        total = sum(one.nbytes for one in self._sums.values())
        while total > self._max_bytes and len(self._sums) > 1:
            _, oldest = self._sums.popitem(last=False)
            total -= oldest.nbytes
