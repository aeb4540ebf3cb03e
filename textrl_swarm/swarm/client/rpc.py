"""Calls to one server: each with a deadline, its bytes counted, its failures translated into errors of ours.

Runs inside hivemind's event loop thread. Knows nothing about routes, retries or training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from torch import Tensor

from textrl_swarm.config import Timeouts
from textrl_swarm.decoders.boundary import Boundary
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.errors import AdapterMissing, AdapterRejected, ServerFailed, ShapeError
from textrl_swarm.swarm.client.streams import OpenStream, StreamPool
from textrl_swarm.swarm.protocol import (
    INFO_KEY,
    WEIGHTS,
    AdapterSnapshot,
    ServedWeights,
    error_from_wire,
    weights_key,
)
from textrl_swarm.swarm.stub import ServerStub
from textrl_swarm.swarm.traffic import Traffic

_MAX_GROWTH = 8  # of a block's output over its input: what else crosses the boundary
_ANY = 1 << 40  # numbers: gradients are as large as the adapter


# What hivemind, the network and unpacking a stranger's answer raise.
_FOREIGN = (
    P2PHandlerError,
    P2PDaemonError,
    OSError,
    EOFError,
    asyncio.TimeoutError,
    asyncio.IncompleteReadError,
    StopAsyncIteration,
    ValueError,
    RuntimeError,  # torch's, when a part of a tensor is missing
)
# Those of them that say nothing but that a connection is gone.
_BROKEN = (P2PDaemonError, OSError, EOFError, asyncio.IncompleteReadError)


def short_id(peer: PeerID) -> str:
    """How messages name a server."""
    return f"…{str(peer)[-6:]}"


def _translated(error: Exception, peer: PeerID, what: str) -> AdapterMissing | AdapterRejected | ServerFailed:
    text = str(error)
    known = error_from_wire(text, short_id(peer))
    if known is not None:
        return known
    message = f"{what} on server {short_id(peer)} failed: {text or type(error).__name__}"
    return ServerFailed(message, answered=isinstance(error, P2PHandlerError))


class ServerCalls:
    """What can be asked of a server. All methods are coroutines.

    All raise ServerFailed, and those that name an adapter AdapterMissing or AdapterRejected.
    """

    def __init__(self, p2p: P2P, timeouts: Timeouts, traffic: Traffic, boundary: Boundary | None = None):
        self.boundary = boundary  # None = nothing but hidden states travels
        self.p2p = p2p
        self.timeouts = timeouts
        self.traffic = traffic
        self._weights: dict[PeerID, Mapping[str, ServedWeights]] = {}
        self._streams = StreamPool()
        self.codec: str | None = None  # of hidden states, see swarm/codec.py

    async def close(self) -> None:
        """Ends the streams that are kept open; never raises."""
        await self._streams.close()

    def expect(self, peer: PeerID, weights: Mapping[str, ServedWeights]) -> None:
        """From now on requests to this server name these weights (uid of a block -> weights), and a server
        that holds others refuses them.
        """
        self._weights[peer] = dict(weights)

    def _naming_weights(self, peer: PeerID, uids: Sequence[str]) -> dict[str, str]:
        known = self._weights.get(peer)
        return {} if known is None else {WEIGHTS: weights_key(known[uid] for uid in uids)}

    def _stub(self, peer: PeerID) -> Any:
        return ServerStub.get_stub(self.p2p, peer)

    async def info(self, peer: PeerID, uid: str) -> dict[str, Any]:
        """Our entry of rpc_info; empty for a stock petals server."""
        timeout_s = self.timeouts.connect_s + self.timeouts.request_s
        try:
            answer = await self._stub(peer).rpc_info(runtime_pb2.ExpertUID(uid=uid), timeout=timeout_s)
            return MSGPackSerializer.loads(answer.serialized_info).get(INFO_KEY, {})
        except _FOREIGN as error:
            raise _translated(error, peer, "rpc_info") from error

    async def push(
        self, peer: PeerID, uids: Sequence[str], blocks: Sequence[int], adapter: AdapterSnapshot
    ) -> None:
        """Puts the adapter's tensors of these blocks on the server; returns once they can be used."""
        flats = [adapter.blocks[block] for block in blocks]
        metadata = {"header": adapter.header.encode()}
        await self._request(peer, "push", uids, flats, metadata, 0, ("adapters", "adapters"))

    async def forward(
        self, peer: PeerID, uids: Sequence[str], hidden: Tensor, key: str, packed: PackedRows | None = None
    ) -> Tensor:
        """Output (B, S, H) of a chain of blocks.

        Args:
            key: of the adapter; "" = none.
            packed: how rows lie in `hidden` and in the output.
        """
        metadata = {"active_adapter": key, **_packing(packed)}
        most = _MAX_GROWTH * (hidden.numel() + 1024)
        kinds = "activations", "activations"
        answer = await self._request(peer, "forward", uids, [hidden], metadata, most, kinds)
        (outputs,) = _complete(answer, 1, peer)
        return _checked(outputs, hidden, peer, self.boundary)

    async def backward(
        self,
        peer: PeerID,
        uids: Sequence[str],
        hidden: Tensor,
        grad: Tensor,
        key: str,
        need_input_grad: bool,
        summed: tuple[str, int, int] | None = None,
        packed: PackedRows | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradient of the chain's input (None when not needed) and of each block's flat adapter tensor.

        Args:
            summed: name of a sum over micro-batches, index of this one, and their number: each block's
                gradient is that of all of them, or empty while the server has not seen all.
            packed: how rows lie in `hidden` and `grad`.
        """
        metadata = {
            "active_adapter": key, "need_input_grad": need_input_grad, "sum": summed, **_packing(packed)
        }  # fmt: skip
        kinds = "activations", "gradients"
        answer = await self._request(peer, "backward", uids, [hidden, grad], metadata, _ANY, kinds)
        grad_input, *flats = _complete(answer, 1 + len(uids), peer)
        if not all(torch.isfinite(flat).all() for flat in flats):
            raise ServerFailed(f"server {short_id(peer)} returned gradients that are not finite")
        return (_checked(grad_input, hidden, peer) if need_input_grad else None), flats

    async def _request(
        self,
        peer: PeerID,
        what: str,
        uids: Sequence[str],
        tensors: Sequence[Tensor],
        metadata: Mapping[str, Any],
        max_numbers: int,
        kinds: tuple[str, str],
    ) -> list[Tensor]:
        """The tensors of the answer to a request.

        Args:
            what: a kind of request that LoraHandler.rpc_requests knows.
            max_numbers: of a tensor of the answer.
            kinds: of traffic, there and back.
        """
        packed = {"request": what, **metadata, **self._naming_weights(peer, uids)}

        async def call() -> tuple[list[Tensor], int, int]:
            stream = self._streams.take(peer)
            was_idle = stream is not None
            if stream is None:
                stream = await OpenStream.open(self._stub(peer).rpc_requests, self.timeouts.connect_s)
            stream.codec = self.codec
            before = stream.received
            try:
                sent = await stream.send(" ".join(uids), tensors, packed)
                answer = await stream.receive_all(max_numbers)
            except BaseException as error:
                self._streams.discard(stream)
                if was_idle and isinstance(error, _BROKEN):  # as an idle one may be
                    return await call()
                raise
            self._streams.give_back(peer, stream)
            return answer, sent, stream.received - before

        try:
            answer, sent, received = await asyncio.wait_for(call(), self.timeouts.request_s)
        except (*_FOREIGN, ShapeError) as error:
            raise _translated(error, peer, what) from error
        self.traffic.sent[kinds[0]] += sent
        self.traffic.received[kinds[1]] += received
        return answer

    async def open_generation(
        self, peer: PeerID, uids: Sequence[str], *, rows: int, max_length: int, key: str
    ) -> GenerationStream:
        """A stream that keeps the caches of one batch on the server: so many rows, and tokens in each."""
        try:
            stream = await OpenStream.open(self._stub(peer).rpc_generate, self.timeouts.connect_s)
            stream.codec = self.codec
        except _FOREIGN as error:
            raise _translated(error, peer, "rpc_generate") from error
        opening = {
            "rows": rows,
            "max_length": max_length,
            "active_adapter": key,
            "alloc_timeout": self.timeouts.request_s / 2,
            **self._naming_weights(peer, uids),
        }
        return GenerationStream(self, peer, " ".join(uids), stream, opening)


class GenerationStream:
    """One batch's open generation on one server; made by ServerCalls.open_generation."""

    def __init__(
        self, calls: ServerCalls, peer: PeerID, uid: str, stream: OpenStream, opening: Mapping[str, Any]
    ):
        self._calls = calls
        self._peer = peer
        self._uid = uid
        self._stream = stream
        self._opening = opening

    async def send(self, hidden: Tensor, chunk: Chunk, *, last_only: bool) -> None:
        """The tokens (b, k, H) of a chunk. Several may be on their way; they are answered in order."""
        metadata = {**self._opening, "chunk": chunk.encode(), "last_only": last_only}
        self._opening = {}
        sent = await self._stream.send(self._uid, [hidden], metadata)  # others send meanwhile
        self._calls.traffic.sent["activations"] += sent

    async def receive(self, hidden: Tensor, *, last_only: bool) -> Tensor:
        """The output for what was sent and not yet answered: (b, k, W), or (b, 1, W) with `last_only`."""
        most = _MAX_GROWTH * (hidden.numel() + 1024)
        before = self._stream.received
        try:
            outputs = await asyncio.wait_for(self._stream.receive(most), self._calls.timeouts.request_s)
        except (*_FOREIGN, ShapeError) as error:
            raise _translated(error, self._peer, "a generation step") from error
        (outputs,) = _complete([] if outputs is None else [outputs], 1, self._peer)
        self._calls.traffic.received["activations"] += self._stream.received - before
        expected = hidden[:, -1:] if last_only else hidden
        return _checked(outputs, expected, self._peer, self._calls.boundary)

    async def close(self) -> None:
        """Tells the server to free the cache; never raises."""
        await self._stream.close()


def _packing(packed: PackedRows | None) -> dict[str, Any]:
    return {} if packed is None else {"packed": packed.encode()}


def _complete(answer: list[Tensor], count: int, peer: PeerID) -> list[Tensor]:
    """Raises ServerFailed for too few tensors: hivemind ends a broken stream as it ends a complete one."""
    if len(answer) != count:
        raise ServerFailed(f"server {short_id(peer)} broke off: {len(answer)} of {count} tensors arrived")
    return answer


def _checked(outputs: Tensor, inputs: Tensor, peer: PeerID, boundary: Boundary | None = None) -> Tensor:
    fits = outputs.shape == inputs.shape
    if boundary is not None and boundary.parts:  # their size is the servers' to know
        fits = outputs.shape[:-1] == inputs.shape[:-1] and outputs.shape[-1] >= boundary.hidden_size
    if not fits:
        raise ServerFailed(
            f"server {short_id(peer)} returned shape {tuple(outputs.shape)} for inputs of shape "
            f"{tuple(inputs.shape)}"
        )
    if not torch.isfinite(outputs).all():
        raise ServerFailed(f"server {short_id(peer)} returned NaN or infinite numbers")
    return outputs
