"""From an environment's prompts to a rollout with rewards, a whole batch at a time. Knows nothing about learning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_swarm.config import SamplingConfig
from textrl_swarm.env import TextRLEnv
from textrl_swarm.policy import Policy
from textrl_swarm.types import RolloutBatch


@dataclass(frozen=True)
class Sampled:
    """Responses to P prompts, C samples each (B = P * C rows), before anybody judged them."""

    items: tuple[dict, ...]  # (P,) the prompts' dicts
    rollout: RolloutBatch
    seconds: float  # of sampling


@dataclass(frozen=True)
class Collected:
    """A rollout of P prompts x C samples (B = P * C rows) with what the user's function says about it."""

    rollout: RolloutBatch
    rewards: Tensor  # (B, T) fp32, zero outside the response mask
    items: tuple[dict, ...]  # (P,) the prompts' dicts
    env_steps: int  # tokens of the longest sample of each prompt, summed
    seconds: float  # sampling and rewards together

    @property
    def scores(self) -> Tensor:
        """(B,) summed rewards of each response."""
        return self.rewards.sum(dim=1)

    @property
    def tokens_per_second(self) -> float:
        return float(self.rollout.response_mask.sum()) / self.seconds


def collect(policy: Policy, env: TextRLEnv, num_prompts: int, sampling: SamplingConfig) -> Collected:
    """`sample_responses`, then `reward_responses`."""
    return reward_responses(env, sample_responses(policy, env, num_prompts, sampling))


def sample_responses(policy: Policy, env: TextRLEnv, num_prompts: int, sampling: SamplingConfig) -> Sampled:
    """Draws prompts and samples `env.compare_sample` responses to each.

    `sampling.max_new_tokens` below `env.env_max_length` cuts episodes short; they get their final reward all the same.
    """
    started = time.perf_counter()
    items = env.draw(num_prompts)
    sampling = dataclasses.replace(
        sampling, num_samples=env.compare_sample, max_new_tokens=min(sampling.max_new_tokens, env.env_max_length)
    )
    rollout = policy.generate([env.encode(item) for item in items], sampling)
    return Sampled(tuple(items), rollout, time.perf_counter() - started)


def reward_responses(env: TextRLEnv, sampled: Sampled) -> Collected:
    """Asks the user's function about sampled responses, which an error leaves as they are."""
    started = time.perf_counter()
    rewards, env_steps = score(env, sampled.items, sampled.rollout)
    seconds = sampled.seconds + time.perf_counter() - started
    return Collected(sampled.rollout, rewards, sampled.items, env_steps, seconds)


def score(env: TextRLEnv, items: Sequence[dict], rollout: RolloutBatch) -> tuple[Tensor, int]:
    """What the user's reward says about a rollout: a sentence reward is asked once, a step reward as if each prompt had been an episode.

    Returns:
        rewards (B, T): what was given before the end on the token just chosen, what was given at the end on each sample's own last token;
        and the number of env steps.
    """
    samples = env.compare_sample
    rewards = torch.zeros(rollout.response_mask.shape)
    lengths = rollout.response_lengths
    last = lengths - 1
    env_steps = int(lengths.view(len(items), samples).amax(dim=1).sum())
    if env.reward_function.is_sentence:
        values = env.reward_function.of_sentences([item for item in items for _ in range(samples)], rollout.texts)
        rewards[torch.arange(len(rollout)), last] = torch.tensor(values)
        return rewards, env_steps
    for p, item in enumerate(items):
        rows = list(range(p * samples, (p + 1) * samples))
        strings = [[env.token_string(token) for token in _response(rollout, row)] for row in rows]
        longest = int(lengths[rows].max())
        for step in range(longest - 1 if env.reward_on_finish_only else 0, longest):
            finish = step == longest - 1
            values = env.reward_function(item, [tokens[: step + 1] for tokens in strings], finish)
            for row, value in zip(rows, values, strict=True):
                if finish:
                    rewards[row, last[row]] += value
                elif step <= last[row]:
                    rewards[row, step] += value
    return rewards, env_steps


def _response(rollout: RolloutBatch, row: int) -> list[int]:
    start = int(rollout.prompt_lengths[row])
    return rollout.tokens[row, start : start + int(rollout.response_lengths[row])].tolist()
