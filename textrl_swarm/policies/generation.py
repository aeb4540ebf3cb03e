"""Sampling responses: one cached session per group of prompts, whatever holds the caches.

Rows leave a session soon after they have ended. What was sampled is what is scored and trained on: token ids
all the way. Knows nothing about rewards or training.
"""

from __future__ import annotations

import operator
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from textrl_swarm.config import SamplingConfig
from textrl_swarm.decoders.chunks import Step
from textrl_swarm.errors import PromptError
from textrl_swarm.maths.sampling import choose_tokens, token_logprobs
from textrl_swarm.models.texts import decode_response, encode_prompt
from textrl_swarm.models.value_head import ValueHead
from textrl_swarm.policies.filters import filter_logits
from textrl_swarm.policies.sessions import DecodingSession, Pending, RowLayout
from textrl_swarm.types import RolloutBatch, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptLike = str | Sequence[int]

# Ended rows leave once so many of a session's rows are still open, since the caches are copied then.
_MAX_OPEN = 7 / 8
# Of a session, before the rows are split over several: a step of fewer costs as much.
_MIN_ROWS = 16


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
    def max_step_tokens(self) -> int | None: ...
    @property
    def sessions_at_once(self) -> int: ...
    @property
    def takes_padding(self) -> bool: ...
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
    groups = _groups(decoder, encoded, sampling)
    batches = []
    for group in groups:
        group_draws = None if draws is None else draws[group]
        batches.append(_Batch([rows[i] for i in group], group_draws, sampling, stop))
    with torch.no_grad():
        _run_all(decoder, batches)
    trajectories: dict[int, Trajectory] = {}
    for group, batch in zip(groups, batches, strict=True):
        trajectories.update(zip(group, batch.trajectories(decoder.tokenizer), strict=True))
    in_order = [trajectories[i] for i in range(len(rows))]
    return RolloutBatch.from_trajectories(
        in_order, temperature=sampling.temperature, pad_token=_pad_token(decoder)
    )


def _run_all(decoder: Decoder, batches: Sequence[_Batch]) -> None:
    """Runs batches side by side, as many as the caches hold: while the servers compute a token of one,
    another's is chosen.
    """
    waiting = list(reversed(batches))
    running: dict[_Batch, tuple[_Steps, Pending[list[Tensor]]]] = {}
    most = decoder.max_session_tokens
    try:
        while waiting or running:
            while waiting and len(running) < decoder.sessions_at_once:
                reserved = sum(batch.reserved(decoder) for batch in [waiting[-1], *running])
                if running and most is not None and reserved > most:
                    break
                batch = waiting.pop()
                steps = batch.steps(decoder)
                running[batch] = steps, next(steps)
            ready = wait(
                [pending.future for _, pending in running.values()], return_when=FIRST_COMPLETED
            ).done
            for batch, (steps, pending) in list(running.items()):
                if pending.future in ready:
                    try:
                        running[batch] = steps, steps.send(pending.result())
                    except StopIteration:
                        del running[batch]
    finally:
        for steps, _ in running.values():
            steps.close()


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


# What is waited for, and what it gave.
_Steps = Generator[Pending[list[Tensor]], list[Tensor], None]


class _Batch:
    """R rows that share one session.

    Args:
        prompts: (n,) int64 each, in ascending order of their lengths.
        draws: (R, T) random numbers; None = the most likely tokens.
        stop: token ids that end a response.
    """

    def __init__(
        self, prompts: Sequence[Tensor], draws: Tensor | None, sampling: SamplingConfig, stop: Tensor
    ):
        self.prompts = prompts
        self.draws = draws
        self.sampling = sampling
        self.stop = stop
        shape = (len(prompts), sampling.max_new_tokens)
        self.responses = torch.zeros(shape, dtype=torch.int64)
        self.logprobs = torch.zeros(shape)
        self.values = torch.zeros(shape)
        self.lengths = torch.zeros(len(prompts), dtype=torch.int64)
        self.terminated = torch.zeros(len(prompts), dtype=torch.bool)

    @property
    def max_length(self) -> int:
        """Tokens of its longest row, at most."""
        return len(self.prompts[-1]) + self.sampling.max_new_tokens

    def reserved(self, decoder: Decoder) -> int:
        """Tokens for which its caches have room."""
        return len(self.prompts) * (self.max_length + decoder.session_row_tokens)

    def steps(self, decoder: Decoder) -> _Steps:
        """Chooses tokens until every row has ended."""
        layout = RowLayout(
            self.prompts, max_tokens=decoder.max_step_tokens, takes_padding=decoder.takes_padding
        )
        with decoder.session(len(self.prompts), self.max_length) as session:
            steps = [replace(step, inputs=step.inputs.to(decoder.device)) for step in layout.prompt_steps()]
            outputs = yield session.run(steps)
            repeated = []
            for step, output in zip(steps, outputs, strict=True):
                repeated.append(output[:, -1].repeat_interleave(step.chunk.copies, dim=0))
            hidden = torch.cat(repeated)
            live = torch.arange(len(self.prompts))
            for position in range(self.sampling.max_new_tokens):
                self._choose(decoder, hidden, live, position)
                still_open = live[~self.terminated[live]]
                if len(still_open) == 0 or position + 1 == self.sampling.max_new_tokens:
                    return
                if len(still_open) <= _MAX_OPEN * len(live):
                    live = still_open
                tokens = self.responses[live, position][:, None].to(decoder.device)
                chunk = layout.next_chunk(live.tolist())
                (output,) = yield session.run([Step(tokens, chunk, last_only=True)])
                hidden = output[:, -1]

    def _choose(self, decoder: Decoder, hidden: Tensor, live: Tensor, position: int) -> None:
        """Chooses the token at `position` of responses that have not ended; hidden (len(live), H) is the
        state before it.
        """
        choosing = ~self.terminated[live]
        rows = live[choosing]
        states = hidden if choosing.all() else hidden[choosing.to(hidden.device)]
        seen = None
        if self.sampling.repetition_penalty != 1.0:
            seen = [torch.cat([self.prompts[i], self.responses[i, :position]]) for i in rows.tolist()]
        draws = None if self.draws is None else self.draws[rows, position]
        chosen, logprobs, values = sample_next(decoder, states, seen, self.sampling, draws)
        self.responses[rows, position] = chosen
        self.logprobs[rows, position] = logprobs
        self.values[rows, position] = values
        self.lengths[rows] = position + 1
        self.terminated[rows] = torch.isin(chosen, self.stop)

    def trajectories(self, tokenizer: PreTrainedTokenizerBase | None) -> list[Trajectory]:
        """The rows without their padding."""
        rows = []
        for i, (prompt, count) in enumerate(zip(self.prompts, self.lengths.tolist(), strict=True)):
            response = self.responses[i, :count]
            ended = bool(self.terminated[i])
            text = decode_response(tokenizer, prompt.tolist(), response.tolist(), ended=ended)
            logprobs = self.logprobs[i, :count]
            values = self.values[i, :count]
            rows.append(Trajectory(prompt, response, logprobs, values, ended, text))
        return rows


def sample_next(
    decoder: Decoder,
    hidden: Tensor,
    seen: Sequence[Tensor] | None,
    sampling: SamplingConfig,
    draws: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of R rows.

    Args:
        hidden: (R, H) last hidden states.
        seen: per row its tokens so far, for the repetition penalty; None where there is none.
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


def _groups(decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[list[int]]:
    """Rows per session, in ascending order of their prompts: a session for each of those that run at the same
    time, or more of them where the caches are too small. A prompt's samples stay together if they can.
    """
    samples, at_once = sampling.num_samples, decoder.sessions_at_once
    most_rows = max(_MIN_ROWS, -(-len(prompts) * samples // at_once))
    most_tokens = None if decoder.max_session_tokens is None else decoder.max_session_tokens // at_once
    groups: list[list[int]] = []
    for prompt in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        # The longest in hand, so that all rows of the group need as much.
        tokens = len(prompts[prompt]) + sampling.max_new_tokens + decoder.session_row_tokens
        room = samples * len(prompts) if most_tokens is None else most_tokens // tokens
        for sample in range(samples):
            row = prompt * samples + sample
            last = groups[-1] if groups else []
            fits = (
                0 < len(last) < room
                and (len(last) < most_rows or sample > 0)
                and (decoder.takes_padding or len(prompts[last[0] // samples]) == len(prompts[prompt]))
            )
            if fits:
                last.append(row)
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
