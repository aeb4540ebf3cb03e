"""What counts as a reward, what does not, and what the user is told then."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from textrl_swarm.errors import ConfigError, RewardError
from textrl_swarm.rewards import RewardFunction, Rewards

ITEM = {"input": "the soup is", "extra": 3}
PREDICTED = [["a"], ["b"]]


def ask(value, samples: int = 2, finish: bool = True) -> list[float]:
    return list(RewardFunction(lambda *_: value, samples)(ITEM, PREDICTED[:samples], finish))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, [1.0, 1.0]),
        (0.25, [0.25, 0.25]),
        (True, [1.0, 1.0]),
        ([3], [3.0, 3.0]),
        ((0.5,), [0.5, 0.5]),
        ([1, 2], [1.0, 2.0]),
        ((1, 2.5), [1.0, 2.5]),
        ([True, False], [1.0, 0.0]),
        (np.float32(0.5), [0.5, 0.5]),
        (np.array(2), [2.0, 2.0]),
        (np.array([1, 2]), [1.0, 2.0]),
        (np.array([7]), [7.0, 7.0]),
        (torch.tensor(0.5), [0.5, 0.5]),
        (torch.tensor([1.0, 2.0], requires_grad=True), [1.0, 2.0]),
        ([np.float64(1), torch.tensor(2)], [1.0, 2.0]),
        ([np.bool_(True), np.int64(4)], [1.0, 4.0]),
        ([torch.tensor([0.5]), np.array([[2]])], [0.5, 2.0]),
    ],
    ids=repr,
)
def test_rewards_that_are_believed(value, expected):
    found = ask(value)
    assert found == expected
    assert all(type(reward) is float for reward in found)


@pytest.mark.parametrize("value", [2, [2], (2.0,), np.array([2.0]), torch.tensor(2)], ids=repr)
def test_one_sample(value, caplog):
    assert ask(value, samples=1) == [2.0]
    assert not caplog.records  # a list of one is exactly right here


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([1, 2, 3], "3 rewards for 2 samples"),
        ([], "0 rewards for 2 samples"),
        (np.zeros(5), "5 rewards for 2 samples"),
        (math.nan, "returned nan"),
        ([0.0, math.inf], "returned inf for sample 1"),
        (-math.inf, "returned -inf"),
        (torch.tensor([math.nan, 0.0]), "returned nan for sample 0"),
        ("good", "returned 'good' (str)"),
        (b"12", "(bytes)"),
        (["1", "2"], "returned '1' (str) for sample 0"),
        (None, "returned None (NoneType)"),
        ([None, 1], "returned None (NoneType) for sample 0"),
        ({"reward": 1}, "(dict)"),
        ([[1.0], [2.0]], "returned [1.0] (list) for sample 0"),
        (np.zeros((2, 2)), "(list) for sample 0"),
        (1 + 2j, "(complex)"),
        ([torch.zeros(3), 0.0], "for sample 0"),
        ({1.0, 2.0}, "(set)"),
    ],
    ids=repr,
)
def test_anything_else_is_an_error_that_names_the_prompt_and_what_came_back(value, told):
    with pytest.raises(RewardError) as caught:
        ask(value)
    assert told in str(caught.value)
    assert "'the soup is'" in str(caught.value) and "one per sample (2)" in str(caught.value)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), KeyError("label"), RuntimeError("CUDA out of memory")], ids=repr)
@pytest.mark.parametrize("finish", [False, True])
def test_a_function_that_raises(error, finish):
    def get_reward(item, predicted, finish):
        raise error

    with pytest.raises(RewardError, match=r"get_reward raised .* for prompt 'the soup is'") as caught:
        RewardFunction(get_reward, 2)(ITEM, PREDICTED, finish)
    assert caught.value.__cause__ is error
    assert type(error).__name__ in str(caught.value)


def test_our_own_errors_and_ctrl_c_pass_unchanged():
    def raising(error):
        def get_reward(*_):
            raise error

        return RewardFunction(get_reward, 2)

    for error in (ConfigError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            raising(error)(ITEM, PREDICTED, True)
        assert caught.value is error


def readme_snippet(input_item, predicted_list, finish):
    if finish:
        reward = [1] * len(predicted_list)
    return reward


def test_a_reward_that_is_set_at_the_end_only_counts_zero_before_and_is_mentioned_once(caplog):
    function = RewardFunction(readme_snippet, 2)
    assert [list(function(ITEM, PREDICTED, finish)) for finish in (False, False, True)] == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "counts as 0" in record.message


def test_a_reward_that_is_unset_at_the_end_is_an_error():
    def get_reward(input_item, predicted_list, finish):
        if not finish:
            reward = 1
        return reward

    with pytest.raises(RewardError, match="UnboundLocalError"):
        RewardFunction(get_reward, 2)(ITEM, PREDICTED, True)


def test_what_is_the_same_for_every_sample_is_mentioned_once(caplog):
    function = RewardFunction(lambda *_: [1], 3)
    for _ in range(3):
        assert list(function(ITEM, PREDICTED, False)) == [1.0] * 3
    assert [record.message for record in caplog.records] == ["get_reward returned a list of one for 3 samples; every sample gets it"]


def test_the_function_gets_the_item_the_strings_and_whether_all_have_ended():
    seen = []
    RewardFunction(lambda *args: seen.append(args) or 0, 2)(ITEM, PREDICTED, True)
    assert seen == [(ITEM, PREDICTED, True)]


def test_rewards_add_up_as_in_the_loops_of_textrl_and_pfrl():
    rewards = Rewards([1.0, 3.0])
    score = 0
    score += rewards
    score += rewards
    assert score == 4.0 and isinstance(score, float)
    assert float(rewards) == 2.0
    assert sum(rewards) == 4.0 and len(rewards) == 2 and rewards[1] == 3.0
