"""Spans of blocks, half-open (start, stop): the even split over servers, and how spans are printed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from textrl_swarm.errors import ConfigError

BlockSpan = tuple[int, int]


def split_evenly(num_blocks: int, num_servers: int) -> list[BlockSpan]:
    """One span per server, with sizes that differ by at most one. Raises ConfigError for impossible
    numbers.
    """
    if not 1 <= num_servers <= num_blocks:
        raise ConfigError(
            f"{num_blocks} blocks can be split over 1 to {num_blocks} servers, not {num_servers}"
        )
    edges = [round(i * num_blocks / num_servers) for i in range(num_servers + 1)]
    return list(itertools.pairwise(edges))


def inner_blocks(num_blocks: int, local_blocks: tuple[int, int]) -> range:
    """The blocks that are left to a swarm. Raises ConfigError when none are.

    Args:
        local_blocks: how many of the first, and of the last, a client computes itself.
    """
    first, last = local_blocks
    if first + last >= num_blocks:
        raise ConfigError(
            f"local_blocks=[{first}, {last}] leaves nothing to the swarm: the model has {num_blocks} blocks; "
            "keep fewer, or leave the swarm out"
        )
    return range(first, num_blocks - last)


def spans_of(blocks: Iterable[int]) -> list[BlockSpan]:
    """The spans that cover these blocks and no others, e.g. [(0, 4), (7, 8)] for 0, 1, 2, 3, 7."""
    spans: list[BlockSpan] = []
    for block in sorted(set(blocks)):
        if spans and spans[-1][1] == block:
            spans[-1] = (spans[-1][0], block + 1)
        else:
            spans.append((block, block + 1))
    return spans


def blocks_text(blocks: Iterable[int]) -> str:
    """For messages: "block 7", "blocks 0..3, 7"; empty for no blocks."""
    spans = spans_of(blocks)
    if not spans:
        return ""
    listed = ", ".join(str(start) if stop - start == 1 else f"{start}..{stop - 1}" for start, stop in spans)
    is_single = len(spans) == 1 and spans[0][1] - spans[0][0] == 1
    return f"block {listed}" if is_single else f"blocks {listed}"
