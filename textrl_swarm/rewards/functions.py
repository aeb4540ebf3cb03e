"""The user's reward function in either of its two forms, and the checks of what comes back.

A step reward is TextRL's: `f(input_item, predicted_list, finish)`, asked after every token. A sentence reward
is `f(items, texts)`, asked once per rollout for all responses together. Knows nothing about models or token
ids.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from textrl_swarm.errors import ConfigError, RewardError, TextRLSwarmError
from textrl_swarm.rewards.isolation import private_copy, settings_of
from textrl_swarm.rewards.time_limit import TookTooLong, within
from textrl_swarm.types import Item

logger = logging.getLogger(__name__)

StepReward = Callable[[Item, list[list[str]], bool], object]
SentenceReward = Callable[[Sequence[Item], Sequence[str]], Sequence[float]]

FORMS = (
    "a reward is either f(input_item, predicted_list, finish), asked after every token, "
    "or f(items, texts), asked once for all responses of a rollout"
)
_MAX_TEXT = 60  # characters of a prompt, response or value in a message
_MAX_ERROR = 500  # characters of a reward's exception in a message
# What a reward may raise without ending the program; Ctrl-C comes from the user, not from the reward.
_REWARD_ERRORS = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)
_LARGEST_REWARD = 3.4e38  # rewards are kept as float32


class Rewards(list[float]):
    """One float per sample of an env step.

    Adds to a number as its mean, so that `R += reward` in a user's loop keeps the episode's score of one
    sample.
    """

    def __radd__(self, other: float) -> float:
        return other + float(self)

    def __float__(self) -> float:
        return sum(self) / len(self)


def is_sentence_reward(reward: Callable[..., Any]) -> bool:
    """Tells the two forms apart by the number of positional parameters.

    A parameter called `finish` makes a step reward, even if it has a default.

    Raises:
        ConfigError: neither form, or the form of another trainer (TRL, trlX, OpenRLHF, verl).
    """
    if not callable(reward):
        raise ConfigError(f"{reward!r} is not callable; {FORMS}")
    if inspect.isclass(reward):
        name = reward_name(reward)
        raise ConfigError(f"{name} is a class; give an object of it, made with {name}(...); {FORMS}")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the parameters of {reward_name(reward)} cannot be read ({error}); {FORMS}"
        ) from error
    _require_our_form(reward, signature)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    takes_any_number = inspect.Parameter.VAR_POSITIONAL in kinds
    wants_three = not _takes(signature, 2) or takes_any_number or "finish" in signature.parameters
    if _takes(signature, 3) and wants_three:
        return False
    if _takes(signature, 2):
        return True
    raise ConfigError(f"{reward_name(reward)}{signature} has the wrong parameters; {FORMS}")


# Parameters of other trainers' reward functions -> what stands for them in a sentence reward. All their other
# parameters are columns of the data.
_WHOLE = '[item["input"] + text for item, text in zip(items, texts)]'
_PROMPTS = '[item["input"] for item in items]'
_MEANINGS = {
    **dict.fromkeys(("completions", "outputs"), "texts"),
    **dict.fromkeys(("prompts", "prompt"), _PROMPTS),
    **dict.fromkeys(("queries", "samples"), _WHOLE),
}
_FROM_THE_TRAINER = ("completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")  # in TRL


def _require_our_form(reward: Callable[..., Any], signature: inspect.Signature) -> None:
    """Raises ConfigError for a function made for another trainer, and shows how to wrap it."""
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind not in several]
    trainer = _made_for(names, takes_any_name=inspect.Parameter.VAR_KEYWORD in kinds)
    if trainer is None:
        return
    name = getattr(reward, "__name__", "reward")
    names = [name for name in names if name not in _FROM_THE_TRAINER]
    if trainer == "verl":  # asks about one response at a time
        values = {one: "text" if one == "solution_str" else f'item["{one}"]' for one in names}
        ending = " for item, text in zip(items, texts)]"
    else:
        values = {one: _MEANINGS.get(one, f'[item["{one}"] for item in items]') for one in names}
        ending = ""
    arguments = ", ".join(f"{one}={value}" for one, value in values.items())
    raise ConfigError(
        f"{name}{signature} has the parameters of a reward for {trainer}; {FORMS}. To use it here, wrap it:\n"
        f"def score(items, texts):\n    return {'[' if ending else ''}{name}({arguments}){ending}"
    )


def _made_for(names: list[str], *, takes_any_name: bool) -> str | None:
    """The trainer that calls functions with these parameters; `f(items, completions)` is ours."""
    given = set(names)
    if "solution_str" in given:
        return "verl"
    if {"queries", "prompts"} <= given:
        return "OpenRLHF"
    if "samples" in given and ("outputs" in given or takes_any_name):
        return "trlX"
    is_pair = len(names) == 2 and names[1] == "completions" and names[0] not in ("prompts", "prompt")
    is_own = is_pair and (names[0] == "items" or not takes_any_name)
    return "TRL" if "completions" in given and not is_own else None


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


class RewardFunction:
    """Asks a reward of either form, and checks what comes back.

    A step reward may return one number per sample, or a number or list of length 1, which then holds for
    every sample (with a warning, once).

    Args:
        reward: a step reward or a sentence reward.
        num_samples: responses to one prompt; None = not known, for sentence rewards only.
        timeout_s: of one call; None = wait for ever.
        name: for messages; None = the reward's own.

    Attributes:
        settings: process-wide settings that the reward changes; they hold in its calls only.

    Raises:
        ConfigError: the reward takes other parameters, or an impossible timeout.
    """

    def __init__(
        self,
        reward: StepReward | SentenceReward,
        num_samples: int | None,
        timeout_s: float | None = None,
        *,
        name: str | None = None,
    ):
        self.is_sentence = is_sentence_reward(reward)
        if timeout_s is not None:
            is_time = is_number(timeout_s) and not isinstance(timeout_s, bool) and 0 < timeout_s < math.inf
            if not is_time:
                raise ConfigError(
                    f"reward_timeout_s must be > 0 seconds, or None to wait for ever; got {timeout_s!r}"
                )
        self.settings = settings_of(reward)
        self._reward = reward
        self._num_samples = num_samples
        self._timeout_s = timeout_s
        self._name = name or reward_name(reward)
        self._warned: set[str] = set()

    def __call__(self, item: Item, predicted: list[list[str]], finish: bool) -> Rewards:
        """Asks a step reward: one finite float per sample.

        Raises:
            RewardError: the function raised, or returned something else; names the prompt and what came back.
        """
        count = self._num_samples or len(predicted)
        samples = ", ".join(repr(_short("".join(tokens))) for tokens in predicted)
        where = f"for prompt {_short(item.get('input'))!r} (samples so far: {samples})"
        try:
            value = self._within_time(where, item, predicted, finish)
        except TextRLSwarmError:
            raise
        except _REWARD_ERRORS as error:
            if finish or not isinstance(error, UnboundLocalError):
                raise self._raised(error, where) from error
            unset = error.name or "its result"
            self._warn_once(f"{self._name} left {unset} unset before the end of a response; that counts as 0")
            value = [0.0] * count
        return Rewards(self._per_sample(value, count, where))

    def of_sentences(self, items: Iterable[Item], texts: Iterable[str]) -> list[float]:
        """Asks a sentence reward: one finite float per response.

        Raises:
            RewardError: the function raised, or returned something else; names the first prompt and sample on
                which the function fails alone, if there is one.
        """
        items = list(items)  # lists, because tokenizers and pipelines take no tuples
        texts = list(texts)
        count = len(texts)
        pairs = zip(items, texts, strict=True)
        places = [self._place(i, item, text, count) for i, (item, text) in enumerate(pairs)]
        together = f"for {count} responses"
        try:
            value = self._of_copies(together, items, texts)
        except TextRLSwarmError:  # too slow, or a sum whose part has already reported where it failed
            raise
        except _REWARD_ERRORS as error:
            guilty, cause = self._guilty(error, items, texts)
            raise self._raised(cause, together if guilty is None else places[guilty]) from cause
        if not isinstance(value, list):
            raise self._error(f"returned {_short(repr(value))} ({type(value).__name__})", together)
        if len(value) != count:
            raise self._error(f"returned {len(value)} rewards", together)
        return [self._number(reward, place) for reward, place in zip(value, places, strict=True)]

    def _place(self, i: int, item: Item, text: str, count: int) -> str:
        sample = (
            f"response {i} of {count}" if self._num_samples is None else f"sample {i % self._num_samples}"
        )
        return f"for prompt {_short(item.get('input'))!r}, {sample} ({_short(text)!r})"

    def _guilty(
        self, error: BaseException, items: list[Item], texts: list[str]
    ) -> tuple[int | None, BaseException]:
        """The first response on which the reward raises alone, and what it raises; None when it takes
        several.

        The search asks about halves, so it costs no more than asking about all responses once more.
        """
        start, stop = 0, len(texts)
        while stop - start > 1:
            middle = (start + stop) // 2
            found = self._failure(items[start:middle], texts[start:middle])
            start, stop = (middle, stop) if found is None else (start, middle)
        alone = self._failure(items[start:stop], texts[start:stop])
        return (None, error) if alone is None else (start, alone)

    def _failure(self, items: list[Item], texts: list[str]) -> BaseException | None:
        try:
            self._of_copies("", items, texts)
        except TextRLSwarmError:  # too slow is another matter
            return None
        except _REWARD_ERRORS as error:
            return error
        return None

    def _of_copies(self, where: str, items: list[Item], texts: list[str]) -> Any:
        """Every response has a copy of its prompt's dict: the reward may change it, and its lists."""
        return self._within_time(where, [private_copy(item) for item in items], list(texts))

    def _per_sample(self, value: object, count: int, where: str) -> list[float]:
        if is_number(value) or (isinstance(value, list) and len(value) == 1):
            if count > 1:
                got = "a list of one" if isinstance(value, list) else "one number"
                self._warn_once(f"{self._name} returned {got} for {count} samples; every sample gets it")
            value = (value if isinstance(value, list) else [value]) * count
        if not isinstance(value, list):
            raise self._error(f"returned {_short(repr(value))} ({type(value).__name__})", where)
        if len(value) != count:
            shown = _short(repr(value))
            raise self._error(f"returned {len(value)} rewards for {count} samples ({shown})", where)
        return [self._number(reward, f"for sample {i} {where}") for i, reward in enumerate(value)]

    def _number(self, reward: Any, where: str) -> float:
        if hasattr(reward, "tolist"):  # of numpy or torch
            reward = reward.tolist()
        # A reward model's logits: one number in brackets.
        while isinstance(reward, list) and len(reward) == 1:
            reward = reward[0]
        if not is_number(reward):
            raise self._error(f"returned {_short(repr(reward))} ({type(reward).__name__})", where)
        if not -_LARGEST_REWARD <= reward <= _LARGEST_REWARD:  # false for NaN, too
            raise self._error(f"returned {_short(reward)}", where)
        return float(reward)

    def _within_time(self, where: str, *arguments: Any) -> Any:
        try:
            return within(self._timeout_s, self._call, *arguments)
        except TookTooLong as error:
            raise RewardError(
                f"{self._name} took longer than reward_timeout_s={self._timeout_s:g} {where}; "
                "make it faster or allow more seconds"
            ) from error

    def _call(self, *arguments: Any) -> Any:
        with self.settings.in_use():
            return _plain(self._reward(*arguments))  # a generator runs here

    def _error(self, what: str, where: str) -> RewardError:
        if self.is_sentence:
            wanted = "one finite number per response"
        else:
            wanted = f"a finite number, or a list with one per sample ({self._num_samples})"
        return RewardError(f"{self._name} {what} {where}; return {wanted}")

    def _raised(self, error: BaseException, where: str) -> RewardError:
        package = Path(__file__).parent.parent
        frames = traceback.extract_tb(error.__traceback__)
        users = [frame for frame in frames if package not in Path(frame.filename).parents]
        line = f"; see {Path(users[0].filename).name}, line {users[0].lineno}" if users else ""
        return _also_as(error, f"{self._name} raised {_short(_repr(error), _MAX_ERROR)} {where}{line}")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _also_as(error: BaseException, message: str) -> RewardError:
    """A RewardError that is also of the user's own class and has its attributes, where the classes can be
    combined.

    So `except` clauses for the user's error catch it too.
    """
    ends_loops = isinstance(error, (StopIteration, StopAsyncIteration))
    if not isinstance(error, Exception) or ends_loops:
        return RewardError(message)
    try:
        members = {"__str__": lambda self: message, "__module__": RewardError.__module__}
        kind: Any = type("RewardError", (RewardError, type(error)), members)
        raised: Any = kind.__new__(kind)
        raised.__dict__.update(vars(error))
        raised.args = (message,)
    except Exception:  # some classes cannot be combined
        return RewardError(message)
    return raised


def reward_name(reward: object) -> str:
    """How messages and logs name a reward."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)


def _short(text: object, most: int = _MAX_TEXT) -> str:
    text = str(text)
    return text if len(text) <= most else text[: most - 3] + "..."


def _repr(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:  # of the user's class
        return type(error).__name__


def _plain(value: Any) -> Any:
    """A list where there is a sequence, of numpy or torch too; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    is_sequence = isinstance(value, (Sequence, Iterator)) and not isinstance(value, (str, bytes))
    return list(value) if is_sequence else value


def is_number(value: object) -> bool:
    """Whether a value is a reward; True and False are, as 1 and 0."""
    return isinstance(value, (int, float))
