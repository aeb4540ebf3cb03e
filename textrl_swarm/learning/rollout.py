"""From an environment's prompts to a rollout with rewards, a whole batch at a time. Knows nothing about
learning.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from textrl_swarm.config import SamplingConfig
from textrl_swarm.learning.env import PromptEnv
from textrl_swarm.policies.base import Policy
from textrl_swarm.rewards.functions import Rewards
from textrl_swarm.types import Item, RolloutBatch

# Added to the seed for each further part of a rollout, which must not repeat the one before.
_NEXT_PART = 1_000_003


@dataclass(frozen=True)
class Sampled:
    """Responses to P prompts, C samples each (B = P * C rows), before they are rewarded."""

    items: tuple[Item, ...]
    """(P,) the prompts' dicts."""

    rollout: RolloutBatch

    seconds: float
    """Of sampling."""


@dataclass(frozen=True)
class Collected:
    """A rollout of P prompts x C samples (B = P * C rows) with its rewards."""

    rollout: RolloutBatch

    rewards: Tensor
    """(B, T) fp32, zero outside the response mask."""

    items: tuple[Item, ...]
    """(P,) the prompts' dicts."""

    env_steps: int
    """Tokens of the longest sample of each prompt, summed."""

    seconds: float
    """Of sampling and rewards together."""

    @property
    def scores(self) -> Tensor:
        """(B,) summed rewards of each response."""
        return self.rewards.sum(dim=1)

    @property
    def tokens_per_second(self) -> float:
        """Response tokens over `seconds`."""
        return float(self.rollout.response_mask.sum()) / self.seconds


def collect(policy: Policy, env: PromptEnv, num_prompts: int, sampling: SamplingConfig) -> Collected:
    """`sample_responses`, then `reward_responses`."""
    return reward_responses(env, sample_responses(policy, env, num_prompts, sampling))


def resampled(
    policy: Policy, env: PromptEnv, collected: Collected, sampling: SamplingConfig, times: int
) -> Collected:
    """Other prompts in the place of those whose responses all score the same, which teach nothing.

    Args:
        times: how often at most.

    Source: Yu et al. 2025, arXiv 2503.14476, section 3.2 (dynamic sampling), with a bound.
    """
    samples = env.compare_sample
    for attempt in range(1, times + 1):
        is_silent = (collected.scores.view(-1, samples).diff(dim=1) == 0).all(dim=1)
        silent = is_silent.nonzero().flatten().tolist()
        if not silent or samples < 2:
            break
        seed = None if sampling.seed is None else sampling.seed + _NEXT_PART * attempt
        others = collect(policy, env, len(silent), dataclasses.replace(sampling, seed=seed))
        collected = _replaced(collected, silent, others, samples)
    return collected


def _replaced(collected: Collected, prompts: Sequence[int], others: Collected, samples: int) -> Collected:
    """With the prompts of `others`, and their responses, in the place of these."""
    rows, items = collected.rollout.trajectories(), list(collected.items)
    rewards, new_rows = list(collected.rewards), others.rollout.trajectories()
    for i, prompt in enumerate(prompts):
        here, there = (slice(n * samples, (n + 1) * samples) for n in (prompt, i))
        rows[here], rewards[here] = new_rows[there], list(others.rewards[there])
        items[prompt] = others.items[i]
    rollout = RolloutBatch.from_trajectories(rows, temperature=collected.rollout.temperature)
    width = rollout.response_mask.shape[1]
    padded = pad_sequence([*rewards, torch.zeros(width)], batch_first=True)[:-1, :width]
    lengths = rollout.response_lengths.view(-1, samples).amax(dim=1)
    return Collected(rollout, padded, tuple(items), int(lengths.sum()), collected.seconds + others.seconds)


def collect_env_steps(policy: Policy, env: PromptEnv, env_steps: int, sampling: SamplingConfig) -> Collected:
    """Collects whole episodes until they have at least `env_steps` env steps together.

    Responses may end early, so the number of episodes is not known before. The first part assumes full-length
    responses; later parts use the mean length so far.
    """
    length: float = min(sampling.max_new_tokens, env.env_max_length)
    parts: list[Collected] = []
    while (missing := env_steps - sum(part.env_steps for part in parts)) > 0:
        if parts:
            episodes = sum(len(part.items) for part in parts)
            length = sum(part.env_steps for part in parts) / episodes
        seed = None if sampling.seed is None else sampling.seed + _NEXT_PART * len(parts)
        part_sampling = dataclasses.replace(sampling, seed=seed)
        parts.append(collect(policy, env, math.ceil(missing / length), part_sampling))
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[Collected]) -> Collected:
    trajectories = [one for part in parts for one in part.rollout.trajectories()]
    rollout = RolloutBatch.from_trajectories(trajectories, temperature=parts[0].rollout.temperature)
    rewards = [row for part in parts for row in part.rewards]  # each as wide as its part
    return Collected(
        rollout,
        pad_sequence(rewards, batch_first=True),
        tuple(item for part in parts for item in part.items),
        sum(part.env_steps for part in parts),
        sum(part.seconds for part in parts),
    )


def sample_responses(policy: Policy, env: PromptEnv, num_prompts: int, sampling: SamplingConfig) -> Sampled:
    """Draws prompts and samples `env.compare_sample` responses to each.

    Responses end at `sampling.stop_token_ids`, or else at the environment's `gen_stop_toks`, to which the
    policy's end tokens are added once. `sampling.max_new_tokens` below `env.env_max_length` cuts episodes
    short, which still get their final reward.
    """
    started = time.perf_counter()
    prompts = env.draw(num_prompts)
    stop_ids = sampling.stop_token_ids
    if stop_ids is None:
        env.stop_also_at(policy.stop_ids)
    sampling = dataclasses.replace(
        sampling,
        num_samples=env.compare_sample,
        max_new_tokens=min(sampling.max_new_tokens, env.env_max_length),
        stop_token_ids=tuple(sorted(env.stop_ids)) if stop_ids is None else stop_ids,
    )
    rollout = policy.generate([prompt.ids for prompt in prompts], sampling)
    return Sampled(tuple(prompt.item for prompt in prompts), rollout, time.perf_counter() - started)


def reward_responses(env: PromptEnv, sampled: Sampled) -> Collected:
    """Asks the user's reward about sampled responses; an error leaves the responses unchanged."""
    started = time.perf_counter()
    rewards, env_steps = per_token_rewards(env, sampled.items, sampled.rollout)
    seconds = sampled.seconds + time.perf_counter() - started
    return Collected(sampled.rollout, rewards, sampled.items, env_steps, seconds)


def per_token_rewards(env: PromptEnv, items: Sequence[Item], rollout: RolloutBatch) -> tuple[Tensor, int]:
    """The user's rewards for a rollout.

    A sentence reward is asked once. For a step reward, each prompt's responses are played in the environment,
    token by token, so that whatever the user overrides sees what it would see in an episode.

    Returns:
        Rewards (B, T): those given before the end on the token just chosen, those given at the end on each
        sample's own last token; and the number of env steps.
    """
    samples = env.compare_sample
    rewards = torch.zeros(rollout.response_mask.shape)
    lengths = rollout.response_lengths
    last = lengths - 1
    if env.asks_sentences:
        values = env.sentence_rewards([item for item in items for _ in range(samples)], _texts(env, rollout))
        rewards[torch.arange(len(rollout)), last] = torch.tensor(values)
    else:
        with env.ending_at(_ends(rollout)):
            for p, item in enumerate(items):
                rows = torch.arange(p * samples, (p + 1) * samples)
                for env_step, earned, ended in _played(env, item, rollout, rows):
                    at = last[rows] if ended else torch.full((samples,), env_step)
                    rewards[rows, at] += torch.tensor(earned)
    return rewards, int(lengths.view(len(items), samples).amax(dim=1).sum())


def _ends(rollout: RolloutBatch) -> set[int]:
    """The tokens that ended responses of a rollout; played again, its samples end there and nowhere else."""
    rows = rollout.terminated.nonzero().flatten()
    last = rollout.prompt_lengths[rows] + rollout.response_lengths[rows] - 1
    return set(rollout.tokens[rows, last].tolist())


def _texts(env: PromptEnv, rollout: RolloutBatch) -> Sequence[str]:
    if not env.skip_special_tokens:
        return rollout.texts
    rows = rollout.trajectories()
    return [env.response_text(row.prompt.tolist(), row.response.tolist(), row.terminated) for row in rows]


def _played(
    env: PromptEnv, item: Item, rollout: RolloutBatch, rows: Tensor
) -> Iterator[tuple[int, Rewards, bool]]:
    """Per env step of one prompt's responses: its number, its rewards, and whether it was the last."""
    env_steps = int(rollout.response_lengths[rows].max())
    at = rollout.prompt_lengths[rows][:, None] + torch.arange(env_steps)
    at = at.clamp(max=rollout.tokens.shape[1] - 1)  # the env ignores what follows a sample's end
    tokens = rollout.tokens[rows].gather(1, at)  # (C, env_steps)
    env.reset(item)
    for env_step in range(env_steps):
        rewards, done = env.play(tokens[:, env_step].numpy())
        if env_step == env_steps - 1 and not done:  # the responses were cut where the environment would go on
            rewards = env.final_rewards()
            done = True
        yield env_step, rewards, done
        if done:
            return
