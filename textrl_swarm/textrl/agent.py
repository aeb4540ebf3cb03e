"""The PPO agent with pfrl's interface: act, observe, eval_mode, save, load, get_statistics.

Acting continues one cached session, a token of each sample per call; whole rollouts come through `learn`.
Both end in the same `Learner`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textrl_swarm.config import PPOConfig, SamplingConfig
from textrl_swarm.errors import AnswersRefuted, ConfigError, RewardError
from textrl_swarm.learning.learner import Learner
from textrl_swarm.learning.ppo import PPO, MakeOptimizer
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.generation import check_lengths, sample_next, stop_tokens
from textrl_swarm.policies.sessions import DecodingSession
from textrl_swarm.textrl.door import BatchAgent
from textrl_swarm.types import RolloutBatch, Trajectory

logger = logging.getLogger(__name__)

Observed = list[list[int]]  # per sample the token ids of prompt and response so far

# pfrl's names of statistics, then ours -> the update's metric.
_STATISTICS = {
    "average_value": "value",
    "average_entropy": "entropy",
    "average_value_loss": "value_loss",
    "average_policy_loss": "policy_loss",
    "n_updates": None,
    "explained_variance": "explained_variance",
    "kl": "kl",
    "clip_fraction": "clip_fraction",
    "score": "score",
}


class PPOAgent(BatchAgent):
    """Collects episodes of `act` and `observe` (or `batch_act`, `batch_observe`), trains every
    `update_interval` env steps.

    Args:
        policy: what acts and is trained.
        config: of the update; None = PPOConfig().
        sampling: of actions in training, and of evaluation unless `act_deterministically`; None =
            SamplingConfig().
        update_interval: env steps (one token of each sample) between updates; an update waits for the end of
            an episode.
        act_deterministically: evaluation takes the most likely token.
        make_optimizer: parameters -> torch optimizer; None = AdamW.

    Attributes:
        learner: the engine behind this interface.
        training: False inside pfrl's `eval_mode()`.
    """

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig | None = None,
        sampling: SamplingConfig | None = None,
        *,
        update_interval: int = 10,
        act_deterministically: bool = True,
        make_optimizer: MakeOptimizer | None = None,
    ):
        if update_interval < 1:
            raise ConfigError(f"update_interval must be >= 1 env steps, got {update_interval}")
        self.learner = Learner(policy, config, sampling, make_optimizer)
        self.update_interval = update_interval
        self.act_deterministically = act_deterministically
        self.training = True
        seed = self.ppo.config.seed
        # By training mode, since evaluation may interrupt an episode:
        self._generators = {mode: torch.Generator().manual_seed(seed) for mode in (True, False)}
        self._acting: dict[tuple[bool, int], _Episode] = {}  # by training mode and environment
        self._finished: list[_Episode] = []

    # -------------------------------------------------------------------------------- of the learner

    @property
    def policy(self) -> Policy:
        """What acts and is trained."""
        return self.learner.policy

    @property
    def sampling(self) -> SamplingConfig:
        """How actions are sampled."""
        return self.learner.sampling

    @property
    def ppo(self) -> PPO:
        """The update."""
        return self.learner.ppo

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last update; empty before the first."""
        return self.learner.metrics

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """For hooks, such as pfrl's that change the learning rate."""
        return self.ppo.optimizer

    def rollout_sampling(self) -> SamplingConfig:
        """See `Learner.rollout_sampling`."""
        return self.learner.rollout_sampling()

    def learn(self, rollout: RolloutBatch, rewards: Tensor) -> dict[str, float]:
        """See `Learner.learn`."""
        return self.learner.learn(rollout, rewards)

    def save(self, dirname: str) -> None:
        """See `Learner.save`."""
        self.learner.save(dirname)

    def load(self, dirname: str) -> None:
        """See `Learner.load`."""
        self.learner.load(dirname)

    # ------------------------------------------------------------------------------ pfrl's interface

    def batch_act(self, batch_obs: Sequence[Observed]) -> list[np.ndarray]:
        """For each environment the next token ids (C,) of the C samples in its observation."""
        return [self._act(obs, i) for i, obs in enumerate(batch_obs)]

    def batch_observe(
        self,
        batch_obs: Sequence[Observed],
        batch_reward: Sequence[Any],
        batch_done: Sequence[bool],
        batch_reset: Sequence[bool],
    ) -> None:
        """Takes the consequences of the last actions.

        A `reset` without `done` means that an episode was cut short. If its observation is the environment's
        own, the environment is then asked for the final reward; else the episode is worth what it earned.
        """
        consequences = zip(batch_obs, batch_reward, batch_done, batch_reset, strict=True)
        for i, (obs, reward, done, reset) in enumerate(consequences):
            self._observe(obs, reward, bool(done), bool(reset), i)
        has_ended = any(batch_done) or any(batch_reset)
        env_steps = sum(len(episode.rewards) for episode in self._finished)
        if has_ended and env_steps >= self.update_interval:
            finished = self._finished
            self._finished = []
            self.learn(*_as_rollout(finished, self.sampling.temperature))

    def _act(self, obs: Observed, env: int) -> np.ndarray:
        key = (self.training, env)
        episode = self._acting.get(key)
        # The last episode may have been left without reset=True.
        if episode is None or not episode.continues(obs):
            if episode is not None:
                episode.close()
            max_new_tokens = getattr(obs, "max_new_tokens", self.sampling.max_new_tokens)
            episode = self._acting[key] = _Episode(self.policy, max_new_tokens, self.sampling)
        with torch.no_grad():
            hidden = episode.advance(obs)
            draws = None
            if self.training or not self.act_deterministically:
                generator = self._generators[self.training]
                draws = torch.rand(len(obs), dtype=torch.float64, generator=generator)
            seen = [torch.tensor(row) for row in obs]
            chosen, logprobs, values = sample_next(self.policy, hidden, seen, self.sampling, draws)
        episode.chose(chosen, logprobs, values)
        return chosen.numpy()

    def _observe(self, obs: Observed, reward: Any, done: bool, reset: bool, env: int) -> None:
        episode = self._acting.get((self.training, env))
        if episode is None or not episode.chosen:
            raise ConfigError("observe() without act(): call agent.act(obs) first")
        final_rewards = getattr(obs, "final_rewards", None)
        if reset and not done and self.training and final_rewards is not None:
            reward = final_rewards()  # instead of the reward of a token in the middle
        episode.rewarded(reward, getattr(obs, "terminated", None))
        if done or reset:
            if self.training:
                self._finished.append(episode)
            episode.close()
            del self._acting[self.training, env]

    def get_statistics(self) -> list[tuple[str, float]]:
        """pfrl's six names first, then ours; NaN before the first update."""
        statistics = []
        for name, metric in _STATISTICS.items():
            value = self.ppo.num_steps if metric is None else self.metrics.get(metric, float("nan"))
            statistics.append((name, value))
        return statistics


class _Episode:
    """C samples of one prompt while they are being chosen: their session, and what was chosen and earned."""

    def __init__(self, policy: Policy, max_new_tokens: int, sampling: SamplingConfig):
        self._policy = policy
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._resources = contextlib.ExitStack()
        self._session: DecodingSession | None = None
        self.prompt: list[int] = []
        # Per env step: (C,) token ids, their logprobs, the values before them, and whether the sample was
        # still open.
        self.chosen: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.values: list[Tensor] = []
        self.open: list[Tensor] = []
        self.rewards: list[list[float]] = []
        self.ended = torch.zeros(0, dtype=torch.bool)  # (C,)

    def continues(self, obs: Observed) -> bool:
        """Whether the observation is this episode's next one, and not the first of another."""
        if self._session is None:
            return True
        if len(obs) != len(self.ended):
            return False
        for i, row in enumerate(obs):
            expected = self.prompt + [int(tokens[i]) for tokens in self.chosen]
            if not self.ended[i] and row != expected:
                return False
        return True

    def advance(self, obs: Observed) -> Tensor:
        """(C, H) hidden states after the last token of each sample; samples that have ended are computed
        too.
        """
        if self._session is None:
            self._session = self._open_session(obs)
            new = torch.tensor(obs)
        elif len(self.chosen) >= self._max_new_tokens:
            raise ConfigError(
                f"this episode continues after {self._max_new_tokens} tokens, its limit when it began; "
                "make the "
                "agent with SamplingConfig(max_new_tokens=...) as large as the environment's max_length"
            )
        else:
            new = self.chosen[-1][:, None]
        return self._session.step(new.to(self._policy.device))[:, -1]

    def _open_session(self, obs: Observed) -> DecodingSession:
        if len({tuple(row) for row in obs}) != 1:
            raise ConfigError(
                "an episode starts with the same prompt for every sample; call env.reset() first"
            )
        self.prompt = list(obs[0])
        self.ended = torch.zeros(len(obs), dtype=torch.bool)
        check_lengths(self._policy, [self.prompt], self._max_new_tokens)
        length = len(self.prompt) + self._max_new_tokens
        return self._resources.enter_context(self._policy.session(len(obs), length))

    def chose(self, chosen: Tensor, logprobs: Tensor, values: Tensor) -> None:
        """Notes the tokens of an env step."""
        self.chosen.append(chosen)
        self.logprobs.append(logprobs)
        self.values.append(values)
        self.open.append(~self.ended)

    def rewarded(self, reward: Any, terminated: Sequence[bool] | None) -> None:
        """Notes the rewards of the last action, a number or one per sample.

        Args:
            terminated: which samples a stop token has ended, by the environment; None = by the stop tokens
                of sampling, or else the policy's.
        """
        count = len(self.chosen[-1])
        rewards = np.asarray(reward, dtype=np.float64).reshape(-1)
        if len(rewards) not in (1, count) or not np.isfinite(rewards).all():
            raise RewardError(f"observe() takes a finite number, or one per sample ({count}), got {reward!r}")
        self.rewards.append(np.broadcast_to(rewards, count).tolist())
        if terminated is None:
            stop = stop_tokens(self._policy, self._sampling)
            self.ended = self.ended | torch.isin(self.chosen[-1], stop)
        else:
            self.ended = self.ended | torch.as_tensor(terminated)

    def close(self) -> None:
        """Frees the session."""
        try:
            self._resources.close()
        except AnswersRefuted:  # an environment's steps cannot be done again; the update reckons with that
            logger.warning("the responses of this episode may come from a server that was refuted")

    def trajectory(self, sample: int) -> tuple[Trajectory, Tensor]:
        """One sample with its rewards (n,); rewards after the sample's end go to its own last token."""
        length = int(sum(bool(was_open[sample]) for was_open in self.open))
        rewards = torch.zeros(length)
        last_step = len(self.rewards) - 1
        for env_step, earned in enumerate(self.rewards):
            if env_step < length or env_step == last_step:
                rewards[min(env_step, length - 1)] += earned[sample]
        trajectory = Trajectory(
            prompt=torch.tensor(self.prompt),
            response=torch.stack([tokens[sample] for tokens in self.chosen[:length]]),
            logprobs=torch.stack([logprobs[sample] for logprobs in self.logprobs[:length]]),
            values=torch.stack([values[sample] for values in self.values[:length]]),
            terminated=bool(self.ended[sample]),
        )
        return trajectory, rewards


def _as_rollout(episodes: Sequence[_Episode], temperature: float) -> tuple[RolloutBatch, Tensor]:
    """Episodes of env steps as one right-padded batch, and its rewards (B, T)."""
    samples = []
    for episode in episodes:
        samples += [episode.trajectory(sample) for sample in range(len(episode.chosen[0]))]
    trajectories, rewards = zip(*samples, strict=True)
    rollout = RolloutBatch.from_trajectories(trajectories, temperature=temperature)
    return rollout, torch.nn.utils.rnn.pad_sequence(list(rewards), batch_first=True)
