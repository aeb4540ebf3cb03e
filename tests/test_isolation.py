"""What a user's code changes stays with it: its copies share nothing, its settings are its own."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading

import numpy as np
import pytest
import torch
from architectures import character_tokenizer
from PIL import Image

from textrl_swarm.errors import PromptError, RewardError
from textrl_swarm.rewards.combine import CombinedReward
from textrl_swarm.rewards.files import load_reward
from textrl_swarm.rewards.functions import RewardFunction
from textrl_swarm.rewards.isolation import OwnSettings, private_copy
from textrl_swarm.textrl.env import TextRLEnv


@dataclasses.dataclass
class Reference:
    words: list[str]


def an_item() -> dict:
    image = Image.new("RGB", (2, 2), "red")
    return {
        "input": "abc",
        "keywords": ["a", "b", "c"],
        "nested": {"deep": [{"list": [1, 2]}]},
        "set": {1, 2},
        "pair": ([1], "x"),
        "array": np.arange(3),
        "objects": np.array([[1, 2], None], dtype=object),
        "tensor": torch.ones(2),
        "graph": torch.ones(2, requires_grad=True) * 2,
        "image": image,
        "reference": Reference(["x"]),
        "counts": collections.Counter("aab"),
        "deque": collections.deque([1]),
        "bytes": bytearray(b"x"),
    }


def spoil(item) -> None:
    """Changes everything that can be changed, in place."""
    item["keywords"].clear()
    item["nested"]["deep"][0]["list"].append(3)
    item["set"].add(3)
    item["pair"][0].append(2)
    item["array"][:] = 7
    item["objects"][0].append(3)
    item["tensor"].zero_()
    item["graph"].detach().zero_()
    item["image"].putpixel((0, 0), (0, 0, 0))
    item["reference"].words.append("y")
    item["counts"]["a"] = 9
    item["deque"].append(2)
    item["bytes"][0] = 0
    item["new"] = 1
    item["input"] += "!"


def seen(item) -> str:
    plain = {**item, "image": list(item["image"].tobytes())}
    return repr(
        {name: value.tolist() if hasattr(value, "tolist") else value for name, value in plain.items()}
    )


def asking_twice(form: str, items: list[dict]) -> list[str]:
    """What a reward that spoils its items sees in two rollouts."""
    found: list[str] = []

    def sentence(items, texts):
        for item in items:
            found.append(seen(item))
            spoil(item)
        return [0.0] * len(texts)

    def step(item, predicted, finish):
        found.append(seen(item))
        spoil(item)
        predicted.clear()
        return 0.0

    reward = {"sentence": sentence, "step": step, "sum": CombinedReward((sentence, 1), (sentence, 2))}[form]
    env = TextRLEnv(None, character_tokenizer(), items, max_length=2, compare_sample=1, reward=reward)
    for _ in range(2):
        env.reset()
        env.step([5])
        env.step([5])
        assert env.predicted != [[]]
        assert seen(env.input_item) == seen(an_item())
    env.reset(items[0])
    assert all(seen(prompt.item) == seen(an_item()) for prompt in (*env.draw(2), *env.prompts()))
    if form != "step":
        env.sentence_rewards(items * 2, ["x", "y"])
    return found


@pytest.mark.parametrize("form", ["sentence", "step", "sum"])
def test_every_call_of_a_reward_gets_the_prompt_as_the_user_gave_it(form):
    items = [an_item()]
    found = asking_twice(form, items)
    assert len(found) >= 4 and set(found) == {seen(an_item())}
    assert seen(items[0]) == seen(an_item())


class Popping(TextRLEnv):
    def get_obs_input(self, item):
        return item["keywords"].pop()

    def get_reward(self, item, predicted, finish):
        return 0.0


def test_an_environments_prompts_are_its_own():
    mine = [{"keywords": ["a"], "input": "a"}]
    env = Popping(None, character_tokenizer(), mine, compare_sample=1)
    mine[0]["keywords"].append("b")
    for prompt in (*env.draw(2), env.encode(mine[0])):
        assert prompt.ids in ((3,), (4,))
        prompt.item["keywords"].extend("xyz")
    env.reset(mine[0])
    env.input_item["keywords"].append("x")
    assert mine == [{"keywords": ["a", "b"], "input": "a"}]
    assert [prompt.ids for prompt in env.prompts()] == [(3,)]


def test_samples_of_a_prompt_do_not_see_each_others_changes():
    def emptied(items, texts):
        counts = [len(item["keywords"]) for item in items if [item["keywords"].pop() for _ in "abc"] or True]
        assert counts == [0] * len(items)
        return [float(len(texts))] * len(texts)

    item = {"input": "a", "keywords": ["a", "b", "c"]}
    assert RewardFunction(emptied, 3).of_sentences([item] * 3, ["x", "y", "z"]) == [3.0] * 3


def test_the_search_for_the_failing_sample_asks_with_unchanged_prompts():
    def fails_on_the_last(items, texts):
        for item, text in zip(items, texts, strict=True):
            item["keywords"].pop()  # raises the second time, if it is the same list
            if text == "bad":
                raise KeyError("mine")
        return [0.0] * len(texts)

    items = [{"input": "a", "keywords": ["x"]} for _ in range(4)]
    with pytest.raises(RewardError, match=r"raised KeyError\('mine'\) .*sample 1 \('bad'\)"):
        RewardFunction(fails_on_the_last, 2).of_sentences(items, ["a", "b", "c", "bad"])


def test_callables_and_what_cannot_be_copied_are_shared_and_what_holds_them_is_not():
    lock, model, words = threading.Lock(), torch.nn.Linear(2, 2), ["a"]
    item = collections.defaultdict(list, {"input": "a", "held": [lock, words], "model": model, "f": len})
    twin = private_copy(item)
    assert type(twin) is collections.defaultdict and twin.default_factory is list
    assert twin["held"][0] is lock and twin["model"] is model and twin["f"] is len
    assert twin["held"][1] == words and twin["held"][1] is not words


def test_one_object_in_two_places_stays_one_and_loops_end():
    shared: list = [1]
    loop: list = [shared, shared]
    loop.append(loop)
    twin = private_copy(loop)
    assert twin[0] is twin[1] and twin[2] is twin and twin[0] is not shared


def test_nesting_without_end_is_told():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(PromptError, match="nested too deep"):
        private_copy({"input": "a", "deep": deep})
    while deep:  # a list this deep must not be freed recursively
        deep = deep.pop()


# ------------------------------------------------------------------------------ process-wide settings


@pytest.fixture(autouse=True)
def trainers_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = settings()
    yield
    after = settings()
    adopt(before)
    assert after == before


def settings() -> tuple:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_deterministic_debug_mode(),
        torch.get_num_threads(),
        os.getcwd(),
    )


def adopt(values: tuple) -> None:
    torch.set_default_dtype(values[0])
    torch.set_default_device(None if values[1].type == "cpu" else values[1])
    torch.set_grad_enabled(values[2])
    torch.set_autocast_enabled("cpu", values[3])
    torch.set_deterministic_debug_mode(values[4])
    torch.set_num_threads(values[5])
    os.chdir(values[6])


def changed(directory) -> tuple:
    return (torch.float64, torch.device("meta"), False, True, 1, torch.get_num_threads() + 1, str(directory))


@pytest.mark.parametrize("timeout_s", [None, 30])
@pytest.mark.parametrize("raises", [False, True])
def test_settings_that_a_reward_changes_are_its_own(tmp_path, timeout_s, raises):
    (tmp_path / "there").mkdir()
    wanted, inside = changed(tmp_path / "there"), []

    def reward(items, texts):
        inside.append(settings())
        adopt(wanted)
        if raises:
            raise ValueError("mine")
        return [0.0] * len(texts)

    before, function = settings(), RewardFunction(reward, 1, timeout_s)
    for _ in range(2):
        try:
            function.of_sentences([{"input": "a"}], ["x"])
        except RewardError:
            assert raises
        assert settings() == before
    assert inside[0] == before and inside[-1] == wanted  # the reward finds what it left


def test_a_module_of_rewards_has_settings_of_its_own(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "mine.py").write_text(
        "import os, torch\ntorch.set_default_dtype(torch.float64)\nos.chdir('there')\n"
        "def f(items, texts):\n"
        "    assert os.path.basename(os.getcwd()) == 'there'\n"
        "    return [float(torch.zeros(()).dtype == torch.float64)] * len(texts)\n"
    )
    before = settings()
    reward = load_reward("mine.py:f")
    assert settings() == before
    for function in (RewardFunction(reward, 1), RewardFunction(reward, 1)):
        assert function.of_sentences([{"input": "a"}], ["x"]) == [1.0]


def test_rewards_have_settings_of_their_own():
    def doubles(items, texts):
        torch.set_default_dtype(torch.float64)
        return [1.0] * len(texts)

    def asks(items, texts):
        return [float(torch.get_default_dtype() == torch.float32)] * len(texts)

    both = RewardFunction(CombinedReward((doubles, 1), (asks, 2)), 1)
    assert both.of_sentences([{"input": "a"}], ["x"]) == [3.0]


def test_a_removed_directory_of_a_reward_harms_nobody(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    own = OwnSettings()
    for remove in (True, False):
        with own.in_use():
            os.chdir(gone if remove else tmp_path)
            if remove:
                gone.rmdir()
        assert os.getcwd() == str(tmp_path)


def test_environments_methods_have_the_users_settings_too():
    class Env(TextRLEnv):
        def get_obs_input(self, item):
            torch.set_default_dtype(torch.float64)
            return item["input"]

        def step(self, action):
            torch.set_default_dtype(torch.float16)
            return super().step(action)

        def get_reward(self, item, predicted, finish):
            return 0.0

    env = Env(None, character_tokenizer(), ["abc"], compare_sample=1)
    env.play([5])
    assert torch.get_default_dtype() == torch.float32
