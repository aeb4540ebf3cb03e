"""The chain of remote blocks as one differentiable function of hidden states and adapter tensors,
fault-tolerant.

Rows are split into micro-batches that travel the chain side by side, within a limit of bytes, so that every
server works. Gradients are added in row order whatever the order of arrival. Knows nothing about embeddings,
heads or losses; how one micro-batch travels, and what happens when a server is lost, is in passes.py.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from torch import Tensor

from textrl_swarm.config import ServerChecks
from textrl_swarm.decoders.sharing import SharedPrefix
from textrl_swarm.errors import PromptError, RemoteFailure
from textrl_swarm.models.blocks import blocks_text
from textrl_swarm.swarm.client.backward import MicroBatchBackward, Trail
from textrl_swarm.swarm.client.checks import Checks
from textrl_swarm.swarm.client.hand_over import HandOvers
from textrl_swarm.swarm.client.micro_batches import MicroBatch, cut, put_together
from textrl_swarm.swarm.client.own_blocks import OwnBlocks
from textrl_swarm.swarm.client.passes import Passes
from textrl_swarm.swarm.client.pushed import PushedAdapters
from textrl_swarm.swarm.client.routing import Router
from textrl_swarm.swarm.client.rpc import ServerCalls
from textrl_swarm.swarm.protocol import AdapterSnapshot

Result = TypeVar("Result")

_MAX_SUMS = 2  # times that servers are asked for sums of gradients before each micro-batch's own are


@dataclass(frozen=True)
class ChainLimits:
    """What the servers of this model allow: the smallest of all inspected so far."""

    max_batch_tokens: int = 1 << 40
    """Rows x tokens in one request."""

    max_length: int = 1 << 40
    """Tokens of one row in a generation session."""

    cache_tokens: int = 1 << 40
    """Rows x tokens of all sessions together, per block."""

    cache_row_tokens: int = 0
    """Tokens that each row counts for beside its own: the states of linear attention."""

    takes_padding: bool = True
    """Whether rows of unequal length may share a generation."""

    takes_sharing: bool = True
    """Whether prefixes that rows have in common may be computed once."""

    def within(self, info: Mapping[str, Any]) -> ChainLimits:
        """What these and one more server's, as its rpc_info tells them, allow together."""
        return ChainLimits(
            max_batch_tokens=min(self.max_batch_tokens, info["max_batch_tokens"]),
            max_length=min(self.max_length, info["max_length"]),
            cache_tokens=min(self.cache_tokens, info["cache_tokens"]),
            cache_row_tokens=max(self.cache_row_tokens, info["cache_row_tokens"]),
            takes_padding=self.takes_padding and info["takes_padding"],
            takes_sharing=self.takes_sharing and info["takes_sharing"],
        )


class BlockChain:
    """Blocks 0..num_blocks of one model, wherever they are.

    Args:
        max_bytes_in_flight: of the micro-batches that travel at the same time; at least one does.
        checks: of what servers answer; None = they are believed.
        own: computes blocks where servers cannot be compared; None = nobody does.
    """

    def __init__(
        self,
        router: Router,
        calls: ServerCalls,
        *,
        max_bytes_in_flight: int = 256 << 20,
        checks: ServerChecks | None = None,
        own: OwnBlocks | None = None,
    ):
        self.router = router
        self.calls = calls
        self.limits = ChainLimits()
        self.pushed = PushedAdapters(router, calls)
        self.checks = Checks(router, calls, self.pushed, checks, own) if checks and checks.rate > 0 else None
        self.hand_overs = HandOvers(is_off=self.checks is not None)
        self.max_bytes_in_flight = max_bytes_in_flight
        self.passes = Passes(
            router,
            calls,
            self.pushed,
            self.hand_overs,
            recovery_s=calls.timeouts.recovery_s,
            checks=self.checks,
        )

    def __call__(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None = None,
        flats: Mapping[int, Tensor] | None = None,
        shared: SharedPrefix | None = None,
    ) -> Tensor:
        """Output (B, S, H) of blocks start..stop for hidden states (B, S, H).

        Args:
            adapter: applied by the servers; None = the base model.
            flats: the differentiable tensors that `adapter` was taken from; None = no gradient is wanted.
            shared: first columns that rows have in common, which travel and are computed once; None = rows
                are computed whole.
        """
        if adapter is None or flats is None or not torch.is_grad_enabled():
            return self._forward(hidden.detach(), start, stop, adapter, self.cut(hidden, shared))[0]
        wanted = [block for block in range(start, stop) if block in flats]
        return _RemoteBlocks.apply(
            self, hidden, start, stop, adapter, shared, wanted, *(flats[block] for block in wanted)
        )

    def cut(self, hidden: Tensor, shared: SharedPrefix | None) -> list[MicroBatch]:
        """The micro-batches of hidden states (B, S, W). Raises PromptError for rows that are too long."""
        rows, length, _ = hidden.shape
        if length > self.limits.max_batch_tokens:
            raise PromptError(
                f"a sequence of {length} tokens is longer than the servers take at once "
                f"({self.limits.max_batch_tokens}); "
                "shorten it, or start the servers with a larger --max_batch_size"
            )
        shared = shared if self.limits.takes_sharing else None
        return cut(rows, length, self.limits.max_batch_tokens, shared)

    def _forward(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None,
        batches: Sequence[MicroBatch],
        *,
        will_go_back: bool = False,
    ) -> tuple[Tensor, list[Trail]]:
        if will_go_back:
            self.passes.begin()
        whole = hidden.cpu()
        parts = [batch.inputs(whole) for batch in batches]
        jobs = []
        for part, batch in zip(parts, batches, strict=True):
            jobs.append(
                self.passes.forward(part, start, stop, adapter, batch.packed, will_go_back=will_go_back)
            )
        results = self._run_all(jobs, max(part.nbytes for part in parts))
        self.settle()
        found = [batch.outputs(output) for batch, (output, _) in zip(batches, results, strict=True)]
        outputs = put_together(batches, found)
        return outputs.to(device=hidden.device, dtype=hidden.dtype), [trail for _, trail in results]

    def _backward(
        self,
        grad: Tensor,
        trails: list[Trail],
        adapter: AdapterSnapshot,
        need_input_grad: bool,
        batches: Sequence[MicroBatch],
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        whole = grad.detach().cpu()
        tasks = []
        for batch, trail in zip(batches, trails, strict=True):
            tasks.append(MicroBatchBackward(batch.grad_outputs(whole), trail, batch.packed))
        first, last = trails[0][0].span.start, trails[0][-1].span.stop
        sums: dict[int, Tensor] = {}
        grad_input = None
        missing = set(adapter.blocks_within(range(first, last)))
        for is_summed in (*[len(tasks) > 1] * _MAX_SUMS, False):
            grads = self._backward_once(tasks, adapter, need_input_grad, is_summed, missing, sums)
            if grad_input is None and need_input_grad:
                found = [batch.grad_inputs(part) for batch, part in zip(batches, grads, strict=True)]
                grad_input = put_together(batches, found).to(device=grad.device, dtype=grad.dtype)
            missing -= sums.keys()
            if not missing:
                self._check_gradients(tasks, adapter, sums)
                break
            # Servers that were lost took their sums with them: what they computed is computed again.
            tasks = [task.again(missing) for task in tasks]
            need_input_grad = False
        if missing:
            raise RemoteFailure(f"the servers returned no gradients of {blocks_text(sorted(missing))}")
        self.settle()
        return grad_input, sums

    def _check_gradients(
        self, tasks: Sequence[MicroBatchBackward], adapter: AdapterSnapshot, sums: dict[int, Tensor]
    ) -> None:
        """Of servers that computed a whole sum."""
        if self.checks is None:
            return
        checks, packed = self.checks, [task.packed for task in tasks]

        async def see() -> None:
            for pieces in zip(*(task.finished for task in tasks), strict=False):
                if len({piece.span for piece in pieces}) == 1:
                    checks.saw_gradients(pieces, sums, adapter, packed)

        run_in_background(see())

    def settle(self) -> None:
        """Waits until answers are checked. Raises AnswersRefuted."""
        if self.checks is not None:
            run_in_background(self.checks.settle())

    def _backward_once(
        self,
        tasks: Sequence[MicroBatchBackward],
        adapter: AdapterSnapshot,
        need_input_grad: bool,
        is_summed: bool,
        wanted: Collection[int],
        sums: dict[int, Tensor],
    ) -> list[Tensor]:
        """Runs all micro-batches; adds the gradients of `wanted` blocks that are complete to `sums`. Returns
        the gradients of the inputs.
        """
        name = uuid.uuid4().hex
        jobs = []
        for index, task in enumerate(tasks):
            summed = (name, index, len(tasks)) if is_summed else None
            jobs.append(self.passes.backward(task, adapter, need_input_grad, summed))
        largest = max(task.inputs.nbytes for task in tasks)
        results = self._run_all(jobs, largest)
        for _, flats in results:  # in row order: the sum is the same however the answers raced
            for block, flat in flats.items():
                if block in wanted and flat.numel():
                    sums[block] = flat if is_summed or block not in sums else sums[block] + flat
        return [part for part, _ in results if part is not None]

    def _run_all(self, coroutines: Sequence[Coroutine[Any, Any, Result]], bytes_of_each: int) -> list[Result]:
        async def run() -> list[Result]:
            slots = asyncio.Semaphore(max(1, self.max_bytes_in_flight // bytes_of_each))

            async def one(coroutine: Coroutine[Any, Any, Result]) -> Result:
                async with slots:
                    return await coroutine

            tasks = [asyncio.ensure_future(one(coroutine)) for coroutine in coroutines]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return run_in_background(run())


class _RemoteBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chain: BlockChain,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot,
        shared: SharedPrefix | None,
        wanted: list[int],
        *flats: Tensor,
    ) -> Tensor:
        ctx.batches = chain.cut(hidden, shared)
        outputs, ctx.trails = chain._forward(
            hidden.detach(), start, stop, adapter, ctx.batches, will_go_back=True
        )
        ctx.chain = chain
        ctx.adapter = adapter
        ctx.wanted = wanted
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1]
        grad_hidden, sums = ctx.chain._backward(grad, ctx.trails, ctx.adapter, needed, ctx.batches)
        flat_grads = [sums[block].to(grad.device) for block in ctx.wanted]
        return (None, grad_hidden, None, None, None, None, None, *flat_grads)


def start_in_background(coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Runs a coroutine in hivemind's event loop thread."""
    return RemoteExpertWorker.run_coroutine(coroutine, return_future=True)


def run_in_background(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The same, and waits for it; Ctrl-C cancels it."""
    future = start_in_background(coroutine)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
