"""Prompts and the user's reward as episodes: what rollouts are drawn from and rewarded by.

An episode is `compare_sample` responses to one prompt, a token of each per env step. The environment needs
only the tokenizer; it never runs the model, and what it shows the agent are token ids. Knows nothing about
policies or training; `textrl/env.py` gives it TextRL's and gym's interface.
"""

from __future__ import annotations

import contextlib
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textrl_swarm.errors import ConfigError, PromptError
from textrl_swarm.models.texts import decode_response, encode_prompt, special_ids, stop_ids, token_id
from textrl_swarm.rewards.functions import RewardFunction, Rewards, SentenceReward, StepReward
from textrl_swarm.rewards.isolation import private_copy
from textrl_swarm.types import Item, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Observation(list[list[int]]):
    """What an agent sees: per sample the token ids of prompt and response so far, and facts about the
    episode.

    Attributes:
        terminated: (C,) bool, whether a stop token has ended the sample.
        max_new_tokens: most tokens of a response.
        final_rewards: asks the reward as if the samples ended here; None in a copy that was sent to another
            process.
    """

    def __init__(
        self,
        rows: Iterable[list[int]],
        terminated: Iterable[bool],
        max_new_tokens: int,
        final_rewards: Callable[[], Rewards] | None,
    ):
        super().__init__(rows)
        self.terminated = list(terminated)
        self.max_new_tokens = max_new_tokens
        self.final_rewards = final_rewards

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self), self.terminated, self.max_new_tokens, None)


class PromptEnv:
    """Episodes over a list of prompts.

    Args:
        tokenizer: turns prompts into token ids and ids into token strings.
        items: the prompts' dicts; each call of the reward gets copies, see `private_copy`.
        reward: a step reward `f(input_item, predicted_list, finish)`, or a sentence reward `f(items, texts)`,
            which is asked once per rollout.
        max_length: most tokens per response.
        compare_sample: responses to the same prompt in one episode.
        reward_timeout_s: a reward that takes longer is an error; None = wait for ever.
        reward_name: for messages; None = the reward's own.
        skip_special_tokens: rewards of either form see no special tokens. False = they see them (<think>,
            where that is one); markers such as the end token are tokens of a step reward, and no text.

    Attributes:
        gen_stop_toks: tokens that end a response, as strings or ids; may be changed at any time.
        input_item: the prompt's dict of the episode under way. While a rollout is rewarded, this and the
            next two belong to the episode that the reward is asked about.
        predicted: per sample its token strings so far.
        predicted_end: per sample whether it has ended.
        reward_on_finish_only: set it on a subclass whose reward gives nothing before the end; the reward is
            then asked once per episode.

    Raises:
        ConfigError: an impossible length, or a reward that takes the wrong parameters.
    """

    reward_on_finish_only = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[Item],
        reward: StepReward | SentenceReward,
        *,
        max_length: int = 100,
        compare_sample: int = 2,
        reward_timeout_s: float | None = None,
        reward_name: str | None = None,
        skip_special_tokens: bool = False,
    ):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.env_max_length = _count("max_length", max_length)
        self.compare_sample = _count("compare_sample", compare_sample)
        stop_tokens = (getattr(tokenizer, "sep_token", None), getattr(tokenizer, "eos_token", None))
        self.gen_stop_toks: list[str | int] = [token for token in stop_tokens if token]
        self._offered = stop_ids(tokenizer)  # what gen_stop_toks held once
        self._ends: frozenset[int] | None = None  # inside `ending_at`
        self._items = [private_copy(item) for item in items]  # the user's own are not changed
        self._ids: dict[str, tuple[int, ...]] = {}  # text -> token ids: every text is tokenized once
        self._rng = random.Random(0)
        self._upcoming: list[int] = []  # indices into items
        self._rewards = RewardFunction(reward, self.compare_sample, reward_timeout_s, name=reward_name)

    # --------------------------------------------------------------------------------------- prompts

    def prompt_text(self, item: Item) -> str:
        """The text that the model continues."""
        return item["input"]

    def encode(self, item: Item) -> Prompt:
        """A copy of a prompt's dict, with its token ids. Raises PromptError when it has none."""
        item = private_copy(item)
        with self._rewards.settings.in_use():
            text = self.prompt_text(item)
        if not isinstance(text, str):
            raise PromptError(
                f"the text of prompt {item!r} must be a string, got {text!r}; see get_obs_input"
            )
        if text not in self._ids:
            self._ids[text] = tuple(encode_prompt(self.tokenizer, text))
        if not self._ids[text]:
            raise PromptError(f"prompt {text!r} has no tokens; a policy needs at least one to continue")
        return Prompt(item, self._ids[text])

    def prompts(self) -> list[Prompt]:
        """All prompts, in the order in which they were given."""
        return [self.encode(item) for item in self._items]

    def draw(self, count: int) -> list[Prompt]:
        """Prompts in random order, every one once before any comes again."""
        while len(self._upcoming) < count:
            self._upcoming += self._rng.sample(range(len(self._items)), len(self._items))
        drawn = self._upcoming[:count]
        self._upcoming = self._upcoming[count:]
        return [self.encode(self._items[i]) for i in drawn]

    def seed(self, seed: int) -> None:
        """Fixes the order in which prompts are drawn."""
        self._rng = random.Random(seed)
        self._upcoming = []

    def state_dict(self) -> dict[str, Any]:
        """The order in which prompts will be drawn, as plain values."""
        return {"upcoming": list(self._upcoming), "random": self._rng.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the order of `state_dict`, from JSON too. Indices of prompts that no longer exist are
        dropped.
        """
        version, numbers, gauss = state["random"]
        self._rng.setstate((version, tuple(numbers), gauss))
        self._upcoming = [i for i in state["upcoming"] if i < len(self._items)]

    # -------------------------------------------------------------------------------------- episodes

    def reset(self, input_item: Any = None) -> Observation:
        """Starts an episode with a prompt's dict, or with the next prompt to be drawn."""
        prompt = self.draw(1)[0] if input_item is None else self.encode(self.item(input_item))
        self.input_item = prompt.item
        self._prompt_ids = list(prompt.ids)
        self.predicted: list[list[str]] = [[] for _ in range(self.compare_sample)]
        self.predicted_ids: list[list[int]] = [[] for _ in range(self.compare_sample)]
        self.predicted_end = [False] * self.compare_sample
        self._terminated = [False] * self.compare_sample
        return self._observation()

    def item(self, prompt: Any) -> Item:
        """A prompt in any form that `reset` takes, as the dict that rewards get."""
        return prompt

    def step(self, action: Any) -> tuple[Observation, Rewards, bool, dict[str, Any]]:
        """One token for each sample; tokens for samples that have ended are ignored.

        Returns:
            Observation, rewards (one per sample), whether all samples have ended, and a dict whose
            "predicted_str" holds the texts so far.

        Raises:
            ConfigError: the episode has ended, or the action has another shape.
            RewardError: the reward failed.
        """
        rewards, done = self._advance(action)
        texts = [self.tokenizer.convert_tokens_to_string(tokens) for tokens in self.predicted]
        return self._observation(), rewards, done, {"predicted_str": texts}

    def play(self, action: Any) -> tuple[Rewards, bool]:
        """Like `step`, but returns only (rewards, done) and skips building texts and observations.

        A `step` that a subclass overrides runs in full.
        """
        if type(self).step is not PromptEnv.step:
            with self._rewards.settings.in_use():
                _, rewards, done, _ = self.step(action)
            return rewards, done
        return self._advance(action)

    def _advance(self, action: Any) -> tuple[Rewards, bool]:
        if all(self.predicted_end):
            raise ConfigError("this episode has ended; call env.reset() for the next one")
        actions = np.asarray(action)
        is_whole = np.issubdtype(actions.dtype, np.integer)
        if actions.size != self.compare_sample or not is_whole or actions.min() < 0:
            raise ConfigError(
                f"an action has one token id per sample ({self.compare_sample}), got {action!r}"
            )
        ended = list(self.predicted_end)
        stop_ids = self.stop_ids
        for i, token in enumerate(actions.reshape(-1).tolist()):
            if ended[i]:
                continue
            self.predicted_ids[i].append(token)
            self.predicted[i].append(self.token_string(token))
            self._terminated[i] = token in stop_ids
            self.predicted_end[i] = self._terminated[i] or len(self.predicted_ids[i]) >= self.env_max_length
        done = all(self.predicted_end)
        rewards = self._reward(done)
        if not done:  # a sample that has ended earns nothing more until the end of the episode
            rewards = Rewards(0.0 if over else reward for over, reward in zip(ended, rewards, strict=True))
        return rewards, done

    def _observation(self) -> Observation:
        rows = [self._prompt_ids + ids for ids in self.predicted_ids]
        return Observation(rows, self._terminated, self.env_max_length, self.final_rewards)

    @contextlib.contextmanager
    def ending_at(self, ids: Iterable[int]) -> Iterator[None]:
        """Inside, these tokens end a sample, and not `gen_stop_toks`."""
        before = self._ends
        self._ends = frozenset(ids)
        try:
            yield
        finally:
            self._ends = before

    @contextlib.contextmanager
    def shortened(self, length: int | None) -> Iterator[None]:
        """Inside, episodes end after at most `length` env steps, with their final reward."""
        before = self.env_max_length
        self.env_max_length = min(before, length or before)
        try:
            yield
        finally:
            self.env_max_length = before

    # --------------------------------------------------------------------------------------- rewards

    def final_rewards(self) -> Rewards:
        """The rewards as if the samples ended here, for an episode that is cut short."""
        return self._reward(True)

    def _reward(self, done: bool) -> Rewards:
        nothing = Rewards([0.0] * self.compare_sample)
        if self.asks_sentences:
            if not done:
                return nothing
            samples = zip(self.predicted_ids, self._terminated, strict=True)
            texts = [self.response_text(self._prompt_ids, ids, ended) for ids, ended in samples]
            return Rewards(self.sentence_rewards([self.input_item] * self.compare_sample, texts))
        if self.reward_on_finish_only and not done:
            return nothing
        unchanged = self.input_item
        self.input_item = private_copy(unchanged)  # which the reward may change
        try:
            return self._rewards(self.input_item, self._shown_tokens(), done)
        finally:
            self.input_item = unchanged

    def _shown_tokens(self) -> list[list[str]]:
        """Per sample the token strings that a step reward gets."""
        if not self.skip_special_tokens:
            return [list(tokens) for tokens in self.predicted]
        hidden = special_ids(self.tokenizer)
        samples = zip(self.predicted, self.predicted_ids, strict=True)
        return [[t for t, i in zip(*sample, strict=True) if i not in hidden] for sample in samples]

    def response_text(self, prompt: Sequence[int], response: Sequence[int], ended: bool) -> str:
        """The text of a response that a sentence reward gets; `ended`: by its last token."""
        skip = self.skip_special_tokens
        return decode_response(self.tokenizer, prompt, response, ended=ended, skip_special_tokens=skip)

    @property
    def asks_sentences(self) -> bool:
        """Whether the reward is of the form `f(items, texts)`."""
        return self._rewards.is_sentence

    def sentence_rewards(self, items: Sequence[Item], texts: Sequence[str]) -> list[float]:
        """Asks a sentence reward about any number of responses."""
        return self._rewards.of_sentences(items, texts)

    # ---------------------------------------------------------------------------------------- tokens

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids of `gen_stop_toks`. Raises ConfigError for a string that is not one token."""
        if self._ends is not None:
            return self._ends
        return frozenset(token_id(self.tokenizer, token) for token in self.gen_stop_toks)

    def stop_also_at(self, ids: Iterable[int]) -> None:
        """Adds to `gen_stop_toks`: a model may name end tokens that its tokenizer does not.

        An id is added once; what is removed from `gen_stop_toks` afterwards stays removed.
        """
        new = frozenset(ids) - self._offered
        self._offered |= new
        for token in sorted(new - self.stop_ids):
            text = self.token_string(token)
            is_its_name = text != "" and self.tokenizer.convert_tokens_to_ids(text) == token
            self.gen_stop_toks.append(text if is_its_name else token)

    def token_string(self, token: int) -> str:
        """The token with this id; "" when the tokenizer has none."""
        return self.tokenizer.convert_ids_to_tokens(token) or ""


def _count(name: str, value: object) -> int:
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if count < 1:
        raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
    return count
