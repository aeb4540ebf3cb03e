"""One micro-batch on its way forward and back through the chain, whichever servers hold its blocks.

A request that fails is re-planned from the block where it failed: nothing that was computed before is lost,
and since servers hold no state but content-addressed adapters, a retry gives the same numbers. Knows nothing
about the other micro-batches.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from torch import Tensor

from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.errors import AdapterMissing, ServerFailed
from textrl_swarm.models.blocks import blocks_text
from textrl_swarm.swarm.client.attempts import Attempts
from textrl_swarm.swarm.client.backward import MicroBatchBackward, Trail
from textrl_swarm.swarm.client.hand_over import HandOvers
from textrl_swarm.swarm.client.pushed import PushedAdapters
from textrl_swarm.swarm.client.routing import Router, Span
from textrl_swarm.swarm.client.rpc import HandedForward, ServerCalls
from textrl_swarm.swarm.protocol import AdapterSnapshot, Receiver


class Passes:
    """Forward and backward of one micro-batch; made by BlockChain."""

    def __init__(self, router: Router, calls: ServerCalls, pushed: PushedAdapters, hand_overs: HandOvers):
        self._router = router
        self._calls = calls
        self._pushed = pushed
        self._hand_overs = hand_overs

    async def forward(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None = None,
    ) -> tuple[Tensor, Trail]:
        """Runs one micro-batch (b, S, H) through blocks start..stop; also returns which server got which
        input.
        """
        attempts = Attempts(
            f"forward through {blocks_text(range(start, stop))}", self._calls.timeouts.recovery_s
        )
        trail: Trail = []
        block = start
        while block < stop:
            spans = await self._router.route(block, stop, timeout_s=attempts.left_s)
            outputs, error = await self._forward_once(spans, hidden, adapter, packed)
            for span, output in zip(spans, outputs, strict=False):
                self._router.report_success(span.peer)
                trail.append((span, hidden.to(span.dtype)))
                hidden, block = output, span.stop
            if isinstance(error, AdapterMissing):
                self._pushed.forget(spans[len(outputs)], adapter)
                attempts.lost_adapter()
            elif isinstance(error, ServerFailed):
                self._router.report_failure(spans[len(outputs)].peer, error)
                await attempts.pause(error)
        return hidden, trail

    async def _forward_once(
        self,
        spans: Sequence[Span],
        hidden: Tensor,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None,
    ) -> tuple[list[Tensor], AdapterMissing | ServerFailed | None]:
        """Outputs of the first spans, as far as hidden states go from server to server; and the error of the
        span after them.
        """
        count = 1
        while count < len(spans) and self._hand_overs.can(spans[count - 1].peer, spans[count].peer):
            count += 1
        # Whoever is handed something must be able to begin.
        pushes = [self._pushed.ensure(span, adapter) for span in spans[:count]]
        keys = await asyncio.gather(*pushes, return_exceptions=True)
        ready: list[str] = []
        for key in keys:
            if isinstance(key, str):
                ready.append(key)
            elif ready:
                break  # its turn will come
            elif isinstance(key, (AdapterMissing, ServerFailed)):
                return [], key
            else:
                raise key
        calls = self._start(spans[: len(ready)], hidden, ready, packed)
        outputs: list[Tensor] = []
        try:
            for i, call in enumerate(calls):
                output, has_handed_over = await call
                outputs.append(output)
                if i + 1 < len(calls) and not has_handed_over and not calls[i + 1].done():
                    self._hand_overs.failed(spans[i].peer, spans[i + 1].peer)
                    break
        except (AdapterMissing, ServerFailed) as error:
            return outputs, error
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        return outputs, None

    def _start(
        self, spans: Sequence[Span], hidden: Tensor, keys: Sequence[str], packed: PackedRows | None
    ) -> list[asyncio.Task[tuple[Tensor, bool]]]:
        """Asks all of these servers at once; each but the first waits for what the one before hands over."""
        names = [uuid.uuid4().hex for _ in spans]
        calls = []
        for i, (span, key) in enumerate(zip(spans, keys, strict=True)):
            receivers = []
            for following, name in zip(spans[i + 1 : i + 2], names[i + 1 : i + 2], strict=True):
                receivers.append(Receiver(str(following.peer), self._router.uids[following.start], name))
            handed = HandedForward(names[i] if i > 0 else None, receivers, servers=i + 1)
            sent = hidden.to(span.dtype)
            call = self._calls.forward(span.peer, self._uids(span), sent, key, packed, handed=handed)
            calls.append(asyncio.ensure_future(call))
        return calls

    async def backward(
        self,
        task: MicroBatchBackward,
        adapter: AdapterSnapshot,
        need_input_grad: bool,
        summed: tuple[str, int, int] | None,
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Goes back through what is left of a micro-batch; returns the gradient of its input (None when not
        needed) and of each block's flat tensor, empty where the server adds it to a sum.
        """
        attempts = Attempts("backward", self._calls.timeouts.recovery_s)
        flats: dict[int, Tensor] = {}
        grad_input: Tensor | None = None
        while task.left:
            piece = task.left[-1]
            span = piece.span
            assert piece.grad is not None, "pieces are finished from the last to the first"
            needed = task.needs_input_grad(need_input_grad)
            try:
                key = await self._pushed.ensure(span, adapter)
                grad = piece.grad.to(span.dtype)
                grad_input, span_flats = await self._calls.backward(
                    span.peer, self._uids(span), piece.inputs, grad, key, needed, summed, task.packed
                )
            except AdapterMissing:
                self._pushed.forget(span, adapter)
                attempts.lost_adapter()
                continue
            except ServerFailed as error:
                self._router.report_failure(span.peer, error)
                await attempts.pause(error)
                # Other servers take over, however many that takes: their inputs come from running the span
                # again.
                _, trail = await self.forward(piece.inputs, span.start, span.stop, adapter, task.packed)
                task.replace_last(trail)
                continue
            self._router.report_success(span.peer)
            task.finish_last(grad_input)
            flats.update(zip(range(span.start, span.stop), span_flats, strict=True))
        return (grad_input if need_input_grad else None), flats

    def _uids(self, span: Span) -> list[str]:
        return self._router.uids[span.start : span.stop]
