"""A policy, how it samples, and PPO: what a training loop drives, saves and loads. Knows nothing about
prompts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from textrl_swarm.config import PPOConfig, SamplingConfig
from textrl_swarm.errors import AdapterError, CheckpointError, TextRLSwarmError
from textrl_swarm.learning.ppo import PPO, MakeOptimizer
from textrl_swarm.models.adapter_files import ADAPTER_CONFIG, require_no_textrl_model
from textrl_swarm.policies.base import Policy
from textrl_swarm.types import RolloutBatch

LEARNER_STATE = "learner.pt"


class Learner:
    """Trains a policy on whole rollouts.

    Args:
        policy: what samples and is trained.
        config: of the update; None = PPOConfig().
        sampling: of rollouts; None = SamplingConfig().
        make_optimizer: parameters -> torch optimizer; None = AdamW.

    Attributes:
        metrics: of the last update; empty before the first.
    """

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig | None = None,
        sampling: SamplingConfig | None = None,
        make_optimizer: MakeOptimizer | None = None,
    ):
        self.policy = policy
        self.sampling = sampling or SamplingConfig()
        self._seed = self.sampling.seed
        self.ppo = PPO(policy, config, make_optimizer, self.sampling.max_new_tokens)
        self.metrics: dict[str, float] = {}

    def rollout_sampling(self) -> SamplingConfig:
        """How the next rollout samples: its random numbers depend on the seed and the updates so far.

        Without a seed, one is drawn the first time. A reward may seed torch's global generator at every call,
        and must not make all rollouts alike.
        """
        if self._seed is None:
            self._seed = int(torch.randint(2**31, ()))
        return dataclasses.replace(self.sampling, seed=self._seed + self.ppo.num_updates)

    def learn(self, rollout: RolloutBatch, rewards: Tensor) -> dict[str, float]:
        """Trains on a whole rollout; returns the update's metrics. Raises RewardError, see `PPO.update`."""
        self.metrics = self.ppo.update(rollout, rewards)
        return self.metrics

    def save(self, directory: str | Path) -> None:
        """Writes adapter (PEFT format), value head, optimizer and counters."""
        self.policy.save_adapter(directory)
        torch.save(self.ppo.state_dict(), Path(directory).expanduser() / LEARNER_STATE)

    def load(self, directory: str | Path) -> None:
        """Loads what `save` wrote; an adapter alone is enough. Raises AdapterError, naming checkpoints
        nearby; CheckpointError for a damaged file beside it.
        """
        path = Path(directory).expanduser()
        if not path.is_dir():
            near = sorted(child.name for child in path.parent.glob("*") if (child / ADAPTER_CONFIG).is_file())
            hint = f"{path.parent} has {', '.join(near)}" if near else f"{path.parent} has no checkpoints"
            raise AdapterError(f"there is no checkpoint {path}; {hint}")
        require_no_textrl_model(path)
        self.policy.load_adapter(path)
        state_path = path / LEARNER_STATE
        if state_path.is_file():
            try:
                self.ppo.load_state_dict(torch.load(state_path, weights_only=True))
            except TextRLSwarmError:
                raise
            except Exception as error:  # a damaged file can fail in any way
                raise CheckpointError(
                    f"{state_path} cannot be read ({error!r:.200}): copy it again, or remove it to start "
                    "from the adapter with a new optimizer"
                ) from error
