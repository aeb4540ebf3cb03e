"""One batch's generation through the chain, with the attention caches on the servers. Survives the loss of
any server.

Every step's input to every span is kept; when a server is lost, its blocks go to others and the steps are
replayed one by one. Servers that are far away hand outputs to each other as well as to the client, which
relays what did not come through. The same steps in the same shapes give the same numbers, so on fp32 servers
the outcome is bit-equal to an undisturbed run. (Stock petals 2.2 fails here: its issue 587.) Knows nothing
about tokens, embeddings or sampling.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from textrl_swarm.decoders.boundary import join_tokens
from textrl_swarm.decoders.chunks import Chunk, Step
from textrl_swarm.errors import AdapterMissing, ServerFailed
from textrl_swarm.swarm.client.attempts import Attempts
from textrl_swarm.swarm.client.chain import BlockChain, run_in_background, start_in_background
from textrl_swarm.swarm.client.routing import Span
from textrl_swarm.swarm.client.rpc import GenerationStream
from textrl_swarm.swarm.protocol import LEAST_BYTES_PER_S, AdapterSnapshot, Receiver

_MAX_BYTES_IN_FLIGHT = 16 << 20  # sent to one server and not yet answered
_RELAY_AFTER_S = 2.0  # and the time for the bytes: in which one server hands over what the client has already


@dataclass(frozen=True)
class _Place:
    """A step without its hidden states."""

    chunk: Chunk
    last_only: bool


class _Leg:
    """One span's part of the session."""

    def __init__(self, span: Span, inputs: list[Tensor] | None = None):
        self.span = span
        self.inputs = inputs or []  # (b, k, W), of every step since the session began
        self.stream: GenerationStream | None = None
        self.outputs: list[Tensor] = []  # where checks want them: (b, k, W) or (b, 1, W) of every step
        self.since = 0  # first step whose output is this server's; those before are another's
        self.sent = self.done = 0  # steps that the present stream was given, and has answered
        self.handed_over: set[int] = set()  # steps that the server before was asked to give to this one
        self.answer: asyncio.Future[Tensor] | None = None  # to the step `done`; outlives a round
        self.ended = False  # in this round nothing more comes from it
        self.changed = asyncio.Event()

    def put(self, hidden: Tensor) -> None:
        """The input of the next step."""
        self.inputs.append(hidden.to(self.span.dtype))
        self.changed.set()

    @property
    def has_room(self) -> bool:
        """Whether one more step may be sent before the earlier ones are answered."""
        in_flight = sum(hidden.nbytes for hidden in self.inputs[self.done : self.sent + 1])
        return self.sent == self.done or in_flight <= _MAX_BYTES_IN_FLIGHT

    @property
    def will_answer(self) -> bool:
        """Whether the server has the step `done`, or should soon."""
        return self.done < self.sent or self.done in self.handed_over

    async def change(self, timeout_s: float | None = None) -> None:
        """Waits until something has changed, for at most so many seconds."""
        self.changed.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.changed.wait(), timeout_s)


class GenerationSession:
    """Context manager; made by SwarmClient.

    Args:
        blocks: those that are run.
        rows: for which the servers reserve caches.
        max_length: tokens per row, reserved on the servers; the most that may be stepped in all.
    """

    def __init__(
        self,
        chain: BlockChain,
        blocks: range,
        adapter: AdapterSnapshot | None,
        *,
        rows: int,
        max_length: int,
    ):
        self._chain = chain
        self._blocks = blocks
        self._adapter = adapter
        self._rows = rows
        self._max_length = max_length
        self._legs: list[_Leg] = []
        self._places: list[_Place] = []  # of every step since the session began
        self._first_wanted = 0  # of the steps that are asked for
        self._outputs: dict[int, Tensor] = {}  # of those, by their number

    def run(self, steps: Sequence[Step]) -> Future[list[Tensor]]:
        """Outputs of the blocks for each step, on the CPU: (b, k, W), or (b, 1, W) with `last_only`.

        While one server computes a step, the one before it computes the next. What was run before must be
        done.
        """
        return start_in_background(self._run(steps))

    async def _run(self, steps: Sequence[Step]) -> list[Tensor]:
        attempts = Attempts("generation", self._chain.calls.timeouts.recovery_s)
        if not self._legs:
            spans = await self._route(self._blocks.start, self._blocks.stop, attempts)
            self._legs = [_Leg(span) for span in spans]
        self._outputs = {}
        numbers = []  # of the parts of each step
        for step in steps:
            first = len(self._places)
            for hidden, place in self._parts(step):
                self._places.append(place)
                self._legs[0].put(hidden)
            numbers.append(range(first, len(self._places)))
        self._first_wanted = numbers[0].start
        while failed := await self._advance():
            for leg, error in failed:
                await self._recover(leg, error, attempts)
        outputs = []
        for step, own in zip(steps, numbers, strict=True):
            wanted = own[-1:] if step.last_only else own
            outputs.append(join_tokens([self._outputs[i] for i in wanted]))
        return outputs

    def _parts(self, step: Step) -> Iterator[tuple[Tensor, _Place]]:
        """More tokens than a server takes at once, one part behind the other."""
        rows = step.inputs.shape[0]
        chunk = step.chunk
        for hidden in step.inputs.split(max(1, self._chain.limits.max_batch_tokens // rows), dim=1):
            yield hidden, _Place(chunk, step.last_only)
            chunk = chunk.rows(0, rows, chunk.past + hidden.shape[1])

    async def _route(self, start: int, stop: int, attempts: Attempts) -> list[Span]:
        return await self._chain.router.route(start, stop, timeout_s=attempts.left_s)

    async def _advance(self) -> list[tuple[_Leg, BaseException]]:
        """Lets every leg do what can be done; returns those that failed."""
        for leg in self._legs:
            leg.ended = False
            leg.handed_over.clear()
        neighbours = zip([None, *self._legs], self._legs, [*self._legs[1:], None], strict=False)
        work = [self._work(*legs) for legs in neighbours]
        results = await asyncio.gather(*work, return_exceptions=True)
        return [(leg, error) for leg, error in zip(self._legs, results, strict=True) if error is not None]

    async def _work(self, before: _Leg | None, leg: _Leg, following: _Leg | None) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            if leg.stream is None:
                key = await self._chain.pushed.ensure(leg.span, self._adapter)
                uids = self._chain.router.uids[leg.span.start : leg.span.stop]
                leg.stream = await self._chain.calls.open_generation(
                    leg.span.peer, uids, rows=self._rows, max_length=self._max_length, key=key
                )
            is_last = following is None
            for coroutine in (self._send(before, leg, is_last), self._receive(before, leg, following)):
                tasks.append(asyncio.ensure_future(coroutine))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            leg.ended = True
            if following is not None:
                following.changed.set()

    async def _send(self, before: _Leg | None, leg: _Leg, is_last: bool) -> None:
        assert leg.stream is not None
        while leg.sent < len(self._places):
            step = leg.sent
            if step == len(leg.inputs) or not leg.has_room:
                if not await self._changed(before, leg):
                    return
            elif step in leg.handed_over and before is not None:
                await self._relay_late(before, leg, step)
            else:
                place = self._places[step]
                await leg.stream.send(
                    leg.inputs[step],
                    place.chunk,
                    step=step,
                    last_only=place.last_only and is_last,
                    receivers=self._receivers(leg, step),
                )
                leg.sent += 1
                leg.changed.set()

    async def _relay_late(self, before: _Leg, leg: _Leg, step: int) -> None:
        """Gives the server before some time to bring a step's input, which the client has; then the client
        brings it.
        """
        late = time.monotonic() + _RELAY_AFTER_S + leg.inputs[step].nbytes / LEAST_BYTES_PER_S
        while step in leg.handed_over and leg.done <= step:
            left_s = late - time.monotonic()
            if left_s <= 0:
                leg.handed_over.discard(step)
                self._chain.hand_overs.failed(before.span.peer, leg.span.peer)
            else:
                await leg.change(left_s)

    def _receivers(self, leg: _Leg, step: int) -> list[Receiver]:
        """The servers that a step goes through after this one without the client's help: those that have
        answered earlier steps, and so wait for this one.
        """
        receivers = []
        following = self._legs[self._legs.index(leg) :]
        for giver, taker in pairwise(following):
            is_waiting = 0 < taker.done <= step
            if taker.stream is None or not is_waiting:
                break
            if not self._chain.hand_overs.saves_time(giver.span.peer, taker.span.peer):
                break
            last_only = self._places[step].last_only and taker is following[-1]
            uid = self._chain.router.uids[taker.span.start]
            receivers.append(Receiver(str(taker.span.peer), uid, taker.stream.session, last_only))
            taker.handed_over.add(step)
            taker.changed.set()
        return receivers

    async def _receive(self, before: _Leg | None, leg: _Leg, following: _Leg | None) -> None:
        """Hands outputs to the leg that follows."""
        assert leg.stream is not None
        while leg.done < len(self._places):
            if not leg.will_answer:
                if not await self._changed(before, leg):
                    return
                continue
            step = leg.done
            output = await self._answer(before, leg, self._places[step].last_only and following is None)
            if output is None:
                return
            if following is None and step >= self._first_wanted:
                self._outputs[step] = output
            if following is not None and len(following.inputs) == step:
                following.put(output)
            if following is None and self._chain.checks is not None and len(leg.outputs) == step:
                leg.outputs.append(output)
            leg.done += 1
            leg.sent = max(leg.sent, leg.done)
            leg.changed.set()

    async def _answer(self, before: _Leg | None, leg: _Leg, last_only: bool) -> Tensor | None:
        """The output of the step `done`; None when its input does not come in this round."""
        assert leg.stream is not None
        step = leg.done
        if leg.answer is None:
            receiving = leg.stream.receive(self._legs[0].inputs[step], last_only=last_only)
            leg.answer = asyncio.ensure_future(receiving)
            leg.answer.add_done_callback(lambda _: leg.changed.set())
        deadline: float | None = None  # counts from when the input is known
        while not leg.answer.done():
            if step < len(leg.inputs):
                deadline = deadline or time.monotonic() + self._chain.calls.timeouts.request_s
            elif before is None or before.ended:
                return None
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise leg.stream.too_late(self._chain.calls.timeouts.request_s)
            await leg.change(left_s)
        output = leg.answer.result()
        leg.answer = None
        return output

    async def _changed(self, before: _Leg | None, leg: _Leg) -> bool:
        """Waits until something has changed for a leg; False when nothing more comes in this round."""
        if leg.sent == len(leg.inputs) and (before is None or before.ended):
            return False
        await leg.change()
        return True

    async def _recover(self, leg: _Leg, error: BaseException, attempts: Attempts) -> None:
        await self._drop_stream(leg)
        if isinstance(error, AdapterMissing):
            self._chain.pushed.forget(leg.span, self._adapter)
            attempts.lost_adapter()
        elif isinstance(error, ServerFailed):
            self._chain.router.report_failure(leg.span.peer, error)
            await attempts.pause(error)
            spans = await self._route(leg.span.start, leg.span.stop, attempts)
            # The first replacement gets the lost server's inputs; the others get the outputs of the one
            # before.
            replacements = [_Leg(span, leg.inputs if n == 0 else None) for n, span in enumerate(spans)]
            i = self._legs.index(leg)
            self._check(leg)
            replacements[-1].since = len(self._outputs_of(leg))
            replacements[-1].outputs = leg.outputs
            self._legs[i : i + 1] = replacements
        else:
            raise error

    def _outputs_of(self, leg: _Leg) -> list[Tensor]:
        """Of each step that was answered: (b, k, W), or (b, 1, W) of the last tokens alone."""
        return leg.outputs if leg is self._legs[-1] else self._legs[self._legs.index(leg) + 1].inputs

    def _check(self, leg: _Leg) -> None:
        """Has some rows of what a server answered in all steps so far computed by others."""
        checks = self._chain.checks
        outputs = self._outputs_of(leg)
        boundary = self._chain.calls.boundary
        if checks is None or len(outputs) <= leg.since:
            return
        if boundary is not None and leg.inputs[0].shape[-1] > boundary.hidden_size:
            return  # whole rows hand on other numbers beside hidden states than their tokens one by one
        where = self._tokens_of_rows(len(outputs))
        for row in checks.rows_of_generation(leg.span, self._adapter, self._rows):
            inputs: list[Tensor] = []
            found: list[Tensor] = []
            at: list[int] = []
            count = 0
            for step, i, first in where[row]:
                inputs.append(leg.inputs[step][i, first:])
                count += len(inputs[-1])
                answer = outputs[step][i, first - leg.inputs[step].shape[1] :]
                if step >= leg.since and len(answer):
                    found.append(answer)
                    at.extend(range(count - len(answer), count))
            if found and count <= self._chain.limits.max_batch_tokens:
                joined = torch.cat(inputs), torch.cat(found)
                checks.saw_generated(leg.span, *joined, at, self._adapter, found[0].dtype)

    def _tokens_of_rows(self, steps: int) -> list[list[tuple[int, int, int]]]:
        """For each row that the session began with the step, the row in it, and its first column that is no
        padding, of all its tokens.
        """
        found: list[list[tuple[int, int, int]]] = [[] for _ in range(self._rows)]
        live = list(range(self._rows))
        for step, place in enumerate(self._places[:steps]):
            chunk = place.chunk
            live = [live[row] for row in chunk.keep] or live
            rows, length, _ = self._legs[0].inputs[step].shape
            for i in range(rows):
                first = max(0, chunk.padding[i] - chunk.past) if chunk.padding else 0
                for copy in range(chunk.copies):
                    if first < length:
                        found[live[chunk.first + i * chunk.copies + copy]].append((step, i, first))
        return found

    async def _drop_stream(self, leg: _Leg) -> None:
        stream, answer = leg.stream, leg.answer
        leg.stream = leg.answer = None
        leg.sent = leg.done = 0
        if answer is not None:
            answer.cancel()
            await asyncio.wait([answer])
        if stream is not None:
            await stream.close()

    def close(self) -> None:
        """Frees the servers' caches. Safe to call twice."""
        legs = self._legs
        self._legs = []
        if legs:
            run_in_background(self._close(legs))

    async def _close(self, legs: list[_Leg]) -> None:
        await asyncio.gather(*(self._drop_stream(leg) for leg in legs))

    def __enter__(self) -> GenerationSession:
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        try:
            if kind is None and self._chain.checks is not None:
                run_in_background(self._check_all())
        finally:
            self.close()
        if kind is None:
            self._chain.settle()

    async def _check_all(self) -> None:
        for leg in self._legs:
            self._check(leg)
