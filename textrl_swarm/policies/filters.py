"""From logits to the scores that are sampled from, by transformers' own processors. Knows nothing about the
draw.

Filters shape what is drawn; the log-probability of what was drawn is always that of the full vocabulary at
the sampling temperature (`maths.sampling.token_logprobs`), so that old and new logprobs follow one rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from textrl_swarm.errors import ShapeError


def filter_logits(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seen_tokens: Sequence[Tensor] | None = None,
) -> Tensor:
    """Scores whose softmax is the distribution to sample from, in the order of transformers' `generate`.

    1. repetition penalty: a seen token's score s becomes s / penalty if s >= 0, else s * penalty
    2. temperature: scores / temperature
    3. top-k: -inf below the k-th largest score (ties with it stay)
    4. top-p: -inf outside the smallest set of most likely tokens whose probability reaches top_p

    A filter that is off does not run: with top_k 0, top_p 1 and penalty 1 the result is logits / temperature,
    bit for bit.

    Args:
        logits: (B, V), any float dtype.
        temperature: > 0.
        top_k: >= 0; 0 switches the filter off.
        top_p: in (0, 1]; 1 switches the filter off.
        repetition_penalty: > 0; above 1 makes seen tokens less likely, 1 switches it off.
        seen_tokens: B tensors (n_b,) int64, each row's prompt and response so far, without padding; needed
            when the penalty is on.

    Returns:
        (B, V) fp32, -inf where a token must not be drawn.

    Raises:
        ShapeError: shapes do not fit, or the penalty is on and `seen_tokens` is missing.

    Source: Keskar et al. 2019, arXiv 1909.05858 (penalty; there negative scores are divided too); Fan et al.
    2018, arXiv 1805.04833 (top-k); Holtzman et al. 2019, arXiv 1904.09751 (top-p).
    """
    if logits.dim() != 2:
        raise ShapeError(f"logits must be (B, V), got shape {tuple(logits.shape)}; pass one row per sequence")
    scores = logits.float()
    if repetition_penalty != 1:
        seen = _checked_seen_tokens(seen_tokens, rows=logits.shape[0])
        penalise = RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
        # Row by row: the processor takes a rectangle of ids, and would penalise a padding id like any other.
        scores = torch.cat([penalise(ids[None], row[None]) for ids, row in zip(seen, scores, strict=True)])
    # The other processors look at scores only, so they get no ids.
    if temperature != 1:
        scores = TemperatureLogitsWarper(float(temperature))(None, scores)
    if top_k != 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p != 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores


def _checked_seen_tokens(seen_tokens: Sequence[Tensor] | None, *, rows: int) -> Sequence[Tensor]:
    if seen_tokens is None or len(seen_tokens) != rows:
        got = "None" if seen_tokens is None else f"{len(seen_tokens)} rows"
        raise ShapeError(
            f"the repetition penalty needs seen_tokens with {rows} rows, got {got}; "
            "pass each row's prompt and response"
        )
    for b, seen in enumerate(seen_tokens):
        if seen.dim() != 1 or seen.dtype != torch.int64:
            raise ShapeError(
                f"seen_tokens[{b}] must be 1-d int64, got shape {tuple(seen.shape)} {seen.dtype}; "
                "pass ids without padding"
            )
    return seen_tokens
