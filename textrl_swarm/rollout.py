"""From an environment's prompts to a rollout with rewards, a whole batch at a time. Knows nothing about learning."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from textrl_swarm.config import SamplingConfig
from textrl_swarm.env import TextRLEnv
from textrl_swarm.policy import Policy
from textrl_swarm.rewards import Rewards
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


def collect_env_steps(policy: Policy, env: TextRLEnv, env_steps: int, sampling: SamplingConfig) -> Collected:
    """Whole episodes until they have at least `env_steps` env steps together.

    How many that takes is not known before: responses may end early. It begins with as many as would do at full length, and goes on
    with as many as would do at the mean length so far.
    """
    length = min(sampling.max_new_tokens, env.env_max_length)
    parts: list[Collected] = []
    while (missing := env_steps - sum(part.env_steps for part in parts)) > 0:
        if parts:
            length = sum(part.env_steps for part in parts) / sum(len(part.items) for part in parts)
        seed = None if sampling.seed is None else sampling.seed + 1_000_003 * len(parts)  # the next part is not the same again
        parts.append(collect(policy, env, math.ceil(missing / length), dataclasses.replace(sampling, seed=seed)))
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[Collected]) -> Collected:
    rollouts = [part.rollout for part in parts]

    def padded(tensors: Sequence[Tensor]) -> Tensor:  # (b, n) each -> (B, N)
        width = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    by_column, by_row = ("tokens", "response_mask", "old_logprobs", "values"), ("prompt_lengths", "terminated")
    rollout = RolloutBatch(
        **{name: padded([getattr(rollout, name) for rollout in rollouts]) for name in by_column},
        **{name: torch.cat([getattr(rollout, name) for rollout in rollouts]) for name in by_row},
        texts=tuple(text for rollout in rollouts for text in rollout.texts), temperature=rollouts[0].temperature,
    )  # fmt: skip
    return Collected(
        rollout, padded([part.rewards for part in parts]), tuple(item for part in parts for item in part.items),
        sum(part.env_steps for part in parts), sum(part.seconds for part in parts),
    )  # fmt: skip


def sample_responses(policy: Policy, env: TextRLEnv, num_prompts: int, sampling: SamplingConfig) -> Sampled:
    """Draws prompts and samples `env.compare_sample` responses to each.

    `sampling.max_new_tokens` below `env.env_max_length` cuts episodes short; they get their final reward all the same.
    """
    started = time.perf_counter()
    items = env.draw(num_prompts)
    sampling = dataclasses.replace(
        sampling, num_samples=env.compare_sample, max_new_tokens=min(sampling.max_new_tokens, env.env_max_length),
        stop_token_ids=tuple(sorted(env.stop_ids)) if sampling.stop_token_ids is None else sampling.stop_token_ids,
    )  # fmt: skip
    rollout = policy.generate([env.encode(item) for item in items], sampling)
    return Sampled(tuple(items), rollout, time.perf_counter() - started)


def reward_responses(env: TextRLEnv, sampled: Sampled) -> Collected:
    """Asks the user's function about sampled responses, which an error leaves as they are."""
    started = time.perf_counter()
    rewards, env_steps = score(env, sampled.items, sampled.rollout)
    seconds = sampled.seconds + time.perf_counter() - started
    return Collected(sampled.rollout, rewards, sampled.items, env_steps, seconds)


def score(env: TextRLEnv, items: Sequence[dict], rollout: RolloutBatch) -> tuple[Tensor, int]:
    """What the user's reward says about a rollout: a sentence reward is asked once; for a step reward each prompt's responses are played
    in the environment, token by token, so that whatever the user overrides sees what it would see in an episode.

    Returns:
        rewards (B, T): what was given before the end on the token just chosen, what was given at the end on each sample's own last token;
        and the number of env steps.
    """
    samples = env.compare_sample
    rewards = torch.zeros(rollout.response_mask.shape)
    lengths = rollout.response_lengths
    last = lengths - 1
    if env.asks_sentences:
        values = env.sentence_rewards([item for item in items for _ in range(samples)], rollout.texts)
        rewards[torch.arange(len(rollout)), last] = torch.tensor(values)
    else:
        for p, item in enumerate(items):
            rows = torch.arange(p * samples, (p + 1) * samples)
            for step, values, ended in _played(env, item, rollout, rows):
                at = last[rows] if ended else torch.full((samples,), step)
                rewards[rows, at] += torch.tensor(values)
    return rewards, int(lengths.view(len(items), samples).amax(dim=1).sum())


def _played(env: TextRLEnv, item: dict, rollout: RolloutBatch, rows: Tensor) -> Iterator[tuple[int, Rewards, bool]]:
    """Per env step of one prompt's responses: its number, what it earned, and whether it was the last."""
    steps = int(rollout.response_lengths[rows].max())
    at = rollout.prompt_lengths[rows][:, None] + torch.arange(steps)
    tokens = rollout.tokens[rows].gather(1, at.clamp(max=rollout.tokens.shape[1] - 1))  # (C, steps); the env ignores what follows an end
    env.reset(item)
    for step in range(steps):
        values, done = env.play(tokens[:, step].numpy())
        if step == steps - 1 and not done:
            values, done = env.final_rewards(), True  # the responses were cut where the environment would go on
        yield step, values, done
        if done:
            return
