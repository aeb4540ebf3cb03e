"""Prompts that several rows begin with, computed once in forward and in backward.

The samples of one prompt share its tokens: 8 responses of 32 tokens to a prompt of 500 are 4256 tokens, or
756 and an attention cache that all 8 look at. Knows nothing about rollouts: it looks at the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from textrl_swarm.errors import ShapeError

WORTHWHILE = 0.8  # share of the tokens that is left to compute


@dataclass(frozen=True)
class SharedPrefix:
    """The first columns of B rows, of which U are distinct."""

    length: int
    """Columns."""

    rows: Tensor
    """(U,) int64: a row for each distinct prefix."""

    index: Tensor
    """(B,) int64: each row's place in `rows`."""

    def order(self) -> Tensor:
        """(B,) int64: rows such that those with the same prefix are neighbours."""
        return self.index.argsort(stable=True)

    def packed(self, rows: Tensor) -> PackedRows:
        """How some of the rows are packed."""
        _, index = self.index[rows].unique(return_inverse=True)
        return PackedRows(self.length, tuple(index.tolist()))


@dataclass(frozen=True)
class PackedRows:
    """How b rows of S tokens lie in one of n = U * length + b * (S - length): the distinct prefixes first,
    then what is behind the prefix of each row.
    """

    length: int
    """Tokens of a prefix."""

    index: tuple[int, ...]
    """(b,) which of the U prefixes a row begins with."""

    def encode(self) -> list[Any]:
        """As it travels."""
        return [self.length, list(self.index)]

    @staticmethod
    def decode(raw: Any, tokens: int) -> PackedRows:
        """Reads a stranger's numbers for so many tokens. Raises ShapeError."""
        try:
            length, index = raw
            packed = PackedRows(int(length), tuple(map(int, index)))
            count = len(set(packed.index))
            rest = tokens - count * packed.length
            fits = packed.length > 0 and rest > 0 and rest % len(packed.index) == 0
            fits = fits and set(packed.index) == set(range(count))
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise ShapeError(f"malformed rows that share prefixes: {error!r}") from error
        if not fits:
            raise ShapeError(f"{tokens} tokens are not {len(packed.index)} rows that share prefixes")
        return packed

    @property
    def prefixes(self) -> int:
        """U"""
        return max(self.index) + 1

    def unpacked(self, tokens: int) -> int:
        """b * S, for n tokens: what attention sees."""
        return len(self.index) * self.length + tokens - self.prefixes * self.length

    def _index(self, device: torch.device) -> Tensor:
        return torch.tensor(self.index, device=device)

    @property
    def _first(self) -> list[int]:
        """(U,) the first row of each prefix."""
        return [self.index.index(prefix) for prefix in range(self.prefixes)]

    def pack(self, rows: Tensor) -> Tensor:
        """(1, n, W) for (b, S, W)."""
        return self.join(rows[self._first, : self.length], rows[:, self.length :])

    def pack_gradient(self, grad: Tensor) -> Tensor:
        """(1, n, W) gradient of what `unpack` took, for (b, S, W) of what it gave."""
        shape = (self.prefixes, self.length, grad.shape[-1])
        sums = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
        sums.index_add_(0, self._index(grad.device), grad[:, : self.length])
        return self.join(sums, grad[:, self.length :])

    def unpack(self, packed: Tensor) -> Tensor:
        """(b, S, W) for (1, n, W)."""
        prefixes, rest = self.split(packed)
        return torch.cat([prefixes.index_select(0, self._index(packed.device)), rest], dim=1)

    def unpack_gradient(self, packed: Tensor) -> Tensor:
        """(b, S, W) gradient of what `pack` took, for (1, n, W) of what it gave (in a prefix's first row)."""
        prefixes, rest = self.split(packed)
        grad = packed.new_zeros(len(self.index), self.length, packed.shape[-1])
        grad[self._first] = prefixes
        return torch.cat([grad, rest], dim=1)

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """(U, length, W) prefixes and (b, S - length, W) of what is behind them."""
        tokens = self.prefixes * self.length
        first, rest = packed[0, :tokens], packed[0, tokens:]
        return first.unflatten(0, (self.prefixes, -1)), rest.unflatten(0, (len(self.index), -1))

    def join(self, prefixes: Tensor, rest: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([prefixes.flatten(0, 1), rest.flatten(0, 1)])[None]

    def reorder(self, layer: Any) -> None:
        """Gives each row its prefix's part of a layer of transformers' caches.

        By index_select, whose backward adds up in the same order every time.
        """
        layer.reorder_cache(torch.tensor(self.index))


def shared_prefix(tokens: Tensor) -> SharedPrefix | None:
    """The prefix for which fewest tokens are computed, U * length + B * (S - length) of the B * S.

    Args:
        tokens: (B, S) int64, or hidden states (B, S, W), where equal ones are found by their first numbers.

    Returns:
        None when more than 0.8 of the tokens would be left.
    """
    if tokens.ndim == 3:
        prefix = shared_prefix(tokens[..., 0].float().contiguous().view(torch.int32))
        same = prefix is not None and torch.equal(
            tokens[prefix.rows, : prefix.length][prefix.index], tokens[:, : prefix.length]
        )
        return prefix if same else None
    table = tokens.cpu().numpy()
    count, width = table.shape
    if count == 1 or width == 1:
        return None
    order = np.lexsort(table.T[::-1])
    ordered = table[order]
    differs = ordered[1:] != ordered[:-1]
    # Columns that each row has in common with the one before.
    common = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
    lengths = np.arange(1, width)
    distinct = 1 + (common < lengths[:, None]).sum(axis=1)
    left = distinct * lengths + count * (width - lengths)
    best = int(left.argmin())
    if left[best] > WORTHWHILE * count * width:
        return None
    begins = np.concatenate([[True], common < lengths[best]])
    index = np.empty(count, dtype=np.int64)
    index[order] = begins.cumsum() - 1
    device = tokens.device
    rows = torch.from_numpy(order[begins]).to(device)
    return SharedPrefix(int(lengths[best]), rows, torch.from_numpy(index).to(device))


def run_shared(
    run: Callable[..., Tensor], config: Any, inputs: Tensor, prefix: SharedPrefix, skipped: int = 0
) -> Tensor:
    """(B, S, H) last hidden states, differentiable.

    Args:
        run: inputs and options of the decoder's forward -> last hidden states.
        config: of the decoder.
        inputs: (B, S) tokens or (B, S, H) hidden states.
        skipped: blocks from the first on that `run` does not run; what looks at their caches finds zeros.
    """
    cache = DynamicCache(config=config)
    options = {"past_key_values": cache, "use_cache": True}
    order = prefix.order()  # as a swarm computes them: gradients are sums over rows
    index = prefix.index[order]
    first = run(inputs[prefix.rows, : prefix.length], **options)
    cache.reorder_cache(index)  # by index_select, whose backward adds up in the same order every time
    for layer in cache.layers[:skipped]:
        if isinstance(layer, DynamicLayer):
            zeros = first.new_zeros(len(index), 1, prefix.length, 1)
            layer.update(zeros, zeros)
    rest = run(inputs[order, prefix.length :], **options)
    return torch.cat([first.index_select(0, index), rest], dim=1).index_select(0, order.argsort())
