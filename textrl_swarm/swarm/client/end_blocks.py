"""The first and the last blocks of a model, on the client's machine: servers see neither hidden states that
are next to a prompt's tokens nor those that the output embeddings turn into a response's.

They compute as servers do, with the same hooks for the adapter, but in the client's dtype. Knows nothing
about servers, tokens or heads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textrl_swarm.decoders.block import cache_spec
from textrl_swarm.decoders.checkpoint import Checkpoint
from textrl_swarm.decoders.chunks import Step
from textrl_swarm.decoders.planner import Planner
from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.decoders.tried import TriedBlock
from textrl_swarm.errors import ConfigError
from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.models.blocks import blocks_text, inner_blocks
from textrl_swarm.models.layers import LayerSizes, layers_of
from textrl_swarm.swarm.client.micro_batches import MicroBatch, put_together
from textrl_swarm.swarm.low_rank import add_hooks, applied
from textrl_swarm.swarm.memory import free_bytes
from textrl_swarm.swarm.protocol import AdapterSnapshot

logger = logging.getLogger(__name__)

_ATTENTION_BYTES = 256 << 20  # attention matrices of a long prompt at a time, as servers have it


def load_ends(
    base: BaseModel, local_blocks: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> EndBlocks:
    """Reads a model's first and last blocks from its files.

    Args:
        local_blocks: how many of the first, and of the last.

    Raises:
        ConfigError: the model has too few blocks, or this machine too little memory.
        ModelError: a weight is missing, or its file cannot be read.
    """
    skeleton = Skeleton(base.config, dtype)
    inner = inner_blocks(skeleton.num_blocks, local_blocks)
    indices = [index for index in range(skeleton.num_blocks) if index not in inner]
    if not indices:
        return EndBlocks({}, inner)
    _require_room([skeleton.blocks[index] for index in indices], local_blocks, dtype, device)
    logger.info("loading %s of %s, which this machine computes itself", blocks_text(indices), base)
    planner = Planner(base.config, dtype, device, str(base))
    source = Checkpoint(base, skeleton)
    blocks = {}
    for index in indices:
        spec = cache_spec(skeleton.blocks[index], index, planner)
        module = source.take_block(index)
        module.requires_grad_(False)
        module.to(device)
        module.eval()
        blocks[index] = block = TriedBlock(module, index, planner, spec, layers_of(module))
        add_hooks(module, block.linears)
    return EndBlocks(blocks, inner)


def _require_room(
    blocks: Iterable[nn.Module], local_blocks: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    numbers = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    needed = sum(numbers) * dtype.itemsize
    free = free_bytes(device)
    if needed > free:
        raise ConfigError(
            f"local_blocks={list(local_blocks)}: {len(numbers)} block(s) need {needed / 2**30:.1f} GiB for "
            f"their weights in {str(dtype).removeprefix('torch.')}, and {device} has {free / 2**30:.1f} GiB "
            "left: keep fewer, or take dtype='bfloat16'"
        )


class EndBlocks:
    """Blocks around those of the swarm; perhaps none.

    Args:
        blocks: by their index.
        inner: the blocks that are the swarm's.
    """

    def __init__(self, blocks: Mapping[int, TriedBlock], inner: range):
        self._blocks = blocks
        self.inner = inner
        self.linears: dict[int, dict[str, LayerSizes]] = {
            index: block.linears for index, block in blocks.items()
        }
        """Block index -> path of a layer inside it -> sizes."""
        self.takes_padding = all(block.takes_padding for block in blocks.values())
        self.takes_sharing = all(block.takes_sharing for block in blocks.values())

    def __call__(
        self,
        hidden: Tensor,
        blocks: range,
        adapter: AdapterSnapshot | None,
        flats: Mapping[int, Tensor],
        batches: Sequence[MicroBatch],
    ) -> Tensor:
        """Output (B, S, W) of some of these blocks for hidden states (B, S, W); differentiable.

        Backward runs each block once more, one micro-batch at a time, so that only inputs are kept.

        Args:
            flats: the numbers of `adapter`, through which gradients flow.
            batches: the cut of the rows.
        """
        if not blocks:
            return hidden
        outputs = []
        for batch in batches:
            part = batch.inputs(hidden)
            for index in blocks:
                arguments = (index, part, adapter, flats.get(index), batch.packed)
                if torch.is_grad_enabled():
                    part = checkpoint(self._run, *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    part = self._run(*arguments)
            outputs.append(batch.outputs(part))
        return put_together(batches, outputs)

    def _run(
        self,
        index: int,
        hidden: Tensor,
        adapter: AdapterSnapshot | None,
        flat: Tensor | None,
        packed: PackedRows | None,
    ) -> Tensor:
        with _updated(adapter, index, flat):
            return self._blocks[index].block(hidden, packed)

    def session(self, adapter: AdapterSnapshot | None, *, rows: int, max_length: int) -> EndSession:
        """A generation's part of these blocks, with caches for rows of at most `max_length` tokens."""
        return EndSession(self._blocks, self.inner, adapter, rows, max_length)


class EndSession:
    """What runs before the servers' blocks in each step, and behind them. Made by EndBlocks."""

    def __init__(
        self,
        blocks: Mapping[int, TriedBlock],
        inner: range,
        adapter: AdapterSnapshot | None,
        rows: int,
        max_length: int,
    ):
        self._blocks = blocks
        self._first = [index for index in blocks if index < inner.start]
        self._last = [index for index in blocks if index >= inner.stop]
        self._adapter = adapter
        self._flats: dict[int, Tensor] = {}
        self._caches: dict[int, list[Tensor]] = {}
        for index, block in blocks.items():
            if adapter is not None and index in adapter.blocks:
                self._flats[index] = adapter.blocks[index].to(block.device)
            shapes = block.cache_spec.tensors(rows, max_length, block.block.dtype)
            self._caches[index] = [
                torch.zeros(shape, dtype=dtype, device=block.device) for shape, dtype in shapes
            ]

    def before(self, step: Step) -> Step:
        """The step as servers get it, for one with embeddings."""
        hidden = self._run(self._first, step, step.inputs)
        return replace(step, inputs=hidden.cpu(), last_only=step.last_only and not self._last)

    def behind(self, step: Step, hidden: Tensor) -> Tensor:
        """Output of all blocks for what servers answered to a step."""
        hidden = self._run(self._last, step, hidden)
        return hidden[:, -1:] if step.last_only else hidden

    def _run(self, blocks: Sequence[int], step: Step, hidden: Tensor) -> Tensor:
        for index in blocks:
            with _updated(self._adapter, index, self._flats.get(index)):
                hidden = self._blocks[index].step(hidden, self._caches[index], step.chunk, _ATTENTION_BYTES)
        return hidden


def _updated(
    adapter: AdapterSnapshot | None, index: int, flat: Tensor | None
) -> AbstractContextManager[None]:
    return nullcontext() if adapter is None or flat is None else applied(adapter.header, index, flat)
