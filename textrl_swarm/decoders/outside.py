"""A decoder without its blocks: what a swarm's client computes itself.

Embeddings, final norm and output embeddings run through the model's own forward, with ports in the place of
the blocks: scaled or normalised embeddings, learned positions, projections, soft caps and logit scales come
out as that architecture's own code has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from textrl_swarm.decoders.caches import planned
from textrl_swarm.decoders.planner import cache_layers
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.decoders.stand_ins import StandIns
from textrl_swarm.errors import ModelError
from textrl_swarm.models.output_head import OutputHead, output_embeddings


class Outside:
    """Everything before the first block and behind the last.

    Args:
        skeleton: with the weights outside of the blocks loaded; its blocks are replaced.
        device: where these weights go.

    Raises:
        ModelError: a decoder that does not hand one hidden state from block to block.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device | str = "cpu"):
        self.skeleton = skeleton
        self._templates = cache_layers(skeleton.config)
        self._output: Tensor | None = None  # of the last block, while the decoder's end runs
        self.device = torch.device(device)
        ports = StandIns(skeleton, self._port)
        skeleton.move(self.device)
        problem = ports.choose_form(self._is_run)
        if problem is not None:
            raise ModelError(f"{skeleton.config.model_type} does not run without its blocks: {problem}")
        with torch.no_grad():
            normed = self.finish(self._dummy())
        self.head_size = normed.shape[-1]
        self._head = OutputHead(skeleton.model, skeleton.decoder, self.head_size)

    @property
    def name(self) -> str:
        """Of the model: directory or hub id."""
        return str(self.skeleton.model.name_or_path)

    @property
    def vocab_size(self) -> int:
        """Rows of the output embeddings."""
        return output_embeddings(self.skeleton.model).weight.shape[0]

    def embed(self, tokens: Tensor, past: int = 0, padding: Sequence[int] = ()) -> Tensor:
        """What the first block is given (B, S, H), for tokens (B, S) int64 behind `past` others.

        Args:
            padding: see Chunk.
        """
        self._output = None
        cache = None
        if past:
            cache = Cache(layers=[planned(template, past) for template in self._templates])
        try:
            self.skeleton.run_decoder(past, cache, padding, input_ids=tokens)
        except _Embedded as reached:
            return reached.hidden
        raise ModelError(f"{self.skeleton.config.model_type} does not reach its first block")

    def finish(self, hidden: Tensor) -> Tensor:
        """What output embeddings and value head read (B, S, H'), for the last block's output (B, S, W)."""
        self._output = hidden[..., : self.skeleton.hidden_size]
        try:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
            return self.skeleton.run_decoder(0, None, input_ids=tokens)[0]
        finally:
            self._output = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) for what `finish` returned (..., H')."""
        return self._head(hidden)

    def _port(self, block: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._output is None:
            raise _Embedded(hidden)
        return self._output if block == 0 else hidden

    def _dummy(self) -> Tensor:
        return torch.zeros(1, 3, self.skeleton.hidden_size, dtype=self.skeleton.dtype, device=self.device)

    def _is_run(self) -> bool:
        with torch.no_grad():
            normed, dummy = self.finish(self._dummy()), self._dummy()
        # A decoder that wants tuples takes a row of a tensor for its first part, once per block.
        return isinstance(normed, Tensor) and normed.shape[:2] == dummy.shape[:2]


class _Embedded(Exception):
    """Ends a decoder's forward before the first block."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden
