"""Proximal policy optimisation of whole responses: from a rollout and its rewards to a changed adapter.

One teacher-forced forward per minibatch of whole sequences, never one per token. Old logprobs and values are recomputed in the same forward
that is trained (arXiv 2505.07291 does so at every optimisation step): the ratio is 1 on the first pass, however sampling was filtered and
whatever the servers' cached path rounds differently. Knows nothing about prompts, texts, environments or where the policy's blocks are.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_swarm.config import PPOConfig
from textrl_swarm.errors import RewardError
from textrl_swarm.losses import chunked_logprobs, policy_loss, value_loss
from textrl_swarm.policy import Policy
from textrl_swarm.returns import estimate_advantages, explained_variance, masked_mean, next_kl_coef, shaped_rewards, whiten, zero_outside
from textrl_swarm.types import RolloutBatch

logger = logging.getLogger(__name__)

_SCORING_ROWS = 64  # rows per forward when nothing is trained
_STEP_METRICS = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm")  # means over the optimizer steps taken


@dataclass(frozen=True)
class _Scores:
    """What one forward says about B responses of at most T tokens."""

    logprobs: Tensor  # (B, T) of the chosen tokens at the rollout's temperature
    entropies: Tensor | None  # (B, T)
    values: Tensor  # (B, T) of the states in which they were chosen
    final_values: Tensor  # (B,) of the state after the last one


class PPO:
    """The learner: owns optimizer and KL coefficient, changes the policy's trainable parameters and nothing else.

    Args:
        policy: what is trained.
        config: see PPOConfig.
        make_optimizer: parameters -> torch optimizer; None = AdamW.
    """

    def __init__(
        self, policy: Policy, config: PPOConfig | None = None, make_optimizer: Callable[[list], torch.optim.Optimizer] | None = None
    ):
        self.policy, self.config = policy, config or PPOConfig()
        self._parameters = list(policy.trainable_parameters().values())
        make_optimizer = make_optimizer or self._adamw
        self.optimizer = make_optimizer(self._parameters)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.kl_coef = self.config.kl_coef
        self.num_updates = 0  # rollouts trained on
        self.num_steps = 0  # optimizer steps taken
        self.num_skipped = 0  # optimizer steps skipped because something was not finite

    def _adamw(self, parameters: list) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.config.lr, eps=self.config.adam_eps, weight_decay=self.config.weight_decay)

    def update(self, rollout: RolloutBatch, rewards: Tensor) -> dict[str, float]:
        """Trains on one rollout.

        Args:
            rollout: B responses of at most T tokens.
            rewards: (B, T) per token, before the KL penalty; a sentence's score sits on its last token.

        Returns:
            the metrics that the README defines, as plain numbers.

        Raises:
            RewardError: rewards of another shape, or not finite; nothing is changed then.
        """
        started = time.perf_counter()
        mask = rollout.response_mask
        _check_rewards(rewards, mask)
        config = self.config
        with torch.no_grad():
            features, old, ref = self._score_with_ref(rollout)
            shaped = shaped_rewards(rewards, old.logprobs, ref.logprobs, mask, kl_coef=self.kl_coef)
            if config.whiten_rewards:
                shaped = whiten(shaped, mask, shift_mean=False)
            cut = ~rollout.terminated & config.bootstrap_truncated
            bootstrap = torch.where(cut, old.final_values, torch.zeros(()))
            advantages, returns = estimate_advantages(shaped, old.values, bootstrap, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
            if config.whiten_advantages:
                advantages = whiten(advantages, mask)
        kl = _kl(old, ref)
        metrics = {
            "score": float(zero_outside(mask, rewards).sum(dim=1).mean()),
            "kl": kl,
            "kl_coef": self.kl_coef,
            "entropy": float(masked_mean(old.entropies, mask)),
            "value": float(masked_mean(old.values, mask)),
            "explained_variance": float(explained_variance(old.values, returns, mask)),
            "sampler_kl": float(masked_mean(rollout.old_logprobs - old.logprobs, mask)),
            "response_tokens": float(mask.sum(dim=1).float().mean()),
            "terminated": float(rollout.terminated.float().mean()),
            "lr": self._set_lr(),
        }
        with torch.enable_grad():  # a reward's module may have switched gradients off for all
            metrics.update(self._train(features, rollout, old, advantages, returns))
        if config.adaptive_kl_target is not None and math.isfinite(kl):
            self.kl_coef = next_kl_coef(
                self.kl_coef, kl, target=config.adaptive_kl_target, horizon=config.adaptive_kl_horizon, num_responses=len(rollout)
            )
        self.num_updates += 1
        metrics["update_tokens_per_second"] = float(mask.sum()) / (time.perf_counter() - started)
        return metrics

    def divergence(self, rollout: RolloutBatch) -> float:
        """KL to the ref policy over responses that this policy sampled: mean over responses of sum_t logprob - ref_logprob, in nats."""
        with torch.no_grad():
            _, now, ref = self._score_with_ref(rollout)
        return _kl(now, ref)

    def _score_with_ref(self, rollout: RolloutBatch) -> tuple[Tensor, _Scores, _Scores]:
        features = self.policy.features(rollout.tokens.to(self.policy.device))
        scores = self._score_all(features, rollout)
        with self.policy.reference():
            return features, scores, self._score_all(features, rollout)

    def _train(self, features: Tensor, rollout: RolloutBatch, old: _Scores, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        sums = [0.0] * len(_STEP_METRICS)
        taken, first, stopped_early = 0, None, False
        skipped_before = self.num_skipped
        for rows in self._minibatches(len(rollout)):
            mask = rollout.response_mask[rows]
            now = self._score(features, rollout, rows, with_entropy=self.config.entropy_coef > 0)
            actor_loss, stats = policy_loss(now.logprobs, old.logprobs[rows], advantages[rows], mask, clip_range=self.config.clip_range)
            critic_loss = value_loss(now.values, old.values[rows], returns[rows], mask, clip_range=self.config.value_clip_range)
            loss = actor_loss + self.config.value_coef * critic_loss
            if self.config.entropy_coef > 0:
                loss = loss - self.config.entropy_coef * masked_mean(now.entropies, mask)
            if first is None:
                first = stats
            if self.config.target_kl is not None and float(stats.approx_kl) > self.config.target_kl:
                stopped_early = True
                break
            grad_norm = self._optimizer_step(loss)
            if grad_norm is None:
                continue
            taken += 1
            parts = (actor_loss.detach(), critic_loss.detach(), stats.clip_fraction, stats.approx_kl, grad_norm)
            sums = [total + float(part) for total, part in zip(sums, parts, strict=True)]
        means = [total / taken if taken else math.nan for total in sums]
        return {
            **dict(zip(_STEP_METRICS, means, strict=True)),
            "ratio_first_pass": float(first.ratio_mean),
            "ratio_first_pass_max_deviation": float(first.ratio_max_deviation),
            "optimizer_steps": float(taken),
            "skipped_steps": float(self.num_skipped - skipped_before),
            "stopped_early": float(stopped_early),
        }

    def _set_lr(self) -> float:
        """Of this update: a function of the number of updates before it, so that nothing about it needs to be saved."""
        decay = self.config.lr_decay_updates
        if decay is not None:  # else it is whoever changes the optimizer's, e.g. a hook of pfrl
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * max(0.0, 1 - self.num_updates / decay)
        return self.optimizer.param_groups[0]["lr"]

    def _optimizer_step(self, loss: Tensor) -> float | None:
        """Backward, clip, step. Returns the gradient norm before clipping; None when the step was skipped, for a loss or gradient that
        is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        if torch.isfinite(loss):
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
            if torch.isfinite(grad_norm):
                self.optimizer.step()
                self.num_steps += 1
                return float(grad_norm)
        self.num_skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        logger.warning("an optimizer step was skipped: loss or gradient is not finite (%d skipped so far)", self.num_skipped)
        return None

    def _minibatches(self, num_rows: int, epochs: int | None = None) -> Iterator[Tensor]:
        """Row indices, every row once per epoch, in an order that depends on seed and update only."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.num_updates) % 2**63)
        for _ in range(epochs or self.config.epochs):
            yield from torch.randperm(num_rows, generator=generator).split(self.config.minibatch_size)

    def _score_all(self, features: Tensor, rollout: RolloutBatch) -> _Scores:
        order = torch.arange(len(rollout))
        groups = order.split(_SCORING_ROWS)
        if self.policy.rounds_by_batch:  # in the minibatches of the first pass, whose ratio is then 1
            order = torch.cat(groups := list(self._minibatches(len(rollout), epochs=1)))
        parts = [self._score(features, rollout, rows, with_entropy=True) for rows in groups]
        back = order.argsort()
        return _Scores(*(torch.cat([getattr(part, name) for part in parts])[back] for name in _Scores.__dataclass_fields__))

    def _score(self, features: Tensor, rollout: RolloutBatch, rows: Tensor, *, with_entropy: bool) -> _Scores:
        """One forward of the given rows; results on the CPU, differentiable when gradients are on."""
        mask, prompt_lengths = rollout.response_mask[rows], rollout.prompt_lengths[rows]
        lengths = prompt_lengths + mask.sum(dim=1)
        hidden = self.policy.hidden_states(features[rows.to(features.device), : int(lengths.max())])
        row, step = mask.nonzero(as_tuple=True)  # (N,) real response tokens
        before = prompt_lengths[row] + step - 1  # the state in which token `step` was chosen
        states = hidden[row.to(hidden.device), before.to(hidden.device)]  # (N, H)
        chosen = rollout.tokens[rows][row, before + 1].to(hidden.device)
        scored = chunked_logprobs(states, self.policy.project, chosen, temperature=rollout.temperature, with_entropy=with_entropy)
        logprobs, entropies = scored if with_entropy else (scored, None)
        final = hidden[torch.arange(len(rows)), (lengths - 1).to(hidden.device)]

        def spread(flat: Tensor) -> Tensor:  # (N,) -> (b, T), zero outside the mask
            return torch.zeros(mask.shape).masked_scatter(mask, flat.float().cpu())

        return _Scores(
            logprobs=spread(logprobs),
            entropies=spread(entropies) if with_entropy else None,
            values=spread(self.policy.value_head(states)),
            final_values=self.policy.value_head(final).float().cpu(),
        )

    def state_dict(self) -> dict:
        """Optimizer, KL coefficient and counters; the policy's parameters are saved by the policy."""
        counters = {name: getattr(self, name) for name in ("kl_coef", "num_updates", "num_steps", "num_skipped")}
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "initial_kl_coef": self.config.kl_coef,
            **counters,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict`. Settings are this run's: a learning rate or KL coefficient goes on where the saved run's schedule or
        controller had brought it, unless it began with another; another kind of optimizer begins afresh."""
        saved, here = state.get("optimizer_class"), type(self.optimizer).__name__
        if saved in (None, here):
            chosen = [dict(group) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, mine in zip(self.optimizer.param_groups, chosen, strict=True):
                kept = {"params", "lr"} if group.get("initial_lr") == mine["initial_lr"] else {"params"}
                group.update({name: value for name, value in mine.items() if name not in kept})
        else:
            logger.warning("the checkpoint was written with the optimizer %s; %s begins afresh", saved, here)
        same = state.get("initial_kl_coef", self.config.kl_coef) == self.config.kl_coef
        self.kl_coef = state["kl_coef"] if same else self.config.kl_coef
        for name in ("num_updates", "num_steps", "num_skipped"):
            setattr(self, name, state[name])


def _kl(scores: _Scores, ref: _Scores) -> float:
    return float((scores.logprobs - ref.logprobs).sum(dim=1).mean())


def _check_rewards(rewards: Tensor, mask: Tensor) -> None:
    if rewards.shape != mask.shape:
        raise RewardError(f"rewards must have one number per response token, shape {tuple(mask.shape)}, got {tuple(rewards.shape)}")
    broken = (~torch.isfinite(rewards) & mask).nonzero()
    if len(broken):
        row, step = broken[0].tolist()
        raise RewardError(f"the reward of response {row}, token {step} is {float(rewards[row, step])}; rewards must be finite numbers")
