"""Spans of blocks: the even split, and how messages print blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textrl_swarm.errors import ConfigError
from textrl_swarm.models.blocks import blocks_text, spans_of, split_evenly


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ((), ""),
        ((0,), "block 0"),
        ((0, 1), "blocks 0..1"),
        ((0, 1, 2, 3, 7), "blocks 0..3, 7"),
        ((2, 4, 5), "blocks 2, 4..5"),
        ((7, 3, 3), "blocks 3, 7"),
    ],
)
def test_listed_blocks(blocks, expected):
    assert blocks_text(blocks) == expected


@given(st.sets(st.integers(0, 60)))
def test_spans_cover_the_blocks_and_no_others(blocks):
    spans = spans_of(blocks)
    assert {block for start, stop in spans for block in range(start, stop)} == blocks
    assert all(first[1] < second[0] for first, second in itertools.pairwise(spans)), "spans do not touch"


@given(st.integers(1, 100), st.data())
def test_an_even_split_covers_every_block_once_with_sizes_that_differ_by_at_most_one(num_blocks, data):
    spans = split_evenly(num_blocks, data.draw(st.integers(1, num_blocks)))
    assert [block for start, stop in spans for block in range(start, stop)] == list(range(num_blocks))
    sizes = {stop - start for start, stop in spans}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("servers", [0, 5])
def test_a_split_that_leaves_a_server_without_blocks_is_refused(servers):
    with pytest.raises(ConfigError, match=f"4 blocks can be split over 1 to 4 servers, not {servers}"):
        split_evenly(4, servers)
