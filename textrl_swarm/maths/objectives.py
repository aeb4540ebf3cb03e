"""Objectives over one rollout: baselines that need no critic, ratios per token or per response, what clips
them, estimates of the KL, and how tokens are weighed. Pure functions; nothing under a False mask reaches a
result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_swarm.errors import ShapeError
from textrl_swarm.maths.returns import check_same_shape, masked_mean, zero_outside

_STD_EPS = 1e-4  # as TRL has it


# ------------------------------------------------------------------------------------------ advantages


def group_advantages(scores: Tensor, groups: Tensor, *, baseline: str, scale: str = "none") -> Tensor:
    """Advantages of responses among those to the same prompt.

        group          A = score - mean of the group
        leave_one_out  A = score - mean of the others in the group
        then, if scaled, A / (std of the group, or of the batch, + 1e-4)

    Args:
        scores: (B,) one number per response.
        groups: (B,) int64: rows with the same number have the same prompt.
        baseline: "group" or "leave_one_out".
        scale: "none", "group" or "batch"; standard deviations are unbiased (divided by n - 1).

    Returns:
        (B,) fp32.

    Raises:
        ShapeError: shapes do not fit, an unknown name, or a group of one.

    Source: Shao et al. 2024, arXiv 2402.03300, section 4.1.2 (group); Ahmadian et al. 2024, arXiv 2402.14740,
    equation 8 (leave one out); Liu et al. 2025, arXiv 2503.20783 (no scale).
    """
    if scores.dim() != 1 or groups.shape != scores.shape:
        raise ShapeError(
            f"scores and groups must be (B,), got {tuple(scores.shape)} and {tuple(groups.shape)}"
        )
    if baseline not in ("group", "leave_one_out") or scale not in ("none", "group", "batch"):
        raise ShapeError(f"there is no baseline {baseline!r} with scale {scale!r}")
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    if int(counts.min()) < 2:
        raise ShapeError("a group has one response, which has no other to be compared with")
    scores = scores.double()  # equal scores far from 0 are no signal
    size = counts[index]
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, index, scores) / counts
    deviations = scores - means[index]
    if scale == "none":
        factor = torch.ones(())
    elif scale == "batch":
        factor = 1 / (scores.std() + _STD_EPS)
    else:
        squares = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, index, deviations.square())
        factor = 1 / ((squares / (counts - 1)).sqrt()[index] + _STD_EPS)
    if baseline == "leave_one_out":
        deviations = deviations * size / (size - 1)
    return (deviations * factor).float()


def groups_of(tokens: Tensor, prompt_lengths: Tensor) -> Tensor:
    """(B,) int64: the same number for rows with the same prompt.

    Args:
        tokens: (B, S) int64, prompts first.
        prompt_lengths: (B,).
    """
    known: dict[tuple[int, ...], int] = {}
    found = []
    for row, length in zip(tokens.tolist(), prompt_lengths.tolist(), strict=True):
        found.append(known.setdefault(tuple(row[:length]), len(known)))
    return torch.tensor(found)


# ---------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Surrogate:
    """What is done to the ratio of the new policy to the old.

    Attributes:
        ratio: "token"; "response", the product over a response's tokens; "response_mean", its geometric mean.
        clip: "ppo", the worse of clipped and not; "cispo", a bounded factor of the logprobs' gradient.
        clip_low, clip_high: the ratio is clipped to 1 - clip_low .. 1 + clip_high; with "cispo" to at most
            clip_high.
        ratio_max: with "ppo", the ratio that is not clipped is at most this; None = any.
    """

    ratio: str = "token"
    clip: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_max: float | None = None


@dataclass(frozen=True)
class SurrogateLoss:
    """Of B responses."""

    per_token: Tensor
    """(B, T) fp32, zero outside the mask; carries the gradient."""

    ratio: Tensor
    """(B, T) that was clipped; of a response, on each of its tokens; carries the gradient."""

    is_clipped: Tensor
    """(B, T) bool: whether the ratio is out of the range."""


def surrogate_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, surrogate: Surrogate
) -> SurrogateLoss:
    """The loss of each token.

        log ratio = logprobs - old_logprobs, or its sum or mean over the response
        ppo    loss = max(-A min(ratio, ratio_max), -A clip(ratio, 1 - clip_low, 1 + clip_high))
        cispo  loss = -A min(ratio, clip_high) logprobs, the factor without gradient

    Where ratios are of responses, so are advantages: the mean over the response's tokens.

    Args:
        logprobs: (B, T) of the chosen tokens under the policy being trained, nats; carries the gradient.
        old_logprobs: (B, T) under the policy that sampled, same temperature.
        advantages: (B, T), constants.
        mask: (B, T) bool, True on chosen tokens.

    Raises:
        ShapeError: shapes do not fit.

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7; Yu et al. 2025, arXiv 2503.14476, equation 10
    (clip_high); Ahmadian et al. 2024, arXiv 2402.14740 (response); Zheng et al. 2025, arXiv 2507.18071,
    equation 7 (response_mean, GSPO); Chen et al. 2025, arXiv 2506.13585, equation 4 (CISPO); INTELLECT-2
    2025, arXiv 2505.07291, section 3.4 (ratio_max).
    """
    check_same_shape(mask=mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs = zero_outside(mask, logprobs)
    advantages = zero_outside(mask, advantages)
    log_ratio = zero_outside(mask, logprobs - old_logprobs.float())
    if surrogate.ratio != "token":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        advantages = (advantages.sum(dim=1, keepdim=True) / lengths).expand_as(advantages)
        whole = log_ratio.sum(dim=1, keepdim=True)
        whole = whole / lengths if surrogate.ratio == "response_mean" else whole
        log_ratio = zero_outside(mask, whole.expand_as(log_ratio))
    ratio = log_ratio.exp()
    low, high = 1 - surrogate.clip_low, 1 + surrogate.clip_high
    if surrogate.clip == "cispo":
        high = surrogate.clip_high
        loss = -advantages * ratio.detach().clamp(max=high) * logprobs
        is_clipped = ratio.detach() > high
    else:
        most = float("inf") if surrogate.ratio_max is None else surrogate.ratio_max
        loss = torch.maximum(-advantages * ratio.clamp(max=most), -advantages * ratio.clamp(low, high))
        deviation = torch.expm1(log_ratio.detach())  # ratio - 1 without cancellation
        is_clipped = (deviation > surrogate.clip_high) | (deviation < -surrogate.clip_low)
    return SurrogateLoss(zero_outside(mask, loss), ratio, is_clipped & mask)


def sampler_weights(
    scored: Tensor, sampled: Tensor, mask: Tensor, *, kind: str, of: str, most: float
) -> Tensor:
    """(B, T) fp32 weights of token losses where the sampler is not quite the policy that is scored: quantised
    servers, caches and codecs round otherwise. The weight is the probability of what was sampled in the one
    over that in the other.

    Args:
        scored, sampled: (B, T) logprobs of the chosen tokens, same temperature.
        mask: (B, T) bool, True on chosen tokens.
        kind: "truncate", weights are at most `most`; "mask", those above it become 0.
        of: "token", or "response", the product over its tokens.
        most: > 0.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (TIS);
    arXiv 2510.18855, section 3.2 (masking, IcePop).
    """
    check_same_shape(mask=mask, scored=scored, sampled=sampled)
    log_ratio = zero_outside(mask, scored.float() - sampled.float())
    if of == "response":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()
    ratio = ratio.clamp(max=most) if kind == "truncate" else ratio.masked_fill(ratio > most, 0.0)
    return zero_outside(mask, ratio)


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kind: str) -> Tensor:
    """(B, T) fp32 estimates of KL(policy || ref) from one sampled token each.

        k1 = log ratio,  k2 = (log ratio)^2 / 2,  k3 = 1 / ratio - 1 + log ratio;  ratio = policy / ref

    k1 and k3 have the right mean, k3 the smaller variance; as losses, k2 has the right gradient.

    Source: Schulman 2020, "Approximating KL divergence"; Tang and Munos 2025, arXiv 2506.09477 (gradients).
    """
    check_same_shape(mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = zero_outside(mask, logprobs.float() - ref_logprobs.float())
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return zero_outside(mask, torch.exp(-log_ratio) - 1 + log_ratio)


def token_weights(mask: Tensor, mean: str, *, length: int) -> Tensor:
    """(B, T) fp32 weights by which a batch's token losses are summed.

        tokens     1 / tokens of the batch
        responses  1 / (B * tokens of the response)
        length     1 / (B * length)

    Args:
        mask: (B, T) bool; with nothing True all weights are 0.
        length: most tokens that a response may have.

    Source: arXiv 2503.14476, equation 8 (tokens, DAPO); arXiv 2402.03300, equation 3 (responses, GRPO); Liu
    et al. 2025, arXiv 2503.20783, section 3.1 (length, Dr. GRPO).
    """
    weights = mask.float()
    if mean == "tokens":
        return weights / mask.sum().clamp(min=1)
    if mean == "responses":
        return weights / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask))
    return weights / (len(mask) * length)


def next_entropy_coef(coef: float, entropy: float, *, target: float, step: float) -> float:
    """The weight of the entropy bonus in the next update: larger after one whose entropy (nats per token) was
    at most the target, smaller after another; in 0..1.

    Source: He et al. 2025, arXiv 2505.22312, section 4.5 (Skywork-OR1).
    """
    return min(max(coef + (step if entropy <= target else -step), 0.0), 1.0)


@dataclass(frozen=True)
class RatioStats:
    """How far the policy moved from the one that sampled, over the real tokens; all without gradient.

    On the first pass over a rollout the ratio is 1: `approx_kl` and `ratio_max_deviation` are 0.
    """

    approx_kl: Tensor
    """() nats per token, >= 0: estimate of KL(old || new)."""

    ratio_mean: Tensor
    """() 1 in expectation."""

    ratio_max_deviation: Tensor
    """() max |ratio - 1|."""


def ratio_stats(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> RatioStats:
    """Of tokens' ratios.

        approx_kl = mean( (ratio - 1) - log ratio )

    Source: Schulman 2020, "Approximating KL divergence" (estimator k3).
    """
    log_ratio = zero_outside(mask, logprobs.detach().float() - old_logprobs.float())
    deviation = torch.expm1(log_ratio)  # ratio - 1 without cancellation; 0 outside the mask
    return RatioStats(
        approx_kl=masked_mean(deviation - log_ratio, mask),
        ratio_mean=masked_mean(deviation + 1, mask),
        ratio_max_deviation=deviation.abs().max(),
    )
