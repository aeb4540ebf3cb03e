"""Asking the user's reward function, and believing only what is a reward. Knows nothing about models or tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch

from textrl_swarm.errors import RewardError, TextRLSwarmError

logger = logging.getLogger(__name__)


class Rewards(list):
    """One float per sample of an env step. Adds to a number as its mean, so that `R += reward` keeps the episode's score of one sample."""

    def __radd__(self, other):
        return other + float(self)

    def __float__(self) -> float:
        return sum(self) / len(self)


class RewardFunction:
    """Wraps `get_reward(input_item, predicted_list, finish)`.

    Accepts a number or a list of length 1 (the same for every sample; said once), or one number per sample.
    """

    def __init__(self, get_reward: Callable[[dict, list[list[str]], bool], object], num_samples: int):
        self._get_reward, self._num_samples = get_reward, num_samples
        self._said: set[str] = set()

    def __call__(self, item: dict, predicted: list[list[str]], finish: bool) -> Rewards:
        """One finite float per sample.

        Raises:
            RewardError: the function raised, or returned something else; names the prompt and what came back.
        """
        try:
            value = self._get_reward(item, predicted, finish)
        except TextRLSwarmError:
            raise
        except UnboundLocalError as error:
            if finish:
                raise self._error(item, f"raised {error!r}") from error
            self._say_once(f"get_reward left {error.name or 'its result'} unset before the end of a response; that counts as 0")
            value = [0.0] * self._num_samples
        except Exception as error:
            raise self._error(item, f"raised {error!r}") from error
        return Rewards(self._checked(value, item))

    def _checked(self, value: object, item: dict) -> list[float]:
        if isinstance(value, torch.Tensor) or hasattr(value, "tolist"):
            value = value.tolist()
        if _is_number(value):
            if self._num_samples > 1:
                self._say_once(f"get_reward returned one number for {self._num_samples} samples; every sample gets it")
            values = [value] * self._num_samples
        elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            values = list(value)
            if len(values) == 1 and self._num_samples > 1:
                self._say_once(f"get_reward returned a list of one for {self._num_samples} samples; every sample gets it")
                values *= self._num_samples
            if len(values) != self._num_samples:
                raise self._error(item, f"returned {len(values)} rewards for {self._num_samples} samples ({value!r})")
        else:
            raise self._error(item, f"returned {value!r} ({type(value).__name__})")
        for i, reward in enumerate(values):
            if hasattr(reward, "tolist"):  # of numpy or torch; one number in brackets is a number
                numbers = reward.reshape(-1).tolist()
                values[i] = reward = numbers[0] if len(numbers) == 1 else numbers
            if not _is_number(reward):
                raise self._error(item, f"returned {reward!r} ({type(reward).__name__}) for sample {i}")
            if not math.isfinite(reward):
                raise self._error(item, f"returned {reward} for sample {i}")
        return [float(reward) for reward in values]

    def _error(self, item: dict, what: str) -> RewardError:
        return RewardError(
            f"get_reward {what} for prompt {item.get('input')!r}; "
            f"return a finite number, or a list with one per sample ({self._num_samples})"
        )

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))  # True and False are rewards too: 1 and 0
