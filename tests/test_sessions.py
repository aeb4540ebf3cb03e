"""Where rows and columns of a session's caches are, and which numbers a server refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_swarm.decoders.chunks import Chunk, mask_of, positions_of
from textrl_swarm.errors import ShapeError
from textrl_swarm.policies.sessions import RowLayout

EMPTY = -1


class Caches:
    """Tokens in the place of keys and values."""

    def __init__(self, rows: int, columns: int):
        self.grid = torch.full((rows, columns), EMPTY)

    def write(self, tokens: torch.Tensor, chunk: Chunk) -> None:
        rows, length = tokens.shape
        chunk.require_fit(rows, length, len(self.grid), self.grid.shape[1])
        if chunk.keep:
            self.grid = self.grid[list(chunk.keep)]
        padding = chunk.padding or (0,) * rows
        for row, empty in enumerate(padding):
            for copy in range(chunk.copies):
                place = self.grid[chunk.first + row * chunk.copies + copy, chunk.start :]
                for column in range(max(chunk.past, empty), chunk.past + length):
                    assert place[column] == EMPTY
                    place[column] = tokens[row, column - chunk.past]


prompt_lists = st.lists(st.integers(1, 60), min_size=1, max_size=12).flatmap(
    lambda lengths: st.lists(
        st.sampled_from([[length] * length for length in lengths]), min_size=1, max_size=12
    )
)


@settings(max_examples=200, deadline=None)
@given(prompts=prompt_lists, max_tokens=st.sampled_from([None, 20, 100]), data=st.data())
def test_every_row_gets_its_prompt_and_then_its_tokens(prompts, max_tokens, data):
    prompts = [torch.tensor(prompt) for prompt in sorted(prompts, key=len)]
    layout = RowLayout(prompts, max_tokens=max_tokens, takes_padding=True)
    caches = Caches(len(prompts), len(prompts[-1]) + 3)
    computed = 0
    for step in layout.prompt_steps():
        caches.write(step.inputs, step.chunk)
        rows, length = step.inputs.shape
        computed += rows * length
        assert step.last_only and (max_tokens is None or rows * length <= max_tokens or rows == 1)
    distinct = {len(prompt): prompt for prompt in prompts}
    real = sum(map(len, distinct.values()))
    assert real <= computed <= 1.25 * real + 64 * len(distinct)
    live = list(range(len(prompts)))
    for token in range(3):
        live = data.draw(st.lists(st.sampled_from(live), unique=True, min_size=1).map(sorted))
        caches.write(torch.full((len(live), 1), 100 + token), layout.next_chunk(live))
    assert len(caches.grid) == len(live)
    for row, found in zip(live, caches.grid, strict=True):
        expected = [*prompts[row].tolist(), 100, 101, 102]
        assert found.tolist() == [EMPTY] * (len(found) - len(expected)) + expected


def test_equal_prompts_are_computed_once():
    prompts = [torch.tensor([5, 6])] * 4 + [torch.tensor([7, 8, 9])] * 4
    (step,) = RowLayout(prompts, max_tokens=None, takes_padding=True).prompt_steps()
    assert step.inputs.tolist() == [[0, 5, 6], [7, 8, 9]] and step.chunk.copies == 4


def test_without_padding_there_is_one_step_of_all_rows():
    layout = RowLayout([torch.tensor([5, 6])] * 3, max_tokens=4, takes_padding=False)
    (step,) = layout.prompt_steps()
    assert step.inputs.shape == (3, 2) and step.chunk == Chunk(0)
    assert layout.next_chunk([0, 2]) == Chunk(2, keep=(0, 2))


def test_masks_and_positions():
    assert mask_of((0, 2), 4, torch.device("cpu")).tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert positions_of((0, 2), 2, 2, torch.device("cpu")).tolist() == [[2, 3], [0, 1]]
    assert positions_of((0, 2), 0, 3, torch.device("cpu")).tolist() == [[0, 1, 2], [0, 0, 0]]


GOOD = Chunk(past=2, first=1, copies=2, start=3, width=8, padding=(0, 1), keep=())


def test_what_fits_fits():
    GOOD.require_fit(2, 3, live_rows=5, max_length=8)
    replace(GOOD, keep=(0, 1, 2, 4, 5)).require_fit(2, 3, live_rows=6, max_length=8)
    assert Chunk.decode(GOOD.encode()) == GOOD


@pytest.mark.parametrize(
    "changes",
    [
        {"past": 3},
        {"first": 2},
        {"copies": 3},
        {"start": 4},
        {"width": 9},
        {"width": 7},
        {"padding": (0,)},
        {"padding": (0, 5)},
        {"keep": (0, 1, 2, 3)},
        {"keep": (0, 2, 1, 3, 4)},
        {"keep": (0, 1, 1, 3, 4)},
        {"keep": (0, 1, 2, 3, 5)},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes):
    with pytest.raises(ShapeError, match="do not fit"):
        replace(GOOD, **changes).require_fit(2, 3, live_rows=5, max_length=8)


@pytest.mark.parametrize(
    "changes",
    [
        {"past": -1},
        {"copies": 0},
        {"padding": [-1, 0]},
        {"keep": [-1, 0]},
        {"past": "x"},
        {"keep": 3},
        {"start": None},
        {"width": float("inf")},
    ],
    ids=str,
)
def test_strange_numbers_are_refused(changes):
    with pytest.raises(ShapeError):
        Chunk.decode({**GOOD.encode(), **changes})
    with pytest.raises(ShapeError):
        Chunk.decode({"past": 3})
