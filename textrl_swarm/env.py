"""TextRL's environment: prompts and the user's reward function, with the gym interface of four values per step.

`get_reward` is the one method to override. The environment needs only the tokenizer; it never runs the model, and what it shows the agent
are token ids. Knows nothing about policies or training.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from textrl_swarm.errors import ConfigError, PromptError
from textrl_swarm.rewards import RewardFunction, Rewards, SentenceReward, StepReward, is_sentence_reward

logger = logging.getLogger(__name__)


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
        reward_function: asks the reward and checks what it returns.
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
        for name, value in (("max_length", max_length), ("compare_sample", compare_sample)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
        self.model, self.tokenizer = model, tokenizer
        self.items = _items(observation_input)
        self.observation_space = observation_input
        self.env_max_length, self.compare_sample = max_length, compare_sample
        self.unfreeze_layer_from_past = unfreeze_layer_from_past
        self.stop_ids = {getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")} - {None}
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
        self.reward_function = RewardFunction(self._get_reward if reward is None else reward, compare_sample, reward_timeout_s, name=name)
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

    def reset(self, input_item: dict | str | None = None) -> list[list[int]]:
        """Starts an episode; returns its observation: `compare_sample` lists of token ids."""
        self.input_item = self.draw(1)[0] if input_item is None else _items([input_item])[0]
        self._prompt_ids = self.encode(self.input_item)
        self.predicted: list[list[str]] = [[] for _ in range(self.compare_sample)]
        self.predicted_ids: list[list[int]] = [[] for _ in range(self.compare_sample)]
        self.predicted_end = [False] * self.compare_sample
        return self._observation()

    def step(self, action) -> tuple[list[list[int]], Rewards, bool, dict]:
        """One token for each sample (tokens for samples that have ended are ignored).

        Returns:
            observation, rewards (one per sample), whether all samples have ended, {"predicted_str": the texts so far}.

        Raises:
            ConfigError: the episode has ended, or the action has another shape. RewardError.
        """
        if all(self.predicted_end):
            raise ConfigError("this episode has ended; call env.reset() for the next one")
        actions = np.asarray(action)
        if actions.size != self.compare_sample or not np.issubdtype(actions.dtype, np.integer) or actions.min() < 0:
            raise ConfigError(f"an action has one token id per sample ({self.compare_sample}), got {action!r}")
        actions = actions.reshape(-1)
        for i, token in enumerate(actions.tolist()):
            if self.predicted_end[i]:
                continue
            self.predicted_ids[i].append(token)
            self.predicted[i].append(self.token_string(token))
            self.predicted_end[i] = token in self.stop_ids or len(self.predicted_ids[i]) >= self.env_max_length
        done = all(self.predicted_end)
        told = {"predicted_str": [self.tokenizer.convert_tokens_to_string(tokens) for tokens in self.predicted]}
        return self._observation(), self._reward(done), done, told

    def final_rewards(self) -> Rewards:
        """What the samples so far are worth if they end here, for an episode that is cut short."""
        return self._reward(True)

    def _reward(self, done: bool) -> Rewards:
        if self.reward_function.is_sentence:
            if not done:
                return Rewards([0.0] * self.compare_sample)
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.predicted_ids]
            return Rewards(self.reward_function.of_sentences([self.input_item] * self.compare_sample, texts))
        if self.reward_on_finish_only and not done:
            return Rewards([0.0] * self.compare_sample)
        return self.reward_function(self.input_item, [list(tokens) for tokens in self.predicted], done)

    def seed(self, seed: int) -> None:
        """Fixes the order in which prompts are drawn."""
        self._rng, self._upcoming = random.Random(seed), []

    # ------------------------------------------------------------------ for whole-batch collection

    def draw(self, count: int) -> list[dict]:
        """Prompts in random order, every one once before any comes again."""
        while len(self._upcoming) < count:
            self._upcoming += self._rng.sample(range(len(self.items)), len(self.items))
        drawn, self._upcoming = self._upcoming[:count], self._upcoming[count:]
        return [self.items[i] for i in drawn]

    def state_dict(self) -> dict:
        """The order in which prompts will be drawn, as plain values."""
        return {"upcoming": list(self._upcoming), "random": self._rng.getstate()}

    def load_state_dict(self, state: dict) -> None:
        """Continues the order of `state_dict`, from JSON too. Prompts that there are no longer are passed over."""
        version, numbers, gauss = state["random"]
        self._rng.setstate((version, tuple(numbers), gauss))
        self._upcoming = [i for i in state["upcoming"] if i < len(self.items)]

    def encode(self, item: dict) -> list[int]:
        """Token ids of a prompt. Raises PromptError when there are none."""
        ids = self.tokenizer(self.gat_obs_input(item))["input_ids"]
        if not ids:
            raise PromptError(f"prompt {item['input']!r} has no tokens; a policy needs at least one to continue")
        return ids

    def token_string(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token) or ""

    def _observation(self) -> list[list[int]]:
        return [self._prompt_ids + ids for ids in self.predicted_ids]


def _items(observation_input: Iterable) -> list[dict]:
    listed = isinstance(observation_input, Iterable) and not isinstance(observation_input, (str, bytes, Mapping))
    entries = list(observation_input) if listed else []
    if not entries:
        raise PromptError(
            f"observation_input must be a list with at least one prompt, e.g. [{{'input': 'The soup is'}}], got {observation_input!r}"
        )
    items = []
    for i, entry in enumerate(entries):
        item = {"input": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else None
        if item is None and isinstance(entry, Sequence) and len(entry) > 0 and isinstance(entry[0], str):
            item = {"input": entry[0], "extra": list(entry[1:])}
        if item is None or not isinstance(item.get("input"), str) or item["input"] == "":
            raise PromptError(f"prompt {i} has no text: {entry!r}; use {{'input': 'some text'}}")
        items.append(item)
    return items
