"""From scores to a token, and from a token to its log-probability.

Knows nothing about models, sessions, seeds or where the random numbers come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from textrl_swarm.errors import NumericsError, ShapeError


def choose_tokens(scores: Tensor, uniforms: Tensor | None) -> Tensor:
    """Draws one token per row by inverting the cumulative distribution, or takes the most likely one.

        p = softmax(scores[b])
        token[b] = min { v : p[0] + ... + p[v] > uniforms[b] * (p[0] + ... + p[V-1]) }

    Why not torch.multinomial: here row b depends on its own random number only, so a response does not change
    with the rows that share its batch, with their order, or with the machine (beyond the rounding of the
    logits). Computed in float64, where V = 250,880 summands leave the cumulative sum exact to about 1e-11.

    Args:
        scores: (B, V), any float dtype; -inf = never chosen. At least one finite score per row.
        uniforms: (B,) float in [0, 1), one random number per row; None = argmax.

    Returns:
        (B,) int64.

    Raises:
        ShapeError: shapes do not fit, or a uniform is outside [0, 1).
        NumericsError: a row has NaN, +inf or nothing but -inf.

    Source: Devroye 1986, Non-Uniform Random Variate Generation, section III.2 (inversion by sequential
    search).
    """
    if scores.dim() != 2:
        raise ShapeError(f"scores must be (B, V), got shape {tuple(scores.shape)}; pass one row per sequence")
    best = scores.amax(dim=-1)  # (B,) NaN if any score of the row is
    if not torch.isfinite(best).all():
        rows = (~torch.isfinite(best)).nonzero().flatten().tolist()
        raise NumericsError(
            f"rows {rows} of the model's logits hold NaN, +inf or nothing but -inf, so no token can be "
            "drawn: "
            "the weights or the adapter are damaged, or too large for their dtype (then dtype='float32' "
            "helps)"
        )
    if uniforms is None:
        return scores.argmax(dim=-1)
    if uniforms.shape != scores.shape[:1]:
        raise ShapeError(
            f"uniforms has shape {tuple(uniforms.shape)}, expected ({scores.shape[0]},): "
            "one random number per row of scores"
        )
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ShapeError(
            f"uniforms must lie in [0, 1), got {uniforms.min().item()} to {uniforms.max().item()}; "
            "draw them with torch.rand"
        )
    probs = scores.double().softmax(dim=-1)
    # Zeros at impossible tokens: no uniform lies below them, whatever the rounding of a parallel cumulative
    # sum.
    cumulative = probs.cumsum(dim=-1).masked_fill(probs == 0, 0.0)  # (B, V)
    total = cumulative.amax(dim=-1)  # (B,) 1 up to rounding
    return (cumulative > (uniforms * total)[:, None]).int().argmax(dim=-1)  # argmax: the first True


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of given tokens over the full vocabulary at the sampling temperature.

        logprob = log softmax(logits / temperature)[token]

    Args:
        logits: (..., V), any float dtype; computed in fp32.
        tokens: (...) int64.
        temperature: > 0.

    Returns:
        (...) fp32, nats, <= 0.

    Raises:
        ShapeError: shapes do not fit, or temperature <= 0.

    Source: Ziegler et al. 2019, arXiv 1909.08593 (its code scores at the sampling temperature).
    """
    check_scored(logits, tokens, temperature)
    return scaled_log_probs(logits, temperature).gather(-1, tokens[..., None]).squeeze(-1)


def check_scored(logits: Tensor, tokens: Tensor, temperature: float) -> None:
    """Raises ShapeError, see `token_logprobs`."""
    if logits.shape[:-1] != tokens.shape or logits.dim() == 0:
        raise ShapeError(
            f"logits {tuple(logits.shape)} must have the shape of tokens {tuple(tokens.shape)} plus the "
            "vocabulary"
        )
    if not temperature > 0:
        raise ShapeError(
            f"temperature must be > 0, got {temperature!r}; pass the temperature of the sampling"
        )


def scaled_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """(..., V) fp32 log softmax(logits / temperature).

    It subtracts the maximum first: BLOOM's logits can be in the hundreds, where x - logsumexp(x) would lose
    digits.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return scaled.log_softmax(dim=-1)
