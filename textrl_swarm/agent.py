"""The PPO agent with pfrl's interface: act, observe, eval_mode, save, load, get_statistics. The door to pfrl.

Acting continues one cached session, a token of each sample per call; whole rollouts come through `learn`. Both end in the same update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from textrl_swarm.config import PPOConfig, SamplingConfig
from textrl_swarm.errors import AdapterError, ConfigError
from textrl_swarm.generation import sample_next, stop_ids
from textrl_swarm.policy import Policy
from textrl_swarm.ppo import PPO
from textrl_swarm.types import RolloutBatch

with contextlib.redirect_stderr(io.StringIO()):  # gym, which pfrl imports, prints that it is unmaintained
    from pfrl.agent import Agent

LEARNER_STATE = "learner.pt"


class PPOAgent(Agent):
    """Collects episodes of `act` and `observe`, trains after `update_interval` env steps.

    Args:
        policy: what acts and is trained.
        config: of the update.
        sampling: of actions in training, and of evaluation unless `act_deterministically`.
        update_interval: env steps (one token of each sample) between updates; an update waits for the end of an episode.
        act_deterministically: evaluation takes the most likely token.
    """

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig | None = None,
        sampling: SamplingConfig | None = None,
        *,
        update_interval: int = 10,
        act_deterministically: bool = True,
        make_optimizer: Callable[[list], torch.optim.Optimizer] | None = None,
    ):
        if update_interval < 1:
            raise ConfigError(f"update_interval must be >= 1 env steps, got {update_interval}")
        self.policy, self.sampling = policy, sampling or SamplingConfig()
        self.ppo = PPO(policy, config, make_optimizer)
        self.update_interval, self.act_deterministically = update_interval, act_deterministically
        self.training = True
        self.metrics: dict[str, float] = {}  # of the last update
        self._stop = stop_ids(policy)
        self._draws = {mode: torch.Generator().manual_seed(self.ppo.config.seed) for mode in (True, False)}  # by training mode, as below
        self._acting = {True: self._new_episode(), False: self._new_episode()}  # by training mode: evaluation may interrupt an episode
        self._finished: list[_Episode] = []

    # ------------------------------------------------------------------ pfrl's interface

    def act(self, obs: list[list[int]]) -> np.ndarray:
        """(C,) token ids, the next one of each of the C samples in the observation (lists of token ids)."""
        episode = self._acting[self.training]
        if not episode.continues(obs):  # the last one was left without observe(..., reset=True)
            episode.close()
            episode = self._acting[self.training] = self._new_episode()
        with torch.no_grad():
            hidden = episode.advance(obs)
            deterministic = not self.training and self.act_deterministically
            draws = None if deterministic else torch.rand(len(obs), dtype=torch.float64, generator=self._draws[self.training])
            seen = [torch.tensor(row) for row in obs]
            chosen, logprobs, values = sample_next(self.policy, hidden, seen, self.sampling, draws)
        episode.chose(chosen, logprobs, values)
        return chosen.numpy()

    def observe(self, obs: list[list[int]], reward, done: bool, reset: bool) -> None:
        """Takes the consequences of the last action; `reset` without `done` means that the episode was cut short."""
        episode = self._acting[self.training]
        episode.rewarded(reward, self._stop)
        if not (done or reset):
            return
        if self.training and episode.rewards:
            self._finished.append(episode)
        episode.close()
        self._acting[self.training] = self._new_episode()
        if sum(len(e.rewards) for e in self._finished) >= self.update_interval:
            finished, self._finished = self._finished, []
            rollout, rewards = _as_rollout(finished, self.sampling.temperature)
            self.learn(rollout, rewards)

    def _new_episode(self) -> _Episode:
        return _Episode(self.policy, self.sampling.max_new_tokens)

    def rollout_sampling(self) -> SamplingConfig:
        """Of the next whole rollout. With a seed its random numbers depend on that and on the number of updates alone."""
        seed = self.sampling.seed
        return self.sampling if seed is None else dataclasses.replace(self.sampling, seed=seed + self.ppo.num_updates)

    def learn(self, rollout: RolloutBatch, rewards: Tensor) -> dict[str, float]:
        """Trains on a whole rollout; returns the update's metrics."""
        self.metrics = self.ppo.update(rollout, rewards)
        return self.metrics

    def save(self, dirname: str) -> None:
        """Adapter (PEFT format), value head, optimizer and counters."""
        self.policy.save_adapter(dirname)
        torch.save(self.ppo.state_dict(), Path(dirname) / LEARNER_STATE)

    def load(self, dirname: str) -> None:
        """What `save` wrote; an adapter alone is enough. Raises AdapterError with the checkpoints that exist nearby."""
        path = Path(dirname)
        if not path.is_dir():
            near = sorted(child.name for child in path.parent.glob("*") if (child / "adapter_config.json").is_file())
            hint = f"{path.parent} has {', '.join(near)}" if near else f"{path.parent} has no checkpoints"
            raise AdapterError(f"there is no checkpoint {path}; {hint}")
        self.policy.load_adapter(path)
        state_path = path / LEARNER_STATE
        if state_path.is_file():
            self.ppo.load_state_dict(torch.load(state_path, weights_only=True))

    def get_statistics(self) -> list[tuple[str, float]]:
        """pfrl's six names first, then ours; NaN before the first update."""
        names = {
            "average_value": "value", "average_entropy": "entropy", "average_value_loss": "value_loss",
            "average_policy_loss": "policy_loss", "n_updates": None, "explained_variance": "explained_variance",
            "kl": "kl", "clip_fraction": "clip_fraction", "score": "score",
        }  # fmt: skip
        nan = float("nan")
        return [(name, self.ppo.num_steps if key is None else self.metrics.get(key, nan)) for name, key in names.items()]


class _Episode:
    """C samples of one prompt while they are being chosen: their session, and what was chosen and earned."""

    def __init__(self, policy: Policy, max_new_tokens: int):
        self._policy, self._max_new_tokens = policy, max_new_tokens
        self._resources = contextlib.ExitStack()
        self._session = None
        self.prompt: list[int] = []
        self.chosen: list[Tensor] = []  # per env step: (C,) token ids, their logprobs, the values before them
        self.logprobs: list[Tensor] = []
        self.values: list[Tensor] = []
        self.open: list[Tensor] = []  # per env step: (C,) bool, samples that had not ended before it
        self.rewards: list[list[float]] = []
        self.ended = torch.zeros(0, dtype=torch.bool)  # (C,)

    def continues(self, obs: list[list[int]]) -> bool:
        """Whether the observation is this episode's next one, and not the first of another."""
        if self._session is None:
            return True
        expected = [self.prompt + [int(step[i]) for step in self.chosen] for i in range(len(obs))]
        return len(obs) == len(self.ended) and all(bool(ended) or row == e for ended, row, e in zip(self.ended, obs, expected, strict=True))

    def advance(self, obs: list[list[int]]) -> Tensor:
        """(C, H) hidden states after the last token of each sample; samples that have ended ride along."""
        if self._session is None:
            if len({tuple(row) for row in obs}) != 1:
                raise ConfigError("an episode starts with the same prompt for every sample; call env.reset() first")
            self.prompt, self.ended = list(obs[0]), torch.zeros(len(obs), dtype=torch.bool)
            self._session = self._resources.enter_context(self._policy.session(len(obs), len(self.prompt) + self._max_new_tokens))
            new = torch.tensor(obs)
        else:
            new = self.chosen[-1][:, None]
        return self._session.step(new.to(self._policy.device))[:, -1]

    def chose(self, chosen: Tensor, logprobs: Tensor, values: Tensor) -> None:
        self.chosen.append(chosen)
        self.logprobs.append(logprobs)
        self.values.append(values)
        self.open.append(~self.ended)

    def rewarded(self, reward, stop: Tensor) -> None:
        """Rewards of the last action: a number, or one per sample."""
        if not self.chosen:
            raise ConfigError("observe() without act(): call agent.act(obs) first")
        count = len(self.chosen[-1])
        rewards = [float(r) for r in reward] if hasattr(reward, "__len__") else [float(reward)] * count
        self.rewards.append(rewards if len(rewards) == count else rewards * count)
        self.ended = self.ended | torch.isin(self.chosen[-1], stop)

    def close(self) -> None:
        self._resources.close()


def _as_rollout(episodes: list[_Episode], temperature: float) -> tuple[RolloutBatch, Tensor]:
    """Episodes of env steps as one right-padded batch; a reward after a sample's end goes to its own last token."""
    rows = [(episode, sample) for episode in episodes for sample in range(len(episode.chosen[0]))]
    lengths = [int(sum(bool(step[sample]) for step in episode.open)) for episode, sample in rows]
    horizon, width = max(lengths), max(len(episode.prompt) + n for (episode, _), n in zip(rows, lengths, strict=True))
    tokens = torch.zeros((len(rows), width), dtype=torch.int64)
    mask = torch.zeros((len(rows), horizon), dtype=torch.bool)
    logprobs, values, rewards = (torch.zeros((len(rows), horizon)) for _ in range(3))
    for i, ((episode, sample), n) in enumerate(zip(rows, lengths, strict=True)):
        p = len(episode.prompt)
        tokens[i, :p] = torch.tensor(episode.prompt)
        tokens[i, p : p + n] = torch.stack([step[sample] for step in episode.chosen[:n]])
        mask[i, :n] = True
        logprobs[i, :n] = torch.stack([step[sample] for step in episode.logprobs[:n]])
        values[i, :n] = torch.stack([step[sample] for step in episode.values[:n]])
        for step, earned in enumerate(episode.rewards):
            rewards[i, min(step, n - 1)] += earned[sample] if step < n or step == len(episode.rewards) - 1 else 0.0
    rollout = RolloutBatch(
        tokens=tokens, prompt_lengths=torch.tensor([len(episode.prompt) for episode, _ in rows]), response_mask=mask,
        terminated=torch.stack([episode.ended[sample] for episode, sample in rows]), old_logprobs=logprobs, values=values,
        texts=("",) * len(rows), temperature=temperature,
    )  # fmt: skip
    return rollout, rewards
