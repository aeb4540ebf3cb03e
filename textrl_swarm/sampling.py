"""From logits to a token, and from a token to its log-probability. Owns filters, the draw and the score of chosen tokens.

Knows nothing about models, sessions, seeds or where the random numbers come from. Filters shape what is drawn; the score of what was drawn
is always that of the full vocabulary at the sampling temperature, so that old and new logprobs follow one rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def filter_logits(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seen_tokens: Sequence[Tensor] | None = None,
) -> Tensor:
    """Scores whose softmax is the distribution to sample from; transformers' processors, in the order of its `generate`.

    1. repetition penalty: a seen token's score s becomes s / penalty if s >= 0, else s * penalty
    2. temperature:        scores / temperature
    3. top-k:              -inf below the k-th largest score (ties with it stay)
    4. top-p:              -inf outside the smallest set of most likely tokens whose probability reaches top_p

    A filter that is off is not run: with top_k 0, top_p 1 and penalty 1 the result is logits / temperature, bit for bit.

    Args:
        logits: (B, V), any float dtype.
        temperature: > 0.
        top_k: >= 0; 0 switches the filter off.
        top_p: in (0, 1]; 1 switches the filter off.
        repetition_penalty: > 0; above 1 makes seen tokens less likely, 1 switches it off.
        seen_tokens: B tensors (n_b,) int64, each row's prompt and response so far, without padding; needed when the penalty is on.

    Returns:
        (B, V) fp32, -inf where a token must not be drawn.

    Raises:
        ValueError: shapes do not fit, or the penalty is on and `seen_tokens` is missing.

    Source: Keskar et al. 2019, arXiv 1909.05858 (penalty; there negative scores are divided too); Fan et al. 2018, arXiv 1805.04833
    (top-k); Holtzman et al. 2019, arXiv 1904.09751 (top-p).
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be (B, V), got shape {tuple(logits.shape)}; pass one row per sequence")
    scores = logits.float()
    if repetition_penalty != 1:
        _check_seen_tokens(seen_tokens, rows=logits.shape[0])
        penalise = RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
        # Row by row: the processor takes a rectangle of ids, and a padding id would be penalised like any other.
        scores = torch.cat([penalise(seen[None], row[None]) for seen, row in zip(seen_tokens, scores, strict=True)])
    # The remaining processors look at scores only, so they get no ids.
    if temperature != 1:
        scores = TemperatureLogitsWarper(float(temperature))(None, scores)
    if top_k != 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p != 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores


def choose_tokens(scores: Tensor, uniforms: Tensor | None) -> Tensor:
    """Draws one token per row by inverting the cumulative distribution, or takes the most likely one.

        p = softmax(scores[b]);  token[b] = min { v : p[0] + ... + p[v] > uniforms[b] * (p[0] + ... + p[V-1]) }

    Why not torch.multinomial: here row b depends on its own random number only, so a response does not change with the rows that share its
    batch, with their order, or with the machine (beyond the rounding of the logits). Computed in float64, where V = 250,880 summands leave
    the cumulative sum exact to about 1e-11.

    Args:
        scores: (B, V), any float dtype; -inf = never chosen. At least one finite score per row.
        uniforms: (B,) float in [0, 1), one random number per row; None = argmax.

    Returns:
        (B,) int64.

    Raises:
        ValueError: shapes do not fit, a uniform is outside [0, 1), or a row has NaN, +inf or nothing but -inf.

    Source: Devroye 1986, Non-Uniform Random Variate Generation, section III.2 (inversion by sequential search).
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must be (B, V), got shape {tuple(scores.shape)}; pass one row per sequence")
    best = scores.amax(dim=-1)  # (B,) NaN if any score of the row is
    if not torch.isfinite(best).all():
        rows = (~torch.isfinite(best)).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of scores hold NaN, +inf or nothing but -inf, so no token can be drawn; check the model's logits")
    if uniforms is None:
        return scores.argmax(dim=-1)
    if uniforms.shape != scores.shape[:1]:
        raise ValueError(f"uniforms has shape {tuple(uniforms.shape)}, expected ({scores.shape[0]},): one random number per row of scores")
    if not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ValueError(f"uniforms must lie in [0, 1), got {uniforms.min().item()} to {uniforms.max().item()}; draw them with torch.rand")
    probs = scores.double().softmax(dim=-1)
    # Zeros at impossible tokens: no uniform lies below them, whatever the rounding of a parallel cumulative sum.
    cumulative = probs.cumsum(dim=-1).masked_fill(probs == 0, 0.0)  # (B, V)
    total = cumulative.amax(dim=-1)  # (B,) 1 up to rounding
    return (cumulative > (uniforms.double() * total)[:, None]).int().argmax(dim=-1)  # argmax: the first True


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
        ValueError: shapes do not fit, or temperature <= 0.

    Source: Ziegler et al. 2019, arXiv 1909.08593 (its code scores at the sampling temperature).
    """
    if logits.shape[:-1] != tokens.shape or logits.dim() == 0:
        raise ValueError(f"logits {tuple(logits.shape)} must have the shape of tokens {tuple(tokens.shape)} plus the vocabulary")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}; pass the temperature the tokens were sampled at")
    # log_softmax subtracts the maximum first: BLOOM's logits can be in the hundreds, where x - logsumexp(x) would lose digits.
    return (logits.float() / temperature).log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def _check_seen_tokens(seen_tokens: Sequence[Tensor] | None, *, rows: int) -> None:
    if seen_tokens is None or len(seen_tokens) != rows:
        got = "None" if seen_tokens is None else f"{len(seen_tokens)} rows"
        raise ValueError(f"the repetition penalty needs seen_tokens with {rows} rows, got {got}; pass each row's prompt and response")
    for b, seen in enumerate(seen_tokens):
        if seen.dim() != 1 or seen.dtype != torch.int64:
            raise ValueError(f"seen_tokens[{b}] must be 1-d int64, got shape {tuple(seen.shape)} {seen.dtype}; pass ids without padding")
