"""The value loss and the entropy, and logprobs of long batches in bounded memory.

Knows nothing about models, optimizers or loss weights. Everything is computed in fp32 whatever comes in, and
nothing under a False mask reaches a loss or a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from textrl_swarm.errors import ShapeError
from textrl_swarm.maths.returns import check_same_shape, masked_mean, zero_outside
from textrl_swarm.maths.sampling import check_scored, scaled_log_probs

LOGITS_CHUNK_TOKENS = 512  # tokens whose logits exist at the same time in `chunked_logprobs`


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float | None
) -> Tensor:
    """Half the squared error of the values, pessimistic about moves beyond the clip range, as a mean over
    real tokens.

        clipped = old_values + clip(values - old_values, -clip_range, clip_range)
        loss    = 0.5 * mean( max( (values - returns)^2, (clipped - returns)^2 ) )

    Args:
        values: (B, T) of the value head being trained; carries the gradient.
        old_values: (B, T) at the time of the rollout.
        returns: (B, T), constants.
        mask: (B, T) bool, True on chosen tokens; at least one True.
        clip_range: > 0, in units of the return; None = plain squared error.

    Returns:
        () fp32.

    Raises:
        ShapeError: shapes do not fit, nothing is True, or clip_range <= 0.

    Source: Ziegler et al. 2019, arXiv 1909.08593 (its code; the clipping is OpenAI baselines', not in the PPO
    paper).
    """
    check_same_shape(mask=mask, values=values, old_values=old_values, returns=returns)
    if clip_range is not None and not clip_range > 0:
        raise ShapeError(f"clip_range must be > 0 or None (no clipping), got {clip_range!r}")
    values, old_values, returns = (zero_outside(mask, x) for x in (values, old_values, returns))
    errors = (values - returns).square()
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (clipped - returns).square())
    return 0.5 * masked_mean(errors, mask)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits), tokens of probability zero adding nothing; divide the logits by the
    temperature first.

        H = -sum_v p[v] * log p[v],   with 0 log 0 = 0

    Args:
        logits: (..., V), any float dtype; may hold -inf, but at least one finite score per row.

    Returns:
        (...) fp32, nats, in [0, log V]; values and gradients are finite where logits are -inf.
    """
    if logits.dim() == 0:
        raise ShapeError("logits must be (..., V), got a scalar; pass the scores of the whole vocabulary")
    return _entropy_of(logits.float().log_softmax(dim=-1))


def _entropy_of(log_probs: Tensor) -> Tensor:
    """(...) for the logarithms (..., V) of probabilities."""
    finite = log_probs.clamp(min=torch.finfo(torch.float32).min)  # 0 log 0
    return -torch.linalg.vecdot(log_probs.exp(), finite)


class _Scores(torch.autograd.Function):
    """(n,) logprobs of tokens and entropies, from one log-softmax of (n, V) logits.

    In backward, with p the probabilities, T the temperature and H the entropy:

        d logprob[t] / d logit[v] = ([v = t] - p[v]) / T
        d H / d logit[v]          = -p[v] (log p[v] + H) / T
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        log_probs = scaled_log_probs(logits, temperature)
        entropies = _entropy_of(log_probs) if with_entropy else log_probs.new_empty(0)
        ctx.save_for_backward(log_probs, tokens, *((entropies,) if entropy_grad else ()))
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return log_probs.gather(-1, tokens[:, None]).squeeze(-1), entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        log_probs, tokens, *entropies = ctx.saved_tensors
        grad_logits = log_probs.exp()
        factor: Tensor | float = 0.0 if grad is None else -grad[:, None]
        if grad_entropy is not None:
            finite = log_probs.clamp(min=torch.finfo(torch.float32).min)
            factor = factor - (finite + entropies[0][:, None]) * grad_entropy[:, None]
        grad_logits *= factor
        if grad is not None:
            grad_logits.scatter_add_(-1, tokens[:, None], grad[:, None])
        if ctx.temperature != 1:
            grad_logits /= ctx.temperature
        return grad_logits.to(ctx.dtype), None, None, None, None


def chunked_logprobs(
    hidden: Tensor,
    project: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    temperature: float,
    chunk_tokens: int = LOGITS_CHUNK_TOKENS,
    with_entropy: bool = False,
    entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of tokens from hidden states, without all logits in memory at once.

    BLOOM's vocabulary has 250,880 entries: the logits of 32k tokens are 33 GB in fp32, before the softmax
    makes a copy. Here a chunk of `chunk_tokens` rows (0.5 GB per copy for BLOOM) is projected, scored and
    dropped; when gradients are on, backward projects it again. Values and gradients are those of the
    unchunked computation up to the order of summation; only time is lost.

    Args:
        hidden: (N, H), any float dtype.
        project: (n, H) -> (n, V) logits; differentiable, the same each time it is called, and row by row (no
            row looks at another).
        tokens: (N,) int64.
        temperature: > 0; the logits are divided by it.
        chunk_tokens: rows projected at a time, >= 1.
        with_entropy: also return the entropy of each row's distribution at the temperature.
        entropy_grad: False = the entropies carry no gradient, and backward does not compute them again.

    Returns:
        (N,) fp32 logprobs, nats; and with `with_entropy` (N,) fp32 entropies, nats, else None.

    Raises:
        ShapeError: shapes do not fit, chunk_tokens < 1, or temperature <= 0.

    Source: Chen et al. 2016, arXiv 1604.06174 (recomputing in backward).
    """
    if hidden.dim() != 2 or tokens.shape != hidden.shape[:1]:
        raise ShapeError(
            f"expected hidden (N, H) and tokens (N,), got {tuple(hidden.shape)} and {tuple(tokens.shape)}; "
            "flatten them first"
        )
    if chunk_tokens < 1:
        raise ShapeError(f"chunk_tokens must be >= 1, got {chunk_tokens!r}")

    entropy_grad = entropy_grad and with_entropy
    is_backward = False

    def evaluate(hidden_chunk: Tensor, tokens_chunk: Tensor) -> tuple[Tensor, Tensor]:
        logits = project(hidden_chunk)  # (n, V)
        check_scored(logits, tokens_chunk, temperature)
        wanted = entropy_grad if is_backward else with_entropy
        return _Scores.apply(logits, tokens_chunk, temperature, wanted, entropy_grad)

    pairs = zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True)
    # With gradients off, `checkpoint` is a plain call.
    chunks = [checkpoint(evaluate, *pair, use_reentrant=False) for pair in pairs]
    is_backward = True  # from now on `evaluate` is called to be gone back through
    logprobs, entropies = (torch.cat(column) for column in zip(*chunks, strict=True))
    return logprobs, (entropies if with_entropy else None)
