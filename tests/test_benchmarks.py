"""The task of benchmarks/random_walks.py: its graph, and what a path in it is worth."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def random_walks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("random_walks", BENCHMARKS / "random_walks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task(random_walks):
    return random_walks.Task()


EOS, PAD = 21, 22


# The graph has 6 -> 1 -> 0, 6 -> 16 -> 10 -> 0, and the way round 10 -> 17 -> 12 -> 7 -> 13 -> 1 with the
# detour 17 -> 15 -> 12. It has no 1 -> 10.
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ([1, 0, EOS], 1.0),
        ([1, 0], 1.0),
        ([6, 1, 0, EOS], 1.0),
        ([6, 16, 10, 0, EOS], 6 / 7),  # one node more than the shortest path of three
        ([10, 17, 12, 7, 13, 1, 0, EOS], 3 / 8),  # seven nodes instead of two
        ([6, 16, 10, 17, 12, 7, 13, 1, 0, EOS], 1 / 7),  # nine
        ([16, 10, 17, 15, 12, 7, 13, 1, 0], 1 / 7),  # nine, where the shortest is 16 -> 10 -> 0
        # Ten nodes are the most: the goal is reached, and worth nothing.
        ([6, 16, 10, 17, 15, 12, 7, 13, 1, 0], 0.0),
        ([10, 17, 12, 7, 13, 1, EOS], 0.0),  # misses the goal
        ([6, 16, 10, 17, 15, 12, 7, 13, 1, 13], 0.0),
        ([10, EOS, 0], 0.0),  # ended before the goal
        ([1, 10, 0, EOS], 0.0),  # no such edge
        ([1, PAD, 0, EOS], 0.0),  # no such node
        ([1, 1, 0, EOS], 0.0),  # standing still is no edge
        ([1, 0, 5, 5, 5], 1.0),  # the goal absorbs: what is said after it does not count
    ],
)
def test_what_a_path_is_worth(task, path, expected):
    assert task.score(path) == pytest.approx(expected)


def test_the_graph_is_the_public_one(task):
    assert [np.flatnonzero(task.edges[node]).tolist() for node in (0, 1, 6, 10, 17)] == [
        [0],
        [0],
        [1, 16],
        [0, 8, 17],
        [12, 15],
    ]
    assert task.shortest[1:] == [2, 3, 3, 5, 5, 3, 4, 4, 4, 2, 3, 5, 3, 4, 4, 3, 5, 4, 3, 2]
    assert len(task.walks) == 1000 and max(map(len, task.walks)) == 10
    assert all(task.edges[a, b] for walk in task.walks for a, b in pairwise(walk))
    assert {walk[0] for walk in task.walks} == set(range(1, 21))


def test_blocks_are_means_over_ten_updates(random_walks):
    assert random_walks.blocks([1.0] * 10 + [0.5, 0.0]) == [1.0, 0.25]
