"""`train`: one iteration after another, an iteration being one rollout and one update.

Knows nothing about terminals or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from textrl_swarm.config import SamplingConfig
from textrl_swarm.learning.env import PromptEnv
from textrl_swarm.learning.rollout import Collected, Sampled, resampled, reward_responses, sample_responses
from textrl_swarm.policies.base import Policy
from textrl_swarm.types import RolloutBatch


class LearnsFromRollouts(Protocol):
    """What the loop needs of a Learner, or of pfrl's agent around one."""

    @property
    def policy(self) -> Policy:
        """What samples."""
        ...

    def rollout_sampling(self) -> SamplingConfig:
        """How the next rollout samples."""
        ...

    def learn(self, rollout: RolloutBatch, rewards: Tensor) -> dict[str, float]:
        """Trains on a rollout; returns metrics."""
        ...


@dataclass(frozen=True)
class Iteration:
    """One iteration that has ended."""

    index: int
    """From 0."""

    collected: Collected

    metrics: dict[str, float]
    """Of the update, plus speed and bytes."""

    seconds: float


def train(
    learner: LearnsFromRollouts,
    env: PromptEnv,
    *,
    iterations: int,
    prompts_per_iteration: int,
    resample: int = 0,
    start: int = 0,
    sampled: Sampled | None = None,
    on_sampled: Callable[[int, Sampled], None] | None = None,
) -> Iterator[Iteration]:
    """Yields after each iteration; stop early by leaving the loop.

    Args:
        learner: a Learner or a PPOAgent.
        iterations: how many in all.
        prompts_per_iteration: prompts per rollout; each gets `env.compare_sample` responses.
        resample: how often at most prompts whose responses all score the same are replaced by others, in each
            rollout.
        start: iterations that are already done.
        sampled: responses for the first iteration, if they exist already.
        on_sampled: called with the iteration's index and its responses before they are rewarded.
    """
    for index in range(start, iterations):
        started = time.perf_counter()
        bytes_before = _bytes(learner.policy)
        sampling = learner.rollout_sampling()
        if sampled is None:
            sampled = sample_responses(learner.policy, env, prompts_per_iteration, sampling)
            if on_sampled is not None:
                on_sampled(index, sampled)
        collected = reward_responses(env, sampled)
        sampled = None
        first_score = float(collected.scores.mean())
        collected = resampled(learner.policy, env, collected, sampling, resample)
        metrics = dict(learner.learn(collected.rollout, collected.rewards))
        if resample:
            metrics["score_before_resampling"] = first_score
        metrics["rollout_tokens_per_second"] = collected.tokens_per_second
        for name, total in _bytes(learner.policy).items():
            metrics[name] = float(total - bytes_before[name])
        yield Iteration(index, collected, metrics, time.perf_counter() - started)


def _bytes(policy: Policy) -> dict[str, int]:
    traffic = policy.traffic
    if traffic is None:
        return {"bytes_sent": 0, "bytes_received": 0}
    return {"bytes_sent": traffic.total_sent, "bytes_received": traffic.total_received}
