"""Sums over micro-batches that arrive in any order, and more than once."""

from __future__ import annotations

import itertools

import pytest
import torch

from textrl_swarm.swarm.server.gradient_sums import GradientSums

GRADIENTS = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 1e-8]), torch.tensor([-1e8, 3.0])]
IN_ORDER = GRADIENTS[0] + GRADIENTS[1] + GRADIENTS[2]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_order_of_arrival_changes_no_bit(order):
    sums = GradientSums(1000)
    answers = [sums.add(("a", 0), i, 3, GRADIENTS[i]) for i in order]
    assert answers[:2] == [None, None] and torch.equal(answers[2], IN_ORDER)


def test_a_repeated_micro_batch_counts_once_and_gets_the_sum_again():
    sums = GradientSums(1000)
    for i in (0, 0, 1, 0, 1):
        assert sums.add(("a", 0), i, 3, GRADIENTS[i]) is None
    for _ in range(2):
        assert torch.equal(sums.add(("a", 0), 2, 3, GRADIENTS[2]), IN_ORDER)


def test_names_and_blocks_are_apart():
    sums = GradientSums(1000)
    assert sums.add(("a", 0), 0, 2, GRADIENTS[0]) is None
    assert sums.add(("a", 1), 1, 2, GRADIENTS[1]) is None
    assert sums.add(("b", 0), 1, 2, GRADIENTS[1]) is None


def test_those_that_were_used_least_recently_make_room():
    sums = GradientSums(2 * 8)  # two sums of two fp32 numbers
    for name in ("a", "b", "a", "c"):  # b goes
        sums.add((name, 0), 0, 2, GRADIENTS[0])
    assert sums.add(("a", 0), 1, 2, GRADIENTS[1]) is not None
    assert sums.add(("b", 0), 1, 2, GRADIENTS[1]) is None
