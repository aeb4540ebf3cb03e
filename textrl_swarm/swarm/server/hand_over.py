"""Outputs that go from one server straight to the next: given away here, and awaited there.

A step through S servers then takes S + 1 trips over the network; when the client relays, it takes 2 S. The
client is answered as well, and relays what did not arrive: losing a hand-over costs time only. Knows nothing
about what is computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import astuple
from typing import Any, Protocol

import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import P2P, PeerID
from torch import Tensor

from textrl_swarm.errors import ShapeError
from textrl_swarm.swarm.access import Membership
from textrl_swarm.swarm.protocol import LEAST_BYTES_PER_S, Receiver
from textrl_swarm.swarm.streams import StreamPool, within
from textrl_swarm.swarm.stub import ServerStub

logger = logging.getLogger(__name__)

_GIVE_S = 5.0  # seconds for a hand-over, until the next server has it, and those for its bytes
_CONNECT_S = 3.0
_EXPECTED_S = 5.0  # how long what was handed over waits for the request that wants it
_MAX_EARLY = 1024  # steps that arrived before the one that comes next


class HandOvers:
    """Gives outputs to other servers, from one handler process.

    Args:
        p2p: of that process.
        membership: of this server.
    """

    def __init__(self, p2p: P2P, membership: Membership):
        self._p2p = p2p
        self._streams = StreamPool(p2p, membership)
        self._running: set[asyncio.Task[bool]] = set()

    def start(
        self, output: Tensor, request: Mapping[str, Any], codec: str | None
    ) -> asyncio.Task[bool] | None:
        """Sends an output (b, k, W) on its way when the metadata of a request says to whom.

        Returns:
            Whether it arrived; None = nobody is named.

        Raises:
            ShapeError: malformed metadata.
        """
        receivers = Receiver.decode_all(request.get("hand_over"))
        if not receivers:
            return None
        receiver = receivers[0]
        try:
            peer = PeerID.from_base58(receiver.peer)
        except ValueError as error:
            raise ShapeError(f"{receiver.peer!r} is not the id of a server") from error
        facts = {
            "step": request.get("step"),
            "chunk": request.get("chunk"),
            "last_only": receiver.last_only,
            "hand_over": [astuple(following) for following in receivers[1:]],
        }
        metadata = {"request": "hand_over", "session": receiver.session, "facts": facts}
        task = asyncio.ensure_future(self._give(peer, receiver.uid, output, metadata, codec))
        self._running.add(task)  # nobody else may hold it
        task.add_done_callback(self._running.discard)
        return task

    async def _give(
        self, peer: PeerID, uid: str, output: Tensor, metadata: Mapping[str, Any], codec: str | None
    ) -> bool:
        if not torch.isfinite(output).all():
            return False  # the client is to see who computed it
        method = ServerStub.get_stub(self._p2p, peer).rpc_requests
        call = self._streams.call(peer, method, uid, [output], metadata, connect_s=_CONNECT_S, codec=codec)
        try:
            await asyncio.wait_for(call, _GIVE_S + output.nbytes / LEAST_BYTES_PER_S)
        except Exception as error:  # whatever it is, the client notices
            logger.info("a hand-over to %s failed: %s", peer, str(error) or type(error).__name__)
            if isinstance(error, asyncio.TimeoutError):
                self._streams.forget(peer)
            return False
        return True


class Mailboxes(Protocol):
    """What petals' handlers have for outputs that arrive in a process other than the one that waits."""

    _session_handlers: dict[str, int]

    def _put_into_session_queue(self, session_id: str, request: Any) -> None: ...

    async def _get_from_session_queue(self, session_id: str) -> Any: ...


async def deliver(mailboxes: Mailboxes, session: str, output: Tensor, facts: Mapping[str, Any]) -> None:
    """Puts an output where a request waits for it, or will soon.

    Raises:
        ShapeError: no request waits for it.
    """
    until = time.monotonic() + _EXPECTED_S
    while session not in mailboxes._session_handlers:  # other processes tell it of their sessions
        if time.monotonic() > until:
            raise ShapeError(f"nobody waits for an output of {session!r} here")
        await asyncio.sleep(0.01)
    # As bytes: shared memory of tensors would outlive processes that end.
    mailboxes._put_into_session_queue(session, (serialize_torch_tensor(output), dict(facts)))


async def delivered(mailboxes: Mailboxes, session: str) -> AsyncIterator[tuple[Tensor, dict[str, Any]]]:
    """Outputs for a session of this process, and what was told beside them, as they come."""
    while (arrived := await mailboxes._get_from_session_queue(session)) is not None:
        yield deserialize_torch_tensor(arrived[0]), arrived[1]


async def in_order(
    from_client: AsyncIterator[tuple[Tensor, dict[str, Any]]],
    from_server: AsyncIterator[tuple[Tensor, dict[str, Any]]] | None,
    timeout_s: float,
) -> AsyncGenerator[tuple[Tensor, dict[str, Any]], None]:
    """Steps by their number, `step` in what is told beside them, each once, whoever brings them first; until
    the client has no more. Of a client that does not number them they come as they are.

    Raises:
        asyncio.TimeoutError: none came for so many seconds.
    """
    arrived: asyncio.Queue[tuple[Tensor, dict[str, Any]] | Exception | None] = asyncio.Queue(maxsize=1)

    async def feed(source: AsyncIterator[tuple[Tensor, dict[str, Any]]], is_clients: bool) -> None:
        ending: Exception | None = None
        try:
            async for step in source:
                await arrived.put(step)
        except Exception as error:
            ending = error
        if is_clients:
            await arrived.put(ending)

    feeding = [asyncio.ensure_future(feed(from_client, True))]
    if from_server is not None:
        feeding.append(asyncio.ensure_future(feed(from_server, False)))
    early: dict[int, tuple[Tensor, dict[str, Any]]] = {}
    number = 0
    try:
        while True:
            step = await within(timeout_s, arrived.get(), "step")
            if isinstance(step, Exception):
                raise step
            if step is None:
                return
            at = step[1].get("step", number)
            if not isinstance(at, int) or at >= number + _MAX_EARLY:
                raise ShapeError(f"step {at!r} of a generation came instead of step {number}")
            if at >= number:
                early[at] = step
            while number in early:
                yield early.pop(number)
                number += 1
    finally:
        for task in feeding:
            task.cancel()
        await asyncio.wait(feeding)
