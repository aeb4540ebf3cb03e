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

_WORTHWHILE = 0.8  # share of the tokens that is left to compute


@dataclass(frozen=True)
class SharedPrefix:
    """The first columns of B rows, of which U are distinct."""

    length: int
    """Columns."""

    rows: Tensor
    """(U,) int64: a row for each distinct prefix."""

    index: Tensor
    """(B,) int64: each row's place in `rows`."""


def shared_prefix(tokens: Tensor) -> SharedPrefix | None:
    """The prefix for which fewest tokens are computed, U * length + B * (S - length) of the B * S.

    Args:
        tokens: (B, S) int64.

    Returns:
        None when more than 0.8 of the tokens would be left.
    """
    table = tokens.cpu().numpy()
    count, width = table.shape
    if count == 1 or width == 1:
        return None
    order = np.lexsort(table.T[::-1])
    ordered = table[order]
    differs = ordered[1:] != ordered[:-1]
    common = np.where(
        differs.any(axis=1), differs.argmax(axis=1), width
    )  # columns shared with the row before
    lengths = np.arange(1, width)
    distinct = 1 + (common < lengths[:, None]).sum(axis=1)
    left = distinct * lengths + count * (width - lengths)
    best = int(left.argmin())
    if left[best] > _WORTHWHILE * count * width:
        return None
    begins = np.concatenate([[True], common < lengths[best]])
    index = np.empty(count, dtype=np.int64)
    index[order] = begins.cumsum() - 1
    device = tokens.device
    rows = torch.from_numpy(order[begins]).to(device)
    return SharedPrefix(int(lengths[best]), rows, torch.from_numpy(index).to(device))


def run_shared(forward: Callable[..., Any], config: Any, tokens: Tensor, prefix: SharedPrefix) -> Tensor:
    """(B, S, H) last hidden states, differentiable.

    Args:
        forward: the decoder's.
        config: of the decoder.
    """
    cache = DynamicCache(config=config)
    options = {"past_key_values": cache, "use_cache": True}
    first = forward(tokens[prefix.rows, : prefix.length], **options).last_hidden_state
    cache.reorder_cache(prefix.index)  # by index_select, whose backward adds up in the same order every time
    rest = forward(tokens[:, prefix.length :], **options).last_hidden_state
    return torch.cat([first.index_select(0, prefix.index), rest], dim=1)
