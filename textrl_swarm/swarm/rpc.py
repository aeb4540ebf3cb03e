"""Calls to one server: each with a deadline, its bytes counted, its failures sorted into "missing adapter", "refused" and "broken".

Runs inside hivemind's event loop thread. Knows nothing about routes, retries or training.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import torch
from hivemind.compression import deserialize_tensor_stream, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import runtime_pb2
from hivemind.utils.asyncio import iter_as_aiter
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming
from torch import Tensor

from textrl_swarm.errors import AdapterRejected
from textrl_swarm.swarm.handler import LoraHandler
from textrl_swarm.swarm.protocol import ENDING, INFO_KEY, MISSING, REJECTED, AdapterSnapshot

_NO_TENSOR = torch.empty(0)  # petals' way to say "no deep prompts"
_CLOSE_S = 2.0
_NO_INDICES = torch.empty(0, dtype=torch.int64)  # "do not reorder the cache"


class MissingAdapter(Exception):
    """The server does not hold the adapter that the request named: push it and ask again."""


class ServerFailed(Exception):
    """The server did not answer, answered nonsense, or its computation raised.

    `answered`: True when the server itself reported the error (asking again may well give the same).
    """

    def __init__(self, message: str, *, answered: bool = False):
        super().__init__(message)
        self.answered = answered


@dataclass(frozen=True)
class Timeouts:
    """Seconds. Nothing in the swarm is waited for longer than these say."""

    connect_s: float = 10.0  # until a stream to a server is open
    request_s: float = 120.0  # one forward, backward, push or generation step on one server
    discovery_s: float = 60.0  # until all blocks are found when a policy is made
    recovery_s: float = 300.0  # how long one request may be retried or wait for lost blocks before it fails


class Traffic:
    """Bytes of tensors sent and received, by kind: "activations", "gradients", "adapters"."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    @property
    def total_sent(self) -> int:
        return sum(self.sent.values())

    @property
    def total_received(self) -> int:
        return sum(self.received.values())


def _translated(error: Exception, peer: PeerID, what: str) -> Exception:
    text = str(error)
    if isinstance(error, (MissingAdapter, AdapterRejected, ServerFailed)):
        return error
    if MISSING in text:
        return MissingAdapter(text)
    if REJECTED in text:
        return AdapterRejected(f"server …{str(peer)[-6:]} refused the adapter: {text[text.index(REJECTED) + len(REJECTED) + 2 :]}")
    answered = isinstance(error, P2PHandlerError)
    return ServerFailed(f"{what} on server …{str(peer)[-6:]} failed: {text or type(error).__name__}", answered=answered)


_FOREIGN = (
    P2PHandlerError,
    P2PDaemonError,
    OSError,
    EOFError,
    asyncio.TimeoutError,
    asyncio.IncompleteReadError,
    StopAsyncIteration,
    ValueError,
    RuntimeError,  # torch's, when a tensor came in part
)


class ServerCalls:
    """What can be asked of a server. All methods are coroutines and raise MissingAdapter, AdapterRejected or ServerFailed."""

    def __init__(self, p2p: P2P, timeouts: Timeouts, traffic: Traffic):
        self.p2p, self.timeouts, self.traffic = p2p, timeouts, traffic

    async def info(self, peer: PeerID, uid: str) -> dict:
        """Our entry of rpc_info; empty for a stock petals server."""
        try:
            answer = await LoraHandler.get_stub(self.p2p, peer).rpc_info(
                runtime_pb2.ExpertUID(uid=uid), timeout=self.timeouts.connect_s + self.timeouts.request_s
            )
            return MSGPackSerializer.loads(answer.serialized_info).get(INFO_KEY, {})
        except _FOREIGN as error:
            raise _translated(error, peer, "rpc_info") from error

    async def push(self, peer: PeerID, uids: Sequence[str], blocks: Sequence[int], adapter: AdapterSnapshot) -> None:
        """Puts the adapter's tensors of these blocks on the server; returns once they can be used."""
        flats = [adapter.blocks[block] for block in blocks]
        await self._stream(peer, "rpc_lora_push", uids, flats, {"header": adapter.header.encode()}, "adapters", "adapters")

    async def forward(self, peer: PeerID, uids: Sequence[str], hidden: Tensor, key: str) -> Tensor:
        """Output (B, S, H) of a chain of blocks; `key` "" runs without adapter."""
        answer = await self._stream(
            peer, "rpc_forward_stream", uids, [hidden, _NO_TENSOR], {"active_adapter": key}, "activations", "activations"
        )
        (outputs,) = _complete(answer, 1, peer)
        return _checked(outputs, hidden, peer)

    async def backward(
        self, peer: PeerID, uids: Sequence[str], hidden: Tensor, grad: Tensor, key: str, need_input_grad: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradient of the chain's input (None when not needed) and of each block's flat adapter tensor."""
        metadata = {"active_adapter": key, "need_input_grad": need_input_grad}
        answer = await self._stream(peer, "rpc_lora_backward", uids, [hidden, grad], metadata, "activations", "gradients")
        grad_input, *flats = _complete(answer, 1 + len(uids), peer)
        if not all(torch.isfinite(flat).all() for flat in flats):
            raise ServerFailed(f"server …{str(peer)[-6:]} returned gradients that are not finite")
        return (_checked(grad_input, hidden, peer) if need_input_grad else None), flats

    async def _stream(
        self, peer: PeerID, rpc: str, uids: Sequence[str], tensors: Sequence[Tensor], metadata: dict, sent_kind: str, received_kind: str
    ) -> list[Tensor]:
        uid, packed = " ".join(uids), MSGPackSerializer.dumps({**metadata, ENDING: True})
        loop = asyncio.get_running_loop()

        def make_parts() -> list[runtime_pb2.ExpertRequest]:
            parts = [part for tensor in tensors for part in split_for_streaming(serialize_torch_tensor(tensor), DEFAULT_MAX_MSG_SIZE)]
            # in every message: petals unpacks them side by side and believes the metadata of whichever comes first
            return [runtime_pb2.ExpertRequest(uid=uid, tensors=[part], metadata=packed) for part in parts]

        async def call() -> list[Tensor]:
            stub = LoraHandler.get_stub(self.p2p, peer)
            parts = await loop.run_in_executor(None, make_parts)
            stream = await asyncio.wait_for(getattr(stub, rpc)(iter_as_aiter(parts)), self.timeouts.connect_s)
            return await deserialize_tensor_stream(_tensors_of(_until_ending(stream)))

        try:
            answer = await asyncio.wait_for(call(), self.timeouts.request_s)
        except _FOREIGN as error:
            raise _translated(error, peer, rpc) from error
        self.traffic.sent[sent_kind] += sum(tensor.nbytes for tensor in tensors)
        self.traffic.received[received_kind] += sum(tensor.nbytes for tensor in answer)
        return answer

    async def open_generation(self, peer: PeerID, uids: Sequence[str], *, max_length: int, key: str) -> GenerationStream:
        """A stream that keeps the attention cache of one batch on the server."""
        requests: asyncio.Queue[runtime_pb2.ExpertRequest] = asyncio.Queue()

        async def feed() -> AsyncIterator[runtime_pb2.ExpertRequest]:
            while True:
                request = await requests.get()
                yield request
                if not request.tensors:
                    return

        try:
            stub = LoraHandler.get_stub(self.p2p, peer)
            answers = await asyncio.wait_for(stub.rpc_inference(feed()), self.timeouts.connect_s)
        except _FOREIGN as error:
            raise _translated(error, peer, "rpc_inference") from error
        opening = {"max_length": max_length, "active_adapter": key, "points": 0, "alloc_timeout": self.timeouts.request_s / 2, ENDING: True}
        return GenerationStream(self, peer, " ".join(uids), requests, _until_ending(answers), opening)


class GenerationStream:
    """One batch's open generation on one server; made by ServerCalls.open_generation."""

    def __init__(self, calls: ServerCalls, peer: PeerID, uid: str, requests: asyncio.Queue, answers: AsyncIterator, opening: dict):
        self._calls, self._peer, self._uid, self._requests, self._answers = calls, peer, uid, requests, answers
        self._metadata: dict = opening

    async def step(self, hidden: Tensor) -> Tensor:
        """Output (B, k, H) for the next k tokens of each row."""
        tensors = [serialize_torch_tensor(tensor) for tensor in (hidden, _NO_TENSOR, _NO_INDICES)]
        request = runtime_pb2.ExpertRequest(uid=self._uid, tensors=tensors, metadata=MSGPackSerializer.dumps(self._metadata))
        self._metadata = {}
        try:
            await self._requests.put(request)
            answer = await asyncio.wait_for(self._answers.__anext__(), self._calls.timeouts.request_s)
            (outputs,) = map(deserialize_torch_tensor, answer.tensors)
        except _FOREIGN as error:
            raise _translated(error, self._peer, "a generation step") from error
        self._calls.traffic.sent["activations"] += hidden.nbytes
        self._calls.traffic.received["activations"] += outputs.nbytes
        return _checked(outputs, hidden, self._peer)

    async def close(self) -> None:
        """Tells the server to free the cache; never raises."""

        async def drain() -> None:
            await self._requests.put(runtime_pb2.ExpertRequest())
            async for _ in self._answers:
                pass

        with contextlib.suppress(*_FOREIGN):  # the server may be gone, which frees the cache too
            await asyncio.wait_for(drain(), _CLOSE_S)


async def _until_ending(stream: AsyncIterator) -> AsyncIterator:
    """Messages of an answer up to the one that says how it ended; then closes the stream. See handler._with_ending."""
    try:
        async for message in stream:
            ending = MSGPackSerializer.loads(message.metadata).get(ENDING) if message.metadata else None
            if ending is None:
                yield message
            elif ending == "":
                return
            else:
                raise P2PHandlerError(ending)
        raise EOFError("the connection broke off in the middle of the answer")
    finally:
        await stream.aclose()


async def _tensors_of(stream: AsyncIterator) -> AsyncIterator:
    async for message in stream:
        yield message.tensors


def _complete(answer: list[Tensor], count: int, peer: PeerID) -> list[Tensor]:
    """hivemind ends a stream whose connection broke like one that is complete."""
    if len(answer) != count:
        raise ServerFailed(f"server …{str(peer)[-6:]} broke off: {len(answer)} of {count} tensors came")
    return answer


def _checked(outputs: Tensor, inputs: Tensor, peer: PeerID) -> Tensor:
    if outputs.shape != inputs.shape:
        raise ServerFailed(f"server …{str(peer)[-6:]} returned shape {tuple(outputs.shape)} for inputs of shape {tuple(inputs.shape)}")
    if not torch.isfinite(outputs).all():
        raise ServerFailed(f"server …{str(peer)[-6:]} returned NaN or infinite numbers")
    return outputs
