"""Decoding with caches: what a session is, and which prompts and tokens go where in its caches.

Prompts of unequal length share caches that all end in the same column (decoders/chunks.py). Knows nothing
about sampling, or where the caches are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

from textrl_swarm.decoders.chunks import Chunk, Step

Result = TypeVar("Result")

# Padding that is computed rather than to make one more pass: per token of the prompts, and in all.
_MAX_PADDING = 0.25
_FREE_PADDING = 64


class Pending(Generic[Result]):
    """Something that is being computed, perhaps elsewhere."""

    def __init__(self, future: Future[Result], finish: Callable[[Result], Result] | None = None):
        self.future = future
        self._finish = finish

    @staticmethod
    def done(result: Result) -> Pending[Result]:
        """Of something that is computed already."""
        future: Future[Result] = Future()
        future.set_result(result)
        return Pending(future)

    def result(self) -> Result:
        """Waits for it."""
        result = self.future.result()
        return result if self._finish is None else self._finish(result)


class DecodingSession(ABC):
    """Caches of one batch: tokens in, last hidden states out."""

    _columns = 0

    @abstractmethod
    def run(self, steps: Sequence[Step]) -> Pending[list[Tensor]]:
        """Last hidden states of each step of tokens, (b, k, H) or (b, 1, H). What was run before must be
        done.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """(B, k) int64, the next k tokens of rows of equal length -> (B, k, H) last hidden states."""
        chunk = Chunk(self._columns)
        self._columns += tokens.shape[1]
        return self.run([Step(tokens, chunk)]).result()[0]


class RowLayout:
    """Rows that share a session's caches, from their prompts on until they have ended.

    Args:
        prompts: (n,) int64 each, in ascending order of their lengths.
        max_tokens: rows x tokens of one step of prompts, unless one prompt is longer.
        takes_padding: whether lengths may differ.
    """

    def __init__(self, prompts: Sequence[Tensor], *, max_tokens: int | None, takes_padding: bool):
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._takes_padding = takes_padding
        self.columns = len(prompts[-1])
        self._live = list(range(len(prompts)))

    def prompt_steps(self) -> Iterator[Step]:
        """The prompts; `chunk.copies` rows next to each other have the same one."""
        if not self._takes_padding:
            yield Step(torch.stack(list(self._prompts)), Chunk(0), last_only=True)
            return
        for first, copies, prompts in self._buckets():
            longest = len(prompts[-1])
            padding = tuple(longest - len(prompt) for prompt in prompts)
            tokens = prompts[-1].new_zeros(len(prompts), longest)
            for row, prompt, empty in zip(tokens, prompts, padding, strict=True):
                row[empty:] = prompt
            chunk = Chunk(
                0,
                first,
                copies,
                start=self.columns - longest,
                width=self.columns,
                padding=padding if any(padding) else (),
            )
            yield Step(tokens, chunk, last_only=True)

    def _buckets(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        """First row, copies of each prompt, prompts that are computed together."""
        bucket: list[Tensor] = []
        first = copies = real = 0
        for row, count in self._repeated():
            prompt = self._prompts[row]
            tokens = len(prompt) * (len(bucket) + 1)
            fits = (
                count == copies
                and (self._max_tokens is None or tokens <= self._max_tokens)
                and tokens - real - len(prompt) <= max(_FREE_PADDING, _MAX_PADDING * real)
            )
            if bucket and not fits:
                yield first, copies, bucket
                bucket = []
            if not bucket:
                first, copies, real = row, count, 0
            bucket.append(prompt)
            real += len(prompt)
        yield first, copies, bucket

    def _repeated(self) -> Iterator[tuple[int, int]]:
        """Rows whose prompt is not that of the row before, and how many rows have it."""
        row = 0
        while row < len(self._prompts):
            stop = row + 1
            while stop < len(self._prompts) and torch.equal(self._prompts[stop], self._prompts[row]):
                stop += 1
            yield row, stop - row
            row = stop

    def next_chunk(self, live: Sequence[int]) -> Chunk:
        """The place of the next token of the rows that are still there."""
        keep: tuple[int, ...] = ()
        if len(live) < len(self._live):
            place = {row: i for i, row in enumerate(self._live)}
            keep = tuple(place[row] for row in live)
            self._live = list(live)
        ends = len(self._prompts[-1])
        padding = tuple(ends - len(self._prompts[row]) for row in live)
        chunk = Chunk(self.columns, padding=padding if any(padding) else (), keep=keep)
        self.columns += 1
        return chunk
