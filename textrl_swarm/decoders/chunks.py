"""Where the next tokens of a generation belong: in which rows and columns of the caches.

All rows of a generation end in the same column. Shorter prompts begin further right: what is left of a prompt
is padding, which masks and positions leave out. Knows nothing about what caches hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from textrl_swarm.errors import ShapeError


@dataclass(frozen=True)
class Chunk:
    """The place of k tokens of each of b rows in the caches.

    Some rows' prompts may be written in caches of more rows and longer prompts: then the chunk uses the part
    of the caches from column `start` on, and its own numbers count from there.
    """

    past: int
    """Columns before these tokens, from `start` on."""

    first: int = 0
    """Of its rows in the caches."""

    copies: int = 1
    """Rows that have this prompt, next to each other; it is computed for the first of them."""

    start: int = 0
    """Columns of the caches that are left of all prompts of these rows, and become padding."""

    width: int = 0
    """Columns of all prompts, up to which these rows will be filled; it matters where `start` > 0."""

    padding: tuple[int, ...] = ()
    """(b,) columns from `start` on in which a row has nothing; () = none have any."""

    keep: tuple[int, ...] = ()
    """Rows of the caches that stay and move up, before these tokens come; () = all."""

    def encode(self) -> dict[str, Any]:
        """As it travels."""
        return asdict(self)

    @staticmethod
    def decode(raw: Mapping[str, Any]) -> Chunk:
        """Reads a stranger's numbers. Raises ShapeError."""
        try:
            padding, keep = (tuple(map(int, raw[name])) for name in ("padding", "keep"))
            single = {name: int(raw[name]) for name in ("past", "first", "copies", "start", "width")}
            chunk = Chunk(**single, padding=padding, keep=keep)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ShapeError(f"malformed place of tokens in the caches: {error!r}") from error
        numbers = (chunk.past, chunk.first, chunk.copies - 1, chunk.start, chunk.width, *padding, *keep)
        if min(numbers) < 0:
            raise ShapeError(f"negative numbers in the place of tokens in the caches: {chunk}")
        return chunk

    def require_fit(self, rows: int, length: int, live_rows: int, max_length: int) -> None:
        """Raises ShapeError when (rows, length) tokens do not fit into caches of so many rows and columns."""
        ascending = all(a < b for a, b in zip(self.keep, self.keep[1:], strict=False))
        kept = len(self.keep) or live_rows
        fits = (
            rows > 0
            and length > 0
            and ascending
            and (not self.keep or self.keep[-1] < live_rows)
            and self.first + rows * self.copies <= kept
            and self.start + self.past + length <= max_length
            and (self.start == 0 or self.past + length <= self.width - self.start <= max_length - self.start)
            and len(self.padding) in (0, rows)
            and all(empty < self.past + length for empty in self.padding)
        )
        if not fits:
            raise ShapeError(
                f"{rows} rows of {length} tokens at {self} do not fit into caches of {live_rows} rows of "
                f"{max_length} tokens"
            )

    def rows(self, start: int, stop: int, past: int) -> Chunk:
        """The place of some of its rows, `past` columns from its start on."""
        return Chunk(
            past,
            self.first + start * self.copies,
            self.copies,
            self.start,
            self.width,
            self.padding[start:stop],
        )


@dataclass(frozen=True)
class Step:
    """Some tokens of some rows on their way into the caches."""

    inputs: Tensor
    """(b, k) int64 tokens, or what a block is given for them, (b, k, W)."""

    chunk: Chunk

    last_only: bool = False
    """Whether only the output of each row's last token is wanted."""


def mask_of(padding: Sequence[int], columns: int, device: torch.device) -> Tensor:
    """(b, columns) int64, 0 where a row has nothing and 1 behind it."""
    empty = torch.tensor(padding, device=device)
    return (torch.arange(columns, device=device)[None] >= empty[:, None]).long()


def positions_of(padding: Sequence[int], past: int, length: int, device: torch.device) -> Tensor:
    """(b, length) int64, for each of the tokens behind `past` columns how many of its row are before it."""
    empty = torch.tensor(padding, device=device)
    return (torch.arange(past, past + length, device=device)[None] - empty[:, None]).clamp(min=0)
