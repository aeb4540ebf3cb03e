"""A block that was tried before it is used: what it keeps, what it takes, and how many tokens at once.

Knows nothing about servers or adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from textrl_swarm.decoders.block import (
    DecoderBlock,
    chunks_are_exact,
    padding_is_exact,
    sharing_is_exact,
)
from textrl_swarm.decoders.boundary import join_tokens
from textrl_swarm.decoders.caches import CacheSpec, keep_rows
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.decoders.planner import Planner
from textrl_swarm.models.layers import LayerSizes, never_called

_TRIAL_TOKENS = 16


class TriedBlock(nn.Module):
    """A block ready for use.

    Args:
        module: transformers' own block, with weights, on the planner's device.
        index: its place in the model.
        planner: of the model.
        spec: what it keeps.
        linears: the layers that LoRA can adapt, routed experts among them.

    Attributes:
        linears: without those that the block does not use.
        takes_chunks: False = behind the first tokens of a row, the others come one by one.
        takes_padding: whether prompts of unequal length may share a generation.
        takes_sharing: whether prefixes that rows share may be computed once.

    Raises:
        ModelError: it computes something else with a cache than without.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        planner: Planner,
        spec: CacheSpec,
        linears: dict[str, LayerSizes],
    ):
        super().__init__()
        self.block = block = DecoderBlock(module, index, planner)
        self.cache_spec = spec
        self.device = planner.device
        self._heads = planner.heads
        modules = {path: path for path, sizes in linears.items() if sizes.experts is None}
        unused = never_called(modules, module, lambda: block(trial_tokens(planner)))
        self.linears = {path: sizes for path, sizes in linears.items() if path not in unused}
        self.takes_chunks = chunks_are_exact(block, spec)
        self.takes_padding = padding_is_exact(block, spec)
        self.takes_sharing = sharing_is_exact(block)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block(hidden)

    def step(self, hidden: Tensor, tensors: Sequence[Tensor], chunk: Chunk, max_bytes: int) -> Tensor:
        """Output (b, k, W) for the next k tokens (b, k, W) of each of b rows of a generation.

        Args:
            tensors: of `cache_spec.tensors`, with the earlier tokens in them; these are added.
            max_bytes: of attention matrices at a time; a token of one row is computed whatever it needs.
        """
        if chunk.keep:
            keep_rows(tensors, chunk.keep)
        outputs = []
        for rows, place in self._row_parts(hidden, chunk, max_bytes):
            parts = []
            for tokens, at in self._token_parts(rows, place, max_bytes):
                parts.append(self.block.step(tokens, self.cache_spec, tensors, at))
            outputs.append(join_tokens(parts))
        return torch.cat(outputs)

    def _row_parts(self, hidden: Tensor, chunk: Chunk, max_bytes: int) -> Iterator[tuple[Tensor, Chunk]]:
        """Prompts of unequal length some rows at a time: in parts of their tokens, padding would end in the
        middle of one.
        """
        rows, length, _ = hidden.shape
        most = self._tokens_at_once(length, chunk.past, max_bytes) // length
        if not chunk.padding or length == 1 or most >= rows:
            yield hidden, chunk
            return
        for start in range(0, rows, max(1, most)):
            stop = min(rows, start + max(1, most))
            yield hidden[start:stop], chunk.rows(start, stop, chunk.past)

    def _token_parts(self, hidden: Tensor, chunk: Chunk, max_bytes: int) -> Iterator[tuple[Tensor, Chunk]]:
        """A long prompt in parts whose attention matrices are small enough."""
        rows, length, _ = hidden.shape
        most = max(1, self._tokens_at_once(length, chunk.past, max_bytes) // rows)
        lengths: int | list[int] = most
        if not self.takes_chunks:
            first = min(most, length) if chunk.past == 0 else 1
            lengths = [first, *[1] * (length - first)]
        past = chunk.past
        for tokens in hidden.split(lengths, dim=1):
            yield tokens, chunk.rows(0, rows, past)
            past += tokens.shape[1]

    def _tokens_at_once(self, length: int, past: int, max_bytes: int) -> int:
        return max_bytes // (self._heads * self.block.dtype.itemsize * (past + length))


def trial_tokens(planner: Planner) -> Tensor:
    """(1, 16, W) noise that any block takes."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, _TRIAL_TOKENS, planner.hidden_size), generator=generator)
    return planner.boundary.trial(hidden.to(planner.device, planner.dtype))
