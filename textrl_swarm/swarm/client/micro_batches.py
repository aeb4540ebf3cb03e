"""How the rows of a forward or backward are cut into micro-batches, and put together again.

Knows nothing about servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_swarm.decoders.sharing import PackedRows, SharedPrefix
from textrl_swarm.swarm.protocol import MAX_UNPACKED, micro_batch_tokens


@dataclass(frozen=True)
class MicroBatch:
    """Some rows that travel together."""

    rows: Tensor
    """(b,) int64: which they are."""

    packed: PackedRows | None = None
    """How they lie in what travels, where they share prefixes."""

    def inputs(self, whole: Tensor) -> Tensor:
        """What travels of (B, S, W) inputs."""
        own = whole[self.rows]
        return own if self.packed is None else self.packed.pack(own)

    def grad_outputs(self, whole: Tensor) -> Tensor:
        """What travels of the gradient (B, S, W) of outputs."""
        own = whole[self.rows]
        return own if self.packed is None else self.packed.pack_gradient(own)

    def outputs(self, found: Tensor) -> Tensor:
        """(b, S, W) of what came back."""
        return found if self.packed is None else self.packed.unpack(found)

    def grad_inputs(self, found: Tensor) -> Tensor:
        """(b, S, W) of what came back."""
        return found if self.packed is None else self.packed.unpack_gradient(found)


def cut(rows: int, length: int, max_tokens: int, shared: SharedPrefix | None) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` tokens, or one row.

    The cut depends on the tokens alone: a sum of gradients is the same to the bit wherever the blocks are.

    Args:
        rows, length: B, S.
    """
    if shared is None:
        most = micro_batch_tokens(rows * length, max_tokens) // length
        return [MicroBatch(part) for part in torch.arange(rows).split(max(1, most))]
    return [MicroBatch(part, shared.packed(part)) for part in _groups(rows, length, max_tokens, shared)]


def _groups(rows: int, length: int, max_tokens: int, shared: SharedPrefix) -> Iterator[Tensor]:
    """Rows with the same prefix together, as far as they fit."""
    rest = length - shared.length
    most = micro_batch_tokens(len(shared.rows) * shared.length + rows * rest, max_tokens, shared.length)
    most_rows = max(1, MAX_UNPACKED * max_tokens // length)
    group: list[int] = []
    tokens = 0
    for together in shared.order().split(torch.bincount(shared.index).tolist()):
        more = shared.length
        if group and (tokens + more + len(together) * rest > most or len(group) + len(together) > most_rows):
            yield torch.tensor(group)
            group, tokens = [], 0
        for row in together.tolist():
            if group and (tokens + more + rest > most or len(group) == most_rows):
                yield torch.tensor(group)
                group, tokens, more = [], 0, shared.length
            group.append(row)
            tokens, more = tokens + more + rest, 0
    yield torch.tensor(group)


def put_together(batches: Sequence[MicroBatch], parts: Sequence[Tensor]) -> Tensor:
    """(B, S, W) of all rows for (b, S, W) of each micro-batch."""
    rows = torch.cat([batch.rows for batch in batches])
    return torch.cat(list(parts))[rows.argsort()]
