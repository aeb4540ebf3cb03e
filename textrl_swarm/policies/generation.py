"""Sampling responses: one cached session per group of prompts, whatever holds the caches.

Prompts of unequal length share a session: each row is fed its own next prompt token until its prompt is used
up, because no attention mask exists in a swarm. What was sampled is what is scored and trained on: token ids
all the way. Knows nothing about rewards or training.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from textrl_swarm.config import SamplingConfig
from textrl_swarm.errors import PromptError
from textrl_swarm.maths.sampling import choose_tokens, token_logprobs
from textrl_swarm.models.texts import decode_response, encode_prompt
from textrl_swarm.models.value_head import ValueHead
from textrl_swarm.policies.filters import filter_logits
from textrl_swarm.types import RolloutBatch, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptLike = str | Sequence[int]


class DecodingSession(Protocol):
    """Attention caches of one batch: tokens in, last hidden states out."""

    def step(self, tokens: Tensor) -> Tensor:
        """(B, k) int64, the next k tokens of each row -> (B, k, H) last hidden states."""
        ...


class Decoder(Protocol):
    """What generation needs of a policy."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...
    @property
    def value_head(self) -> ValueHead: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def max_session_tokens(self) -> int | None: ...
    @property
    def session_row_tokens(self) -> int: ...
    @property
    def length_limit_reason(self) -> str: ...

    def project(self, hidden: Tensor) -> Tensor:
        """(..., H) last hidden states -> (..., V) logits."""
        ...

    def session(self, rows: int, max_length: int) -> AbstractContextManager[DecodingSession]:
        """Decoding with attention caches, for `rows` rows of at most `max_length` tokens."""
        ...


def generate(decoder: Decoder, prompts: Sequence[PromptLike], sampling: SamplingConfig) -> RolloutBatch:
    """`sampling.num_samples` responses to each prompt.

    Every row has its own random numbers, drawn before anything else: neither the grouping of rows nor the
    place where the model is computed changes what is sampled from the same logits.

    Raises:
        PromptError: no prompts, an empty or malformed one, or one that does not fit the model or the servers'
            caches.
        NumericsError: the model's logits are NaN or infinite.
    """
    encoded = encode_prompts(decoder, prompts)
    check_lengths(decoder, encoded, sampling.max_new_tokens)
    rows = [torch.tensor(ids) for ids in encoded for _ in range(sampling.num_samples)]
    draws = _draw(len(rows), sampling)
    stop = stop_tokens(decoder, sampling)
    pad_token = _pad_token(decoder)
    trajectories: dict[int, Trajectory] = {}
    with torch.no_grad():
        for group in _groups(decoder, [len(row) for row in rows], sampling.max_new_tokens):
            group_draws = None if draws is None else draws[group]
            batch = _Batch([rows[i] for i in group], group_draws, sampling, stop, pad_token)
            batch.run(decoder)
            trajectories.update(zip(group, batch.trajectories(decoder.tokenizer), strict=True))
    in_order = [trajectories[i] for i in range(len(rows))]
    return RolloutBatch.from_trajectories(in_order, temperature=sampling.temperature, pad_token=pad_token)


def stop_tokens(decoder: Decoder, sampling: SamplingConfig) -> Tensor:
    """(n,) int64, the token ids that end a response: those of `sampling`, or else the decoder's."""
    ids = decoder.stop_ids if sampling.stop_token_ids is None else sampling.stop_token_ids
    return torch.tensor(sorted(ids), dtype=torch.int64)


def _draw(rows: int, sampling: SamplingConfig) -> Tensor | None:
    """(rows, max_new_tokens) float64 in [0, 1), a random number for every token; None without sampling."""
    if not sampling.do_sample:
        return None
    generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
    return torch.rand((rows, sampling.max_new_tokens), dtype=torch.float64, generator=generator)


class _Batch:
    """R rows that share one session."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        draws: Tensor | None,
        sampling: SamplingConfig,
        stop: Tensor,
        pad_token: int,
    ):
        self.draws = draws
        self.sampling = sampling
        self.stop = stop
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(self.prompt_lengths.max()) + sampling.max_new_tokens
        self.tokens = torch.full((len(prompts), width), pad_token, dtype=torch.int64)
        for row, prompt in zip(self.tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        shape = (len(prompts), sampling.max_new_tokens)
        self.mask = torch.zeros(shape, dtype=torch.bool)
        self.logprobs = torch.zeros(shape)
        self.values = torch.zeros(shape)
        self.terminated = torch.zeros(len(prompts), dtype=torch.bool)

    def run(self, decoder: Decoder) -> None:
        """Chooses tokens until every row has ended."""
        start = int(self.prompt_lengths.min())
        end = self.tokens.shape[1]
        with decoder.session(len(self.tokens), end) as session:
            hidden = session.step(self.tokens[:, :start].to(decoder.device))[:, -1]
            for position in range(start, end):
                self._choose(decoder, hidden, position)
                if position + 1 == end or not self._open_rows(position + 1).any():
                    return
                hidden = session.step(self.tokens[:, position : position + 1].to(decoder.device))[:, -1]

    def _open_rows(self, position: int) -> Tensor:
        """(R,) bool: rows that still have a token to choose at this position or later."""
        return ~self.terminated & (position < self.prompt_lengths + self.sampling.max_new_tokens)

    def _choose(self, decoder: Decoder, hidden: Tensor, position: int) -> None:
        """Chooses the token at `position` of rows whose prompt is used up; hidden (R, H) is the state before
        it.
        """
        choosing = (self._open_rows(position) & (position >= self.prompt_lengths)).nonzero().flatten()
        if len(choosing) == 0:
            return
        steps = position - self.prompt_lengths[choosing]
        seen = [self.tokens[i, :position] for i in choosing.tolist()]
        draws = None if self.draws is None else self.draws[choosing, steps]
        states = hidden[choosing.to(hidden.device)]
        chosen, logprobs, values = sample_next(decoder, states, seen, self.sampling, draws)
        self.tokens[choosing, position] = chosen
        self.mask[choosing, steps] = True
        self.logprobs[choosing, steps] = logprobs
        self.values[choosing, steps] = values
        self.terminated[choosing] = torch.isin(chosen, self.stop)

    def trajectories(self, tokenizer: PreTrainedTokenizerBase | None) -> list[Trajectory]:
        """The rows without their padding."""
        rows = []
        for i, start in enumerate(self.prompt_lengths.tolist()):
            count = int(self.mask[i].sum())
            prompt = self.tokens[i, :start]
            response = self.tokens[i, start : start + count]
            ended = bool(self.terminated[i])
            text = decode_response(tokenizer, prompt.tolist(), response.tolist(), ended=ended)
            logprobs = self.logprobs[i, :count]
            values = self.values[i, :count]
            rows.append(Trajectory(prompt, response, logprobs, values, ended, text))
        return rows


def sample_next(
    decoder: Decoder, hidden: Tensor, seen: Sequence[Tensor], sampling: SamplingConfig, draws: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of R rows.

    Args:
        hidden: (R, H) last hidden states.
        seen: per row its tokens so far, for the repetition penalty.
        draws: (R,) float64 in [0, 1), a random number per row; None = the most likely token.

    Returns:
        Tokens (R,) int64, their logprobs (R,) over the full vocabulary at the temperature, and values (R,) of
        the states, all on the CPU.
    """
    logits = decoder.project(hidden).float().cpu()
    scores = filter_logits(
        logits,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        seen_tokens=seen,
    )
    chosen = choose_tokens(scores, draws)
    logprobs = token_logprobs(logits, chosen, temperature=sampling.temperature)
    return chosen, logprobs, decoder.value_head(hidden).float().cpu()


# ------------------------------------------------------------------------------------------- prompts


def encode_prompts(decoder: Decoder, prompts: Sequence[PromptLike]) -> list[list[int]]:
    """Token ids of each prompt. Raises PromptError."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"prompts must be a list of texts or of token-id lists, got {type(prompts).__name__}; "
            "wrap a single prompt in [ ]"
        )
    if len(prompts) == 0:
        raise PromptError("the prompt list is empty; give at least one prompt")
    return [_encode(decoder, prompt, i) for i, prompt in enumerate(prompts)]


def _encode(decoder: Decoder, prompt: PromptLike, index: int) -> list[int]:
    ids = _token_ids(decoder.tokenizer, prompt, index)
    if not ids:
        raise PromptError(
            f"prompt {index} is empty ({prompt!r}); a policy needs at least one token to continue"
        )
    wrong = [token for token in ids if not 0 <= token < decoder.vocab_size]
    if wrong:
        raise PromptError(
            f"prompt {index} has token id {wrong[0]}, outside the model's 0..{decoder.vocab_size - 1}"
        )
    return ids


def _token_ids(tokenizer: PreTrainedTokenizerBase | None, prompt: PromptLike, index: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError(
                "this policy has no tokenizer: pass token ids, or load_policy(..., tokenizer=...)"
            )
        return encode_prompt(tokenizer, prompt)
    if not isinstance(prompt, bytes):
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            pass
    raise PromptError(f"prompt {index} is neither a text nor a list of token ids: {prompt!r}")


def check_lengths(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises PromptError for a prompt that does not leave room for `max_new_tokens`."""
    limits = [limit for limit in (decoder.max_length, decoder.max_session_tokens) if limit is not None]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    needed = len(prompts[longest]) + max_new_tokens
    if limits and needed > min(limits):
        raise PromptError(
            f"prompt {longest} has {len(prompts[longest])} tokens; with max_new_tokens={max_new_tokens} "
            f"that makes {needed}, but {decoder.length_limit_reason} allows {min(limits)}: "
            "shorten the prompt or lower max_new_tokens"
        )


def _groups(decoder: Decoder, prompt_lengths: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Rows per session: all rows when the caches hold them, else as many as fit, similar lengths together."""
    most = decoder.max_session_tokens
    if most is None:
        return [list(range(len(prompt_lengths)))]
    groups: list[list[int]] = []
    # Ascending, so that the row in hand is the longest of its group.
    for row in sorted(range(len(prompt_lengths)), key=lambda i: prompt_lengths[i]):
        tokens = prompt_lengths[row] + max_new_tokens + decoder.session_row_tokens
        fits = bool(groups) and (len(groups[-1]) + 1) * tokens <= most
        if fits:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _pad_token(decoder: Decoder) -> int:
    """A padding token that was added to the tokenizer alone has no embedding, and the model reads the
    padding.
    """
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(decoder.tokenizer, name, None)
        if token is not None and token < decoder.vocab_size:
            return token
    return 0
