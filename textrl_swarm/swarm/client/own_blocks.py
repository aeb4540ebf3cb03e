"""Blocks that the client computes itself, to tell which of two servers is wrong: read from the model's files
when they are needed, so that no more of them are in memory than were asked for.

Knows nothing about servers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from hivemind.p2p import PeerID
from torch import Tensor

from textrl_swarm.decoders.block import DecoderBlock
from textrl_swarm.decoders.checkpoint import Checkpoint
from textrl_swarm.decoders.planner import Planner
from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.models.layers import layers_of
from textrl_swarm.swarm.client.backward import MicroBatchBackward, Piece, Trail
from textrl_swarm.swarm.client.routing import Span
from textrl_swarm.swarm.codec import decode, encode
from textrl_swarm.swarm.low_rank import add_hooks, applied
from textrl_swarm.swarm.protocol import AdapterSnapshot

Result = TypeVar("Result")

HERE = PeerID(b"this machine")
_MAX_BYTES = 2 << 30  # of the blocks that stay in memory; at least one does


class OwnBlocks:
    """Passes without servers, in fp32 on the CPU.

    Attributes:
        codec: in which hidden states would travel; they are rounded likewise.

    Args:
        base: the model.

    Raises:
        ModelError: its weights cannot be found.
    """

    def __init__(self, base: BaseModel):
        self._skeleton = Skeleton(base.config, torch.float32)
        self._planner = Planner(base.config, torch.float32, torch.device("cpu"), str(base))
        self._checkpoint = Checkpoint(base, self._skeleton)
        self._blocks: OrderedDict[int, DecoderBlock] = OrderedDict()  # the one that was used last at the end
        self._thread = ThreadPoolExecutor(1, "own blocks")
        self.codec: str | None = None

    async def forward(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None = None,
    ) -> tuple[Tensor, Trail]:
        """See Passes."""

        def compute() -> Tensor:
            with torch.no_grad():
                found = self._arrived(hidden)
                for block in range(start, stop):
                    found = self._run(block, found, adapter, packed, {})
            return self._arrived(found)

        return await self._in_thread(compute), await self.way_back(hidden, start, stop, adapter, packed)

    async def way_back(
        self,
        inputs: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None,
    ) -> Trail:
        """See Passes."""
        return [Piece(Span(HERE, start, stop, torch.float32, 0.0), inputs.float())]

    async def backward(
        self,
        task: MicroBatchBackward,
        adapter: AdapterSnapshot,
        need_input_grad: bool,
        summed: None,
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """See Passes."""
        (piece,) = task.left
        assert piece.inputs is not None and piece.grad is not None, "both are here"
        span, inputs, grad = piece.span, self._arrived(piece.inputs), self._arrived(piece.grad)

        def compute() -> tuple[Tensor | None, dict[int, Tensor]]:
            leaves: dict[int, Tensor] = {}
            with torch.enable_grad():
                first = inputs.detach().clone().requires_grad_(need_input_grad)
                hidden = first
                for block in range(span.start, span.stop):
                    hidden = self._run(block, hidden, adapter, task.packed, leaves)
                wanted = [*([first] if need_input_grad else []), *leaves.values()]
                found = list(torch.autograd.grad(hidden, wanted, grad))
            grad_input = self._arrived(found.pop(0)) if need_input_grad else None
            return grad_input, dict(zip(leaves, found, strict=True))

        return await self._in_thread(compute)

    def _arrived(self, tensor: Tensor) -> Tensor:
        tensor = tensor.float()
        return tensor if self.codec is None else decode(encode(tensor, self.codec), self.codec)

    def _run(
        self,
        block: int,
        hidden: Tensor,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None,
        leaves: dict[int, Tensor],
    ) -> Tensor:
        """One block's output; adds its part of the adapter to `leaves`."""
        update: AbstractContextManager[None] = nullcontext()
        if adapter is not None and block in adapter.blocks:
            leaf = leaves[block] = adapter.blocks[block].detach().requires_grad_(torch.is_grad_enabled())
            update = applied(adapter.header, block, leaf)
        with update:
            return self._block(block)(hidden, packed)

    def _block(self, index: int) -> DecoderBlock:
        if index not in self._blocks:
            module = self._checkpoint.take_block(index)
            module.requires_grad_(False)
            module.eval()
            add_hooks(module, layers_of(module))
            self._blocks[index] = DecoderBlock(module, index, self._planner)
        self._blocks.move_to_end(index)
        while len(self._blocks) > 1 and sum(map(_nbytes, self._blocks.values())) > _MAX_BYTES:
            self._blocks.popitem(last=False)
        return self._blocks[index]

    async def _in_thread(self, compute: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, compute)

    def close(self) -> None:
        """Ends its thread."""
        self._thread.shutdown(cancel_futures=True)


def _nbytes(block: DecoderBlock) -> int:
    return sum(parameter.nbytes for parameter in block.parameters())
