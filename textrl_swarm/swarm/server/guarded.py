"""Petals' RPCs on a server that protects itself: each client's requests have limits, its caches an account.

Knows nothing about adapters or training.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, ClassVar, TypeVar

from hivemind.compression import deserialize_torch_tensor
from hivemind.p2p import P2P, P2PContext
from hivemind.proto import runtime_pb2
from hivemind.utils.nested import nested_flatten
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import combine_from_streaming
from petals.data_structures import Handle
from petals.server.handler import TransformerConnectionHandler
from petals.server.memory_cache import AllocationFailed
from torch import Tensor

from textrl_swarm.errors import ShapeError
from textrl_swarm.swarm.access import AllowList, Door, Membership
from textrl_swarm.swarm.memory import TRIM_S, trim_memory
from textrl_swarm.swarm.protocol import REQUEST_BYTES, server_busy
from textrl_swarm.swarm.server.accounts import CLIENT, Accounts
from textrl_swarm.swarm.server.backend import LoraBackend
from textrl_swarm.swarm.server.gate import PART_BYTES, Gate, StreamLimits, Turns
from textrl_swarm.swarm.streaming import require_finite, require_header
from textrl_swarm.swarm.stub import Requests, Responses

_TENSORS = 4  # of rows x tokens x H, that make up petals' largest request: inputs, gradients, deep prompts
_GIVES_WAY_S = 15  # for which a client has its caches at least, or did nothing
_MAX_NAME = 64  # letters of the name of a session
_MAX_ALLOCATE_S = 60.0  # for which somebody waits for caches
_LOOK_AGAIN_S = 0.2
Item = TypeVar("Item")


class GuardedHandler(TransformerConnectionHandler):
    """TransformerConnectionHandler behind a gate."""

    accounts: ClassVar[Accounts]

    allowed: ClassVar[AllowList | None] = None
    """Peers that may come in; None = all."""

    secret: ClassVar[bytes | None] = None
    """Of the swarm."""

    request_bytes: ClassVar[int] = REQUEST_BYTES
    """Of requests that are read or computed, in all processes."""

    async def add_p2p_handlers(self, p2p: P2P, *args: Any, **kwargs: Any) -> None:
        """As hivemind's; called in the handler's own process."""
        self.membership = Membership(self.secret, p2p.peer_id)
        in_each = self.request_bytes // len(self._handler_event_queues)
        self.turns = Turns(in_each, in_each // 2)
        whole = StreamLimits(message_bytes=self._most_bytes, request_bytes=self._most_bytes)
        limits = {
            "rpc_forward_stream": whole,
            "rpc_backward_stream": whole,
            "rpc_inference": StreamLimits(message_bytes=self._most_bytes),
        }
        gc.freeze()
        self._trimming = asyncio.ensure_future(_trim())
        gate = Gate(p2p, Door(self.allowed, self.membership), self.turns, limits)
        await super().add_p2p_handlers(gate, *args, **kwargs)

    @property
    def _most_numbers(self) -> int:
        """Of a tensor of petals' own requests."""
        backend = next(iter(self.module_backends.values()))
        return _TENSORS * backend.forward_pool.max_batch_size * backend.config.hidden_size

    @functools.cached_property
    def _compressions(self) -> Collection[int]:
        """Those that clients are told to use, and none."""
        backend = next(iter(self.module_backends.values()))
        return {0, *(descriptor.compression for descriptor in nested_flatten(backend.args_schema))}

    @property
    def _most_bytes(self) -> int:
        """Of such a request."""
        return 4 * self._most_numbers + PART_BYTES

    async def rpc_inference(self, requests: Requests, context: P2PContext) -> Responses:
        """Petals' generation, whose caches others may get."""
        arriving = _Arrivals(giving_way(self._looked_at_all(requests), self.reason_to_end))
        try:
            async with aclosing(super().rpc_inference(arriving, context)) as responses:
                async for response in responses:
                    yield response
        finally:
            await arriving.aclose()

    async def rpc_push(
        self, request: runtime_pb2.ExpertRequest, context: P2PContext
    ) -> runtime_pb2.ExpertResponse:
        """Petals' hand-over."""
        return await super().rpc_push(self._looked_at(request), context)

    async def rpc_forward(
        self, request: runtime_pb2.ExpertRequest, context: P2PContext
    ) -> runtime_pb2.ExpertResponse:
        """Petals' own, as is the next."""
        return await super().rpc_forward(self._looked_at(request), context)

    async def rpc_backward(
        self, request: runtime_pb2.ExpertRequest, context: P2PContext
    ) -> runtime_pb2.ExpertResponse:
        return await super().rpc_backward(self._looked_at(request), context)

    def _looked_at(self, request: runtime_pb2.ExpertRequest) -> runtime_pb2.ExpertRequest:
        """A message of petals, whose tensors' headers promise nothing that is too large."""
        for part in request.tensors:
            if part.dtype:  # else it continues a tensor
                require_header(part, self._most_numbers, self._compressions)
            require_finite(part)
        return request

    async def _gather_inputs(
        self, requests: Requests, context: P2PContext
    ) -> tuple[str, list[Tensor], dict[str, Any]]:
        """What the messages of a forward or backward make together, in the place of petals' own, which
        leaves tasks and memory behind when it does not come to its end.
        """
        uid, metadata = "", b""
        tensors: list[Tensor] = []
        parts: list[runtime_pb2.Tensor] = []
        async for request in self._looked_at_all(requests):
            if uid not in ("", request.uid):
                raise ShapeError("the uids differ in one request")
            uid, metadata = request.uid, metadata or request.metadata
            for part in request.tensors:
                if part.dtype and parts:
                    tensors.append(deserialize_torch_tensor(combine_from_streaming(parts)))
                    parts = []
                parts.append(part)
        if parts:
            tensors.append(deserialize_torch_tensor(combine_from_streaming(parts)))
        return uid, tensors, MSGPackSerializer.loads(metadata) if metadata else {}

    def _serialize_outputs(self, outputs: Tensor, backends: Any, metadata: dict[str, Any]) -> Any:
        self._require_compression(metadata)
        return super()._serialize_outputs(outputs, backends, metadata)

    def _serialize_grads(self, grads: Any, backends: Any, metadata: dict[str, Any]) -> Any:
        self._require_compression(metadata)
        return super()._serialize_grads(grads, backends, metadata)

    def _require_compression(self, metadata: dict[str, Any]) -> None:
        """Raises ShapeError for one that would load bitsandbytes into this process."""
        blockwise = runtime_pb2.CompressionType.BLOCKWISE_8BIT
        wanted = metadata.get("output_compression") or ()
        if blockwise in wanted and blockwise not in self._compressions:
            raise ShapeError("only servers with such a --compression compress outputs block by block")

    async def _looked_at_all(self, requests: Requests) -> Requests:
        async for request in requests:
            yield self._looked_at(request)

    @asynccontextmanager
    async def _allocate_cache(
        self, backends: Sequence[LoraBackend], *, batch_size: int, max_length: int, timeout: float
    ) -> AsyncIterator[Sequence[Sequence[Handle]]]:
        """As petals' own; the caches are put down to the client."""
        client, memory = CLIENT.get(), backends[0].memory_cache
        caches = [backend.get_inference_cache_descriptors(batch_size, max_length) for backend in backends]
        size = memory.get_allocation_size(*itertools.chain(*caches))
        if size > memory.max_size_bytes:
            raise ShapeError(
                f"caches for {batch_size} x {max_length} tokens are more than this server has "
                "(--attn_cache_tokens)"
            )
        sizes = {"batch_size": batch_size, "max_length": max_length}
        async with AsyncExitStack() as until_the_end:
            with self.accounts.wanting(client, size):
                handles = await until_the_end.enter_async_context(self._when_free(backends, sizes, timeout))
            with self.accounts.holding(client, size):
                yield handles

    @asynccontextmanager
    async def _when_free(
        self, backends: Sequence[LoraBackend], sizes: dict[str, int], timeout_s: float
    ) -> AsyncIterator[Sequence[Sequence[Handle]]]:
        """Petals' caches, as soon as it has them. It must not wait itself: when its time is over, it leaves
        its lock taken, and gives caches to nobody any more.
        """
        waits_s = min(timeout_s, _MAX_ALLOCATE_S) if math.isfinite(timeout_s) else 0.0
        deadline = time.monotonic() + waits_s
        while True:
            is_last = time.monotonic() >= deadline
            async with AsyncExitStack() as until_the_end:
                try:
                    allocated = super()._allocate_cache(backends, **sizes, timeout=0.0)
                    handles = await until_the_end.enter_async_context(allocated)
                except AllocationFailed:
                    if is_last:
                        raise
                else:
                    yield handles
                    return
            await asyncio.sleep(_LOOK_AGAIN_S)

    def reason_to_end(self, idle_s: int, held_s: int) -> str | None:
        """Why a generation of the present client must end, that did nothing for so long, and has its caches
        for so long; None = it need not.
        """
        memory = next(iter(self.module_backends.values())).memory_cache
        if idle_s >= _GIVES_WAY_S and self.accounts.wanted_bytes > 0:
            return f"others wait for the caches of this generation, which did nothing for {idle_s} s"
        if held_s >= _GIVES_WAY_S and self.accounts.has_too_much(CLIENT.get(), memory.max_size_bytes):
            return "others wait for caches, and this client has more than its part of them"
        return None

    def _managed_session(self, session_id: str) -> AbstractContextManager[None]:
        if not isinstance(session_id, str) or len(session_id) > _MAX_NAME:
            raise ShapeError(f"names of sessions have at most {_MAX_NAME} letters")
        return super()._managed_session(session_id)


async def _trim() -> None:
    while True:
        await asyncio.sleep(TRIM_S)
        trim_memory()


class _Arrivals(AsyncIterator[Item]):
    """What a generator yields. Petals leaves a task behind that waits for the next for ever."""

    def __init__(self, source: AsyncGenerator[Item, None]):
        self._source = source
        self._waiting: asyncio.Task[Any] | None = None

    async def __anext__(self) -> Item:
        self._waiting = asyncio.current_task()
        try:
            return await anext(self._source)
        finally:
            self._waiting = None

    async def aclose(self) -> None:
        """Nobody waits any more."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.wait([self._waiting])
        await self._source.aclose()


async def giving_way(
    arriving: AsyncIterator[Item], reason_to_end: Callable[[int, int], str | None]
) -> AsyncGenerator[Item, None]:
    """What arrives for a generation, until it has to give its caches to others.

    Args:
        reason_to_end: seconds without any, and seconds since the first was asked for -> why it must end.

    Raises:
        ServerBusy: then.
    """
    started = time.monotonic()

    def require_right(idle_s: int) -> None:
        reason = reason_to_end(idle_s, int(time.monotonic() - started))
        if reason is not None:
            raise server_busy(reason)

    while True:
        require_right(0)
        following = asyncio.ensure_future(anext(arriving))
        idle_s = 0
        try:
            while not (await asyncio.wait([following], timeout=1))[0]:
                idle_s += 1
                require_right(idle_s)
            item = following.result()
        except StopAsyncIteration:
            return
        finally:
            following.cancel()
            await asyncio.wait([following])
        yield item
