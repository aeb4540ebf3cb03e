"""The environment: prompts, episodes, where rewards land; whole rollouts are rewarded as episodes are."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import logging
import re

import numpy as np
import pytest
import torch
from architectures import EOS, character_tokenizer
from test_texts import llama_like, metaspace

from textrl_swarm.errors import ConfigError, PromptError, RewardError
from textrl_swarm.learning.rollout import per_token_rewards
from textrl_swarm.models.texts import decode_response
from textrl_swarm.textrl.env import TextRLEnv
from textrl_swarm.types import RolloutBatch, Trajectory

TOKENIZER = character_tokenizer()
A, B, C = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "abc")
PROMPTS = [{"input": "one", "key": [1]}, {"input": "two two"}, {"input": "three"}]


class Quiet(TextRLEnv):
    """Records what get_reward is asked; pays nothing."""

    def get_reward(self, input_item, predicted_list, finish):
        vars(self).setdefault("asked", []).append((input_item, predicted_list, finish))
        return 0


class Dense(TextRLEnv):
    """A number that tells item, sample, length and finish apart."""

    def get_reward(self, input_item, predicted_list, finish):
        return [
            len(input_item["input"]) + 10 * i + 0.1 * len(tokens) + 100 * finish
            for i, tokens in enumerate(predicted_list)
        ]


def make(cls=Quiet, prompts=PROMPTS, **settings) -> TextRLEnv:
    return cls(None, TOKENIZER, prompts, **settings)


# ---------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("entry", "item"),
    [
        ("abc", {"input": "abc"}),
        ({"input": "abc"}, {"input": "abc"}),
        ({"input": "abc", "reference": [1, 2], 3: None}, {"input": "abc", "reference": [1, 2], 3: None}),
        (["abc"], {"input": "abc", "extra": []}),
        (["abc", "a reference"], {"input": "abc", "extra": ["a reference"]}),
        (("abc", 5), {"input": "abc", "extra": [5]}),
        (collections.UserDict(input="abc", key=1), {"input": "abc", "key": 1}),
    ],
)
def test_formats_of_a_prompt(entry, item):
    env = make(prompts=[entry], compare_sample=1)
    assert env.input_item == item
    observation, *_ = env.step([A])
    assert observation == [[*TOKENIZER("abc")["input_ids"], A]]
    assert env.asked == [(item, [["a"]], False)]


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        (),
        "a text",
        {"input": "abc"},
        [""],
        [{"input": ""}],
        [{"output": "abc"}],
        [{"input": 3}],
        [[]],
        [[1, 2]],
        [None],
        ["abc", 7],
        None,
        5,
        iter(()),
    ],
    ids=lambda value: repr(value).split(" at ")[0],
)
def test_what_is_no_prompt(prompts):
    with pytest.raises(PromptError, match=r"observation_input|has no text"):
        make(prompts=prompts)


def test_the_users_dicts_are_not_changed():
    prompts = [{"input": "abc", "key": 1}]
    env = make(prompts=prompts)
    env.input_item["key"] = 2
    assert prompts == [{"input": "abc", "key": 1}]


def test_every_prompt_comes_once_before_any_comes_again():
    env = make(prompts=[f"text {i}" for i in range(7)])
    env.seed(3)
    for count in (1, 3, 7, 10):
        env.draw(count)  # 21 = three rounds
    rounds = [sorted(prompt.item["input"] for prompt in env.draw(7)) for _ in range(3)]
    assert rounds == [sorted(f"text {i}" for i in range(7))] * 3


def test_prompts_are_drawn_uniformly_and_in_another_order_each_round():
    env = make(prompts=[f"text {i}" for i in range(4)])
    first = collections.Counter(env.draw(4)[0].item["input"] for _ in range(2000))
    # 500 expected, deviation 19.
    assert len(first) == 4 and all(400 < count < 600 for count in first.values())


def test_the_seed_fixes_the_order():
    orders = []
    for seed in (1, 1, 2):
        env = make(prompts=[f"text {i}" for i in range(20)])
        env.seed(seed)
        orders.append([prompt.item["input"] for prompt in env.draw(40)])
    assert orders[0] == orders[1] != orders[2]


def test_the_text_for_the_model_can_be_overridden():
    class Wrapped(Quiet):
        def gat_obs_input(self, input_item):
            return f"say {input_item['input']} now"

    assert make(Wrapped, ["abc"]).reset() == [TOKENIZER("say abc now")["input_ids"]] * 2


# --------------------------------------------------------------------------------------------------- episodes


def test_an_observation_is_the_token_ids_of_each_sample():
    env = make(compare_sample=3)
    prompt = TOKENIZER("abc")["input_ids"]
    assert env.reset("abc") == [prompt] * 3
    observation, rewards, done, info = env.step([A, B, C])
    assert observation == [[*prompt, A], [*prompt, B], [*prompt, C]]
    assert (list(rewards), done, info) == ([0.0] * 3, False, {"predicted_str": ["a", "b", "c"]})
    observation, *_, info = env.step(np.array([[C], [B], [A]]))  # pfrl's agents give arrays
    assert observation[0] == [*prompt, A, C] and info["predicted_str"] == ["ac", "bb", "ca"]
    assert env.reset("abc") == [prompt] * 3  # nothing is left of the last episode


def test_get_reward_sees_raw_strings_that_make_a_text():
    env = make(compare_sample=2, max_length=3)
    env.reset(PROMPTS[0])
    for action in ([A, B], [B, EOS], [C, C]):
        *_, done, _ = env.step(action)
    assert done
    assert env.asked == [
        (PROMPTS[0], [["a"], ["b"]], False),
        (PROMPTS[0], [["a", "b"], ["b", TOKENIZER.eos_token]], False),
        (PROMPTS[0], [["a", "b", "c"], ["b", TOKENIZER.eos_token]], True),
    ]
    assert TOKENIZER.convert_tokens_to_string(env.asked[-1][1][0]) == "abc"


def test_what_get_reward_does_to_its_list_stays_there():
    class Greedy(TextRLEnv):
        def get_reward(self, input_item, predicted_list, finish):
            predicted_list[0].clear()
            return 0

    env = make(Greedy)
    env.step([A, A])
    observation, *_ = env.step([B, B])
    assert observation[0][-2:] == [A, B] and env.predicted[0] == ["a", "b"]


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_at_most_max_length_tokens(samples, length):
    env = make(compare_sample=samples, max_length=length)
    for step in range(1, length + 1):
        observation, rewards, done, _ = env.step([A] * samples)
        assert len(rewards) == len(observation) == samples
        assert done == (step == length)
    assert [len(ids) for ids in env.predicted_ids] == [length] * samples


def test_the_end_token_ends_its_own_sample_and_later_tokens_of_it_are_ignored():
    env = make(compare_sample=2, max_length=10)
    before = env.reset("abc")[0]
    assert env.step([EOS, A])[2] is False
    observation, _, done, info = env.step([B, A])
    assert observation == [[*before, EOS], [*before, A, A]] and not done
    assert info["predicted_str"][1] == "aa"
    assert env.step([B, EOS])[2] is True
    assert env.predicted_end == [True, True]


@pytest.mark.parametrize(
    "action",
    [[A], [A, B, C], [], A, [-1, A], [0.5, 1.5], ["a", "b"], None, [None, None], [True, False]],
    ids=repr,
)
def test_what_is_no_action(action):
    env = make(compare_sample=2)
    before = env.reset("abc")
    with pytest.raises(ConfigError, match=r"one token id per sample \(2\)"):
        env.step(action)
    assert env.predicted == [[], []] and env._observation() == before


def test_a_bad_reward_names_the_prompt():
    class Bad(TextRLEnv):
        def get_reward(self, input_item, predicted_list, finish):
            return float("nan")

    env = make(Bad)
    env.reset("two two")
    with pytest.raises(RewardError, match="returned nan for sample 0 for prompt 'two two'"):
        env.step([A, A])


def test_a_missing_get_reward_is_mentioned_and_pays_nothing(caplog):
    env = make(TextRLEnv, max_length=1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "get_reward is not overridden" in record.message
    assert list(env.step([A, B])[1]) == [0.0, 0.0]
    caplog.clear()
    make(Quiet)
    assert not caplog.records


def test_the_attributes_that_textrl_users_know():
    env = make(max_length=7)
    assert (env.env_max_length, env.compare_sample, env.observation_space) == (7, 2, PROMPTS)
    assert (env.gen_stop_toks, env.predicted) == ([TOKENIZER.eos_token], [[], []])
    assert env.input_item in PROMPTS
    defaults = make()
    assert (defaults.env_max_length, defaults.compare_sample) == (100, 2)


@pytest.mark.parametrize(
    "settings",
    [{"max_length": 0}, {"compare_sample": 0}, {"max_length": 2.5}, {"compare_sample": "2"}],
    ids=repr,
)
def test_impossible_settings(settings):
    with pytest.raises(ConfigError, match="whole number >= 1"):
        make(**settings)


# ----------------------------------------------------------------------------------------- where rewards land


def rollout_of(env: TextRLEnv, items: list[dict], responses: list[list[int]]) -> RolloutBatch:
    """The given responses, as `generate` would have returned them."""
    prompts = [list(env.encode(item).ids) for item in items for _ in range(env.compare_sample)]
    lengths = [len(response) for response in responses]
    tokens = torch.full((len(prompts), max(len(p) + n for p, n in zip(prompts, lengths, strict=True))), 1)
    for row, prompt, response in zip(tokens, prompts, responses, strict=True):
        row[: len(prompt) + len(response)] = torch.tensor(prompt + response)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    zeros = torch.zeros(mask.shape)
    return RolloutBatch(
        tokens=tokens, prompt_lengths=torch.tensor([len(p) for p in prompts]), response_mask=mask,
        terminated=torch.tensor([r[-1] == EOS for r in responses]), old_logprobs=zeros, values=zeros,
        texts=("",) * len(prompts), temperature=1.0,
    )  # fmt: skip


def played(env: TextRLEnv, item: dict, responses: list[list[int]]) -> list[list[float]]:
    """Per env step the rewards of each sample, from stepping the environment by hand."""
    env.reset(item)
    given = []
    for step in range(max(map(len, responses))):
        _, rewards, done, _ = env.step([r[step] if step < len(r) else A for r in responses])
        given.append(list(rewards))
    assert done
    return given


def test_a_reward_lands_on_the_token_just_chosen_and_the_last_on_each_samples_own_last_token():
    env = make(Dense, compare_sample=2, max_length=3)
    rewards, env_steps = per_token_rewards(
        env, [PROMPTS[0]], rollout_of(env, [PROMPTS[0]], [[A, EOS], [A, B, C]])
    )
    assert env_steps == 3
    # base 3 for "one", + 10 for sample 1, + 0.1 per token; at the end + 100, for sample 0 on its second token
    expected = [[3.1, 3.2 + 103.2, 0.0], [13.1, 13.2, 113.3]]
    assert torch.allclose(rewards, torch.tensor(expected))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_rollout_is_rewarded_as_its_episodes_would_be(samples):
    env = make(Dense, compare_sample=samples, max_length=4)
    rng = np.random.default_rng(0)
    responses = []
    for _ in range(3 * samples):
        response = rng.integers(2, 20, size=rng.integers(1, 5)).tolist()
        responses.append(response if len(response) == 4 else [*response[:-1], EOS])
    rewards, env_steps = per_token_rewards(env, PROMPTS, rollout_of(env, PROMPTS, responses))
    steps = 0
    for p, item in enumerate(PROMPTS):
        mine = responses[p * samples : (p + 1) * samples]
        given = played(env, item, mine)
        steps += len(given)
        for i, response in enumerate(mine):
            last = len(response) - 1
            expected = [0.0] * rewards.shape[1]
            for step, values in enumerate(given):
                if step <= last or step == len(given) - 1:
                    expected[min(step, last)] += values[i]
            assert rewards[p * samples + i].tolist() == pytest.approx(expected)
    assert env_steps == steps


def test_a_rollout_asks_what_its_episodes_would_ask():
    env = make(Quiet, compare_sample=2, max_length=3)
    responses = [[A, EOS], [B, B, B]]
    played(env, PROMPTS[1], responses)
    asked, env.asked = env.asked, []
    per_token_rewards(env, [PROMPTS[1]], rollout_of(env, [PROMPTS[1]], responses))
    assert env.asked == asked


# --------------------------------------------------------------------------------- a reward that is passed in


def test_a_step_reward_instead_of_a_subclass(caplog):
    reward = lambda item, predicted, finish: [finish, 2]  # noqa: E731
    env = TextRLEnv(None, character_tokenizer(), PROMPTS, max_length=2, compare_sample=2, reward=reward)
    assert not caplog.records
    env.reset()
    assert list(env.step([5, 6])[1]) == [0.0, 2.0]
    assert list(env.step([5, 6])[1]) == [1.0, 2.0]


def test_a_sentence_reward_is_asked_once_when_the_episode_is_done():
    asked = []

    def reward(items, texts):
        asked.append((list(items), list(texts)))
        return [1.0, 2.0]

    tokenizer = character_tokenizer()
    env = TextRLEnv(None, tokenizer, PROMPTS, max_length=2, compare_sample=2, reward=reward)
    env.reset("a")
    a, b, end = *tokenizer.convert_tokens_to_ids(["a", "b"]), tokenizer.eos_token_id
    assert list(env.step([a, b])[1]) == [0.0, 0.0] and asked == []
    assert list(env.step([end, b])[1]) == [1.0, 2.0]
    assert asked == [([{"input": "a"}] * 2, ["a", "bb"])]


def test_rewards_given_twice_or_of_no_form_are_refused():
    class Mine(TextRLEnv):
        def get_reward(self, input_item, predicted_list, finish):
            return 0

    with pytest.raises(ConfigError, match=r"either reward= or a Mine\.get_reward, not both"):
        Mine(None, character_tokenizer(), PROMPTS, reward=lambda items, texts: texts)
    with pytest.raises(ConfigError, match="wrong parameters"):
        TextRLEnv(None, character_tokenizer(), PROMPTS, reward=lambda text: 0)


def test_a_sentence_reward_is_asked_once_per_rollout_and_lands_on_the_last_tokens():
    asked = []

    def reward(items, texts):
        asked.append((items, texts))
        return [1.0, 2.0, 3.0, 4.0]

    env = TextRLEnv(None, TOKENIZER, PROMPTS, max_length=3, compare_sample=2, reward=reward)
    rollout = rollout_of(env, PROMPTS[:2], [[A, EOS], [A, B, C], [EOS], [B, B, EOS]])
    rollout = dataclasses.replace(rollout, texts=("a", "abc", "", "bb"))
    rewards, env_steps = per_token_rewards(env, PROMPTS[:2], rollout)
    assert rewards.tolist() == [[0, 1, 0], [0, 0, 2], [3, 0, 0], [0, 0, 4]] and env_steps == 6
    assert asked == [([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, ["a", "abc", "", "bb"])]  # prompt by prompt


@pytest.mark.parametrize(
    ("signature", "told"),
    [
        ("self, input_item, predicted_list", "pass a function (items, texts) as reward="),
        ("self, input_item", "wrong parameters"),
    ],
)
def test_a_get_reward_with_other_parameters_is_refused(signature, told):
    scope: dict = {}
    exec(f"def get_reward({signature}): return 0", scope)
    with pytest.raises(ConfigError, match=re.escape(told)):
        make(type("Mine", (TextRLEnv,), {"get_reward": scope["get_reward"]}))


def test_get_reward_is_asked_after_every_token_with_a_default_for_finish_too():
    class Mine(TextRLEnv):
        def get_reward(self, input_item, predicted_list, finish=False):
            return [len(tokens) + 10 * finish for tokens in predicted_list]

    env = make(Mine, max_length=2)
    assert [list(env.step([A, B])[1]) for _ in range(2)] == [[1.0, 1.0], [12.0, 12.0]]


def test_what_users_keep_on_their_env_and_assign_to_it_is_theirs():
    class Mine(TextRLEnv):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.rewards = []

        def get_reward(self, input_item, predicted_list, finish):
            self.rewards.append(finish)
            return 1

    env = make(Mine, max_length=2, compare_sample=1)
    assert list(env.step([A])[1]) == [1.0] and env.rewards == [False]
    env.get_reward = lambda input_item, predicted_list, finish: 5
    assert list(env.step([A])[1]) == [5.0]


def test_a_reward_for_the_end_only_is_not_asked_before():
    class Ends(TextRLEnv):
        reward_on_finish_only = True
        asked = 0

        def get_reward(self, input_item, predicted_list, finish):
            assert finish
            self.asked += 1
            return 3

    env = Ends(None, character_tokenizer(), PROMPTS, max_length=3, compare_sample=1)
    env.reset()
    assert [float(env.step([7])[1]) for _ in range(3)] == [0.0, 0.0, 3.0]
    assert env.asked == 1
    rewards, env_steps = per_token_rewards(env, PROMPTS[:1], rollout_of(env, PROMPTS[:1], [[A, B, C]]))
    assert rewards.tolist() == [[0.0, 0.0, 3.0]] and env_steps == 3 and env.asked == 2


def test_a_step_after_the_end_is_refused():
    env = TextRLEnv(
        None,
        character_tokenizer(),
        PROMPTS,
        max_length=1,
        compare_sample=1,
        reward=lambda item, predicted, finish: 1,
    )
    env.reset()
    env.step([7])
    with pytest.raises(ConfigError, match=r"this episode has ended; call env\.reset\(\)"):
        env.step([7])


@pytest.mark.parametrize("name", ["gat_obs_input", "get_obs_input"])
def test_the_text_given_to_the_model_may_be_overridden_in_either_spelling(name):
    cls = type("Asks", (TextRLEnv,), {name: lambda self, item: item["input"] + "?"})
    tokenizer = character_tokenizer()
    env = cls(None, tokenizer, ["soup"], reward=lambda items, texts: [0.0] * len(texts))
    assert list(env.encode({"input": "soup"}).ids) == tokenizer("soup?")["input_ids"]


def test_the_order_of_prompts_continues_from_its_state():
    def make():
        env = TextRLEnv(
            None,
            character_tokenizer(),
            [f"p{chr(97 + i)}" for i in range(7)],
            reward=lambda items, texts: [0.0] * len(texts),
        )
        env.seed(3)
        return env

    one, other = make(), make()
    one.draw(5)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.draw(23) == other.draw(23) != make().draw(23)


def test_the_order_of_more_prompts_than_there_are_now_passes_over_those_that_are_gone():
    env, fewer = make(prompts=["a", "b", "c", "d"]), make(prompts=["a", "b"])
    env.seed(0)
    env.draw(1)
    fewer.load_state_dict(env.state_dict())
    assert {prompt.item["input"] for prompt in fewer.draw(20)} == {"a", "b"}


# --------------------------------------------------------------------------- what users' environments rely on


class Stateful(TextRLEnv):
    """Looks at the environment and not at its arguments, and counts per episode."""

    def reset(self, input_item=None):
        self.asked = 0
        self.resets = vars(self).get("resets", 0) + 1
        return super().reset(input_item)

    def get_reward(self, input_item, predicted_list, finish):
        self.asked += 1
        assert self.input_item is input_item and self.predicted == predicted_list
        return [
            len(ids) + 10 * ended + 100 * finish + 1000 * self.asked
            for ids, ended in zip(self.predicted_ids, self.predicted_end, strict=False)
        ]


def test_while_a_rollout_is_rewarded_the_environment_is_in_the_episode_that_is_asked_about():
    env, by_hand = (make(Stateful, max_length=3) for _ in range(2))
    responses = [[A, EOS], [A, B, C], [B, EOS], [EOS]]
    rewards, _ = per_token_rewards(env, PROMPTS[:2], rollout_of(env, PROMPTS[:2], responses))
    for p in range(2):
        given = played(by_hand, PROMPTS[p], responses[2 * p : 2 * p + 2])
        for i, row in enumerate(rewards[2 * p : 2 * p + 2].tolist()):
            assert sum(row) == sum(earned[i] for earned in given)
    assert env.resets == 1 + 2  # the first is the constructor's


class Doubled(TextRLEnv):
    """Changes what a step earns."""

    def get_reward(self, input_item, predicted_list, finish):
        return 1.0

    def step(self, action):
        observation, rewards, done, told = super().step(action)
        return observation, [2 * reward for reward in rewards], done, told


def test_a_step_that_is_overridden_is_used_for_rollouts_too():
    env = make(Doubled, max_length=2)
    rewards, _ = per_token_rewards(env, PROMPTS[:1], rollout_of(env, PROMPTS[:1], [[A, B], [EOS]]))
    assert rewards.tolist() == [[2.0, 2.0], [4.0, 0.0]]


def test_a_sample_that_has_ended_earns_nothing_until_the_end():
    env = make(Doubled, max_length=3)
    assert played(env, PROMPTS[0], [[EOS], [A, B, C]]) == [[2.0, 2.0], [0.0, 2.0], [2.0, 2.0]]


def test_the_users_own_text_of_a_prompt_gets_no_second_bos():
    tokenizer = llama_like()
    render = lambda item: tokenizer.apply_chat_template(item["chat"], tokenize=False)  # noqa: E731
    cls = type("Chats", (Quiet,), {"get_obs_input": lambda self, item: render(item)})
    chat = [{"role": "user", "content": "a b"}]
    expected = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert cls(None, tokenizer, [{"chat": chat}]).reset()[0] == expected
    assert TextRLEnv(None, tokenizer, [render({"chat": chat})]).reset()[0] == expected


@pytest.mark.parametrize("name", ["get_obs_input", "gat_obs_input"])
def test_an_environment_may_say_where_a_prompts_text_is(name):
    cls = type("Asks", (Quiet,), {name: lambda self, item: "Q " + item["question"]})
    env = make(cls, prompts=[{"question": "why"}])
    assert env.reset({"question": "how"})[0] == TOKENIZER("Q how")["input_ids"]
    with pytest.raises(PromptError, match="must be a string, got 5"):
        make(type("Wrong", (Quiet,), {name: lambda self, item: 5}), prompts=[{"question": "why"}])


def test_a_prompt_that_came_as_a_list_is_one_too():
    """As get_reward of TextRL before 0.2.15 knew it."""
    item = make(prompts=[["abc", "reference"]]).input_item
    assert (item[0], item[1], item["input"]) == ("abc", "reference", "abc")
    with pytest.raises(KeyError):
        item["other"]


def test_stop_tokens_may_be_changed_at_any_time():
    env = make(compare_sample=1)
    env.gen_stop_toks.append("b")
    env.reset()
    assert not env.step([A])[2] and env.step([B])[2]
    env.stop_also_at({C, EOS})
    assert env.gen_stop_toks == [TOKENIZER.eos_token, "b", "c"]


def test_sentences_keep_the_space_between_prompt_and_response():
    tokenizer = metaspace()
    heard = []
    env = TextRLEnv(
        None,
        tokenizer,
        ["a b"],
        max_length=2,
        compare_sample=1,
        reward=lambda items, texts: heard.extend(texts) or [0.0],
    )
    env.step([4]), env.step([3])
    assert heard == [" c b"]


# --------------------------------------------------------------------------------- special tokens


def thinking():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    return tokenizer, tokenizer.convert_tokens_to_ids("<think>")


@pytest.mark.parametrize("whole_rollout", [True, False])
@pytest.mark.parametrize(
    ("skip", "tokens", "texts"),
    [
        (False, [["<think>", "a", "</s>"], ["b", "<pad>", "<think>"]], ["<think>a", "b<think>"]),
        (True, [["a"], ["b"]], ["a", "b"]),
    ],
)
def test_both_forms_of_reward_see_special_tokens_or_neither_does(skip, tokens, texts, whole_rollout):
    """<think> is for rewards. Padding and the end are tokens, which TextRL's form lists, and no text."""
    tokenizer, think = thinking()
    rows = [[think, A, EOS], [B, 1, think]]
    heard = []

    def sentences(items, texts):
        heard.append(list(texts))
        return [0.0] * len(texts)

    def steps(input_item, predicted_list, finish):
        if finish:
            heard.append(predicted_list)
        return [0.0] * len(predicted_list)

    for reward, expected in ((sentences, texts), (steps, tokens)):
        env = TextRLEnv(
            None, tokenizer, ["c"], max_length=3, compare_sample=2, reward=reward, skip_special_tokens=skip
        )
        if whole_rollout:
            prompt = torch.tensor(env.prompts()[0].ids)
            decoded = [decode_response(tokenizer, prompt.tolist(), row, ended=row[-1] == EOS) for row in rows]
            zeros = torch.zeros(3)
            trajectories = [
                Trajectory(prompt, torch.tensor(row), zeros, zeros, row[-1] == EOS, text)
                for row, text in zip(rows, decoded, strict=True)
            ]
            batch = RolloutBatch.from_trajectories(trajectories, temperature=1.0)
            per_token_rewards(env, [env.item("c")], batch)
        else:
            for action in zip(*rows, strict=True):
                *_, info = env.step(list(action))
            assert info["predicted_str"] == ["<think>a</s>", "b<pad><think>"]
        assert heard.pop() == expected
    assert not heard


def test_spaces_of_gym_and_vector_environments_of_pfrl():
    with contextlib.redirect_stderr(io.StringIO()):
        from pfrl.envs import SerialVectorEnv

    env = make()
    assert env.action_space.n == len(env.actions) == len(TOKENIZER) and env.actions[A] == "a"
    several = SerialVectorEnv([make(), make()])
    observations = several.reset()
    assert len(observations) == 2 and observations[0].max_new_tokens == 100
    several.close()


@pytest.mark.parametrize("value", [True, np.float64(2)])
def test_what_is_no_number_of_samples(value):
    with pytest.raises(ConfigError, match="whole number"):
        make(compare_sample=value)


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert make(max_length=np.int64(4)).env_max_length == 4
