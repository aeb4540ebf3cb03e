"""Streams to servers that stay open for one request after the other, as clients and other servers open them.

A new stream costs round trips: its protocol is agreed on, and its window of unconfirmed bytes grows from
256 KiB on. Knows nothing about what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from torch import Tensor

from textrl_swarm.swarm.protocol import CODEC, ENDING
from textrl_swarm.swarm.streaming import decoded, tensor_parts, whole_tensor

# What says nothing but that a connection is gone.
BROKEN = (P2PDaemonError, OSError, EOFError, asyncio.IncompleteReadError)

_CLOSE_S = 2.0
_IDLE_S = 60.0  # after which a stream is not used again; the server ends it after some minutes


class OpenStream:
    """An RPC whose requests and answers are streams; made by `open`.

    Attributes:
        codec: of hidden states in the next request and its answer, see swarm/codec.py; None = as they are.
        received: bytes of tensors so far.
        told: what came with the ending of the last answer.
    """

    def __init__(self, requests: asyncio.Queue[runtime_pb2.ExpertRequest], answers: Any):
        self._requests = requests
        self._answers = answers
        self.codec: str | None = None
        self.received = 0
        self.told: Mapping[str, Any] = {}
        self._has_failed = False  # the server says nothing more
        self.used_at = time.monotonic()

    @staticmethod
    async def open(method: Any, timeout_s: float) -> OpenStream:
        """Calls an RPC of a stub."""
        requests: asyncio.Queue[runtime_pb2.ExpertRequest] = asyncio.Queue()

        async def feed() -> AsyncIterator[runtime_pb2.ExpertRequest]:
            while True:
                request = await requests.get()
                yield request
                if not request.uid:
                    return

        return OpenStream(requests, await asyncio.wait_for(method(feed()), timeout_s))

    async def send(self, uid: str, tensors: Sequence[Tensor], metadata: Mapping[str, Any]) -> int:
        """A request, in messages of a size that hivemind carries; the first of them has the metadata.

        Returns:
            The bytes of the tensors.
        """
        packed = MSGPackSerializer.dumps({**metadata, "tensors": len(tensors), CODEC: self.codec})
        loop = asyncio.get_running_loop()
        if not tensors:
            self._requests.put_nowait(runtime_pb2.ExpertRequest(uid=uid, metadata=packed))
        sent = 0
        for tensor in tensors:
            for part in await loop.run_in_executor(None, tensor_parts, tensor, self.codec):
                self._requests.put_nowait(runtime_pb2.ExpertRequest(uid=uid, tensors=[part], metadata=packed))
                sent += len(part.buffer)
                packed = b""
        return sent

    async def receive(self, max_numbers: int) -> Tensor | None:
        """The next tensor of an answer; None at its end. `received` counts its bytes.

        Raises:
            P2PHandlerError: the answer ended with an error.
            EOFError: the connection broke off.
            ShapeError: more numbers than `max_numbers`.
        """
        try:
            message = await anext(self._answers)
        except StopAsyncIteration:
            raise EOFError("the connection broke off in the middle of the answer") from None
        told = _metadata_of(message)
        ending = told.get(ENDING)
        if ending is None:
            tensor = await whole_tensor(message, self._answers, max_numbers)
            self.received += tensor.nbytes
            return decoded(tensor, self.codec)
        self.used_at = time.monotonic()
        if ending != "":
            self._has_failed = True
            raise P2PHandlerError(ending)
        self.told = told
        return None

    async def receive_all(self, max_numbers: int) -> list[Tensor]:
        """All tensors of an answer. Raises as `receive`."""
        tensors = []
        while (tensor := await self.receive(max_numbers)) is not None:
            tensors.append(tensor)
        return tensors

    async def close(self) -> None:
        """Tells the server that nothing more comes; never raises."""

        async def drain() -> None:
            async for message in self._answers:
                if ENDING in _metadata_of(message):
                    return

        self._requests.put_nowait(runtime_pb2.ExpertRequest())
        with contextlib.suppress(Exception):  # the server may be gone
            if not self._has_failed:
                await asyncio.wait_for(drain(), _CLOSE_S)
        with contextlib.suppress(Exception):
            await self._answers.aclose()


def _metadata_of(message: runtime_pb2.ExpertResponse) -> Mapping[str, Any]:
    """Of an answer's last message: how it ended under ENDING; "" = it is complete, else the error."""
    return MSGPackSerializer.loads(message.metadata) if message.metadata else {}


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


class StreamPool:
    """Streams that nobody uses at the moment, by server."""

    def __init__(self) -> None:
        self._idle: defaultdict[PeerID, list[OpenStream]] = defaultdict(list)
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
        """One request over an open stream; over a new one when there is none, or it broke while it was idle.

        Args:
            method: of the server's stub.
            codec: of hidden states, there and back.
            max_numbers: of a tensor of the answer.

        Raises:
            As `OpenStream.receive`, and what hivemind raises when a server cannot be reached.
        """
        stream = self.take(peer)
        was_idle = stream is not None
        if stream is None:
            stream = await OpenStream.open(method, connect_s)
        stream.codec = codec
        before = stream.received
        try:
            sent = await stream.send(uid, tensors, metadata)
            answer = await stream.receive_all(max_numbers)
        except BaseException as error:
            self.discard(stream)
            if was_idle and isinstance(error, BROKEN):  # as an idle one may be
                return await self.call(
                    peer, method, uid, tensors, metadata,
                    connect_s=connect_s, codec=codec, max_numbers=max_numbers,
                )  # fmt: skip
            raise
        told = stream.told
        self.give_back(peer, stream)
        return Answer(answer, told, sent, stream.received - before)

    def take(self, peer: PeerID) -> OpenStream | None:
        """The one that was used last, whose window is the widest; None = there is none."""
        idle = self._idle[peer]
        while idle:
            stream = idle.pop()
            if time.monotonic() - stream.used_at < _IDLE_S:
                return stream
            self.discard(stream)
        return None

    def give_back(self, peer: PeerID, stream: OpenStream) -> None:
        """For the next request."""
        self._idle[peer].append(stream)

    def discard(self, stream: OpenStream) -> None:
        """Ends a stream while others go on."""
        closing = asyncio.ensure_future(stream.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Ends all of them, at most within seconds; never raises."""
        for idle in self._idle.values():
            for stream in idle:
                self.discard(stream)
        self._idle.clear()
        await asyncio.gather(*self._closing)
