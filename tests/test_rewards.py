"""What counts as a reward, what does not, and what the user is told then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from architectures import character_tokenizer

from textrl_swarm.errors import ConfigError, RewardError
from textrl_swarm.rewards.combine import CombinedReward, group_baseline, rank_rewards
from textrl_swarm.rewards.files import load_reward
from textrl_swarm.rewards.functions import RewardFunction, Rewards, is_sentence_reward
from textrl_swarm.textrl.env import TextRLEnv

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
        (torch.tensor([[1.0], [2.0]]), [1.0, 2.0]),  # a reward model's logits
        ([[1.0], [2.0]], [1.0, 2.0]),
        (map(float, "12"), [1.0, 2.0]),
    ],
    ids=lambda value: repr(value).split(" at ")[0],
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
        (1e39, "returned 1e+39"),  # infinite as float32
        (10**400, "returned 1000"),
        ([0.0, math.inf], "returned inf for sample 1"),
        (-math.inf, "returned -inf"),
        (torch.tensor([math.nan, 0.0]), "returned nan for sample 0"),
        ("good", "returned 'good' (str)"),
        (b"12", "(bytes)"),
        (["1", "2"], "returned '1' (str) for sample 0"),
        (None, "returned None (NoneType)"),
        ([None, 1], "returned None (NoneType) for sample 0"),
        ({"reward": 1}, "(dict)"),
        ([[1.0, 2.0], [2.0]], "returned [1.0, 2.0] (list) for sample 0"),
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


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("division by zero"), KeyError("label"), RuntimeError("CUDA out of memory")],
    ids=repr,
)
@pytest.mark.parametrize("finish", [False, True])
def test_a_function_that_raises(error, finish):
    def get_reward(item, predicted, finish):
        raise error

    with pytest.raises(
        RewardError, match=r"get_reward raised .* for prompt 'the soup is'.*; see test_rewards\.py, line \d+$"
    ) as caught:
        RewardFunction(get_reward, 2)(ITEM, PREDICTED, finish)
    assert caught.value.__cause__ is error
    assert type(error).__name__ in str(caught.value)


def repr_of(error: BaseException) -> str:
    return type(error).__name__


class Trial(Exception):
    """With a constructor and attributes of its own."""

    def __init__(self, number, *, reason):
        super().__init__("not shown")
        self.number, self.reason = number, reason

    def __str__(self):
        return "not shown either"


def test_the_users_own_handlers_catch_what_their_reward_raised():
    def failing(item, predicted, finish):
        raise Trial(3, reason="pruned")

    with pytest.raises(Trial) as caught:
        RewardFunction(failing, 1)({"input": "the soup is"}, [["a"]], True)
    assert isinstance(caught.value, RewardError) and (caught.value.number, caught.value.reason) == (
        3,
        "pruned",
    )
    assert str(caught.value).startswith("failing raised Trial") and "for prompt 'the soup is'" in str(
        caught.value
    )


def test_errors_that_cannot_be_combined_with_ours():
    def failing(item, predicted, finish):
        return b"\xff".decode()

    with pytest.raises(RewardError, match="failing raised UnicodeDecodeError") as caught:
        RewardFunction(failing, 1)({"input": "a"}, [["a"]], True)
    assert isinstance(caught.value.__cause__, UnicodeDecodeError)


class Stubborn(Exception):
    """Cannot be a base class, and cannot be shown."""

    def __init_subclass__(cls):
        raise RuntimeError("no subclasses")

    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    "error",
    [SystemExit(0), StopIteration(), asyncio.CancelledError(), Stubborn(), GeneratorExit()],
    ids=repr_of,
)
def test_what_would_end_programs_and_loops_is_an_error_like_any_other(error):
    def failing(*_):
        raise error

    for ask_it in (
        lambda: RewardFunction(failing, 2)(ITEM, PREDICTED, True),
        lambda: RewardFunction(lambda items, texts: failing(), 2).of_sentences(ITEMS, list("abcd")),
    ):
        with pytest.raises(RewardError, match=f"raised {type(error).__name__}") as caught:
            ask_it()
        assert caught.value.__cause__ is error and type(caught.value) is RewardError


def test_a_reward_may_do_what_it_likes_with_its_lists():
    def clears(items, texts):
        values = [float(len(text)) for text in texts]
        items.clear(), texts.clear()
        return values

    assert RewardFunction(clears, 2).of_sentences(ITEMS, ["a", "bc", "", "d"]) == [1.0, 2.0, 0.0, 1.0]


def test_the_line_that_is_named_is_the_users():
    class Env(TextRLEnv):
        def get_reward(self, input_item, predicted_list, finish):
            return 1 / 0

    with pytest.raises(ZeroDivisionError, match=r"see test_rewards\.py, line \d+"):
        Env(None, character_tokenizer(), ["a"]).step([5, 6])


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
    assert [list(function(ITEM, PREDICTED, finish)) for finish in (False, False, True)] == [
        [0.0, 0.0],
        [0.0, 0.0],
        [1.0, 1.0],
    ]
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
    function = RewardFunction(lambda *_: [1], 3, name="get_reward")
    for _ in range(3):
        assert list(function(ITEM, PREDICTED, False)) == [1.0] * 3
    assert [record.message for record in caplog.records] == [
        "get_reward returned a list of one for 3 samples; every sample gets it"
    ]


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


# ---------------------------------------------------------------------------------------------- the two forms


def lengths(items, texts):
    return [float(len(text)) for text in texts]


class Callable:
    name = "mine"

    def __call__(self, items, texts):
        return [1.0] * len(texts)


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (lambda item, predicted, finish: 0, False),
        (lambda *args: 0, False),
        (lambda item, predicted, finish=True: 0, False),  # two would do, but nothing else has a finish
        (lambda items, *texts: 0, False),
        (lengths, True),
        (lambda items, texts, scale=2.0: texts, True),
        (Callable(), True),
        (TextRLEnv.get_reward.__get__(object()), False),
    ],
)
def test_forms_are_told_apart_by_their_parameters(reward, sentence):
    assert is_sentence_reward(reward) is sentence


class Made:
    def __init__(self, items, texts):
        pass


@pytest.mark.parametrize(
    "reward",
    [
        lambda: 0,
        lambda item: 0,
        lambda a, b, c, d: 0,
        lambda *, items, texts: 0,
        5,
        "len",
        None,
        Made,
        Callable,
    ],
)
def test_any_other_parameters_are_refused_with_both_forms(reward):
    with pytest.raises(ConfigError) as caught:
        RewardFunction(reward, 2)
    assert "f(input_item, predicted_list, finish)" in str(caught.value) and "f(items, texts)" in str(
        caught.value
    )


ITEMS = [{"input": "the soup is"}] * 2 + [{"input": "my phone was"}] * 2


def trl(completions, answer, **kwargs):
    return [float(answer == completion) for answer, completion in zip(answer, completions, strict=True)]


def trl_prompts(prompts, completions, answer, completion_ids=None):
    return [float(a in p + c) for p, c, a in zip(prompts, completions, answer, strict=True)]


def trl_names(*, completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trl_any_order(answer, completions, **kwargs):
    return trl(completions, answer)


def trl_pair(prompts, completions):
    return [float(p < c) for p, c in zip(prompts, completions, strict=True)]


def verl(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)


def openrlhf(queries, prompts, labels):
    return torch.tensor([float(q.startswith(p)) for q, p in zip(queries, prompts, strict=True)])


def trlx(samples, prompts, outputs, **kwargs):
    return [float(s == p + o) for s, p, o in zip(samples, prompts, outputs, strict=True)]


@pytest.mark.parametrize(
    ("reward", "trainer", "expected"),
    [
        (trl, "TRL", [1.0, 0.0]),
        (trl_prompts, "TRL", [1.0, 0.0]),
        (trl_names, "TRL", [1.0, 1.0]),
        (trl_any_order, "TRL", [1.0, 0.0]),
        (trl_pair, "TRL", [1.0, 1.0]),
        (verl, "verl", [1.0, 0.0]),
        (openrlhf, "OpenRLHF", [1.0, 1.0]),
        (trlx, "trlX", [1.0, 1.0]),
    ],
)
def test_rewards_of_other_trainers_are_refused_with_a_wrapper_that_works(reward, trainer, expected):
    with pytest.raises(ConfigError, match=f"the parameters of a reward for {trainer};") as caught:
        is_sentence_reward(reward)
    wrapper = str(caught.value).split("wrap it:\n")[1]
    assert wrapper.count("\n") == 1
    found = {reward.__name__: reward}
    exec(wrapper, found)
    row = {
        "input": "question",
        "answer": "x",
        "data_source": "d",
        "ground_truth": "x",
        "labels": 1,
        "extra_info": 0,
    }
    assert (
        list(map(float, RewardFunction(found["score"], 1).of_sentences([row, row], ["x", "y"]))) == expected
    )


def test_the_parameters_of_ours_may_have_any_name():
    assert is_sentence_reward(lambda items, completions: [])
    assert is_sentence_reward(lambda rows, completions: [])
    assert is_sentence_reward(lambda items, completions, **options: [])
    assert is_sentence_reward(lambda samples, answers: [])
    assert not is_sentence_reward(lambda prompt, outputs, finish: 0)


def test_a_sentence_reward_gets_everything_at_once_and_gives_floats():
    seen = []

    def reward(items, texts):
        seen.append((items, texts))
        return np.array([len(text) for text in texts])

    found = RewardFunction(reward, 2).of_sentences(ITEMS, ["a", "bb", "ccc", ""])
    assert found == [1.0, 2.0, 3.0, 0.0] and all(type(value) is float for value in found)
    assert seen == [(ITEMS, ["a", "bb", "ccc", ""])]
    RewardFunction(reward, 2).of_sentences(tuple(ITEMS[:1]), ("a",))
    # Lists: pipelines of transformers take nothing else for several texts.
    assert seen[-1] == (ITEMS[:1], ["a"])


@pytest.mark.parametrize("guilty", [[0], [1], [2], [3], [1, 3], [0, 1, 2, 3]])
def test_a_sentence_reward_that_raises_names_the_first_response_it_fails_on_alone(guilty):
    asked = []

    def reward(items, texts):
        asked.append(len(texts))
        return [1 / (len(text) - 1) for text in texts]

    texts = ["a" if i in guilty else f"good {i}" for i in range(4)]
    prompt, sample = ITEMS[guilty[0]]["input"], guilty[0] % 2
    with pytest.raises(
        RewardError, match=rf"reward raised ZeroDivisionError.*for prompt '{prompt}', sample {sample} \('a'\)"
    ) as caught:
        RewardFunction(reward, 2).of_sentences(ITEMS, texts)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert asked[0] == 4 and sum(asked[1:]) <= 4


def test_one_that_raises_for_many_only_says_so():
    def reward(items, texts):
        if len(texts) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RewardError, match=r"reward raised MemoryError\('too many'\) for 4 responses"):
        RewardFunction(reward, 2).of_sentences(ITEMS, list("abcd"))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([1.0], "returned 1 rewards for 4 responses"),
        (0.5, "returned 0.5 (float) for 4 responses"),
        ([0, 0, math.nan, 0], "returned nan for prompt 'my phone was', sample 0 ('c')"),
        ([0, "1", 0, 0], "returned '1' (str) for prompt 'the soup is', sample 1 ('b')"),
        (None, "returned None (NoneType)"),
    ],
)
def test_what_a_sentence_reward_may_not_return(value, told):
    with pytest.raises(RewardError) as caught:
        RewardFunction(lambda items, texts: value, 2).of_sentences(ITEMS, list("abcd"))
    assert told in str(caught.value) and "one finite number per response" in str(caught.value)


TOO_SLOW = r"slow took longer than reward_timeout_s=0\.1 for 4 responses; make it faster"


def waits(items, texts):
    threading.Event().wait(30)


def waits_and_swallows(items, texts):
    with contextlib.suppress(BaseException):
        threading.Event().wait(30)
    return [0.0] * len(texts)


def backtracks(items, texts):
    """Holds the interpreter's lock for hours: no other thread would ever be asked."""
    re.match(r"(a+)+$", "a" * 60 + "b")


@pytest.mark.parametrize("function", [waits, waits_and_swallows, backtracks])
def test_a_reward_that_takes_too_long(function):
    function.__name__ = "slow"
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(RewardError, match=TOO_SLOW):
        RewardFunction(function, 2, timeout_s=0.1).of_sentences(ITEMS, list("abcd"))
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_reward_that_takes_too_long_outside_the_main_thread():
    released, told = threading.Event(), []

    def slow(items, texts):
        released.wait(30)
        return [0.0] * len(texts)

    def ask():
        try:
            RewardFunction(slow, 2, timeout_s=0.1).of_sentences(ITEMS, list("abcd"))
        except RewardError as error:
            told.append(str(error))

    try:
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(30)
        assert re.match(TOO_SLOW, told[0])
        (hanging,) = (thread for thread in threading.enumerate() if thread.name == "time limit")
        assert hanging.daemon, "a reward that hangs for ever would keep the interpreter from ending"
    finally:
        released.set()


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf, "5", True])
def test_timeouts_that_are_refused(timeout_s):
    with pytest.raises(ConfigError, match="reward_timeout_s must be > 0 seconds"):
        RewardFunction(lengths, 2, timeout_s)


def test_within_the_time_nothing_changes():
    def raising(item, predicted, finish):
        raise KeyError("label")

    assert list(RewardFunction(lambda *_: [1, 2], 2, timeout_s=30)(ITEM, PREDICTED, True)) == [1.0, 2.0]
    with pytest.raises(RewardError, match=r"raised KeyError\('label'\)"):
        RewardFunction(raising, 2, timeout_s=30)(ITEM, PREDICTED, True)


# ---------------------------------------------------------------------------------------------------- by name


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As under `textrl-swarm`: no current directory.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    source = "def score(items, texts):\n    return [7.0] * len(texts)\n\ndef one(x):\n    pass\n\nPI = 3\n"
    (tmp_path / "tasks_of_this_test.py").write_text(source)
    (tmp_path / "broken_of_this_test.py").write_text("import nothing_like_this\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "late_of_this_test.py").write_text("PI = 3\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "deep_of_this_test.py").write_text(
        "def later(items, texts):\n    from late_of_this_test import PI\n    return [PI] * len(texts)\n"
    )
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "neighbour_of_this_test.py").write_text("EIGHT = 8.0\n")
    imports = "from neighbour_of_this_test import EIGHT\n\n"
    (tmp_path / "deep" / "my-reward.py").write_text(
        f"{imports}def score(items, texts):\n    return [EIGHT] * len(texts)\n"
    )
    return tmp_path


def test_rewards_by_name(here):
    assert load_reward("tasks_of_this_test:score")([], ["a"]) == [7.0]
    assert load_reward("deep/my-reward.py:score")([], ["a"]) == [8.0]
    assert load_reward(f"{here}/deep/my-reward.py:score")([], ["a"]) == [8.0]
    assert load_reward("deep_of_this_test:later")([], ["a"]) == [3]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("tasks_of_this_test", 'a reward is named "module:function" or "path/to/file.py:function"'),
        ("tasks_of_this_test:", "a reward is named"),
        (":score", "a reward is named"),
        ("tasks_of_this_test:scor", "has no 'scor'; did you mean 'score'?"),
        ("tasks_of_this_test:PI", "3 is not callable"),
        ("tasks_of_this_test:one", "one(x) has the wrong parameters"),
        ("not_there_at_all:score", "there is no module 'not_there_at_all' here"),
        ("task_of_this_test:score", "installed packages; did you mean 'tasks_of_this_test'?"),
        ("broken_of_this_test:score", "importing broken_of_this_test failed: ModuleNotFoundError"),
        ("raises.py:score", "importing raises.py failed: ZeroDivisionError"),
        ("ends.py:score", "importing ends.py failed: SystemExit(3)"),
        ("ends:score", "importing ends failed: SystemExit(3)"),
        ("deep/nothing.py:score", "there is no file deep/nothing.py"),
        ("deep/my-rewards.py:score", "did you mean 'my-reward.py'?"),
        ("deep/my-reward:score", "did you mean 'my-reward.py'?"),
        (5, "a reward is named"),
    ],
)
def test_names_that_lead_to_no_reward(here, spec, told):
    with pytest.raises(ConfigError) as caught:
        load_reward(spec)
    assert told in str(caught.value)


# ------------------------------------------------------------------------- several at once, and relative ones


def test_a_weighted_sum_that_remembers_its_parts():
    reward = CombinedReward((lengths, 0.5), (Callable(), -2))
    assert reward(ITEMS[:2], ["abcd", ""]) == [0.5 * 4 - 2, -2.0]
    assert reward.parts == {"lengths": 2.0, "mine": 1.0}
    assert reward.name == "0.5 * lengths + -2 * mine"
    assert is_sentence_reward(reward)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([], "at least one"),
        ([(lengths, "2")], "weight of lengths"),
        ([(lengths, math.inf)], "weight of lengths"),
        ([(lambda item, predicted, finish: 0, 1)], "asked after every token"),
        ([(5, 1)], "not callable"),
        ([lengths], "is a pair"),
        ([(lengths,)], "is a pair"),
    ],
)
def test_sums_that_are_refused(parts, told):
    with pytest.raises(ConfigError, match=told):
        CombinedReward(*parts)


def test_a_part_that_fails_is_named():
    def failing(items, texts):
        return [math.nan] * len(texts)

    with pytest.raises(
        RewardError, match=r"failing returned nan for prompt 'the soup is', response 0 of 1 \('a'\)"
    ):
        CombinedReward((lengths, 1), (failing, 1))(ITEMS[:1], ["a"])


def test_the_response_on_which_a_part_fails_is_named_and_searched_once():
    asked = []

    def failing(items, texts):
        asked.append(len(texts))
        return [1 / len(text) for text in texts]

    function = RewardFunction(CombinedReward((lengths, 1), (failing, 1)), 2)
    with pytest.raises(
        RewardError,
        match=r"failing raised ZeroDivisionError.* for prompt 'my phone was', response 3 of 4 \(''\)",
    ):
        function.of_sentences(ITEMS, ["a", "bb", "ccc", ""])
    assert asked[0] == 4 and sum(asked[1:]) <= 4


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3, 1, 2], [1, -1, 0]),
        ([5, 5], [0, 0]),
        ([1, 9, 9], [-1, 0.5, 0.5]),
        ([4], [0]),
        ([], []),
        ([1e9, -1e9, 0, 0], [1, -1, 0, 0]),
    ],
)
def test_ranks(scores, expected):
    assert rank_rewards(scores) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "expected"), [([1, 2, 6], [-3, -1.5, 4.5]), ([2, 2], [0, 0]), ([3], [3]), ([], [])]
)
def test_group_baseline_leaves_the_own_score_out(scores, expected):
    assert group_baseline(scores) == pytest.approx(expected)


@pytest.mark.parametrize("helper", [rank_rewards, group_baseline])
def test_scores_that_are_no_numbers_are_not_hidden(helper):
    with pytest.raises(RewardError, match="score 0 of 2 is nan"):
        helper([math.nan, 1.0])
