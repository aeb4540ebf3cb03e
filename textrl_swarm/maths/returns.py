"""From scores to what the losses consume: advantages, returns, their statistics and the KL
coefficient.

Knows nothing about policies, minibatches or optimizers. Values under a False mask never reach a result, not
even NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from textrl_swarm.errors import ShapeError


def place_scores(scores: Tensor, response_mask: Tensor) -> Tensor:
    """Puts each response's score on its last chosen token.

    Args:
        scores: (B,) one reward per response.
        response_mask: (B, T) bool, right-padded; at least one True per row.

    Returns:
        (B, T) fp32, zero elsewhere.

    Raises:
        ShapeError: shapes do not fit, the mask is not right-padded, or a row has no token to carry its score.
    """
    _check_right_padded(response_mask)
    _check_per_row("scores", scores, response_mask)
    empty = (~response_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ShapeError(
            f"rows {empty} of response_mask hold no chosen token, so their score has no place; drop these "
            "responses"
        )
    return zero_outside(_is_last(response_mask), scores[:, None])


def estimate_advantages(
    rewards: Tensor,
    values: Tensor,
    bootstrap_values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over right-padded responses.

        delta[t] = rewards[t] + gamma * values[t+1] - values[t],   with values[t+1] = bootstrap_values after
        the last real token A[t]     = delta[t] + gamma * gae_lambda * A[t+1] R[t]     = A[t] + values[t]

    Args:
        rewards: (B, T), reward for choosing the t-th token.
        values: (B, T), value of the state in which the t-th token was chosen.
        bootstrap_values: (B,), value of the state after the last real token; 0 where the response terminated.
        response_mask: (B, T) bool, True on chosen tokens; right-padded.
        gamma: discount per token, in [0, 1].
        gae_lambda: in [0, 1]; 0 = one-step temporal difference, 1 = discounted return minus value.

    Returns:
        advantages and returns, both (B, T) fp32, zero where the mask is False.

    Raises:
        ShapeError: shapes do not fit, or the mask is not right-padded.

    Source: Schulman et al. 2015, arXiv 1506.02438, equations 11, 12 and 16.
    """
    _check_right_padded(response_mask)
    check_same_shape(response_mask=response_mask, rewards=rewards, values=values)
    _check_per_row("bootstrap_values", bootstrap_values, response_mask)
    rewards = zero_outside(response_mask, rewards)
    values = zero_outside(response_mask, values)
    bootstrap = bootstrap_values.float()[:, None]
    next_values = torch.where(_is_last(response_mask), bootstrap, _shift_left(values))  # (B, T)
    deltas = rewards + gamma * next_values - values  # (B, T) 0 in the padding, where all three are
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])  # (B,) stays 0 through the padding
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    return advantages, advantages + values


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True entries.

    Args:
        x: any shape.
        mask: same shape, bool; at least one True.

    Returns:
        () fp32; no gradient reaches entries under a False mask.

    Raises:
        ShapeError: shapes do not fit, or nothing is True.
    """
    check_same_shape(mask=mask, x=x)
    _check_any(mask)
    return zero_outside(mask, x).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scales the True entries to variance 1 and, unless told otherwise, shifts them to mean 0.

        y = (x - mean) / sqrt(variance + 1e-8) + (0 if shift_mean else mean)

    The variance is the biased one (divided by n), so that of y is 1 for every n >= 2. A single entry or equal
    entries become y = x - mean = 0 (or stay as they are without the shift). Computed in float64: equal
    entries far from zero must not turn into scaled-up rounding noise.

    Args:
        x: any shape.
        mask: same shape, bool; with nothing True the result is all zeros.
        shift_mean: False keeps the mean (rewards must not change sign).

    Returns:
        same shape, fp32, zero where the mask is False.

    Raises:
        ShapeError: shapes do not fit.

    Source: Ziegler et al. 2019, arXiv 1909.08593 (`whiten` of its code, which averages over padding too; here
    only real tokens count).
    """
    check_same_shape(mask=mask, x=x)
    real = x[mask].double()  # (n,)
    count = max(real.numel(), 1)
    mean = real.sum() / count
    variance = (real - mean).square().sum() / count
    whitened = (x.double() - mean) * torch.rsqrt(variance + 1e-8)
    return zero_outside(mask, whitened if shift_mean else whitened + mean)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the returns' variance the values predict: 1 is perfect, 0 is no better than a constant,
    below 0 is worse.

        1 - Var(returns - values) / Var(returns)

    Args:
        values, returns: any shape.
        mask: same shape, bool; at least one True.

    Returns:
        () fp32; 0 (never NaN) where all returns are equal, since there is nothing to explain.

    Raises:
        ShapeError: shapes do not fit, or nothing is True.
    """
    check_same_shape(mask=mask, values=values, returns=returns)
    _check_any(mask)
    targets = returns[mask].double()  # (n,)
    errors = targets - values[mask].double()
    if targets.min() == targets.max():
        return torch.zeros((), device=returns.device)
    return (1 - errors.var(correction=0) / targets.var(correction=0)).float()


def next_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, num_responses: int) -> float:
    """Steers the KL penalty towards a target, proportionally in log space.

        error = clip(kl / target - 1, -0.2, 0.2);   next = kl_coef * (1 + error * num_responses / horizon)

    Args:
        kl_coef: the coefficient these responses were rewarded with, >= 0.
        kl: mean over responses of the summed log ratio of policy to reference, nats per response.
        target: nats per response, > 0.
        horizon: responses over which the controller reacts, > 0.
        num_responses: responses that `kl` was measured on; below 5 * horizon.

    Returns:
        The next coefficient; positive if `kl_coef` is.

    Raises:
        ShapeError: a number is out of its range, or so many responses per horizon that the coefficient could
            turn negative.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2 (K_beta = 0.1 per update there is num_responses
    / horizon in its code).
    """
    if not (math.isfinite(kl) and math.isfinite(kl_coef) and kl_coef >= 0):
        raise ShapeError(
            f"kl and kl_coef must be finite and kl_coef >= 0, got kl {kl!r} and kl_coef {kl_coef!r}"
        )
    if not (target > 0 and horizon > 0 and num_responses >= 0):
        raise ShapeError(
            "target and horizon must be > 0 and num_responses >= 0, "
            f"got {target!r}, {horizon!r} and {num_responses!r}"
        )
    if num_responses >= 5 * horizon:
        raise ShapeError(
            f"{num_responses} responses per update with a horizon of {horizon} could make kl_coef negative; "
            f"raise the horizon above {num_responses / 5:g}"
        )
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)


def zero_outside(mask: Tensor, x: Tensor) -> Tensor:
    """x as fp32, zero where the mask is False. Unlike a product with the mask it stops NaN and inf, in values
    and in gradients.
    """
    return torch.where(mask, x.float(), 0.0)


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ShapeError unless all tensors have the shape of the first, which must be a bool mask."""
    (mask_name, mask), *others = tensors.items()
    if mask.dtype != torch.bool:
        raise ShapeError(
            f"{mask_name} must be bool (True = counts), got {mask.dtype}; convert it with .bool()"
        )
    for name, tensor in others:
        if tensor.shape != mask.shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(mask.shape)} like {mask_name}"
            )


def _check_right_padded(response_mask: Tensor) -> None:
    if response_mask.dim() != 2 or response_mask.dtype != torch.bool or response_mask.shape[1] == 0:
        raise ShapeError(
            "response_mask must be (B, T) bool with T >= 1, "
            f"got shape {tuple(response_mask.shape)} {response_mask.dtype}"
        )
    broken = (response_mask[:, 1:] & ~response_mask[:, :-1]).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ShapeError(
            f"rows {broken} of response_mask have a True after a False; pad responses on the right only"
        )


def _check_per_row(name: str, x: Tensor, response_mask: Tensor) -> None:
    if x.shape != response_mask.shape[:1]:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}, expected ({response_mask.shape[0]},): "
            "one number per row of response_mask"
        )


def _check_any(mask: Tensor) -> None:
    if not mask.any():
        raise ShapeError(
            f"mask of shape {tuple(mask.shape)} has no True entry, so there is nothing to average; "
            "leave this batch out"
        )


def _shift_left(x: Tensor) -> Tensor:
    """(B, T): column t holds x[:, t + 1]; zero (False) in the last column."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def _is_last(response_mask: Tensor) -> Tensor:
    """(B, T) bool: True on each row's last True column."""
    return response_mask & ~_shift_left(response_mask)
