"""The chain of remote blocks as one differentiable function of hidden states and adapter tensors,
fault-tolerant.

Rows are split into micro-batches that travel the chain side by side, at most `max_in_flight` at a time, so
that every server works. A request that fails is re-planned from the block where it failed: nothing that was
computed before is lost, and since servers hold no state but content-addressed adapters, a retry gives the
same numbers. Gradients are added in row order whatever the order of arrival. Knows nothing about embeddings,
heads or losses.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import PeerID
from torch import Tensor

from textrl_swarm.errors import AdapterMissing, PromptError, RemoteFailure, ServerFailed
from textrl_swarm.models.blocks import blocks_text
from textrl_swarm.swarm.client.routing import Router, Span
from textrl_swarm.swarm.client.rpc import ServerCalls
from textrl_swarm.swarm.protocol import MAX_MICRO_BATCHES_IN_FLIGHT, MICRO_BATCH_TOKENS, AdapterSnapshot

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_MAX_ANSWERED_FAILURES = 3  # errors that servers report themselves before a request is given up
_MAX_LOST_ADAPTERS = 20  # times servers may lose the adapter of one request before it is given up
_MAX_BACKOFF_S = 8.0

Trail = list[tuple[Span, Tensor]]  # which server computed which blocks from which input (b, S, H)


class Attempts:
    """Bounds the retries of one request: by time since it first failed, and by errors that servers report
    themselves.
    """

    def __init__(self, what: str, recovery_s: float):
        self._what = what
        self._recovery_s = recovery_s
        self._count = 0
        self._answered = 0
        self._lost_adapters = 0
        self._deadline: float | None = None

    @property
    def left_s(self) -> float:
        """Seconds until the request is given up."""
        return self._recovery_s if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def lost_adapter(self) -> None:
        """Counts that a server no longer held the adapter. Raises RemoteFailure when that happens too
        often.
        """
        self._lost_adapters += 1
        if self._lost_adapters > _MAX_LOST_ADAPTERS:
            raise RemoteFailure(
                f"{self._what} failed: a server does not keep the adapter ({self._lost_adapters} times), "
                "probably "
                "because too many clients push theirs; start the servers with a larger --adapter_bytes"
            )

    async def pause(self, error: ServerFailed) -> None:
        """Waits before the next attempt. Raises RemoteFailure when the attempts are used up."""
        self._deadline = self._deadline or time.monotonic() + self._recovery_s
        self._answered += error.answered
        if self._answered >= _MAX_ANSWERED_FAILURES or self.left_s == 0:
            raise RemoteFailure(
                f"{self._what} failed {self._count + 1} times, last: {error}; look at that server's log, "
                "then run again"
            ) from error
        backoff_s = 0.0 if self._count == 0 else 0.5 * 2 ** (self._count - 1)
        delay_s = min(self.left_s, _MAX_BACKOFF_S, backoff_s)
        logger.warning("%s (retry %d in %.1f s)", error, self._count + 1, delay_s)
        self._count += 1
        await asyncio.sleep(delay_s)


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

    def within(self, info: Mapping[str, Any]) -> ChainLimits:
        """What these and one more server's, as its rpc_info tells them, allow together."""
        return ChainLimits(
            max_batch_tokens=min(self.max_batch_tokens, info["max_batch_tokens"]),
            max_length=min(self.max_length, info["max_length"]),
            cache_tokens=min(self.cache_tokens, info["cache_tokens"]),
            cache_row_tokens=max(self.cache_row_tokens, info["cache_row_tokens"]),
            takes_padding=self.takes_padding and info["takes_padding"],
        )


class BlockChain:
    """Blocks 0..num_blocks of one model, wherever they are.

    Args:
        max_in_flight: micro-batches travelling at the same time.
    """

    def __init__(
        self, router: Router, calls: ServerCalls, *, max_in_flight: int = MAX_MICRO_BATCHES_IN_FLIGHT
    ):
        self.router = router
        self.calls = calls
        self.limits = ChainLimits()
        self.max_in_flight = max_in_flight
        self._pushed: set[tuple[PeerID, str, int]] = set()  # (peer, adapter key, block)
        self._push_locks: defaultdict[PeerID, asyncio.Lock] = defaultdict(asyncio.Lock)

    def __call__(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None = None,
        flats: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Output (B, S, H) of blocks start..stop for hidden states (B, S, H).

        Args:
            adapter: applied by the servers; None = the base model.
            flats: the differentiable tensors that `adapter` was taken from; None = no gradient is wanted.
        """
        if start == stop:
            return hidden
        if adapter is None or flats is None or not torch.is_grad_enabled():
            return self._forward(hidden.detach(), start, stop, adapter)[0]
        wanted = [block for block in range(start, stop) if block in flats]
        return _RemoteBlocks.apply(
            self, hidden, start, stop, adapter, wanted, *(flats[block] for block in wanted)
        )

    def _micro_batches(self, hidden: Tensor) -> Sequence[Tensor]:
        length = hidden.shape[1]
        if length > self.limits.max_batch_tokens:
            raise PromptError(
                f"a sequence of {length} tokens is longer than the servers take at once "
                f"({self.limits.max_batch_tokens}); "
                "shorten it, or start the servers with a larger --max_batch_size"
            )
        rows = max(1, min(MICRO_BATCH_TOKENS, self.limits.max_batch_tokens) // length)
        return hidden.split(rows)

    def _forward(
        self, hidden: Tensor, start: int, stop: int, adapter: AdapterSnapshot | None
    ) -> tuple[Tensor, list[Trail]]:
        parts = self._micro_batches(hidden.cpu())
        results = self._run_all([self.through(part, start, stop, adapter) for part in parts])
        outputs = torch.cat([output for output, _ in results])
        return outputs.to(device=hidden.device, dtype=hidden.dtype), [trail for _, trail in results]

    def _backward(
        self, grad: Tensor, trails: list[Trail], adapter: AdapterSnapshot, need_input_grad: bool
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        rows = [trail[0][1].shape[0] for trail in trails]
        parts = grad.detach().cpu().split(rows)
        jobs = []
        for part, trail in zip(parts, trails, strict=True):
            jobs.append(self._back_through(part, trail, adapter, need_input_grad))
        results = self._run_all(jobs)
        sums: dict[int, Tensor] = {}
        for _, flats in results:  # in row order: the sum is the same however the answers raced
            for block, flat in flats.items():
                sums[block] = flat if block not in sums else sums[block] + flat
        if not need_input_grad:
            return None, sums
        grad_input = torch.cat([part for part, _ in results if part is not None])
        return grad_input.to(device=grad.device, dtype=grad.dtype), sums

    def _run_all(self, coroutines: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
        async def run() -> list[Result]:
            slots = asyncio.Semaphore(self.max_in_flight)

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

    async def through(
        self, hidden: Tensor, start: int, stop: int, adapter: AdapterSnapshot | None
    ) -> tuple[Tensor, Trail]:
        """Runs one micro-batch (b, S, H) through blocks start..stop; also returns which server got which
        input.
        """
        attempts = Attempts(
            f"forward through {blocks_text(range(start, stop))}", self.calls.timeouts.recovery_s
        )
        trail: Trail = []
        block = start
        while block < stop:
            span = (await self.router.route(block, stop, timeout_s=attempts.left_s))[0]
            sent = hidden.to(span.dtype)
            try:
                key = await self.ensure_pushed(span, adapter)
                hidden = await self.calls.forward(span.peer, self._uids(span), sent, key)
            except AdapterMissing:
                self.forget(span, adapter)
                attempts.lost_adapter()
                continue
            except ServerFailed as error:
                self.router.report_failure(span.peer, error)
                await attempts.pause(error)
                continue
            self.router.report_success(span.peer)
            trail.append((span, sent))
            block = span.stop
        return hidden, trail

    async def _back_through(
        self, grad: Tensor, trail: Trail, adapter: AdapterSnapshot, need_input_grad: bool
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        attempts = Attempts("backward", self.calls.timeouts.recovery_s)
        first_block = trail[0][0].start
        flats: dict[int, Tensor] = {}
        trail = list(trail)
        while trail:
            span, inputs = trail.pop()
            needed = need_input_grad or span.start > first_block
            try:
                key = await self.ensure_pushed(span, adapter)
                grad_input, span_flats = await self.calls.backward(
                    span.peer, self._uids(span), inputs, grad.to(span.dtype), key, needed
                )
            except AdapterMissing:
                self.forget(span, adapter)
                attempts.lost_adapter()
                trail.append((span, inputs))
                continue
            except ServerFailed as error:
                self.router.report_failure(span.peer, error)
                await attempts.pause(error)
                # Other servers take over, however many that takes: their inputs come from running the span
                # again.
                _, replacement = await self.through(inputs, span.start, span.stop, adapter)
                trail.extend(replacement)
                continue
            self.router.report_success(span.peer)
            grad = grad_input if grad_input is not None else grad
            flats.update(zip(range(span.start, span.stop), span_flats, strict=True))
        return (grad if need_input_grad else None), flats

    def _uids(self, span: Span) -> list[str]:
        return self.router.uids[span.start : span.stop]

    async def ensure_pushed(self, span: Span, adapter: AdapterSnapshot | None) -> str:
        """Makes sure that the server holds the adapter for these blocks; returns the key to name in requests
        ("" = none).
        """
        blocks = [] if adapter is None else adapter.blocks_within(range(span.start, span.stop))
        if adapter is None or not blocks:
            return ""
        async with self._push_locks[span.peer]:
            needed = [block for block in blocks if (span.peer, adapter.key, block) not in self._pushed]
            if needed:
                await self.calls.push(
                    span.peer, [self.router.uids[block] for block in needed], needed, adapter
                )
                self._pushed.update((span.peer, adapter.key, block) for block in needed)
        return adapter.key

    def forget(self, span: Span, adapter: AdapterSnapshot | None) -> None:
        """Notes that the server no longer holds this adapter: it evicted the adapter, or was restarted."""
        if adapter is not None:
            self._pushed -= {(span.peer, adapter.key, block) for block in range(span.start, span.stop)}


class _RemoteBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chain: BlockChain,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot,
        wanted: list[int],
        *flats: Tensor,
    ) -> Tensor:
        outputs, ctx.trails = chain._forward(hidden.detach(), start, stop, adapter)
        ctx.chain = chain
        ctx.adapter = adapter
        ctx.wanted = wanted
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, sums = ctx.chain._backward(grad, ctx.trails, ctx.adapter, ctx.needs_input_grad[1])
        flat_grads = [sums[block].to(grad.device) for block in ctx.wanted]
        return (None, grad_hidden, None, None, None, None, *flat_grads)


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
