"""One micro-batch on its way forward and back through the chain, whichever servers hold its blocks.

A request that fails is re-planned from the block where it failed: nothing that was computed before is lost,
and since servers hold no state but content-addressed adapters, a retry gives the same numbers. Knows nothing
about the other micro-batches.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Protocol

from hivemind.p2p import PeerID
from torch import Tensor

from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.errors import AdapterMissing, InputsMissing, ServerFailed
from textrl_swarm.models.blocks import blocks_text
from textrl_swarm.swarm.client.attempts import Attempts
from textrl_swarm.swarm.client.backward import MicroBatchBackward, Piece, Trail
from textrl_swarm.swarm.client.hand_over import HandOvers
from textrl_swarm.swarm.client.pushed import PushedAdapters
from textrl_swarm.swarm.client.routing import Span
from textrl_swarm.swarm.client.rpc import ForwardPlan, ServerCalls
from textrl_swarm.swarm.protocol import AdapterSnapshot, Receiver


class Routes(Protocol):
    """What Passes need of a Router."""

    uids: list[str]

    async def route(self, start: int, stop: int, *, timeout_s: float) -> list[Span]: ...
    def report_failure(self, peer: PeerID, error: ServerFailed | None = None) -> None: ...
    def report_success(self, peer: PeerID) -> None: ...


class Witness(Protocol):
    """Who is told of what servers answer, see Checks."""

    def saw_forward(
        self,
        span: Span,
        inputs: Tensor,
        outputs: Tensor,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None,
    ) -> None: ...
    def saw_backward(
        self, piece: Piece, grad_inputs: Tensor, adapter: AdapterSnapshot, packed: PackedRows | None
    ) -> None: ...


class Passes:
    """Forward and backward of one micro-batch; made by BlockChain.

    Args:
        recovery_s: how long one request may be retried.
        checks: told of what servers answer.

    Attributes:
        room: bytes of inputs that a server keeps for a client.
    """

    def __init__(
        self,
        router: Routes,
        calls: ServerCalls,
        pushed: PushedAdapters,
        hand_overs: HandOvers,
        *,
        recovery_s: float,
        checks: Witness | None = None,
    ):
        self._router = router
        self._calls = calls
        self._pushed = pushed
        self._hand_overs = hand_overs
        self._recovery_s = recovery_s
        self._checks = checks
        self.room: dict[PeerID, int] = defaultdict(int)
        self._kept_bytes: Counter[PeerID] = Counter()

    def begin(self) -> None:
        """Before the micro-batches of a forward: what servers still keep of earlier ones may go."""
        self._kept_bytes.clear()

    async def forward(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None = None,
        *,
        will_go_back: bool = False,
    ) -> tuple[Tensor, Trail]:
        """Runs one micro-batch (b, S, H) through blocks start..stop; also returns which server got which
        input.

        Args:
            will_go_back: whether servers are asked to keep their inputs; where they have no room, the client
                gets them.
        """
        attempts = Attempts(f"forward through {blocks_text(range(start, stop))}", self._recovery_s)
        trail: Trail = []
        block = start
        while block < stop:
            spans = await self._router.route(block, stop, timeout_s=attempts.left_s)
            names = [self._room_for(span, hidden) if will_go_back else None for span in spans]
            outputs, error = await self._forward_once(spans, hidden, adapter, packed, names, will_go_back)
            if isinstance(error, AdapterMissing):
                self._pushed.forget(spans[len(outputs)], adapter)
                attempts.lost_adapter()
            elif isinstance(error, ServerFailed):
                self._router.report_failure(spans[len(outputs)].peer, error)
                await attempts.pause(error)
            while outputs and outputs[-1] is None:
                outputs.pop()  # only the server that failed had it: it is computed again
            inputs: Tensor | None = hidden
            for span, name, output in zip(spans, names, outputs, strict=False):
                self._router.report_success(span.peer)
                trail.append(Piece(span, None if inputs is None else inputs.to(span.dtype), name))
                if self._checks is not None:
                    assert inputs is not None and output is not None, "then the client relays them"
                    self._checks.saw_forward(span, inputs, output, adapter, packed)
                inputs, block = output, span.stop
            assert inputs is not None, "of the last of them the client has the output"
            hidden = inputs
        return hidden, trail

    async def way_back(
        self,
        inputs: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None,
    ) -> Trail:
        """The way of a micro-batch (b, S, W) through blocks start..stop; it is only run where that takes
        more than one server.
        """
        spans = await self._router.route(start, stop, timeout_s=self._recovery_s)
        if len(spans) == 1:
            return [Piece(spans[0], inputs.to(spans[0].dtype))]
        return (await self.forward(inputs, start, stop, adapter, packed))[1]

    async def _forward_once(
        self,
        spans: Sequence[Span],
        hidden: Tensor,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None,
        kept: Sequence[str | None],
        will_go_back: bool,
    ) -> tuple[list[Tensor | None], AdapterMissing | ServerFailed | None]:
        """Outputs of the first spans, as far as hidden states go from server to server, None for those that
        only the next server has; and the error of the span after them.
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
        calls = self._start(spans[: len(ready)], hidden, ready, packed, kept, will_go_back)
        outputs: list[Tensor | None] = []
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
        self,
        spans: Sequence[Span],
        hidden: Tensor,
        keys: Sequence[str],
        packed: PackedRows | None,
        kept: Sequence[str | None],
        will_go_back: bool,
    ) -> list[asyncio.Task[tuple[Tensor | None, bool]]]:
        """Asks all of these servers at once; each but the first waits for what the one before hands over, and
        the client gets it too where the backward could need it.
        """
        names = [uuid.uuid4().hex for _ in spans]
        calls = []
        for i, (span, key) in enumerate(zip(spans, keys, strict=True)):
            receivers = []
            for following, name in zip(spans[i + 1 : i + 2], names[i + 1 : i + 2], strict=True):
                receivers.append(Receiver(str(following.peer), self._router.uids[following.start], name))
            is_quiet = bool(receivers) and (not will_go_back or kept[i + 1] is not None)
            session = names[i] if i > 0 else None
            plan = ForwardPlan(session, receivers, keep=kept[i], quiet=is_quiet, servers=i + 1)
            sent = hidden.to(span.dtype)
            call = self._calls.forward(span.peer, self._uids(span), sent, key, packed, plan=plan)
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
        attempts = Attempts("backward", self._recovery_s)
        flats: dict[int, Tensor] = {}
        grad_input: Tensor | None = None
        while task.left:
            piece = task.left[-1]
            span = piece.span
            assert piece.grad is not None, "pieces are finished from the last to the first"
            needed = task.needs_input_grad(need_input_grad)
            try:
                inputs = piece.kept or await self._inputs(task, piece, adapter)
                key = await self._pushed.ensure(span, adapter)
                flat = (adapter.blocks.get(block) for block in range(span.start, span.stop))
                sizes = [0 if part is None else part.numel() for part in flat]
                sent = inputs, piece.grad.to(span.dtype), key, sizes, needed, summed, task.packed
                grad_input, span_flats = await self._calls.backward(span.peer, self._uids(span), *sent)
            except AdapterMissing:
                self._pushed.forget(span, adapter)
                attempts.lost_adapter()
                continue
            except InputsMissing:
                piece.kept = None
                continue
            except ServerFailed as error:
                self._router.report_failure(span.peer, error)
                await attempts.pause(error)
                # Other servers take over, however many that takes: their inputs come from running the span
                # again.
                inputs = await self._inputs(task, piece, adapter)
                _, trail = await self.forward(
                    inputs, span.start, span.stop, adapter, task.packed, will_go_back=True
                )
                task.replace_last(trail)
                continue
            self._router.report_success(span.peer)
            if self._checks is not None and grad_input is not None:
                self._checks.saw_backward(piece, grad_input, adapter, task.packed)
            task.finish_last(grad_input)
            flats.update(zip(range(span.start, span.stop), span_flats, strict=True))
        return (grad_input if need_input_grad else None), flats

    async def _inputs(self, task: MicroBatchBackward, piece: Piece, adapter: AdapterSnapshot) -> Tensor:
        """Those of a piece; where only its server had them, the blocks below are run again."""
        if piece.inputs is None:
            start, stop = task.start, piece.span.start
            inputs, _ = await self.forward(task.inputs, start, stop, adapter, task.packed)
            piece.inputs = inputs.to(piece.span.dtype)
        return piece.inputs

    def _room_for(self, span: Span, hidden: Tensor) -> str | None:
        """A name under which a server is asked to keep inputs; None when it has no more room for them."""
        self._kept_bytes[span.peer] += hidden.numel() * span.dtype.itemsize
        has_room = self._kept_bytes[span.peer] <= self.room[span.peer]
        return uuid.uuid4().hex if has_room else None

    def _uids(self, span: Span) -> list[str]:
        return self._router.uids[span.start : span.stop]
