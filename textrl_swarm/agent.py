"""The PPO agent with pfrl's interface: act, observe, eval_mode, save, load, get_statistics. The door to pfrl.

Acting continues one cached session, a token of each sample per call; whole rollouts come through `learn`. Both end in the same update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from textrl_swarm.adapters import ADAPTER_CONFIG
from textrl_swarm.config import PPOConfig, SamplingConfig
from textrl_swarm.errors import AdapterError, ConfigError, RewardError
from textrl_swarm.generation import check_lengths, sample_next
from textrl_swarm.policy import Policy
from textrl_swarm.ppo import PPO
from textrl_swarm.types import RolloutBatch

with contextlib.redirect_stderr(io.StringIO()):  # gym, which pfrl imports, prints that it is unmaintained
    from pfrl.agent import BatchAgent

LEARNER_STATE = "learner.pt"


class PPOAgent(BatchAgent):
    """Collects episodes of `act` and `observe` (or `batch_act`, `batch_observe`), trains after `update_interval` env steps.

    Args:
        policy: what acts and is trained.
        config: of the update.
        sampling: of actions in training, and of evaluation unless `act_deterministically`.
        update_interval: env steps (one token of each sample) between updates; an update waits for the end of an episode.
        act_deterministically: evaluation takes the most likely token.
        make_optimizer: parameters -> torch optimizer; None = AdamW.
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
        self._draws = {mode: torch.Generator().manual_seed(self.ppo.config.seed) for mode in (True, False)}  # by training mode, as below
        self._acting: dict[tuple[bool, int], _Episode] = {}  # by training mode (evaluation may interrupt an episode) and environment
        self._finished: list[_Episode] = []

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """For hooks, such as pfrl's that change the learning rate."""
        return self.ppo.optimizer

    # ------------------------------------------------------------------ pfrl's interface

    def batch_act(self, batch_obs: Sequence[list[list[int]]]) -> list[np.ndarray]:
        """For each environment (C,) token ids: the next one of each of the C samples in its observation (lists of token ids)."""
        return [self._act(obs, i) for i, obs in enumerate(batch_obs)]

    def batch_observe(self, batch_obs: Sequence, batch_reward: Sequence, batch_done: Sequence[bool], batch_reset: Sequence[bool]) -> None:
        """Takes the consequences of the last actions; `reset` without `done` means that an episode was cut short. Its environment is then
        asked what it is worth, if the observation is as the environment gave it; else it is worth what it earned."""
        for i, (obs, reward, done, reset) in enumerate(zip(batch_obs, batch_reward, batch_done, batch_reset, strict=True)):
            self._observe(obs, reward, bool(done), bool(reset), i)
        ended = any(batch_done) or any(batch_reset)
        if ended and sum(len(episode.rewards) for episode in self._finished) >= self.update_interval:
            finished, self._finished = self._finished, []
            self.learn(*_as_rollout(finished, self.sampling.temperature))

    def _act(self, obs: list[list[int]], env: int) -> np.ndarray:
        episode = self._acting.get((self.training, env))
        if episode is None or not episode.continues(obs):  # the last one may have been left without observe(..., reset=True)
            if episode is not None:
                episode.close()
            episode = self._acting[self.training, env] = _Episode(self.policy, getattr(obs, "max_new_tokens", self.sampling.max_new_tokens))
        with torch.no_grad():
            hidden = episode.advance(obs)
            deterministic = not self.training and self.act_deterministically
            draws = None if deterministic else torch.rand(len(obs), dtype=torch.float64, generator=self._draws[self.training])
            seen = [torch.tensor(row) for row in obs]
            chosen, logprobs, values = sample_next(self.policy, hidden, seen, self.sampling, draws)
        episode.chose(chosen, logprobs, values)
        return chosen.numpy()

    def _observe(self, obs, reward, done: bool, reset: bool, env: int) -> None:
        episode = self._acting.get((self.training, env))
        if episode is None or not episode.chosen:
            raise ConfigError("observe() without act(): call agent.act(obs) first")
        if reset and not done and self.training and getattr(obs, "final_rewards", None) is not None:
            reward = obs.final_rewards()  # instead of what the last token earned as one in the middle
        episode.rewarded(reward, getattr(obs, "terminated", None))
        if done or reset:
            if self.training:
                self._finished.append(episode)
            episode.close()
            del self._acting[self.training, env]

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
            near = sorted(child.name for child in path.parent.glob("*") if (child / ADAPTER_CONFIG).is_file())
            hint = f"{path.parent} has {', '.join(near)}" if near else f"{path.parent} has no checkpoints"
            raise AdapterError(f"there is no checkpoint {path}; {hint}")
        if (path / "model.pt").is_file() and not (path / ADAPTER_CONFIG).is_file():
            raise AdapterError(
                f"{path} was saved by TextRL itself (model.pt holds an output layer, no adapter); train again with this package"
            )
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
            check_lengths(self._policy, [self.prompt], SamplingConfig(max_new_tokens=self._max_new_tokens))
            self._session = self._resources.enter_context(self._policy.session(len(obs), len(self.prompt) + self._max_new_tokens))
            new = torch.tensor(obs)
        elif len(self.chosen) >= self._max_new_tokens:
            raise ConfigError(
                f"this episode goes on after {self._max_new_tokens} tokens, which were the most when it began; "
                "make the agent with SamplingConfig(max_new_tokens=...) as large as the environment's max_length"
            )
        else:
            new = self.chosen[-1][:, None]
        return self._session.step(new.to(self._policy.device))[:, -1]

    def chose(self, chosen: Tensor, logprobs: Tensor, values: Tensor) -> None:
        self.chosen.append(chosen)
        self.logprobs.append(logprobs)
        self.values.append(values)
        self.open.append(~self.ended)

    def rewarded(self, reward, terminated: Sequence[bool] | None) -> None:
        """Rewards of the last action, a number or one per sample; `terminated`: which samples a stop token has ended, as the environment
        says; None = as the policy's stop tokens say."""
        count = len(self.chosen[-1])
        rewards = np.asarray(reward, dtype=np.float64).reshape(-1)
        if len(rewards) not in (1, count) or not np.isfinite(rewards).all():
            raise RewardError(f"observe() takes a finite number, or one per sample ({count}), got {reward!r}")
        self.rewards.append(np.broadcast_to(rewards, count).tolist())
        if terminated is None:
            terminated = torch.isin(self.chosen[-1], torch.tensor(sorted(self._policy.stop_ids), dtype=torch.int64))
        self.ended = self.ended | torch.as_tensor(terminated)

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
