"""Rewards: the user's function in either of its two forms, how to combine several, and believing only what is a reward.

A step reward is TextRL's: `f(input_item, predicted_list, finish)`, asked after every token. A sentence reward is `f(items, texts)`, asked
once per rollout for all responses together. Knows nothing about models or token ids.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from textrl_swarm.errors import ConfigError, RewardError, TextRLSwarmError
from textrl_swarm.time_limit import TookTooLong, within

logger = logging.getLogger(__name__)

StepReward = Callable[[dict, list[list[str]], bool], object]
SentenceReward = Callable[[Sequence[dict], Sequence[str]], Sequence[float]]

FORMS = (
    "a reward is either f(input_item, predicted_list, finish), asked after every token, "
    "or f(items, texts), asked once for all responses of a rollout"
)
_SHOWN = 60  # characters of a text in a message
_RAISED = 500  # of what a reward raised
_THEIRS = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)  # what a reward may raise; Ctrl-C is not the reward's
_LARGEST = 3.4e38  # rewards are kept as float32


class Rewards(list):
    """One float per sample of an env step. Adds to a number as its mean, so that `R += reward` keeps the episode's score of one sample."""

    def __radd__(self, other):
        return other + float(self)

    def __float__(self) -> float:
        return sum(self) / len(self)


def is_sentence_reward(reward: Callable) -> bool:
    """Tells the two forms apart by the number of positional parameters; one called `finish` makes a step reward, with a default too.

    Raises ConfigError when it is neither.
    """
    if not callable(reward):
        raise ConfigError(f"{reward!r} is not callable; {FORMS}")
    if inspect.isclass(reward):
        raise ConfigError(f"{_name(reward)} is a class; give an object of it, made with {_name(reward)}(...); {FORMS}")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the parameters of {_name(reward)} cannot be read ({error}); {FORMS}") from error
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if _takes(signature, 3) and (not _takes(signature, 2) or inspect.Parameter.VAR_POSITIONAL in kinds or "finish" in signature.parameters):
        return False
    if _takes(signature, 2):
        return True
    raise ConfigError(f"{_name(reward)}{signature} has the wrong parameters; {FORMS}")


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


class RewardFunction:
    """Asks a reward of either form, and believes only what is one.

    A step reward may return a number or a list of length 1 (the same for every sample; said once), or one number per sample.

    Args:
        reward: a step reward or a sentence reward.
        num_samples: responses to one prompt; None = not known, for sentence rewards only.
        timeout_s: of one call; None = wait for ever.
        name: for messages; None = the reward's own.

    Raises:
        ConfigError: the reward takes other parameters, or an impossible timeout.
    """

    def __init__(
        self, reward: StepReward | SentenceReward, num_samples: int | None, timeout_s: float | None = None, *, name: str | None = None
    ):
        self.is_sentence = is_sentence_reward(reward)
        if timeout_s is not None and (not _is_number(timeout_s) or isinstance(timeout_s, bool) or not 0 < timeout_s < math.inf):
            raise ConfigError(f"reward_timeout_s must be > 0 seconds, or None to wait for ever; got {timeout_s!r}")
        self._reward, self._num_samples, self._timeout_s = reward, num_samples, timeout_s
        self._name = name or _name(reward)
        self._said: set[str] = set()

    def __call__(self, item: dict, predicted: list[list[str]], finish: bool) -> Rewards:
        """Asks a step reward: one finite float per sample.

        Raises:
            RewardError: the function raised, or returned something else; names the prompt and what came back.
        """
        samples = ", ".join(repr(_short("".join(tokens))) for tokens in predicted)
        where = f"for prompt {_short(item.get('input'))!r} (samples so far: {samples})"
        try:
            value = self._within_time(where, item, predicted, finish)
        except TextRLSwarmError:
            raise
        except _THEIRS as error:
            if finish or not isinstance(error, UnboundLocalError):
                raise self._raised(error, where) from error
            self._say_once(f"{self._name} left {error.name or 'its result'} unset before the end of a response; that counts as 0")
            value = [0.0] * self._num_samples
        return Rewards(self._per_sample(value, where))

    def of_sentences(self, items: Sequence[dict], texts: Sequence[str]) -> list[float]:
        """Asks a sentence reward: one finite float per response.

        Raises:
            RewardError: the function raised, or returned something else; names the prompt and sample that it fails on alone, if any does.
        """
        items, texts, count = list(items), list(texts), len(texts)  # lists, because tokenizers and pipelines take no tuples
        places = [self._place(i, item, text, count) for i, (item, text) in enumerate(zip(items, texts, strict=True))]
        together = f"for {count} responses"
        try:
            value = _plain(self._within_time(together, list(items), list(texts)))  # theirs to empty
        except TextRLSwarmError:  # it took too long, or is a sum and its part has said where it failed
            raise
        except _THEIRS as error:
            guilty, cause = self._guilty(error, items, texts)
            raise self._raised(cause, together if guilty is None else places[guilty]) from cause
        if not isinstance(value, list):
            raise self._error(f"returned {_short(repr(value))} ({type(value).__name__})", together)
        if len(value) != count:
            raise self._error(f"returned {len(value)} rewards", together)
        return [self._number(reward, place) for reward, place in zip(value, places, strict=True)]

    def _place(self, i: int, item: dict, text: str, count: int) -> str:
        sample = f"response {i} of {count}" if self._num_samples is None else f"sample {i % self._num_samples}"
        return f"for prompt {_short(item.get('input'))!r}, {sample} ({_short(text)!r})"

    def _guilty(self, error: BaseException, items: list[dict], texts: list[str]) -> tuple[int | None, BaseException]:
        """The first response that raises when it is asked about alone, and what it raises; None when it takes several.

        Halves are asked, so that the search costs no more than asking about all responses once more.
        """
        start, stop = 0, len(texts)
        while stop - start > 1:
            middle = (start + stop) // 2
            found = self._failure(items[start:middle], texts[start:middle])
            start, stop = (middle, stop) if found is None else (start, middle)
        alone = self._failure(items[start:stop], texts[start:stop])
        return (None, error) if alone is None else (start, alone)

    def _failure(self, items: list[dict], texts: list[str]) -> BaseException | None:
        try:
            self._within_time("", items, texts)
        except TextRLSwarmError:  # too slow is another matter
            return None
        except _THEIRS as error:
            return error
        return None

    def _per_sample(self, value: object, where: str) -> list[float]:
        value, count = _plain(value), self._num_samples
        if _is_number(value) or (isinstance(value, list) and len(value) == 1):
            if count > 1:
                got = "a list of one" if isinstance(value, list) else "one number"
                self._say_once(f"{self._name} returned {got} for {count} samples; every sample gets it")
            value = (value if isinstance(value, list) else [value]) * count
        if not isinstance(value, list):
            raise self._error(f"returned {_short(repr(value))} ({type(value).__name__})", where)
        if len(value) != count:
            raise self._error(f"returned {len(value)} rewards for {count} samples ({_short(repr(value))})", where)
        return [self._number(reward, f"for sample {i} {where}") for i, reward in enumerate(value)]

    def _number(self, reward: object, where: str) -> float:
        if hasattr(reward, "tolist"):  # of numpy or torch
            reward = reward.tolist()
        while isinstance(reward, list) and len(reward) == 1:  # as a reward model's logits come: one number in brackets is a number
            reward = reward[0]
        if not _is_number(reward):
            raise self._error(f"returned {_short(repr(reward))} ({type(reward).__name__})", where)
        if not -_LARGEST <= reward <= _LARGEST:  # nan neither
            raise self._error(f"returned {_short(reward)}", where)
        return float(reward)

    def _within_time(self, where: str, *arguments):
        try:
            return within(self._timeout_s, self._reward, *arguments)
        except TookTooLong as error:
            raise RewardError(
                f"{self._name} took longer than reward_timeout_s={self._timeout_s:g} {where}; make it faster or allow more seconds"
            ) from error

    def _error(self, what: str, where: str) -> RewardError:
        wanted = (
            "one finite number per response"
            if self.is_sentence
            else f"a finite number, or a list with one per sample ({self._num_samples})"
        )
        return RewardError(f"{self._name} {what} {where}; return {wanted}")

    def _raised(self, error: BaseException, where: str) -> RewardError:
        here = Path(__file__).parent
        theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if here not in Path(frame.filename).parents]
        line = f"; see {Path(theirs[0].filename).name}, line {theirs[0].lineno}" if theirs else ""
        return _also(error, f"{self._name} raised {_short(_repr(error), _RAISED)} {where}{line}")

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


def _also(error: BaseException, message: str) -> RewardError:
    """A RewardError that `except` clauses for the user's own error catch too, its attributes included, where that can be had."""
    if not isinstance(error, Exception) or isinstance(error, (StopIteration, StopAsyncIteration)):  # those end programs and loops
        return RewardError(message)
    try:
        kind = type("RewardError", (RewardError, type(error)), {"__str__": lambda self: message, "__module__": RewardError.__module__})
        raised = kind.__new__(kind)
        raised.__dict__.update(vars(error))
        raised.args = (message,)
    except Exception:  # some classes cannot be combined
        return RewardError(message)
    return raised


# ------------------------------------------------------------------------------------------ several at once


class CombinedReward:
    """The weighted sum of sentence rewards, itself a sentence reward.

        CombinedReward((sentiment, 1.0), (shortness, 0.1))

    Args:
        parts: pairs of a sentence reward and its weight.

    Attributes:
        parts: name of each part -> mean of what it gave in the last call, before its weight.

    Raises:
        ConfigError: no parts, a weight that is no number, or a step reward (sum those inside one get_reward).
    """

    def __init__(self, *parts: tuple[SentenceReward, float]):
        if not parts:
            raise ConfigError("a combined reward needs at least one (reward, weight)")
        self._parts: list[tuple[str, RewardFunction, float]] = []
        self.parts: dict[str, float] = {}
        for part in parts:
            if not isinstance(part, Sequence) or len(part) != 2:
                raise ConfigError(f"each part of a combined reward is a pair (reward, weight), got {part!r}")
            reward, weight = part
            if not _is_number(weight) or not math.isfinite(weight):
                raise ConfigError(f"the weight of {_name(reward)} must be a finite number, got {weight!r}")
            if not is_sentence_reward(reward):
                raise ConfigError(
                    f"{_name(reward)} is asked after every token; only rewards of the form f(items, texts) can be combined: "
                    "rewrite it, or add the parts up in one get_reward"
                )
            names = [name for name, _, _ in self._parts]
            name = _name(reward)
            self._parts.append((name if name not in names else f"{name}_{len(names)}", RewardFunction(reward, None), float(weight)))
        self.name = " + ".join(f"{weight:g} * {name}" for name, _, weight in self._parts)

    def __call__(self, items: Sequence[dict], texts: Sequence[str]) -> list[float]:
        total = [0.0] * len(texts)
        for name, reward, weight in self._parts:
            values = reward.of_sentences(items, texts)
            self.parts[name] = sum(values) / max(1, len(values))
            total = [before + weight * value for before, value in zip(total, values, strict=True)]
        return total


def rank_rewards(scores: Sequence[float]) -> list[float]:
    """Ranks of one prompt's samples, evenly spaced from -1 (lowest) to 1 (highest); equal scores share the mean of their ranks.

    Only the order counts, so that one prompt's large scores do not drown another's. A single sample gets 0. In `get_reward`, end with
    `return rank_rewards(scores)`; in a sentence reward, take `compare_sample` rows at a time: they come prompt by prompt.
    """
    _require_numbers(scores)
    if len(scores) < 2:
        return [0.0] * len(scores)
    below = [sum(other < score for other in scores) for score in scores]
    equal = [sum(other == score for other in scores) for score in scores]
    return [2 * (b + (e - 1) / 2) / (len(scores) - 1) - 1 for b, e in zip(below, equal, strict=True)]


def group_baseline(scores: Sequence[float]) -> list[float]:
    """Each score minus the mean of the other samples of the same prompt; used as `rank_rewards` is.

    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, equation 8 (RLOO). A single sample keeps its score.
    """
    _require_numbers(scores)
    if len(scores) < 2:
        return [float(score) for score in scores]
    total = sum(scores)
    return [score - (total - score) / (len(scores) - 1) for score in scores]


def _require_numbers(scores: Sequence[float]) -> None:
    for i, score in enumerate(scores):
        if not math.isfinite(score):  # ranks and differences would hide it
            raise RewardError(f"score {i} of {len(scores)} is {score}; scores must be finite numbers")


def _name(reward: object) -> str:
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)


def _short(text: object, most: int = _SHOWN) -> str:
    text = str(text)
    return text if len(text) <= most else text[: most - 3] + "..."


def _repr(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:  # of the user's class
        return type(error).__name__


def _plain(value: object) -> object:
    """A list where there is a sequence, of numpy or torch too; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, (Sequence, Iterator)) and not isinstance(value, (str, bytes)) else value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))  # True and False are rewards too: 1 and 0
