"""Rewards made of others: weighted sums, ranks, and group baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from textrl_swarm.errors import ConfigError, RewardError
from textrl_swarm.rewards.functions import (
    RewardFunction,
    SentenceReward,
    is_number,
    is_sentence_reward,
    reward_name,
)
from textrl_swarm.types import Item


class CombinedReward:
    """The weighted sum of sentence rewards, itself a sentence reward.

        CombinedReward((sentiment, 1.0), (shortness, 0.1))

    Args:
        parts: pairs of a sentence reward and its weight.

    Attributes:
        parts: name of each part -> mean of its rewards in the last call, before its weight.
        name: for logs and model cards.

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
            name = reward_name(reward)
            if not is_number(weight) or not math.isfinite(weight):
                raise ConfigError(f"the weight of {name} must be a finite number, got {weight!r}")
            if not is_sentence_reward(reward):
                raise ConfigError(
                    f"{name} is asked after every token; only rewards of the form f(items, texts) can be "
                    "combined: "
                    "rewrite it, or add the parts up in one get_reward"
                )
            if name in [earlier for earlier, _, _ in self._parts]:
                name = f"{name}_{len(self._parts)}"
            self._parts.append((name, RewardFunction(reward, None), float(weight)))
        self.name = " + ".join(f"{weight:g} * {name}" for name, _, weight in self._parts)

    def __call__(self, items: Sequence[Item], texts: Sequence[str]) -> list[float]:
        """One weighted sum per response."""
        total = [0.0] * len(texts)
        for name, reward, weight in self._parts:
            values = reward.of_sentences(items, texts)
            self.parts[name] = sum(values) / max(1, len(values))
            total = [before + weight * value for before, value in zip(total, values, strict=True)]
        return total


def rank_rewards(scores: Sequence[float]) -> list[float]:
    """Ranks of one prompt's samples, evenly spaced from -1 (lowest) to 1 (highest).

    Equal scores share the mean of their ranks; a single sample gets 0. Only the order counts, so one prompt's
    large scores do not drown another's. In `get_reward`, end with `return rank_rewards(scores)`; in a
    sentence reward, take
    `compare_sample` rows at a time: they come prompt by prompt.

    Raises:
        RewardError: a score is not finite.
    """
    _require_numbers(scores)
    if len(scores) < 2:
        return [0.0] * len(scores)
    below = [sum(other < score for other in scores) for score in scores]
    equal = [sum(other == score for other in scores) for score in scores]
    return [2 * (b + (e - 1) / 2) / (len(scores) - 1) - 1 for b, e in zip(below, equal, strict=True)]


def group_baseline(scores: Sequence[float]) -> list[float]:
    """Each score minus the mean of the other samples of the same prompt; used like `rank_rewards`.

    A single sample keeps its score.

    Raises:
        RewardError: a score is not finite.

    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, equation 8 (RLOO).
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
