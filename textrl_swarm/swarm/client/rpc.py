"""Calls to one server: each with a deadline, its bytes counted, its failures translated into errors of ours.

Runs inside hivemind's event loop thread. Knows nothing about routes, retries or training.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
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
from textrl_swarm.errors import AccessDenied, InputsNotFinite, ServerFailed, ShapeError, SwarmError
from textrl_swarm.swarm.access import Membership
from textrl_swarm.swarm.protocol import (
    HANDED_OVER,
    INFO_KEY,
    WEIGHTS,
    AdapterSnapshot,
    Receiver,
    ServedWeights,
    error_from_wire,
    weights_key,
)
from textrl_swarm.swarm.streams import Answer, OpenStream, StreamPool, is_connected, within
from textrl_swarm.swarm.stub import ServerStub
from textrl_swarm.swarm.traffic import Traffic

_MAX_GROWTH = 8  # of a block's output over its input: what else crosses the boundary
_ALLOCATE_S = 3.0  # in which a server finds room for caches, before another server is asked
_ROUND_TRIPS = 3  # of which the fastest counts: the first opens the stream


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


@dataclass(frozen=True)
class ForwardPlan:
    """Where a forward's inputs come from, and what becomes of inputs and outputs beside the answer."""

    session: str | None = None
    """The name under which another server hands over the inputs; None = the client sends them."""

    receivers: Sequence[Receiver] = ()
    """The server that needs the outputs next; () = only the client."""

    keep: str | None = None
    """The name under which the server keeps the inputs for the backward; None = it need not."""

    quiet: bool = False
    """Whether outputs that the receiver has need not come back to the client."""

    servers: int = 1
    """Those that compute before the answer can come, this one among them."""


def short_id(peer: PeerID) -> str:
    """How messages name a server."""
    return f"…{str(peer)[-6:]}"


def _translated(error: Exception, peer: PeerID, what: str) -> SwarmError:
    text = str(error)
    known = error_from_wire(text, short_id(peer))
    if known is not None:
        return known
    message = f"{what} on server {short_id(peer)} failed: {text or type(error).__name__}"
    return ServerFailed(message, answered=isinstance(error, P2PHandlerError))


def _blamed(error: SwarmError, sent: Sequence[Tensor]) -> SwarmError:
    """The server's failure, if it says without reason that it was sent numbers that are not finite."""
    if isinstance(error, InputsNotFinite) and all(torch.isfinite(tensor).all() for tensor in sent):
        return ServerFailed(f"{error}, which are not among those of this client", answered=True)
    return error


class ServerCalls:
    """What can be asked of a server. All methods are coroutines.

    All raise ServerFailed, and those that name an adapter AdapterMissing or AdapterRejected.
    """

    def __init__(
        self,
        p2p: P2P,
        timeouts: Timeouts,
        traffic: Traffic,
        boundary: Boundary | None = None,
        *,
        secret: bytes | None = None,
    ):
        self.membership = Membership(secret, p2p.peer_id)
        self.boundary = boundary  # None = nothing but hidden states travels
        self.p2p = p2p
        self.timeouts = timeouts
        self.traffic = traffic
        self._weights: dict[PeerID, Mapping[str, ServedWeights]] = {}
        self._streams = StreamPool(p2p, self.membership)
        self.codec: str | None = None  # of hidden states, see swarm/codec.py

    async def close(self) -> None:
        """Ends the streams that are kept open; never raises."""
        await self._streams.close()

    def expect(self, peer: PeerID, weights: Mapping[str, ServedWeights]) -> None:
        """From now on requests to this server name these weights (uid of a block -> weights), and a server
        that holds others refuses them.
        """
        self._weights[peer] = dict(weights)

    def weights_of(self, peer: PeerID, uid: str) -> ServedWeights | None:
        """What `expect` was told, if it was."""
        return self._weights.get(peer, {}).get(uid)

    def _naming_weights(self, peer: PeerID, uids: Sequence[str]) -> dict[str, str]:
        known = self._weights.get(peer)
        return {} if known is None else {WEIGHTS: weights_key(known[uid] for uid in uids)}

    def _stub(self, peer: PeerID) -> Any:
        return ServerStub.get_stub(self.p2p, peer)

    async def info(self, peer: PeerID, uid: str) -> dict[str, Any]:
        """Our entry of rpc_info; empty for a stock petals server.

        Raises:
            AccessDenied: it, or this client, is not a member of the swarm.
        """
        timeout_s = self.timeouts.connect_s + self.timeouts.request_s
        try:
            named = runtime_pb2.ExpertUID(uid=self.membership.asked(uid, peer))
            answer = await within(timeout_s, self._stub(peer).rpc_info(named), "answer")
            info = MSGPackSerializer.loads(answer.serialized_info).get(INFO_KEY, {})
        except _FOREIGN as error:
            raise _translated(error, peer, "rpc_info") from error
        if not self.membership.knows(peer, info):
            raise AccessDenied(f"server {short_id(peer)} does not know this swarm's secret")
        return info

    async def echo(self, peer: PeerID, uid: str, hidden: Tensor) -> None:
        """Sends hidden states (B, S, H) there and back."""
        kinds = "activations", "activations"
        answer = await self._request(peer, "echo", [uid], [hidden], {}, hidden.numel(), kinds)
        _complete(answer.tensors, 1, peer)

    async def round_trip_s(self, peer: PeerID, uid: str) -> float:
        """Seconds that next to nothing takes there and back, over the stream that is open then."""
        seconds = []
        for _ in range(_ROUND_TRIPS):
            started = time.monotonic()
            await self.echo(peer, uid, torch.zeros(1, 1, 1))
            seconds.append(time.monotonic() - started)
        return min(seconds)

    async def push(
        self, peer: PeerID, uids: Sequence[str], blocks: Sequence[int], adapter: AdapterSnapshot
    ) -> None:
        """Puts the adapter's tensors of these blocks on the server; returns once they can be used."""
        flats = [adapter.blocks[block] for block in blocks]
        metadata = {"header": adapter.header.encode()}
        await self._request(peer, "push", uids, flats, metadata, 0, ("adapters", "adapters"))

    async def forward(
        self,
        peer: PeerID,
        uids: Sequence[str],
        hidden: Tensor,
        key: str,
        packed: PackedRows | None = None,
        *,
        plan: ForwardPlan | None = None,
    ) -> tuple[Tensor | None, bool]:
        """Output (B, S, H) of a chain of blocks, and whether it went to the next server; None where it did,
        and need not come back.

        Args:
            key: of the adapter; "" = none.
            packed: how rows lie in `hidden` and in the output.
            plan: None = the client sends the inputs, and alone gets the outputs. Where another server hands
                the inputs over, `hidden` only tells their shape.
        """
        plan = plan or ForwardPlan()
        metadata = {"active_adapter": key, **_packing(packed), **_handing_over(plan.receivers)}
        tensors = [hidden]
        if plan.keep is not None:
            metadata["keep"] = plan.keep
        if plan.quiet:
            metadata["quiet"] = True
        if plan.session is not None:
            metadata["session"] = plan.session
            tensors = []
        most = _MAX_GROWTH * (hidden.numel() + 1024)
        kinds = "activations", "activations"
        answer = await self._request(
            peer, "forward", uids, tensors, metadata, most, kinds, servers=plan.servers
        )
        has_handed_over = bool(answer.told.get(HANDED_OVER))
        if plan.quiet and has_handed_over and not answer.tensors:
            return None, True
        (outputs,) = _complete(answer.tensors, 1, peer)
        return _checked(outputs, hidden, peer, self.boundary), has_handed_over

    async def backward(
        self,
        peer: PeerID,
        uids: Sequence[str],
        inputs: Tensor | str,
        grad: Tensor,
        key: str,
        sizes: Sequence[int],
        need_input_grad: bool,
        summed: tuple[str, int, int] | None = None,
        packed: PackedRows | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradient of the chain's input (None when not needed) and of each block's flat adapter tensor.

        Args:
            inputs: (B, S, H), or the name under which the server keeps them.
            grad: with respect to the output.
            sizes: numbers of each block's flat tensor; 0 = the adapter leaves it as it is.
            summed: name of a sum over micro-batches, index of this one, and their number: each block's
                gradient is that of all of them, or empty while the server has not seen all.
            packed: how rows lie in all of these tensors.

        Raises:
            InputsMissing: it does not keep them any more.
        """
        metadata = {
            "active_adapter": key, "need_input_grad": need_input_grad, "sum": summed, **_packing(packed)
        }  # fmt: skip
        tensors = [grad]
        if isinstance(inputs, str):
            metadata["kept"] = inputs
        else:
            tensors.insert(0, inputs)
        kinds = "activations", "gradients"
        most = max(_MAX_GROWTH * (grad.numel() + 1024), *sizes)
        answer = await self._request(peer, "backward", uids, tensors, metadata, most, kinds)
        grad_input, *flats = _complete(answer.tensors, 1 + len(uids), peer)
        for flat, size in zip(flats, sizes, strict=True):
            if flat.numel() not in (0, size) or flat.ndim != 1:
                raise ServerFailed(
                    f"server {short_id(peer)} returned a gradient of shape {tuple(flat.shape)} for {size} "
                    "numbers of a block's adapter"
                )
        if not all(torch.isfinite(flat).all() for flat in flats):
            raise ServerFailed(f"server {short_id(peer)} returned gradients that are not finite")
        return (_checked(grad_input, grad, peer, self.boundary) if need_input_grad else None), flats

    async def _request(
        self,
        peer: PeerID,
        what: str,
        uids: Sequence[str],
        tensors: Sequence[Tensor],
        metadata: Mapping[str, Any],
        max_numbers: int,
        kinds: tuple[str, str],
        servers: int = 1,
    ) -> Answer:
        """The answer to a request.

        Args:
            what: a kind of request that LoraHandler.rpc_requests knows.
            max_numbers: of a tensor of the answer.
            kinds: of traffic, there and back.
            servers: that compute, one after the other, until the answer can come.
        """
        packed = {"request": what, **metadata, **self._naming_weights(peer, uids)}
        method = self._stub(peer).rpc_requests
        call = self._streams.call(
            peer, method, " ".join(uids), tensors, packed,
            connect_s=self.timeouts.connect_s, codec=self.codec, max_numbers=max_numbers,
        )  # fmt: skip
        try:
            answer = await within(servers * self.timeouts.request_s, call, "answer")
        except asyncio.TimeoutError as error:
            self._streams.forget(peer)
            raise _translated(error, peer, what) from error
        except (*_FOREIGN, ShapeError) as error:
            raise _blamed(_translated(error, peer, what), tensors) from error
        self.traffic.sent[kinds[0]] += answer.sent
        self.traffic.received[kinds[1]] += answer.received
        return answer

    async def open_generation(
        self, peer: PeerID, uids: Sequence[str], *, rows: int, max_length: int, key: str
    ) -> GenerationStream:
        """A stream that keeps the caches of one batch on the server: so many rows, and tokens in each."""
        try:
            stream = await OpenStream.open(
                self._stub(peer).rpc_generate,
                self.timeouts.connect_s,
                partial(is_connected, self.p2p, peer),
                self.membership.greeting(peer),
            )
            stream.codec = self.codec
        except _FOREIGN as error:
            raise _translated(error, peer, "rpc_generate") from error
        opening = {
            "rows": rows,
            "max_length": max_length,
            "active_adapter": key,
            "alloc_timeout": min(_ALLOCATE_S, self.timeouts.request_s / 2),
            **self._naming_weights(peer, uids),
        }
        return GenerationStream(self, peer, " ".join(uids), stream, opening)


class GenerationStream:
    """One batch's open generation on one server; made by ServerCalls.open_generation.

    Attributes:
        session: its name for servers that hand over to it.
    """

    def __init__(
        self, calls: ServerCalls, peer: PeerID, uid: str, stream: OpenStream, opening: Mapping[str, Any]
    ):
        self._calls = calls
        self.peer = peer
        self._uid = uid
        self._stream = stream
        self.session = uuid.uuid4().hex
        self._opening = {**opening, "session": self.session}

    async def send(
        self, hidden: Tensor, chunk: Chunk, *, step: int, last_only: bool, receivers: Sequence[Receiver] = ()
    ) -> None:
        """The tokens (b, k, H) of a chunk. Several may be on their way; they are answered in order.

        Args:
            step: their number; the server computes each once.
            receivers: servers that the output goes through, from this one to the next.
        """
        metadata = {**self._opening, **_handing_over(receivers)}
        metadata |= {"step": step, "chunk": chunk.encode(), "last_only": last_only}
        self._opening = {}
        sent = await self._stream.send(self._uid, [hidden], metadata)  # others send meanwhile
        self._calls.traffic.sent["activations"] += sent

    async def receive(self, hidden: Tensor, *, last_only: bool) -> Tensor:
        """The output of the next step, whoever brought its input (b, k, W): (b, k, W), or (b, 1, W) with
        `last_only`. The caller sets the deadline.
        """
        most = _MAX_GROWTH * (hidden.numel() + 1024)
        before = self._stream.received
        try:
            outputs = await self._stream.receive(most)
        except (*_FOREIGN, ShapeError) as error:
            raise _blamed(_translated(error, self.peer, "a generation step"), [hidden]) from error
        (outputs,) = _complete([] if outputs is None else [outputs], 1, self.peer)
        self._calls.traffic.received["activations"] += self._stream.received - before
        expected = hidden[:, -1:] if last_only else hidden
        return _checked(outputs, expected, self.peer, self._calls.boundary)

    def too_late(self, waited_s: float) -> ServerFailed:
        """The error for an answer that did not come within the caller's deadline."""
        return ServerFailed(
            f"a generation step on server {short_id(self.peer)} failed: no answer within {waited_s:.0f} s"
        )

    async def close(self) -> None:
        """Tells the server to free the cache; never raises."""
        await self._stream.close()


def _handing_over(receivers: Sequence[Receiver]) -> dict[str, Any]:
    return {"hand_over": [astuple(receiver) for receiver in receivers]} if receivers else {}


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
