"""Rewards: the user's function in either of its two forms, where to find it, how to combine several, and believing only what is a reward.

A step reward is TextRL's: `f(input_item, predicted_list, finish)`, asked after every token. A sentence reward is `f(items, texts)`, asked
once per rollout for all responses together. Knows nothing about models or token ids.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from textrl_swarm.errors import ConfigError, RewardError, TextRLSwarmError, closest

logger = logging.getLogger(__name__)

StepReward = Callable[[dict, list[list[str]], bool], object]
SentenceReward = Callable[[Sequence[dict], Sequence[str]], Sequence[float]]

FORMS = (
    "a reward is either f(input_item, predicted_list, finish), asked after every token, "
    "or f(items, texts), asked once for all responses of a rollout"
)
_SHOWN = 60  # characters of a text in a message


class Rewards(list):
    """One float per sample of an env step. Adds to a number as its mean, so that `R += reward` keeps the episode's score of one sample."""

    def __radd__(self, other):
        return other + float(self)

    def __float__(self) -> float:
        return sum(self) / len(self)


def is_sentence_reward(reward: Callable) -> bool:
    """Tells the two forms apart by the number of positional parameters. Raises ConfigError when it is neither."""
    if not callable(reward):
        raise ConfigError(f"{reward!r} is not callable; {FORMS}")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the parameters of {_name(reward)} cannot be read ({error}); {FORMS}") from error
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if _takes(signature, 2) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return True
    if _takes(signature, 3):
        return False
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
        num_samples: responses to one prompt.
        timeout_s: of one call; None = wait for ever.
    """

    def __init__(self, reward: StepReward | SentenceReward, num_samples: int, timeout_s: float | None = None):
        self.is_sentence = is_sentence_reward(reward)
        self._reward, self._num_samples, self._timeout_s = reward, num_samples, timeout_s
        self._said: set[str] = set()

    def __call__(self, item: dict, predicted: list[list[str]], finish: bool) -> Rewards:
        """Asks a step reward: one finite float per sample.

        Raises:
            RewardError: the function raised, or returned something else; names the prompt and what came back.
        """
        samples = ", ".join(repr(_short("".join(tokens))) for tokens in predicted)
        where = f"for prompt {_short(item.get('input'))!r} (samples so far: {samples})"
        try:
            value = self._call(where, item, predicted, finish)
        except RewardError as error:
            unset = error.__cause__
            if finish or not isinstance(unset, UnboundLocalError):
                raise
            self._say_once(f"get_reward left {unset.name or 'its result'} unset before the end of a response; that counts as 0")
            value = [0.0] * self._num_samples
        return Rewards(self._per_sample(value, where))

    def of_sentences(self, items: Sequence[dict], texts: Sequence[str]) -> list[float]:
        """Asks a sentence reward: one finite float per response.

        Raises:
            RewardError: the function raised, or returned something else; names the prompt and sample that it fails on alone, if any does.
        """
        places = [
            f"for prompt {_short(item.get('input'))!r}, sample {i % self._num_samples} ({_short(text)!r})"
            for i, (item, text) in enumerate(zip(items, texts, strict=True))
        ]
        together = f"for {len(texts)} responses"
        try:
            value = _plain(self._call(together, items, texts))
        except RewardError as error:
            if isinstance(error.__cause__, Exception):  # it raised, and did not take too long: which response is it?
                for item, text, place in zip(items, texts, places, strict=True):
                    self._call(place, [item], [text])
            raise
        if not isinstance(value, list):
            raise self._error(f"returned {value!r} ({type(value).__name__})", together)
        if len(value) != len(texts):
            raise self._error(f"returned {len(value)} rewards", together)
        return [self._number(reward, place) for reward, place in zip(value, places, strict=True)]

    def _per_sample(self, value: object, where: str) -> list[float]:
        value, count = _plain(value), self._num_samples
        if _is_number(value) or (isinstance(value, list) and len(value) == 1):
            if count > 1:
                got = "a list of one" if isinstance(value, list) else "one number"
                self._say_once(f"get_reward returned {got} for {count} samples; every sample gets it")
            value = (value if isinstance(value, list) else [value]) * count
        if not isinstance(value, list):
            raise self._error(f"returned {value!r} ({type(value).__name__})", where)
        if len(value) != count:
            raise self._error(f"returned {len(value)} rewards for {count} samples ({_short(repr(value))})", where)
        return [self._number(reward, f"for sample {i} {where}") for i, reward in enumerate(value)]

    def _number(self, reward: object, where: str) -> float:
        if hasattr(reward, "reshape") and hasattr(reward, "tolist"):  # of numpy or torch; one number in brackets is a number
            numbers = reward.reshape(-1).tolist()
            reward = numbers[0] if len(numbers) == 1 else numbers
        if not _is_number(reward):
            raise self._error(f"returned {reward!r} ({type(reward).__name__})", where)
        if not math.isfinite(reward):
            raise self._error(f"returned {reward}", where)
        return float(reward)

    def _call(self, where: str, *arguments):
        try:
            return self._within_time(where, *arguments)
        except TextRLSwarmError:
            raise
        except Exception as error:
            raise self._error(f"raised {error!r}", where) from error

    def _within_time(self, where: str, *arguments):
        if self._timeout_s is None:
            return self._reward(*arguments)
        outcome: list = []

        def ask() -> None:
            try:
                outcome.append((True, self._reward(*arguments)))
            except BaseException as error:
                outcome.append((False, error))

        thread = threading.Thread(target=ask, daemon=True, name="reward")  # daemon: a hung reward must not hang the program's end
        thread.start()
        thread.join(self._timeout_s)
        if not outcome:
            raise self._error(f"took longer than reward_timeout_s={self._timeout_s:g}", where)
        succeeded, result = outcome[0]
        if not succeeded:
            raise result
        return result

    def _error(self, what: str, where: str) -> RewardError:
        wanted = (
            "one finite number per response"
            if self.is_sentence
            else f"a finite number, or a list with one per sample ({self._num_samples})"
        )
        name = _name(self._reward) if self.is_sentence else "get_reward"
        return RewardError(f"{name} {what} {where}; return {wanted}")

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


# ------------------------------------------------------------------------------------------ by name, and several at once


def load_reward(spec: str) -> StepReward | SentenceReward:
    """The callable behind "package.module:name" or "path/to/file.py:name". Modules are also looked for in the current directory.

    Raises:
        ConfigError: no such module, file or name (with the closest there is), it cannot be imported, or it is no reward.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f'a reward is named "module:function" or "path/to/file.py:function", got {spec!r}')
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{place} has no {name!r}; {closest(name, known)}")
    reward = getattr(module, name)
    is_sentence_reward(reward)
    return reward


def _import_module(name: str):
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(f"there is no module {error.name!r} here ({Path.cwd()}) or among the installed packages") from error
        raise ConfigError(f"importing {name} failed: {error!r}") from error
    except Exception as error:
        raise ConfigError(f"importing {name} failed: {error!r}") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _import_file(path: Path):
    if not path.is_file():
        raise ConfigError(f"there is no file {path} ({Path.cwd()} is the current directory)")
    spec = importlib.util.spec_from_file_location(f"textrl_swarm_reward_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ConfigError(f"importing {path} failed: {error!r}") from error
    return module


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
        self._parts: list[tuple[str, SentenceReward, float]] = []
        self.parts: dict[str, float] = {}
        for reward, weight in parts:
            if not _is_number(weight) or not math.isfinite(weight):
                raise ConfigError(f"the weight of {_name(reward)} must be a finite number, got {weight!r}")
            if not is_sentence_reward(reward):
                raise ConfigError(
                    f"{_name(reward)} is asked after every token; only rewards of the form f(items, texts) can be combined: "
                    "rewrite it, or add the parts up in one get_reward"
                )
            names = [name for name, _, _ in self._parts]
            name = _name(reward)
            self._parts.append((name if name not in names else f"{name}_{len(names)}", reward, float(weight)))
        self.name = " + ".join(f"{weight:g} * {name}" for name, _, weight in self._parts)

    def __call__(self, items: Sequence[dict], texts: Sequence[str]) -> list[float]:
        total = [0.0] * len(texts)
        for name, reward, weight in self._parts:
            values = RewardFunction(reward, 1).of_sentences(items, texts)
            self.parts[name] = sum(values) / max(1, len(values))
            total = [before + weight * value for before, value in zip(total, values, strict=True)]
        return total


def rank_rewards(scores: Sequence[float]) -> list[float]:
    """Ranks of one prompt's samples, evenly spaced from -1 (lowest) to 1 (highest); equal scores share the mean of their ranks.

    Only the order counts, so that one prompt's large scores do not drown another's. A single sample gets 0.
    """
    if len(scores) < 2:
        return [0.0] * len(scores)
    below = [sum(other < score for other in scores) for score in scores]
    equal = [sum(other == score for other in scores) for score in scores]
    return [2 * (b + (e - 1) / 2) / (len(scores) - 1) - 1 for b, e in zip(below, equal, strict=True)]


def group_baseline(scores: Sequence[float]) -> list[float]:
    """Each score minus the mean of the other samples of the same prompt.

    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, equation 8 (RLOO). A single sample keeps its score.
    """
    if len(scores) < 2:
        return [float(score) for score in scores]
    total = sum(scores)
    return [score - (total - score) / (len(scores) - 1) for score in scores]


def _name(reward: object) -> str:
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)


def _short(text: object) -> str:
    text = str(text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _plain(value: object) -> object:
    """A list where there is a sequence, of numpy or torch too; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))  # True and False are rewards too: 1 and 0
