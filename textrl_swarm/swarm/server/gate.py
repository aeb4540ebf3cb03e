"""How requests come into a server: from whom, how long their messages may be, and how many at a time.

hivemind reads messages of any length from anyone, and five of them ahead. Here a message is refused from its
length on, the long requests of one client follow each other, and all of them together have a bound. Knows
nothing about what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError

from textrl_swarm.errors import ShapeError, TextRLSwarmError
from textrl_swarm.swarm.access import Door
from textrl_swarm.swarm.protocol import JOINING, server_busy
from textrl_swarm.swarm.server.accounts import CLIENT

logger = logging.getLogger(__name__)

PART_BYTES = 2 * DEFAULT_MAX_MSG_SIZE  # of a message that has a part of a tensor, and what is said of it
_MAX_OPEN = 32  # streams of a client in one process that stay open from request to request
_MAX_CALLS = 64  # of a client in one process, beside streams
_MAX_WAITING = 256  # whose requests take turns
_GREETING_BYTES = 1024
_GREETING_S = 30.0
_HEARS_S = 1.0
_TELL_AGAIN_S = 60.0
_MAX_TOLD = 1000


@dataclass(frozen=True)
class StreamLimits:
    """Of one kind of RPC."""

    message_bytes: int = PART_BYTES
    """Of one message; what is more than PART_BYTES takes its turn."""

    request_bytes: int | None = None
    """Of all messages together, when they make one request, which takes its turn as a whole; None = any."""


@dataclass(eq=False)
class _Waiting:
    client: str
    size_bytes: int
    granted: asyncio.Future[None]


class Turns:
    """Bytes that requests have in this process, at most so many of all clients and of each. The others wait,
    in the order in which they came.

    A request that is larger than a client's part takes its turn when the client has no other.
    """

    def __init__(self, max_bytes: int, max_bytes_per_client: int):
        self._max_bytes = max_bytes
        self._max_bytes_per_client = max_bytes_per_client
        self._taken: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []

    @property
    def taken_bytes(self) -> int:
        """Of all clients now."""
        return sum(self._taken.values())

    async def take(self, client: str, size_bytes: int) -> None:
        """Waits until they are free. `give_back` ends it."""
        waiting = _Waiting(client, size_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._grant()
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._grant()  # those behind it
            else:  # granted at the same moment
                self.give_back(client, size_bytes)
            raise

    def give_back(self, client: str, size_bytes: int) -> None:
        """What `take` took."""
        self._taken[client] -= size_bytes
        if self._taken[client] <= 0:
            del self._taken[client]
        self._grant()

    def _grant(self) -> None:
        for waiting in list(self._waiting):
            own, every, size = self._taken[waiting.client], self.taken_bytes, waiting.size_bytes
            if own > 0 and own + size > self._max_bytes_per_client:
                continue
            if every > 0 and every + size > self._max_bytes:
                break  # else large ones would wait for ever
            self._waiting.remove(waiting)
            self._taken[waiting.client] += size
            if not waiting.granted.done():
                waiting.granted.set_result(None)

    @asynccontextmanager
    async def taken(self, client: str, size_bytes: int) -> AsyncIterator[None]:
        """Inside, they are taken."""
        await self.take(client, size_bytes)
        try:
            yield
        finally:
            self.give_back(client, size_bytes)


class Gate:
    """Stands in the place of hivemind's P2P while a server registers its RPCs there.

    Args:
        p2p: of this process.
        door: who may come in.
        turns: of this process.
        limits: name of an RPC -> those of its stream; all others have the default.
    """

    def __init__(self, p2p: P2P, door: Door, turns: Turns, limits: Mapping[str, StreamLimits]):
        self._p2p = p2p
        self._door = door
        self._turns = turns
        self._limits = limits
        self._open: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._told: dict[PeerID, float] = {}

    async def add_protobuf_handler(
        self,
        name: str,
        handler: Callable[..., Any],
        input_protobuf_type: type,
        *,
        stream_input: bool = False,
        stream_output: bool = False,
        balanced: bool = False,
    ) -> None:
        """As P2P's."""
        if not stream_input:
            assert not stream_output, "no RPC answers one message with many"
            await self._p2p.add_protobuf_handler(
                name, self._guarded_call(handler), input_protobuf_type, balanced=balanced
            )
            return
        method = name.rpartition(".")[2]
        limits = self._limits.get(method, StreamLimits())

        async def handle(info: StreamInfo, reader: Any, writer: Any) -> None:
            context = P2PContext(handle_name=name, local_id=self._p2p.peer_id, remote_id=info.peer_id)
            with closing(writer):
                try:
                    await self._serve(handler, context, limits, reader, writer)
                except (ConnectionError, asyncio.IncompleteReadError):
                    pass  # the client went away
                except Exception as error:
                    self._tell(info.peer_id, error)
                    with contextlib.suppress(Exception):  # whoever was refused may be gone
                        await P2P.send_protobuf(RPCError(message=str(error) or type(error).__name__), writer)
                        await asyncio.wait_for(_until_gone(reader), _HEARS_S)

        await self._p2p.add_binary_stream_handler(name, handle, balanced=balanced)

    def _guarded_call(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: P2PContext) -> Any:
            client = str(context.remote_id)
            try:
                self._door.admit(context.remote_id)
                code = ""
                if isinstance(request, runtime_pb2.ExpertUID):  # others have no place for a code
                    uid, _, code = request.uid.partition(JOINING)
                    request = runtime_pb2.ExpertUID(uid=uid)
                self._door.require_code(context.remote_id, code)
                if self._calls[client] >= _MAX_CALLS:
                    raise server_busy(f"{_MAX_CALLS} calls of this client wait for their answers")
            except TextRLSwarmError as error:
                self._tell(context.remote_id, error)
                raise
            CLIENT.set(client)
            with _counted(self._calls, client):
                return await handler(request, context)

        return call

    def _tell(self, peer: PeerID, error: Exception) -> None:
        """One line for a peer that is refused, however often it comes."""
        now = time.monotonic()
        if now - self._told.get(peer, -_TELL_AGAIN_S) >= _TELL_AGAIN_S:
            if len(self._told) >= _MAX_TOLD:
                self._told.clear()
            self._told[peer] = now
            logger.warning("a request of ...%s was refused: %s", str(peer)[-6:], str(error) or repr(error))

    async def _serve(
        self, handler: Callable[..., Any], context: P2PContext, limits: StreamLimits, reader: Any, writer: Any
    ) -> None:
        peer, client = context.remote_id, str(context.remote_id)
        self._door.admit(peer)
        most = _MAX_OPEN if limits.request_bytes is None else _MAX_WAITING
        if self._open[client] >= most:
            raise server_busy(f"this client has {most} open streams")
        CLIENT.set(client)
        with _counted(self._open, client):
            if self._door.membership.has_secret:
                limit = StreamLimits(message_bytes=_GREETING_BYTES)
                greeting, _ = await asyncio.wait_for(_Arriving(reader, limit).next(), _GREETING_S)
                before, _, code = ("" if greeting is None else greeting.uid).partition(JOINING)
                self._door.require_code(peer, "" if before else code)
            async with AsyncExitStack() as until_the_end:
                if limits.request_bytes is not None:
                    turn = self._turns.taken(client, limits.request_bytes)
                    await until_the_end.enter_async_context(turn)
                arriving = _Arriving(reader, limits, self._turns, client)
                until_the_end.callback(arriving.close)
                await _answer(handler, context, arriving, writer)


async def _answer(handler: Callable[..., Any], context: P2PContext, arriving: _Arriving, writer: Any) -> None:
    """Until the handler is done, or the client is gone, or sends what it must not."""

    async def respond() -> None:
        async with aclosing(handler(arriving.messages(), context)) as responses:
            async for response in responses:
                await P2P.send_protobuf(response, writer)

    responding = asyncio.ensure_future(respond())
    reading = asyncio.ensure_future(arriving.read())
    try:
        await asyncio.wait({responding, reading}, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            reading.result()
        await responding
    finally:
        for task in (responding, reading):
            task.cancel()
        await asyncio.wait({responding, reading})


class _Arriving:
    """The messages of a stream: one is read ahead, which tells that the client is still there.

    Args:
        turns, client: for messages of more than PART_BYTES.
    """

    def __init__(self, reader: Any, limits: StreamLimits, turns: Turns | None = None, client: str = ""):
        self._reader = reader
        self._limits = limits
        self._turns = turns
        self._client = client
        self._read_bytes = 0
        self._taken_bytes = 0
        self._ready: asyncio.Queue[tuple[runtime_pb2.ExpertRequest | None, int]] = asyncio.Queue(maxsize=1)

    async def read(self) -> None:
        """Until the end of the stream.

        Raises:
            ShapeError: a message, or all of them, are too large; before they are read.
            asyncio.IncompleteReadError: the client is gone.
        """
        while True:
            arrived = await self.next()
            await self._ready.put(arrived)
            if arrived[0] is None:
                return

    async def next(self) -> tuple[runtime_pb2.ExpertRequest | None, int]:
        """The next message, as `read`, and the bytes of its turn; None at the end of the stream."""
        marker = await self._reader.readexactly(1)
        size = int.from_bytes(await self._reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
        self._read_bytes += size
        if size > self._limits.message_bytes:
            raise ShapeError(
                f"a message of {size} bytes, where at most {self._limits.message_bytes} are allowed"
            )
        if self._limits.request_bytes is not None and self._read_bytes > self._limits.request_bytes:
            raise ShapeError(f"a request of more than {self._limits.request_bytes} bytes (--max_batch_size)")
        turn_bytes = 0
        if size > PART_BYTES and self._limits.request_bytes is None and self._turns is not None:
            turn_bytes = size
            await self._turns.take(self._client, turn_bytes)
            self._taken_bytes += turn_bytes
        raw = await self._reader.readexactly(size)
        is_message = marker == P2P.MESSAGE_MARKER
        return runtime_pb2.ExpertRequest.FromString(raw) if is_message else None, turn_bytes

    async def messages(self) -> AsyncGenerator[runtime_pb2.ExpertRequest, None]:
        """What `read` reads; a message is done with when the next is asked for."""
        is_first = True
        while True:
            message, turn_bytes = await self._ready.get()
            if message is None:
                return
            if not (is_first and message.uid.startswith(JOINING)):  # where no secret is asked for
                yield message
            is_first = False
            del message
            self._give_back(turn_bytes)

    def _give_back(self, size: int) -> None:
        if size and self._turns is not None:
            self._taken_bytes -= size
            self._turns.give_back(self._client, size)

    def close(self) -> None:
        """Gives back what the stream took."""
        self._give_back(self._taken_bytes)


async def _until_gone(reader: Any) -> None:
    """A stream that is closed while more arrives is reset, and the client does not hear why."""
    while await reader.read(1 << 16):
        pass


@contextlib.contextmanager
def _counted(counts: Counter[str], client: str) -> Iterator[None]:
    counts[client] += 1
    try:
        yield
    finally:
        counts[client] -= 1
        if not counts[client]:
            del counts[client]
