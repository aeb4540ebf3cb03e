"""TextRL's environment: the class whose `get_reward` users override, with the gym interface of four values
per step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from textrl_swarm.errors import ConfigError, PromptError
from textrl_swarm.learning.env import Observation, PromptEnv
from textrl_swarm.learning.prompts import chat_hint, missing_input, require_no_rival, rows
from textrl_swarm.rewards.functions import SentenceReward, StepReward, is_sentence_reward
from textrl_swarm.types import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PromptForm = dict[str, Any] | str | Sequence[str]

_A_PROMPT = "; use {'input': 'some text'}"


class TextRLEnv(PromptEnv):
    """Episodes of `compare_sample` responses to one prompt, a token of each per env step.

    Args:
        model: accepted as in TextRL, not used; may be None.
        tokenizer: turns prompts into token ids and ids into token strings.
        observation_input: prompts: dicts with an "input" (other keys reach get_reward unchanged), texts, or
            lists that begin with the text; or a table of pandas, polars, pyarrow or datasets with a column
            "input".
        max_length: most tokens per response.
        compare_sample: responses to the same prompt in one episode.
        unfreeze_layer_from_past: train only the last n blocks (0 = all); TextRLActor reads it.
        reward: instead of overriding `get_reward`: a step reward `f(input_item, predicted_list, finish)`, or
            a sentence reward `f(items, texts)` that is asked once per rollout; rows come prompt by prompt,
            `compare_sample` samples each.
        reward_timeout_s: a reward that takes longer is an error; None = wait for ever.
        skip_special_tokens: rewards of either form see no special tokens. False = they see them (<think>,
            where that is one); markers such as the end token are tokens of a step reward, and no text.

    Attributes:
        gen_stop_toks: tokens that end a response, as strings or ids; may be changed at any time.
        input_item: the prompt's dict of the episode under way. While a rollout is rewarded, this and the
            next two belong to the episode that the reward is asked about.
        predicted: per sample its token strings so far.
        predicted_end: per sample whether it has ended.
        reward_on_finish_only: set it on a subclass whose `get_reward` gives nothing before the end; it is
            then asked once per episode.

    Raises:
        PromptError: no prompts, or one without text.
        ConfigError: an impossible length, or a reward that takes the wrong parameters.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        observation_input: Sequence[PromptForm] = (),
        max_length: int = 100,
        compare_sample: int = 2,
        unfreeze_layer_from_past: int = 0,
        *,
        reward: StepReward | SentenceReward | None = None,
        reward_timeout_s: float | None = None,
        skip_special_tokens: bool = False,
    ):
        self.model = model
        self.observation_space = observation_input
        self.unfreeze_layer_from_past = unfreeze_layer_from_past
        overridden = type(self).get_reward is not TextRLEnv.get_reward
        if reward is not None and overridden:
            raise ConfigError(f"give either reward= or a {type(self).__name__}.get_reward, not both")
        if overridden and is_sentence_reward(self.get_reward):
            raise ConfigError(
                f"{type(self).__name__}.get_reward takes (input_item, predicted_list, finish); "
                "pass a function (items, texts) as reward="
            )
        super().__init__(
            tokenizer,
            self._as_items(observation_input),
            self._get_reward if reward is None else reward,
            max_length=max_length,
            compare_sample=compare_sample,
            reward_timeout_s=reward_timeout_s,
            reward_name="get_reward" if reward is None else None,
            skip_special_tokens=skip_special_tokens,
        )
        if reward is None and not overridden:
            logger.warning(
                "get_reward is not overridden: every reward is 0 and nothing will be learned; "
                "subclass TextRLEnv or pass reward="
            )
        self.reset()

    # --------------------------------------------------------------------------- what users override

    def get_reward(self, input_item: Item, predicted_list: list[list[str]], finish: bool) -> Any:
        """The user's reward, asked after every token.

        Args:
            input_item: the prompt's dict, e.g. {"input": "The soup is"}.
            predicted_list: per sample, the token strings so far, the end token included;
                `tokenizer.convert_tokens_to_string(predicted_list[0])` makes a text.
            finish: True once all samples have ended. Rewards given then go to each sample's own last token;
                rewards given before go to the token just chosen.

        Returns:
            A number, or a list with one per sample.
        """
        return [0.0] * self.compare_sample

    def _get_reward(self, input_item: Item, predicted_list: list[list[str]], finish: bool) -> Any:
        # looked up at each call: notebooks assign env.get_reward
        return self.get_reward(input_item, predicted_list, finish)

    def get_obs_input(self, input_item: Item) -> str:
        """The text given to the model."""
        return input_item["input"]

    def gat_obs_input(self, input_item: Item) -> str:
        """`get_obs_input` in TextRL's spelling; either may be overridden."""
        return self.get_obs_input(input_item)

    def prompt_text(self, item: Item) -> str:
        """The text of a prompt, by the user's own method."""
        return self.gat_obs_input(item)

    # ------------------------------------------------------------------------------- gym's interface

    @cached_property
    def actions(self) -> list[str]:
        """Token strings by token id."""
        return self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))

    @property
    def action_space(self) -> Any:
        """gym's space of one sample's tokens; an action has `compare_sample` of them."""
        from textrl_swarm.textrl.door import Discrete

        return Discrete(len(self.tokenizer))

    def close(self) -> None:
        """Does nothing; pfrl's vector environments call it."""

    def reset(self, input_item: PromptForm | None = None) -> Observation:
        """Starts an episode; returns its observation: `compare_sample` lists of token ids."""
        return super().reset(input_item)

    def item(self, prompt: PromptForm) -> Item:
        """A prompt in any of the forms of `observation_input` as the dict that rewards get. Raises
        PromptError.
        """
        return self._as_items([prompt])[0]

    def _as_items(self, observation_input: Iterable[Any]) -> list[Item]:
        methods = ("get_obs_input", "gat_obs_input")
        knows_text = any(getattr(type(self), name) is not getattr(TextRLEnv, name) for name in methods)
        return _items(observation_input, any_dict=knows_text)


class _ListedPrompt(dict[Any, Any]):
    """A prompt that came as a list, which early versions of TextRL passed to get_reward: item[0], item[1] ...
    work.
    """

    def __missing__(self, key: object) -> Any:
        if isinstance(key, int):
            return [self["input"], *self["extra"]][key]
        raise KeyError(key)


def _items(observation_input: Iterable[Any], *, any_dict: bool) -> list[Item]:
    """Prompts as dicts with an "input"; with `any_dict` the environment knows where in a dict the text is."""
    entries = rows(observation_input, "observation_input")
    if not entries:
        raise PromptError(
            "observation_input must be a list with at least one prompt, e.g. [{'input': 'The soup is'}], "
            f"got {observation_input!r}"
        )
    items = []
    for i, entry in enumerate(entries):
        item = _as_dict(entry)
        if item is None:
            raise PromptError(f"prompt {i} has no text: {entry!r}{chat_hint(entry) or _A_PROMPT}")
        if not any_dict:
            if "input" not in item:
                raise PromptError(f"prompt {i} has no text: it {missing_input(item)}")
            if not isinstance(item["input"], str) or item["input"] == "":
                raise PromptError(f"prompt {i} has no text: {entry!r}{chat_hint(entry) or _A_PROMPT}")
            require_no_rival(item, f"prompt {i}")
        items.append(item)
    return items


def _as_dict(entry: Any) -> Item | None:
    if isinstance(entry, str):
        return {"input": entry}
    if isinstance(entry, dict):
        return entry
    if isinstance(entry, Mapping):
        return dict(entry)
    if isinstance(entry, Sequence) and len(entry) > 0 and isinstance(entry[0], str):
        return _ListedPrompt({"input": entry[0], "extra": list(entry[1:])})
    return None
