"""Sampling responses: one cached session per group of prompts, whatever holds the caches.

Prompts of unequal length share a session: each row is fed its own next prompt token until its prompt is used up, because no attention mask
exists in a swarm. Token ids all the way: what was sampled is what is scored and trained on.
Knows nothing about rewards or training.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from textrl_swarm.config import SamplingConfig
from textrl_swarm.errors import PromptError
from textrl_swarm.sampling import choose_tokens, filter_logits, token_logprobs
from textrl_swarm.texts import decode_response, encode_prompt
from textrl_swarm.types import RolloutBatch

if TYPE_CHECKING:
    from textrl_swarm.policy import Policy


def generate(policy: Policy, prompts: Sequence[str] | Sequence[Sequence[int]], sampling: SamplingConfig) -> RolloutBatch:
    """`sampling.num_samples` responses to each prompt.

    Every row has its own random numbers, drawn before anything else: neither the grouping of rows nor where the model is computed changes
    what is sampled from the same logits.

    Raises:
        PromptError: no prompts, an empty or malformed one, or one that does not fit the model or the servers' caches.
    """
    rows = [prompt for prompt in encode_prompts(policy, prompts) for _ in range(sampling.num_samples)]
    check_lengths(policy, rows, sampling)
    draws = None
    if sampling.do_sample:
        generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
        draws = torch.rand((len(rows), sampling.max_new_tokens), dtype=torch.float64, generator=generator)
    pad = _pad_id(policy)
    width = max(len(row) for row in rows) + sampling.max_new_tokens
    tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
    prompt_lengths = torch.tensor([len(row) for row in rows])
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    mask = torch.zeros((len(rows), sampling.max_new_tokens), dtype=torch.bool)
    logprobs, values = torch.zeros(mask.shape), torch.zeros(mask.shape)
    terminated = torch.zeros(len(rows), dtype=torch.bool)
    stop = torch.tensor(sorted(policy.stop_ids if sampling.stop_token_ids is None else sampling.stop_token_ids), dtype=torch.int64)
    with torch.no_grad():
        for group in _groups(policy, prompt_lengths, sampling.max_new_tokens):
            part = _Group(tokens[group], prompt_lengths[group], None if draws is None else draws[group], sampling, stop)
            part.run(policy)
            tokens[group], mask[group], terminated[group] = part.tokens, part.mask, part.terminated
            logprobs[group], values[group] = part.logprobs, part.values
    used = int((prompt_lengths + mask.sum(dim=1)).max())
    longest = int(mask.sum(dim=1).max())
    texts = tuple(
        decode_response(policy.tokenizer, tokens[i, :p].tolist(), tokens[i, p : p + n].tolist())
        for i, (p, n) in enumerate(zip(prompt_lengths.tolist(), mask.sum(1).tolist(), strict=True))
    )
    return RolloutBatch(
        tokens=tokens[:, :used].contiguous(), prompt_lengths=prompt_lengths, response_mask=mask[:, :longest].contiguous(),
        terminated=terminated, old_logprobs=logprobs[:, :longest].contiguous(), values=values[:, :longest].contiguous(),
        texts=texts, temperature=sampling.temperature,
    )  # fmt: skip


class _Group:
    """Rows that share one session."""

    def __init__(self, tokens: Tensor, prompt_lengths: Tensor, draws: Tensor | None, sampling: SamplingConfig, stop: Tensor):
        self.tokens, self.prompt_lengths, self.draws, self.sampling, self.stop = tokens, prompt_lengths, draws, sampling, stop
        shape = (len(tokens), sampling.max_new_tokens)
        self.mask = torch.zeros(shape, dtype=torch.bool)
        self.logprobs, self.values = torch.zeros(shape), torch.zeros(shape)
        self.terminated = torch.zeros(len(tokens), dtype=torch.bool)

    def run(self, policy: Policy) -> None:
        start = int(self.prompt_lengths.min())
        end = int(self.prompt_lengths.max()) + self.sampling.max_new_tokens
        with policy.session(len(self.tokens), end) as session:
            hidden = session.step(self.tokens[:, :start].to(policy.device))[:, -1]
            for position in range(start, end):
                self._choose(policy, hidden, position)
                if position + 1 == end or not self._open_rows(position + 1).any():
                    return
                hidden = session.step(self.tokens[:, position : position + 1].to(policy.device))[:, -1]

    def _open_rows(self, position: int) -> Tensor:
        """(R,) bool: rows that still have a token to choose at this position or later."""
        return ~self.terminated & (position < self.prompt_lengths + self.sampling.max_new_tokens)

    def _choose(self, policy: Policy, hidden: Tensor, position: int) -> None:
        """Chooses the token at `position` of the rows whose prompt is used up; hidden (R, H) is the state before it."""
        choosing = (self._open_rows(position) & (position >= self.prompt_lengths)).nonzero().flatten()
        if len(choosing) == 0:
            return
        steps = position - self.prompt_lengths[choosing]
        seen = [self.tokens[i, :position] for i in choosing.tolist()]
        draws = None if self.draws is None else self.draws[choosing, steps]
        chosen, logprobs, values = sample_next(policy, hidden[choosing.to(hidden.device)], seen, self.sampling, draws)
        self.tokens[choosing, position] = chosen
        self.mask[choosing, steps] = True
        self.logprobs[choosing, steps], self.values[choosing, steps] = logprobs, values
        self.terminated[choosing] = torch.isin(chosen, self.stop)


def sample_next(
    policy: Policy, hidden: Tensor, seen: Sequence[Tensor], sampling: SamplingConfig, draws: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of R rows.

    Args:
        hidden: (R, H) last hidden states.
        seen: per row its tokens so far, for the repetition penalty.
        draws: (R,) float64 in [0, 1), a random number per row; None = the most likely token.

    Returns:
        tokens (R,) int64; their logprobs (R,) over the full vocabulary at the temperature; values (R,) of the states. On the CPU.
    """
    logits = policy.project(hidden).float().cpu()
    scores = filter_logits(
        logits,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        seen_tokens=seen,
    )
    chosen = choose_tokens(scores, draws)
    return chosen, token_logprobs(logits, chosen, temperature=sampling.temperature), policy.value_head(hidden).float().cpu()


def encode_prompts(policy: Policy, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids of each prompt. Raises PromptError."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"prompts must be a list of texts or of token-id lists, got {type(prompts).__name__}; wrap a single prompt in [ ]"
        )
    if len(prompts) == 0:
        raise PromptError("the prompt list is empty; give at least one prompt")
    return [_encode(policy, prompt, i) for i, prompt in enumerate(prompts)]


def check_prompts(policy: Policy, prompts: Sequence[str] | Sequence[Sequence[int]], sampling: SamplingConfig) -> None:
    """Raises PromptError when `generate` could not take one of these prompts."""
    check_lengths(policy, encode_prompts(policy, prompts), dataclasses.replace(sampling, num_samples=1))


def _encode(policy: Policy, prompt: str | Sequence[int], index: int) -> list[int]:
    if isinstance(prompt, str):
        if policy.tokenizer is None:
            raise PromptError("this policy has no tokenizer: pass token ids, or load_policy(..., tokenizer=...)")
        ids = encode_prompt(policy.tokenizer, prompt)
    else:
        try:
            ids = None if isinstance(prompt, bytes) else [operator.index(token) for token in prompt]
        except TypeError:
            ids = None
        if ids is None:
            raise PromptError(f"prompt {index} is neither a text nor a list of token ids: {prompt!r}")
    if not ids:
        raise PromptError(f"prompt {index} is empty ({prompt!r}); a policy needs at least one token to continue")
    wrong = [token for token in ids if not 0 <= token < policy.vocab_size]
    if wrong:
        raise PromptError(f"prompt {index} has token id {wrong[0]}, outside the model's 0..{policy.vocab_size - 1}")
    return ids


def check_lengths(policy: Policy, rows: list[list[int]], sampling: SamplingConfig) -> None:
    limits = [limit for limit in (policy.max_length, policy.max_session_tokens) if limit is not None]
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    needed = len(rows[longest]) + sampling.max_new_tokens
    if limits and needed > min(limits):
        raise PromptError(
            f"prompt {longest // sampling.num_samples} has {len(rows[longest])} tokens; "
            f"with max_new_tokens={sampling.max_new_tokens} that makes {needed}, "
            f"but {policy.length_limit_reason} allows {min(limits)}: shorten the prompt or lower max_new_tokens"
        )


def _groups(policy: Policy, prompt_lengths: Tensor, max_new_tokens: int) -> list[Tensor]:
    """Row indices per session: all rows when they fit the caches, else as many as fit, similar lengths together."""
    if policy.max_session_tokens is None:
        return [torch.arange(len(prompt_lengths))]
    order = torch.argsort(prompt_lengths, stable=True)
    groups, start = [], 0
    for end in range(1, len(order) + 1):
        next_fits = end < len(order) and (end + 1 - start) * (int(prompt_lengths[order[end]]) + max_new_tokens) <= policy.max_session_tokens
        if not next_fits:
            groups.append(order[start:end])
            start = end
    return groups


def _pad_id(policy: Policy) -> int:
    """A padding token that was added to the tokenizer alone has no embedding, and padding is fed to the model."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(policy.tokenizer, name, None)
        if token is not None and token < policy.vocab_size:
            return token
    return 0
