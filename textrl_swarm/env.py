"""TextRL's environment: prompts and the user's reward function, with the gym interface of four values per step.

`get_reward` is the one method to override. The environment needs only the tokenizer; it never runs the model, and what it shows the agent
are token ids. Knows nothing about policies or training.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from textrl_swarm.errors import ConfigError, PromptError
from textrl_swarm.rewards import RewardFunction, Rewards, SentenceReward, StepReward, is_sentence_reward
from textrl_swarm.texts import decode_response, encode_prompt

logger = logging.getLogger(__name__)


class Observation(list):
    """What an agent sees: per sample the token ids of prompt and response so far. Also what it has to know of the episode.

    Attributes:
        terminated: (C,) bool, whether a stop token has ended the sample.
        max_new_tokens: most tokens of a response.
        final_rewards: asks what the samples are worth if they end here; None once the observation was sent to another process.
    """

    def __init__(
        self, rows: Iterable[list[int]], terminated: Iterable[bool], max_new_tokens: int, final_rewards: Callable[[], Rewards] | None
    ):
        super().__init__(rows)
        self.terminated, self.max_new_tokens, self.final_rewards = list(terminated), max_new_tokens, final_rewards

    def __reduce__(self):
        return type(self), (list(self), self.terminated, self.max_new_tokens, None)


class TextRLEnv:
    """Episodes of `compare_sample` responses to one prompt, a token of each per env step.

    Args:
        model: only its name for messages; may be None.
        tokenizer: turns prompts into token ids and ids into token strings.
        observation_input: prompts: dicts with an "input" (other keys reach get_reward untouched), texts, or lists that begin with the text.
        max_length: most tokens per response.
        compare_sample: responses to the same prompt in one episode.
        unfreeze_layer_from_past: train only the last n blocks (0 = all); used by TextRLActor.
        reward: instead of overriding `get_reward`: a step reward `f(input_item, predicted_list, finish)`, or a sentence reward
            `f(items, texts)` that is asked once per rollout; rows come prompt by prompt, `compare_sample` samples each.
        reward_timeout_s: a reward that takes longer is an error; None = wait for ever.

    Attributes:
        gen_stop_toks: token strings that end a response; may be changed at any time.
        input_item, predicted, predicted_end: of the episode under way: the prompt's dict, and per sample its token strings and whether it
            has ended. While a rollout is rewarded, those of the episode that `get_reward` is asked about.
        reward_on_finish_only: set it on a subclass whose `get_reward` gives nothing before the end; it is then asked once per episode.

    Raises:
        PromptError: no prompts, or one without text.
        ConfigError: an impossible length, or a reward that takes the wrong parameters.
    """

    reward_on_finish_only = False

    def __init__(
        self,
        model,
        tokenizer,
        observation_input: Sequence[dict | str | Sequence[str]] = (),
        max_length: int = 100,
        compare_sample: int = 2,
        unfreeze_layer_from_past: int = 0,
        *,
        reward: StepReward | SentenceReward | None = None,
        reward_timeout_s: float | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self._items = [copy.copy(item) for item in self._as_items(observation_input)]  # the user's own are not changed
        self.observation_space = observation_input
        self.env_max_length, self.compare_sample = _count("max_length", max_length), _count("compare_sample", compare_sample)
        self.unfreeze_layer_from_past = unfreeze_layer_from_past
        self.gen_stop_toks = [t for t in (getattr(tokenizer, "sep_token", None), getattr(tokenizer, "eos_token", None)) if t]
        self._rng = random.Random(0)
        self._upcoming: list[int] = []  # indices into items
        overridden = type(self).get_reward is not TextRLEnv.get_reward
        if reward is not None and overridden:
            raise ConfigError(f"give either reward= or a {type(self).__name__}.get_reward, not both")
        if overridden and is_sentence_reward(self.get_reward):
            raise ConfigError(
                f"{type(self).__name__}.get_reward takes (input_item, predicted_list, finish); pass a function (items, texts) as reward="
            )
        name = "get_reward" if reward is None else None
        self._rewards = RewardFunction(self._get_reward if reward is None else reward, compare_sample, reward_timeout_s, name=name)
        if reward is None and not overridden:
            logger.warning(
                "get_reward is not overridden: every reward is 0 and nothing will be learned; subclass TextRLEnv or pass reward="
            )
        self.reset()

    # ------------------------------------------------------------------ what users override

    def get_reward(self, input_item: dict, predicted_list: list[list[str]], finish: bool):
        """The user's reward, asked after every token.

        Args:
            input_item: the prompt's dict, e.g. {"input": "The soup is"}.
            predicted_list: per sample, the token strings so far, the end token included;
                `tokenizer.convert_tokens_to_string(predicted_list[0])` makes a text.
            finish: True once all samples have ended. Rewards given then go to each sample's own last token; rewards given before go to the
                token just chosen.

        Returns:
            a number, or a list with one per sample.
        """
        return [0.0] * self.compare_sample

    def _get_reward(self, input_item: dict, predicted_list: list[list[str]], finish: bool):
        return self.get_reward(input_item, predicted_list, finish)  # looked up at each call: notebooks assign env.get_reward

    def get_obs_input(self, input_item: dict) -> str:
        """The text given to the model."""
        return input_item["input"]

    def gat_obs_input(self, input_item: dict) -> str:
        """`get_obs_input` in TextRL's spelling; either may be overridden."""
        return self.get_obs_input(input_item)

    # ------------------------------------------------------------------ gym's interface

    @cached_property
    def actions(self) -> list[str]:
        """Token strings by token id."""
        return self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))

    @property
    def action_space(self):
        """Of one sample; an action has `compare_sample` of them."""
        with contextlib.redirect_stderr(io.StringIO()):  # gym prints that it is unmaintained
            from gym.spaces import Discrete
        return Discrete(len(self.tokenizer))

    def close(self) -> None:
        """Nothing is held; pfrl's vector environments call it."""

    def reset(self, input_item: dict | str | None = None) -> Observation:
        """Starts an episode; returns its observation: `compare_sample` lists of token ids."""
        self.input_item = self.draw(1)[0] if input_item is None else copy.copy(self.item(input_item))
        self._prompt_ids = self.encode(self.input_item)
        self.predicted: list[list[str]] = [[] for _ in range(self.compare_sample)]
        self.predicted_ids: list[list[int]] = [[] for _ in range(self.compare_sample)]
        self.predicted_end = [False] * self.compare_sample
        self._terminated = [False] * self.compare_sample
        return self._observation()

    def step(self, action) -> tuple[Observation, Rewards, bool, dict]:
        """One token for each sample (tokens for samples that have ended are ignored).

        Returns:
            observation, rewards (one per sample), whether all samples have ended, {"predicted_str": the texts so far}.

        Raises:
            ConfigError: the episode has ended, or the action has another shape. RewardError.
        """
        rewards, done = self._advance(action)
        told = {"predicted_str": [self.tokenizer.convert_tokens_to_string(tokens) for tokens in self.predicted]}
        return self._observation(), rewards, done, told

    def play(self, action) -> tuple[Rewards, bool]:
        """`step` for whom rewards and the end are enough: texts and observations are made only when `step` is overridden."""
        if type(self).step is not TextRLEnv.step:
            return self.step(action)[1:3]
        return self._advance(action)

    def _advance(self, action) -> tuple[Rewards, bool]:
        if all(self.predicted_end):
            raise ConfigError("this episode has ended; call env.reset() for the next one")
        actions = np.asarray(action)
        if actions.size != self.compare_sample or not np.issubdtype(actions.dtype, np.integer) or actions.min() < 0:
            raise ConfigError(f"an action has one token id per sample ({self.compare_sample}), got {action!r}")
        ended, stop_ids = list(self.predicted_end), self.stop_ids
        for i, token in enumerate(actions.reshape(-1).tolist()):
            if ended[i]:
                continue
            self.predicted_ids[i].append(token)
            self.predicted[i].append(self.token_string(token))
            self._terminated[i] = token in stop_ids
            self.predicted_end[i] = self._terminated[i] or len(self.predicted_ids[i]) >= self.env_max_length
        done = all(self.predicted_end)
        rewards = self._reward(done)
        if not done:  # a sample that has ended is rewarded again at the end of the episode, and for no token in between
            rewards = Rewards(0.0 if over else reward for over, reward in zip(ended, rewards, strict=True))
        return rewards, done

    def final_rewards(self) -> Rewards:
        """What the samples so far are worth if they end here, for an episode that is cut short."""
        return self._reward(True)

    def _reward(self, done: bool) -> Rewards:
        if self._rewards.is_sentence:
            if not done:
                return Rewards([0.0] * self.compare_sample)
            texts = [decode_response(self.tokenizer, self._prompt_ids, ids) for ids in self.predicted_ids]
            return Rewards(self.sentence_rewards([self.input_item] * self.compare_sample, texts))
        if self.reward_on_finish_only and not done:
            return Rewards([0.0] * self.compare_sample)
        return self._rewards(self.input_item, [list(tokens) for tokens in self.predicted], done)

    @property
    def asks_sentences(self) -> bool:
        """Whether the reward is one of the form `f(items, texts)`."""
        return self._rewards.is_sentence

    def sentence_rewards(self, items: Sequence[dict], texts: Sequence[str]) -> list[float]:
        """Asks a sentence reward about any number of responses."""
        return self._rewards.of_sentences([copy.copy(item) for item in items], texts)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids of `gen_stop_toks`."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self.gen_stop_toks))) - {None}

    def stop_also_at(self, ids: Iterable[int]) -> None:
        """Adds to `gen_stop_toks`: a model may name end tokens that its tokenizer does not."""
        self.gen_stop_toks += [self.token_string(token) for token in sorted(frozenset(ids) - self.stop_ids)]

    @contextlib.contextmanager
    def shortened(self, length: int | None) -> Iterator[None]:
        """Inside, episodes end after at most `length` env steps, with their final reward."""
        before = self.env_max_length
        self.env_max_length = min(before, length or before)
        try:
            yield
        finally:
            self.env_max_length = before

    def seed(self, seed: int) -> None:
        """Fixes the order in which prompts are drawn."""
        self._rng, self._upcoming = random.Random(seed), []

    # ------------------------------------------------------------------ for whole-batch collection

    def draw(self, count: int) -> list[dict]:
        """Prompts in random order, every one once before any comes again."""
        while len(self._upcoming) < count:
            self._upcoming += self._rng.sample(range(len(self._items)), len(self._items))
        drawn, self._upcoming = self._upcoming[:count], self._upcoming[count:]
        return [copy.copy(self._items[i]) for i in drawn]  # a reward may change what it gets; the next one gets the prompt as it is

    def prompts(self) -> list[list[int]]:
        """Token ids of every prompt there is."""
        return [self.encode(item) for item in self._items]

    def item(self, prompt: dict | str | Sequence[str]) -> dict:
        """A prompt in any of the forms of `observation_input` as the dict that rewards get. Raises PromptError."""
        return self._as_items([prompt])[0]

    def _as_items(self, observation_input: Iterable) -> list[dict]:
        knows_text = any(getattr(type(self), name) is not getattr(TextRLEnv, name) for name in ("get_obs_input", "gat_obs_input"))
        return _items(observation_input, any_dict=knows_text)

    def state_dict(self) -> dict:
        """The order in which prompts will be drawn, as plain values."""
        return {"upcoming": list(self._upcoming), "random": self._rng.getstate()}

    def load_state_dict(self, state: dict) -> None:
        """Continues the order of `state_dict`, from JSON too. Prompts that there are no longer are passed over."""
        version, numbers, gauss = state["random"]
        self._rng.setstate((version, tuple(numbers), gauss))
        self._upcoming = [i for i in state["upcoming"] if i < len(self._items)]

    def encode(self, item: dict) -> list[int]:
        """Token ids of a prompt. Raises PromptError when there are none."""
        text = self.gat_obs_input(item)
        if not isinstance(text, str):
            raise PromptError(f"the text of prompt {item!r} must be a string, got {text!r}; see get_obs_input")
        ids = encode_prompt(self.tokenizer, text)
        if not ids:
            raise PromptError(f"prompt {text!r} has no tokens; a policy needs at least one to continue")
        return ids

    def token_string(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token) or ""

    def _observation(self) -> Observation:
        rows = [self._prompt_ids + ids for ids in self.predicted_ids]
        return Observation(rows, self._terminated, self.env_max_length, self.final_rewards)


class _Listed(dict):
    """A prompt that came as a list, which early versions of TextRL gave to get_reward as it was: also item[0], item[1] ..."""

    def __missing__(self, key):
        if isinstance(key, int):
            return [self["input"], *self["extra"]][key]
        raise KeyError(key)


def _items(observation_input: Iterable, *, any_dict: bool) -> list[dict]:
    """Prompts as dicts with an "input"; `any_dict`: the environment knows where in a dict the text is."""
    listed = isinstance(observation_input, Iterable) and not isinstance(observation_input, (str, bytes, Mapping))
    entries = list(observation_input) if listed else []
    if not entries:
        raise PromptError(
            f"observation_input must be a list with at least one prompt, e.g. [{{'input': 'The soup is'}}], got {observation_input!r}"
        )
    items = []
    for i, entry in enumerate(entries):
        item = {"input": entry} if isinstance(entry, str) else entry if isinstance(entry, dict) else None
        if item is None and isinstance(entry, Mapping):
            item = dict(entry)
        if item is None and isinstance(entry, Sequence) and len(entry) > 0 and isinstance(entry[0], str):
            item = _Listed({"input": entry[0], "extra": list(entry[1:])})
        if item is None or not (any_dict or (isinstance(item.get("input"), str) and item["input"] != "")):
            raise PromptError(f"prompt {i} has no text: {entry!r}; use {{'input': 'some text'}}")
        items.append(item)
    return items


def _count(name: str, value: object) -> int:
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
    return count
