"""Streams to servers that stay open for one request after the other, as clients and other servers open them.

A new stream costs round trips: its protocol is agreed on, and its window of unconfirmed bytes grows from
256 KiB on. All requests to a server share one, because streams beside each other share the bandwidth: of
eight micro-batches none would arrive before the last is nearly there. Knows nothing about what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from torch import Tensor

from textrl_swarm.swarm.access import Membership
from textrl_swarm.swarm.protocol import ALIVE, CLOSING, CODEC, ENDING, NUMBER, SILENCE_S
from textrl_swarm.swarm.streaming import decoded, tensor_parts, whole_tensor

# What says nothing but that a connection is gone.
BROKEN = (P2PDaemonError, OSError, EOFError, asyncio.IncompleteReadError)

_CLOSE_S = 2.0
_ANY = 1 << 40  # numbers

IsConnected: TypeAlias = Callable[[], Awaitable[bool]]
Result = TypeVar("Result")

_IDLE_S = 60.0  # after which a stream is not used again; the server ends it after some minutes


class Silence(EOFError):
    """Of a server that was killed, frozen or cut off, as far as one can tell."""


async def within(seconds: float, awaited: Awaitable[Result], what: str) -> Result:
    """The result, or an asyncio.TimeoutError that says what did not come, and for how long."""
    try:
        return await asyncio.wait_for(awaited, seconds)
    except asyncio.TimeoutError as error:
        if str(error):
            raise
        raise asyncio.TimeoutError(f"no {what} within {seconds:.0f} s") from None


async def is_connected(p2p: P2P, peer: PeerID) -> bool:
    """Whether this process's daemon has a connection to a peer; a frozen one may keep it."""
    return any(other.peer_id == peer for other in await p2p.list_peers())


class OpenStream:
    """An RPC whose requests and answers are streams; made by `open`.

    Attributes:
        codec: of hidden states in the next request and its answer, see swarm/codec.py; None = as they are.
        received: bytes of tensors so far.
    """

    def __init__(
        self, requests: asyncio.Queue[runtime_pb2.ExpertRequest], answers: Any, is_connected: IsConnected
    ):
        self._requests = requests
        self._stream = answers
        self._answers = _heard(answers, is_connected)
        self.codec: str | None = None
        self.received = 0
        self._has_failed = False  # the server says nothing more

    @staticmethod
    async def open(
        method: Any,
        timeout_s: float,
        is_connected: IsConnected,
        greeting: runtime_pb2.ExpertRequest | None = None,
    ) -> OpenStream:
        """Calls an RPC of a stub; a greeting is the first message."""
        requests: asyncio.Queue[runtime_pb2.ExpertRequest] = asyncio.Queue()
        if greeting is not None:
            requests.put_nowait(greeting)

        async def feed() -> AsyncIterator[runtime_pb2.ExpertRequest]:
            while True:
                request = await requests.get()
                yield request
                if not request.uid:
                    return

        answers = await within(timeout_s, method(feed()), "connection")
        return OpenStream(requests, answers, is_connected)

    async def send(self, uid: str, tensors: Sequence[Tensor], metadata: Mapping[str, Any]) -> int:
        """A request, in messages of a size that hivemind carries; the first of them has the metadata.

        Returns:
            The bytes of the tensors.
        """
        return self.put(uid, await packed_parts(tensors, self.codec), len(tensors), metadata, self.codec)

    def put(
        self,
        uid: str,
        parts: Sequence[runtime_pb2.Tensor],
        count: int,
        metadata: Mapping[str, Any],
        codec: str | None,
    ) -> int:
        """The same for the parts of `count` tensors, at once, so that no other request comes in between."""
        packed = MSGPackSerializer.dumps({**metadata, "tensors": count, CODEC: codec})
        if not parts:
            self._requests.put_nowait(runtime_pb2.ExpertRequest(uid=uid, metadata=packed))
        for part in parts:
            self._requests.put_nowait(runtime_pb2.ExpertRequest(uid=uid, tensors=[part], metadata=packed))
            packed = b""
        return sum(len(part.buffer) for part in parts)

    async def next(
        self, max_numbers: Callable[[Mapping[str, Any]], int]
    ) -> tuple[Tensor | None, Mapping[str, Any]]:
        """The next tensor of an answer, encoded as it travels, or None at its end; and what is told with it.

        Args:
            max_numbers: most numbers of a tensor with which this is told.

        Raises:
            Silence: the server gave no sign of life for SILENCE_S seconds, or is no longer connected.
            EOFError: the connection broke off.
            ShapeError: a tensor has more.
        """
        try:
            message = await anext(self._answers)
        except StopAsyncIteration:
            raise EOFError("the connection broke off in the middle of the answer") from None
        told = MSGPackSerializer.loads(message.metadata) if message.metadata else {}
        if ENDING in told:
            return None, told
        tensor = await whole_tensor(message, self._answers, max_numbers(told))
        self.received += tensor.nbytes
        return tensor, told

    async def receive(self, max_numbers: int) -> Tensor | None:
        """The next tensor of the only answer of a stream; None at its end.

        Raises:
            P2PHandlerError: it ended with an error.
            EOFError, ShapeError: as `next`.
        """
        tensor, told = await self.next(lambda _: max_numbers)
        if tensor is not None:
            return decoded(tensor, self.codec)
        if CLOSING in told and NUMBER not in told:
            raise Silence(told[ENDING])
        if told[ENDING]:
            self._has_failed = True
            raise P2PHandlerError(told[ENDING])
        return None

    async def close(self) -> None:
        """Tells the server that nothing more comes; never raises."""

        async def drain() -> None:
            while (await self.next(lambda _: _ANY))[0] is not None:
                pass

        self.end()
        with contextlib.suppress(Exception):  # the server may be gone
            if not self._has_failed:
                await asyncio.wait_for(drain(), _CLOSE_S)
        await self.drop()

    def end(self) -> None:
        """Tells the server that nothing more comes."""
        self._requests.put_nowait(runtime_pb2.ExpertRequest())

    async def drop(self) -> None:
        """Waits for nothing more; never raises."""
        for answers in (self._answers, self._stream):
            with contextlib.suppress(Exception):
                await answers.aclose()


async def _heard(stream: AsyncIterator[Any], is_connected: IsConnected) -> AsyncGenerator[Any, None]:
    """Messages of a stream without the signs of life between them."""
    while True:
        arriving = asyncio.ensure_future(anext(stream))
        try:
            # Seconds in which this process ran: it may have been stopped itself.
            for _ in range(SILENCE_S):
                if (await asyncio.wait([arriving], timeout=1))[0]:
                    break
                if not await is_connected():
                    raise Silence("the connection is closed")
            else:
                raise Silence(f"no sign of life for {SILENCE_S} s")
        finally:
            arriving.cancel()  # if it has not arrived
        try:
            message = arriving.result()
        except StopAsyncIteration:
            return
        if not message.metadata or ALIVE not in MSGPackSerializer.loads(message.metadata):
            yield message


async def packed_parts(tensors: Sequence[Tensor], codec: str | None) -> list[runtime_pb2.Tensor]:
    """The parts of all of them, in their order; computed in another thread."""

    def pack() -> list[runtime_pb2.Tensor]:
        return [part for tensor in tensors for part in tensor_parts(tensor, codec)]

    return await asyncio.get_running_loop().run_in_executor(None, pack)


@dataclass(frozen=True)
class Answer:
    """To a request."""

    tensors: list[Tensor]

    told: Mapping[str, Any]
    """With its ending."""

    sent: int
    """Bytes of the request's tensors."""

    received: int
    """Bytes of the answer's."""


@dataclass
class _Asked:
    """A request that is not answered yet."""

    codec: str | None
    max_numbers: int
    ending: asyncio.Future[Mapping[str, Any]]
    tensors: list[Tensor] = field(default_factory=list)
    received: int = 0


class _Requests:
    """Requests to one server, over one stream: sent one after the other, so that the first arrives while the
    others are still on their way, and answered in any order.
    """

    def __init__(self, stream: OpenStream):
        self._stream = stream
        self._asked: dict[int, _Asked] = {}
        self._count = 0
        self.is_over = False
        self.used_at = time.monotonic()
        self._reading = asyncio.ensure_future(self._read())

    @property
    def is_stale(self) -> bool:
        """Whether the stream is over, or was not used for so long that the server may have ended it."""
        return self.is_over or (not self._asked and time.monotonic() - self.used_at >= _IDLE_S)

    async def ask(
        self,
        uid: str,
        tensors: Sequence[Tensor],
        metadata: Mapping[str, Any],
        codec: str | None,
        max_numbers: int,
    ) -> Answer:
        """One request. Raises as `OpenStream.receive`."""
        parts = await packed_parts(tensors, codec)
        if self.is_over:
            raise EOFError("the connection broke off")
        asked = _Asked(codec, max_numbers, asyncio.get_running_loop().create_future())
        number, self._count = self._count, self._count + 1
        self._asked[number] = asked
        sent = self._stream.put(uid, parts, len(tensors), metadata, codec)
        try:
            told = await asked.ending
        finally:
            self.used_at = time.monotonic()
            del self._asked[number]
        return Answer(asked.tensors, told, sent, asked.received)

    async def _read(self) -> None:
        error: Exception = EOFError("the connection broke off")
        try:
            while True:
                tensor, told = await self._stream.next(self._most)
                asked = self._asked.get(told.get(NUMBER, -1))
                if asked is not None and tensor is not None:
                    asked.received += tensor.nbytes
                    asked.tensors.append(decoded(tensor, asked.codec))
                elif asked is not None and not asked.ending.done():
                    if told[ENDING]:
                        asked.ending.set_exception(P2PHandlerError(told[ENDING]))
                    else:
                        asked.ending.set_result(told)
                if told.get(CLOSING):
                    if NUMBER not in told:
                        error = Silence(told[ENDING])
                    return
        except Exception as found:
            error = found
        finally:
            self.is_over = True
            for asked in self._asked.values():
                if not asked.ending.done():
                    asked.ending.set_exception(error)

    def _most(self, told: Mapping[str, Any]) -> int:
        asked = self._asked.get(told.get(NUMBER, -1))
        return _ANY if asked is None else asked.max_numbers  # nobody waits for it any more

    async def close(self) -> None:
        """Tells the server that nothing more comes; never raises."""
        self._stream.end()
        await asyncio.wait([self._reading], timeout=_CLOSE_S)
        self._reading.cancel()
        await asyncio.wait([self._reading])
        await self._stream.drop()


async def _open(
    method: Any,
    timeout_s: float,
    is_connected: IsConnected,
    greeting: runtime_pb2.ExpertRequest | None,
) -> _Requests:
    return _Requests(await OpenStream.open(method, timeout_s, is_connected, greeting))


def _is_stale(opened: asyncio.Task[_Requests]) -> bool:
    return opened.exception() is not None or opened.result().is_stale


async def _close(opening: asyncio.Task[_Requests]) -> None:
    with contextlib.suppress(Exception):  # it was never open
        await (await opening).close()


class StreamPool:
    """The streams for requests, one for each server.

    Args:
        p2p: that of this process.
        membership: what streams begin with.
    """

    def __init__(self, p2p: P2P, membership: Membership):
        self._p2p = p2p
        self._membership = membership
        self._open: dict[PeerID, asyncio.Task[_Requests]] = {}
        self._closing: set[asyncio.Future[None]] = set()

    async def call(
        self,
        peer: PeerID,
        method: Any,
        uid: str,
        tensors: Sequence[Tensor],
        metadata: Mapping[str, Any],
        *,
        connect_s: float,
        codec: str | None = None,
        max_numbers: int = 0,
    ) -> Answer:
        """One request over the open stream; over a new one when there is none, or it broke.

        Args:
            method: of the server's stub.
            codec: of hidden states, there and back.
            max_numbers: of a tensor of the answer.

        Raises:
            As `OpenStream.receive`, and what hivemind raises when a server cannot be reached.
        """
        while True:
            opening = self._open.get(peer)
            if opening is not None and opening.done() and _is_stale(opening):
                self.forget(peer)
                opening = None
            is_new = opening is None
            if opening is None:
                opening = self._open[peer] = asyncio.ensure_future(
                    _open(
                        method,
                        connect_s,
                        partial(is_connected, self._p2p, peer),
                        self._membership.greeting(peer),
                    )
                )
            try:
                requests = await asyncio.shield(opening)  # others wait for it too
            except Exception:
                if self._open.get(peer) is opening:
                    del self._open[peer]
                raise
            try:
                return await requests.ask(uid, tensors, metadata, codec, max_numbers)
            except BROKEN as error:
                if self._open.get(peer) is opening:
                    self.forget(peer)
                if is_new or isinstance(error, Silence):
                    raise

    def forget(self, peer: PeerID) -> None:
        """Ends the stream to a server while others go on; whoever waits there gets an error."""
        opening = self._open.pop(peer, None)
        if opening is not None:
            closing = asyncio.ensure_future(_close(opening))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Ends all of them, at most within seconds; never raises."""
        for peer in list(self._open):
            self.forget(peer)
        await asyncio.gather(*self._closing)
