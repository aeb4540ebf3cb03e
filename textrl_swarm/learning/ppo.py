"""Policy optimisation of whole responses: from a rollout and its rewards to a changed adapter.

One teacher-forced forward per minibatch of whole sequences, never one per token. Old logprobs and values are
recomputed with the same forward that is trained (arXiv 2505.07291 does so at every optimisation step): the
ratio is 1 on the first pass, however sampling was filtered and whatever the servers' cached path rounds
differently. Those of the first minibatch are its training forward's own, if that is one. Knows nothing about
prompts, texts, environments or where the policy's blocks are.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from textrl_swarm.config import PPOConfig
from textrl_swarm.errors import ConfigError, RewardError
from textrl_swarm.maths.losses import chunked_logprobs, value_loss
from textrl_swarm.maths.objectives import (
    Surrogate,
    group_advantages,
    groups_of,
    kl_per_token,
    next_entropy_coef,
    ratio_stats,
    sampler_weights,
    surrogate_loss,
    token_weights,
)
from textrl_swarm.maths.returns import (
    estimate_advantages,
    explained_variance,
    masked_mean,
    next_kl_coef,
    whiten,
    zero_outside,
)
from textrl_swarm.policies.base import Policy
from textrl_swarm.types import RolloutBatch

logger = logging.getLogger(__name__)

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_LARGE_SAMPLER_KL = 0.02  # nats per token; a tiny model in 8 bits had 0.00002
EVALUATION_ROWS = 64  # rows per forward when nothing is trained
# Metrics that are means over the optimizer steps of an update.
_STEP_METRICS = ("policy_loss", "clip_fraction", "approx_kl")


_COUNTERS = ("kl_coef", "entropy_coef", "num_updates", "num_steps", "num_skipped")


@dataclass(frozen=True)
class _Evaluation:
    """What one forward says about B responses of at most T tokens."""

    logprobs: Tensor
    """(B, T) of the chosen tokens at the rollout's temperature."""

    values: Tensor
    """(B, T) of the states in which the tokens were chosen; zeros without a critic."""

    final_values: Tensor
    """(B,) of the state after the last token; zeros without a critic."""

    entropies: Tensor
    """(B, T) of the distributions; zeros where they were not asked for."""

    def detached(self) -> _Evaluation:
        """Without gradients."""
        return _Evaluation(
            self.logprobs.detach(), self.values.detach(), self.final_values.detach(), self.entropies.detach()
        )

    @staticmethod
    def joined(parts: Sequence[_Evaluation], order: Tensor) -> _Evaluation:
        """Parts below each other, then row i of the result is row order[i] of them."""
        return _Evaluation(
            torch.cat([part.logprobs for part in parts])[order],
            torch.cat([part.values for part in parts])[order],
            torch.cat([part.final_values for part in parts])[order],
            torch.cat([part.entropies for part in parts])[order],
        )


@dataclass(frozen=True)
class _Targets:
    """What B responses are trained towards."""

    old: _Evaluation
    ref_logprobs: Tensor
    """(B, T)"""

    advantages: Tensor
    """(B, T)"""

    returns: Tensor
    """(B, T), for the critic."""

    mask: Tensor
    """(B, T) bool: the tokens from which is learned."""

    sampler_weights: Tensor | None
    """(B, T), for samplers that differ from the policy that is scored."""


class PPO:
    """The update: owns optimizer and KL coefficient, changes the policy's trainable parameters and nothing
    else.

    Args:
        policy: what is trained.
        config: see PPOConfig; None = its defaults.
        make_optimizer: parameters -> torch optimizer; None = AdamW.
        length: most tokens that a response may have; None = those of the longest in a rollout.

    Attributes:
        parameters: those that are trained: the adapter's and, with a critic, the value head's.
        kl_coef, entropy_coef: of the next update.
        compares_responses: whether each prompt needs several.
        num_updates: rollouts trained on.
        num_steps: optimizer steps taken.
        num_skipped: optimizer steps skipped because a loss or gradient was not finite.
    """

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig | None = None,
        make_optimizer: MakeOptimizer | None = None,
        length: int | None = None,
    ):
        self.policy = policy
        self.config = config = config or PPOConfig()
        self._length = length
        self._has_critic = config.baseline == "critic"
        self.compares_responses = config.baseline in ("group", "leave_one_out")
        trained = policy.trainable_parameters() if self._has_critic else policy.adapter_parameters()
        self.parameters = list(trained.values())
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        self._surrogate = Surrogate(config.ratio, config.clip, config.clip_range, high, config.ratio_max)
        if make_optimizer is not None and config.value_lr is not None:
            raise ConfigError(
                "value_lr is for AdamW; give an optimizer of your own its groups, or leave it out"
            )
        make_optimizer = make_optimizer or self._adamw
        self.optimizer = make_optimizer(self.parameters)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.kl_coef = config.kl_coef
        self.entropy_coef = config.entropy_coef
        self._wants_entropy = config.entropy_coef > 0 or config.entropy_target is not None
        self._has_warned = False
        self.num_updates = 0
        self.num_steps = 0
        self.num_skipped = 0

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if config.value_lr is not None:
            head = set(self.policy.value_head.parameters())
            groups = [{"params": [parameter for parameter in parameters if parameter not in head]}]
            groups.append({"params": list(self.policy.value_head.parameters()), "lr": config.value_lr})
        return torch.optim.AdamW(groups, lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay)

    def update(self, rollout: RolloutBatch, rewards: Tensor) -> dict[str, float]:
        """Trains on one rollout.

        Args:
            rollout: B responses of at most T tokens.
            rewards: (B, T) per token, before the KL penalty; a sentence's score sits on its last token.

        Returns:
            Metrics by name, as plain numbers; docs/metrics.md defines them.

        Raises:
            RewardError: rewards of another shape, or not finite; nothing is changed then.
            ConfigError: an algorithm that compares the responses to a prompt, and a prompt with one.
        """
        _check_rewards(rewards, rollout.response_mask)
        prompts = self._compared(rollout)
        if not self.policy.checks_answers:
            return self._update(rollout, rewards, prompts)
        parameters = [parameter.detach().clone() for parameter in self.parameters]
        state = copy.deepcopy(self.state_dict())

        def undo() -> None:
            with torch.no_grad():
                for parameter, before in zip(self.parameters, parameters, strict=True):
                    parameter.copy_(before)
            self.load_state_dict(copy.deepcopy(state))

        return self.policy.trusted(lambda: self._update(rollout, rewards, prompts), undo)

    def _update(self, rollout: RolloutBatch, rewards: Tensor, prompts: Tensor | None) -> dict[str, float]:
        started = time.perf_counter()
        mask = rollout.response_mask
        config = self.config
        minibatches = self._minibatches(len(rollout))
        with torch.enable_grad():  # a reward's module may have switched gradients off for the whole process
            features = self.policy.features(rollout.tokens.to(self.policy.device))
            first_rows = next(minibatches)
            known: list[_Evaluation] = []
            if len(self._parts(rollout, first_rows)) == 1:
                known.append(self._evaluate(features, rollout, first_rows, with_entropy=True))
        with torch.no_grad():
            groups = self._groups(rollout, first_rows)
            old = self._evaluate_all(features, rollout, groups, *(first.detached() for first in known))
            with self.policy.reference():  # in the same groups, so that the KL of equal policies is 0
                ref = self._evaluate_all(features, rollout, groups)
            targets = self._targets(rollout, rewards, old, ref.logprobs, prompts)
        kl = _kl(old, ref)
        entropy = float(masked_mean(old.entropies, mask))
        metrics = {
            "score": float(zero_outside(mask, rewards).sum(dim=1).mean()),
            "kl": kl,
            "kl_coef": self.kl_coef,
            "entropy": entropy,
            "entropy_coef": self._entropy_weight(entropy),
            **_signal(rollout, rewards, prompts),
            "sampler_kl": self._sampler_kl(rollout, old),
            "response_tokens": float(mask.sum(dim=1).float().mean()),
            "terminated": float(rollout.terminated.float().mean()),
            "lr": self._set_lr(),
        }
        if self._has_critic:
            metrics["value"] = float(masked_mean(old.values, mask))
            metrics["explained_variance"] = float(explained_variance(old.values, targets.returns, mask))
        with torch.enable_grad():
            steps = itertools.chain([first_rows], minibatches)
            metrics.update(self._train(features, rollout, targets, steps, known, metrics["entropy_coef"]))
        if config.adaptive_kl_target is not None and math.isfinite(kl):
            self.kl_coef = next_kl_coef(
                self.kl_coef,
                kl,
                target=config.adaptive_kl_target,
                horizon=config.adaptive_kl_horizon,
                num_responses=len(rollout),
            )
        if config.entropy_target is not None and math.isfinite(entropy):
            self.entropy_coef = next_entropy_coef(
                self.entropy_coef, entropy, target=config.entropy_target, step=config.entropy_step
            )
        self.num_updates += 1
        metrics["update_tokens_per_second"] = float(mask.sum()) / (time.perf_counter() - started)
        return metrics

    def _targets(
        self,
        rollout: RolloutBatch,
        rewards: Tensor,
        old: _Evaluation,
        ref_logprobs: Tensor,
        prompts: Tensor | None,
    ) -> _Targets:
        config, mask = self.config, rollout.response_mask
        shaped = zero_outside(mask, rewards)
        if config.kl_in == "reward" and self.kl_coef > 0:
            penalties = kl_per_token(old.logprobs, ref_logprobs, mask, config.kl_estimator)
            shaped = shaped - self.kl_coef * penalties
        if config.whiten_rewards:
            shaped = whiten(shaped, mask, shift_mean=False)
        bootstrapped = ~rollout.terminated & config.bootstrap_truncated
        bootstrap = torch.where(bootstrapped, old.final_values, torch.zeros(()))
        # Without a critic all values are 0, and with lambda = 1 advantages are returns.
        gae_lambda = config.gae_lambda if self._has_critic else 1.0
        advantages, returns = estimate_advantages(
            shaped, old.values, bootstrap, mask, gamma=config.gamma, gae_lambda=gae_lambda
        )
        if prompts is not None:
            of_responses = group_advantages(
                shaped.sum(dim=1), prompts, baseline=config.baseline, scale=config.scale_advantages
            )
            advantages = zero_outside(mask, of_responses[:, None].expand_as(shaped))
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        if config.mask_truncated:
            mask = mask & rollout.terminated[:, None]
        weights = None
        if config.sampler_correction != "none":
            weights = sampler_weights(
                old.logprobs,
                rollout.old_logprobs,
                rollout.response_mask,
                kind=config.sampler_correction,
                of=config.sampler_ratio_of,
                most=config.sampler_ratio_max,
            )
        return _Targets(old, ref_logprobs, advantages, returns, mask, weights)

    def _compared(self, rollout: RolloutBatch) -> Tensor | None:
        """(B,) int64 which rows have the same prompt; None where they are not compared."""
        if not self.compares_responses:
            return None
        prompts = groups_of(rollout.tokens, rollout.prompt_lengths)
        counts = prompts.bincount()
        if int(counts.min()) < 2:
            raise ConfigError(
                f"{self.config.algorithm} compares the responses to a prompt (baseline: "
                f"{self.config.baseline}), and {int((counts < 2).sum())} of {len(counts)} prompts have one: "
                "sample more of each (num_samples)"
            )
        return prompts

    def _sampler_kl(self, rollout: RolloutBatch, old: _Evaluation) -> float:
        """In nats per token. Warns once when it is large."""
        mask = rollout.response_mask
        distance = float(masked_mean(kl_per_token(rollout.old_logprobs, old.logprobs, mask, "k3"), mask))
        if not self._has_warned and distance > _LARGE_SAMPLER_KL:
            self._has_warned = True
            advice = []
            if self.policy.num_servers:
                advice.append("let servers compute alike (--torch_dtype, --quant_type)")
                advice.append("take a codec of more bits or none")
            if self.config.sampler_correction == "none":
                advice.append("correct for it (ppo.sampler_correction: truncate)")
            logger.warning(
                "responses were sampled from a policy that is %.3f nats per token away from the one that is "
                "trained%s",
                distance,
                f": {', or '.join(advice)}" if advice else "",
            )
        return float(masked_mean(rollout.old_logprobs - old.logprobs, mask))

    def _entropy_weight(self, entropy: float) -> float:
        """Of the bonus in this update."""
        target = self.config.entropy_target
        return self.entropy_coef if target is None or entropy <= target else 0.0

    def divergence(self, rollout: RolloutBatch) -> float:
        """KL to the ref policy over responses that this policy sampled, in nats per response.

        mean over responses of sum_t (logprob[t] - ref_logprob[t])
        """
        return self.policy.trusted(lambda: self._divergence(rollout))

    def _divergence(self, rollout: RolloutBatch) -> float:
        with torch.no_grad():
            features = self.policy.features(rollout.tokens.to(self.policy.device))
            groups = self._evaluation_groups(rollout, torch.arange(len(rollout)))
            now = self._evaluate_all(features, rollout, groups)
            with self.policy.reference():
                return _kl(now, self._evaluate_all(features, rollout, groups))

    def _train(
        self,
        features: Tensor,
        rollout: RolloutBatch,
        targets: _Targets,
        minibatches: Iterable[Tensor],
        known: list[_Evaluation],
        entropy_coef: float,
    ) -> dict[str, float]:
        """All optimizer steps of an update.

        Args:
            known: the first minibatch's evaluation, if there is one: nothing has changed since.
        """
        averaged = [*_STEP_METRICS, "value_loss"] if self._has_critic else _STEP_METRICS
        sums = dict.fromkeys((*averaged, "grad_norm"), 0.0)
        taken = 0
        first: dict[str, float] | None = None
        stopped_early = False
        skipped_before = self.num_skipped
        for rows in minibatches:
            if not (self._has_critic or targets.mask[rows].any()):
                known.clear()
                continue  # all of them were cut at the length limit
            self.optimizer.zero_grad(set_to_none=True)
            stats = self._add_gradients(features, rollout, targets, rows, known, entropy_coef)
            first = first or stats
            target_kl = self.config.target_kl
            if target_kl is not None and stats["approx_kl"] > target_kl:
                self.optimizer.zero_grad(set_to_none=True)
                stopped_early = True
                break
            grad_norm = self._optimizer_step(is_finite=math.isfinite(stats["loss"]))
            if grad_norm is None:
                continue
            taken += 1
            sums["grad_norm"] += grad_norm
            for name in averaged:
                sums[name] += stats[name]
        first = first or {"ratio_mean": math.nan, "ratio_max_deviation": math.nan}
        return {
            **{name: total / taken if taken else math.nan for name, total in sums.items()},
            "ratio_first_pass": first["ratio_mean"],
            "ratio_first_pass_max_deviation": first["ratio_max_deviation"],
            "optimizer_steps": float(taken),
            "skipped_steps": float(self.num_skipped - skipped_before),
            "stopped_early": float(stopped_early),
        }

    def _add_gradients(
        self,
        features: Tensor,
        rollout: RolloutBatch,
        targets: _Targets,
        minibatch: Tensor,
        known: list[_Evaluation],
        entropy_coef: float,
    ) -> dict[str, float]:
        """Adds the gradients of a minibatch's loss, part by part; the parts' losses add up to it.

        Stops where the loss is no longer finite, or approx_kl is too large already: it never falls.

        Args:
            known: evaluations of the first parts, which are taken out.

        Returns:
            Losses and statistics of the minibatch, or of the parts until it stopped.
        """
        config = self.config
        stats: dict[str, float] = defaultdict(float)
        learned = targets.mask[minibatch]
        length = self._length or learned.shape[1]
        weights = token_weights(learned, config.loss_mean, length=length)
        tokens = rollout.response_mask[minibatch].sum()
        place = {row: i for i, row in enumerate(minibatch.tolist())}
        for rows in self._parts(rollout, minibatch):
            mask = rollout.response_mask[rows]
            weight = weights[[place[row] for row in rows.tolist()]]
            now = (
                known.pop()
                if known
                else self._evaluate(features, rollout, rows, with_entropy=entropy_coef > 0)
            )
            old_logprobs = targets.old.logprobs[rows]
            surrogate = surrogate_loss(
                now.logprobs, old_logprobs, targets.advantages[rows], mask, self._surrogate
            )
            per_token = surrogate.per_token
            if targets.sampler_weights is not None:
                per_token = per_token * targets.sampler_weights[rows]
            if config.kl_in == "loss" and self.kl_coef > 0:
                kl = kl_per_token(now.logprobs, targets.ref_logprobs[rows], mask, config.kl_estimator)
                kl = kl * surrogate.ratio if config.kl_unbiased else kl
                per_token = per_token + self.kl_coef * kl
            loss = actor_loss = (per_token * weight).sum()
            ratio = ratio_stats(now.logprobs, old_logprobs, mask)
            share = mask.sum() / tokens
            means = {
                "clip_fraction": masked_mean(surrogate.is_clipped, mask),
                "approx_kl": ratio.approx_kl,
                "ratio_mean": ratio.ratio_mean,
            }
            if self._has_critic:
                means["value_loss"] = value_loss(
                    now.values,
                    targets.old.values[rows],
                    targets.returns[rows],
                    mask,
                    clip_range=config.value_clip_range,
                )
                loss = loss + config.value_coef * means["value_loss"] * share
            if entropy_coef > 0:
                loss = loss - entropy_coef * masked_mean(now.entropies, mask) * share
            for name, mean in means.items():
                stats[name] += float(mean.detach() * share)
            stats["loss"] += float(loss.detach())
            stats["policy_loss"] += float(actor_loss.detach())
            stats["ratio_max_deviation"] = max(stats["ratio_max_deviation"], float(ratio.ratio_max_deviation))
            is_far = config.target_kl is not None and stats["approx_kl"] > config.target_kl
            if is_far or not math.isfinite(stats["loss"]):
                break
            loss.backward()
        return stats

    def _set_lr(self) -> float:
        """Sets and returns this update's learning rate; it depends only on num_updates, so nothing is
        checkpointed.
        """
        config, warmup, decay = self.config, self.config.lr_warmup_updates, self.config.lr_decay_updates
        if warmup or decay is not None:  # else the optimizer's own, which a hook of pfrl may change
            share = min(1.0, (self.num_updates + 1) / (warmup + 1))
            if decay is not None:
                left = max(0.0, 1 - self.num_updates / decay)
                share *= left if config.lr_schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share
        return self.optimizer.param_groups[0]["lr"]

    def _optimizer_step(self, *, is_finite: bool) -> float | None:
        """Clip and step.

        Args:
            is_finite: whether the loss is.

        Returns:
            The gradient norm before clipping; None when the step was skipped because the loss or a gradient
            is not finite.
        """
        if is_finite:
            grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            if torch.isfinite(grad_norm):
                self.optimizer.step()
                self.num_steps += 1
                return float(grad_norm)
        self.num_skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        logger.warning(
            "an optimizer step was skipped: loss or gradient is not finite (%d skipped so far)",
            self.num_skipped,
        )
        return None

    def _minibatches(self, num_rows: int, epochs: int | None = None) -> Iterator[Tensor]:
        """Row indices, every row once per epoch, in an order that depends on seed and update only."""
        seed = (self.config.seed * 1_000_003 + self.num_updates) % 2**63
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs or self.config.epochs):
            yield from torch.randperm(num_rows, generator=generator).split(self.config.minibatch_size)

    def _parts(self, rollout: RolloutBatch, rows: Tensor) -> list[Tensor]:
        """Rows that are computed at once: all, or as many as `micro_batch_tokens` allows.

        Parts hold rows of similar length. A row above the limit is a part of its own.
        """
        limit = self.config.micro_batch_tokens
        lengths = (rollout.prompt_lengths + rollout.response_mask.sum(dim=1))[rows]
        if limit is None or len(rows) * int(lengths.max()) <= limit:
            return [rows]
        order = lengths.argsort(descending=True, stable=True)
        parts, start = [], 0
        while start < len(rows):
            stop = start + max(1, limit // int(lengths[order[start]]))
            parts.append(rows[order[start:stop]])
            start = stop
        return parts

    def _evaluation_groups(self, rollout: RolloutBatch, rows: Tensor) -> list[Tensor]:
        """Rows of forwards without gradients."""
        return [part for group in rows.split(EVALUATION_ROWS) for part in self._parts(rollout, group)]

    def _groups(self, rollout: RolloutBatch, first: Tensor) -> list[Tensor]:
        """Rows of forwards without gradients: those of the first minibatch, and then the others'."""
        num_rows = len(rollout)
        if self.policy.rounds_by_batch:  # in the forwards of the first pass, whose ratio is then 1
            minibatches = self._minibatches(num_rows, epochs=1)
            return [part for rows in minibatches for part in self._parts(rollout, rows)]
        is_left = torch.ones(num_rows, dtype=torch.bool)
        is_left[first] = False
        left = is_left.nonzero().flatten()
        groups = self._parts(rollout, first)
        return groups + self._evaluation_groups(rollout, left) if len(left) else groups

    def _evaluate_all(
        self, features: Tensor, rollout: RolloutBatch, groups: Sequence[Tensor], *known: _Evaluation
    ) -> _Evaluation:
        """All rows; of the first groups it is `known` already."""
        parts = list(known)
        for rows in groups[len(known) :]:
            parts.append(self._evaluate(features, rollout, rows, with_entropy=True))
        return _Evaluation.joined(parts, order=torch.cat(list(groups)).argsort())

    def _evaluate(
        self, features: Tensor, rollout: RolloutBatch, rows: Tensor, *, with_entropy: bool
    ) -> _Evaluation:
        """One forward of the given rows; results on the CPU, differentiable when gradients are on."""
        mask = rollout.response_mask[rows]
        prompt_lengths = rollout.prompt_lengths[rows]
        lengths = prompt_lengths + mask.sum(dim=1)
        hidden = self.policy.hidden_states(features[rows.to(features.device), : int(lengths.max())])
        row, step = mask.nonzero(as_tuple=True)  # (N,) real response tokens
        before = prompt_lengths[row] + step - 1  # the state in which token `step` was chosen
        states = hidden[row.to(hidden.device), before.to(hidden.device)]  # (N, H)
        chosen = rollout.tokens[rows][row, before + 1].to(hidden.device)
        logprobs, entropies = chunked_logprobs(
            states,
            self.policy.project,
            chosen,
            temperature=rollout.temperature,
            with_entropy=with_entropy,
            entropy_grad=self._wants_entropy,
        )
        final_values = torch.zeros(len(rows))

        def spread(flat: Tensor) -> Tensor:  # (N,) -> (b, T), zero outside the mask
            return torch.zeros(mask.shape).masked_scatter(mask, flat.float().cpu())

        values = torch.zeros(mask.shape)
        if self._has_critic:
            final = hidden[torch.arange(len(rows)), (lengths - 1).to(hidden.device)]
            final_values = self.policy.value_head(final).float().cpu()
            values = spread(self.policy.value_head(states))
        return _Evaluation(
            logprobs=spread(logprobs),
            values=values,
            final_values=final_values,
            entropies=spread(entropies) if entropies is not None else torch.zeros(mask.shape),
        )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, KL coefficient and counters; the policy saves its parameters itself."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "initial_kl_coef": self.config.kl_coef,
            "initial_entropy_coef": self.config.entropy_coef,
            **counters,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`, with the settings of this run.

        A learning rate or KL coefficient continues where the saved run's schedule or controller had brought
        it, unless this run begins with another one. Another kind of optimizer, or one of other parameters,
        begins afresh.
        """
        saved = state["optimizer_class"]
        here = type(self.optimizer).__name__
        counts = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        fits = counts == [len(group["params"]) for group in self.optimizer.param_groups]
        if saved == here and fits:
            chosen = [dict(group) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, mine in zip(self.optimizer.param_groups, chosen, strict=True):
                if group["initial_lr"] == mine["initial_lr"]:
                    mine["lr"] = group["lr"]
                group.update(mine)
        else:
            of_others = (
                "" if fits else ", of other groups of parameters (a critic, or value_lr, came or went)"
            )
            logger.warning(
                "the checkpoint was written with the optimizer %s%s; %s begins afresh", saved, of_others, here
            )
        if state["initial_kl_coef"] == self.config.kl_coef:
            self.kl_coef = state["kl_coef"]
        is_steered = self.config.entropy_target is not None
        if is_steered and state.get("initial_entropy_coef") == self.config.entropy_coef:
            self.entropy_coef = state["entropy_coef"]
        for name in ("num_updates", "num_steps", "num_skipped"):
            setattr(self, name, state[name])


def _signal(rollout: RolloutBatch, rewards: Tensor, prompts: Tensor | None) -> dict[str, float]:
    """How many prompts teach nothing, where responses are compared."""
    if prompts is None:
        return {}
    scores = zero_outside(rollout.response_mask, rewards).sum(dim=1)
    of_each = [scores[prompts == prompt] for prompt in prompts.unique()]
    share = sum(bool((own == own[0]).all()) for own in of_each) / len(of_each)
    if share == 1:
        logger.warning(
            "all responses to each prompt scored the same, so that this update has nothing to learn from but "
            "the KL: give prompts of which some responses succeed, more samples (num_samples), or a reward "
            "with more steps"
        )
    return {"groups_without_signal": share}


def _kl(policy: _Evaluation, ref: _Evaluation) -> float:
    return float((policy.logprobs - ref.logprobs).sum(dim=1).mean())


def _check_rewards(rewards: Tensor, mask: Tensor) -> None:
    if rewards.shape != mask.shape:
        raise RewardError(
            f"rewards must have one number per response token, shape {tuple(mask.shape)}, got "
            f"{tuple(rewards.shape)}"
        )
    broken = (~torch.isfinite(rewards) & mask).nonzero()
    if len(broken):
        row, token = broken[0].tolist()
        raise RewardError(
            f"the reward of response {row}, token {token} is {float(rewards[row, token])}; "
            "rewards must be finite numbers"
        )
