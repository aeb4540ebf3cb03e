"""A server's network side: petals' RPCs, plus two of ours: requests for training, and
generation.

Runs in processes forked from the server, which see only a copy of its memory: whatever must be known by all
of them goes through a task pool to the compute process. Stock RPCs keep their stock names on the wire, so
stock Petals clients work.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from async_timeout import timeout
from hivemind.p2p import P2P, P2PContext
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from petals.server.task_pool import PrioritizedTaskPool
from torch import Tensor

from textrl_swarm.decoders.caches import cache_bytes
from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.errors import ServerMismatch, ShapeError
from textrl_swarm.swarm.access import Membership
from textrl_swarm.swarm.protocol import (
    CLOSING,
    CODEC,
    ENDING,
    HANDED_OVER,
    INFO_KEY,
    KEPT_INPUT_BYTES,
    KEPT_INPUT_SHARE,
    MAX_UNPACKED,
    NUMBER,
    PROOF,
    WEIGHTS,
    AdapterHeader,
    adapter_rejected,
    digest,
    is_adapter_key,
    not_finite,
    server_busy,
    weights_key,
)
from textrl_swarm.swarm.server.backend import LoraBackend
from textrl_swarm.swarm.server.generation import MAX_WIDTH, generate
from textrl_swarm.swarm.server.guarded import GuardedHandler
from textrl_swarm.swarm.server.hand_over import HandOvers, deliver, delivered
from textrl_swarm.swarm.server.kept_inputs import KeptInputs
from textrl_swarm.swarm.server.pulse import Pulse, with_signs_of_life
from textrl_swarm.swarm.server.training import Sum, Training
from textrl_swarm.swarm.streaming import declared_bytes, decoded, tensor_parts, whole_tensor
from textrl_swarm.swarm.streams import within
from textrl_swarm.swarm.stub import Requests, Responses, wire_name

logger = logging.getLogger(__name__)

Answers: TypeAlias = AsyncGenerator[runtime_pb2.ExpertResponse, None]
Outgoing: TypeAlias = "asyncio.Queue[list[runtime_pb2.ExpertResponse] | None]"  # None = nothing more comes

_MAX_NAME = 64  # letters of the name of a sum, or of kept inputs
_AT_ONCE = 64  # requests of one stream that were read and are not answered
_CLIENT_CLOSES_S = 30.0  # how long a stream stays open for a client that was told how it ended


@dataclass(frozen=True)
class _Request:
    """One of rpc_requests, when all of it is read."""

    turn_bytes: int
    """To be given back when it is answered."""

    client: str
    """Its peer id."""

    backends: Sequence[LoraBackend]
    """Of the blocks that it names."""

    metadata: dict[str, Any]
    tensors: Sequence[Tensor]


class LoraHandler(GuardedHandler):
    """A handler that also stores adapters and computes their gradients."""

    kept_input_bytes: ClassVar[int] = KEPT_INPUT_BYTES
    """For inputs of forwards, in all processes; a client's stream, and what is kept for it, is in one."""

    pulse: ClassVar[Pulse]
    """Of the process that computes."""

    training: ClassVar[Training]

    store_pool: ClassVar[PrioritizedTaskPool]
    """Takes pushed adapters."""

    _rpc_handlers = None  # hivemind caches these two on the class; inherited, they would hide the new RPCs
    _stub_type = None

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        return wire_name(namespace, method_name)

    async def add_p2p_handlers(self, p2p: P2P, *args: Any, **kwargs: Any) -> None:
        """As hivemind's; called in the handler's own process."""
        self._hand_overs = HandOvers(p2p, Membership(self.secret, p2p.peer_id))
        processes = len(self._handler_event_queues)
        in_each = self.kept_input_bytes // processes
        self._kept = KeptInputs(in_each, min(in_each, self.kept_input_bytes // KEPT_INPUT_SHARE))
        await super().add_p2p_handlers(p2p, *args, **kwargs)

    def _get_active_adapter(self, metadata: dict[str, Any]) -> str:
        name = metadata.get("active_adapter") or ""
        return (
            name
            if is_adapter_key(name)
            else super()._get_active_adapter({**metadata, "active_adapter": name})
        )

    def _backends(self, uids: str) -> Sequence[LoraBackend]:
        return tuple(self.module_backends[uid] for uid in self._check_uids(uids))

    async def rpc_generate(self, requests: Requests, context: P2PContext) -> Responses:
        """Generation with the caches on the server, for rows of unequal length.

        Metadata of the first message: `rows`, `max_length` (columns of the caches), `active_adapter`,
        `alloc_timeout` (seconds to wait for free caches), `session` (its name for servers that hand over to
        it). Each step is a tensor (b, k, H), with `step` (its number), `chunk` (see Chunk), `last_only`
        (answer with the last token of each row) and `hand_over` (see Receiver) in its metadata, and is
        answered by the outputs. A message without a tensor ends the generation.
        """
        async with aclosing(with_signs_of_life(self._generate(requests, context), self.pulse)) as responses:
            async for response in responses:
                yield response

    async def _generate(self, requests: Requests, context: P2PContext) -> Answers:
        ending = ""
        try:
            first = await within(self.step_timeout, anext(requests), "message")
            metadata = MSGPackSerializer.loads(first.metadata)
            self._check_weights(first.uid, metadata)
            adapter = self._get_active_adapter(metadata)
            self._log_request("generation", first.uid.split(), context)
            backends = self._backends(first.uid)
            async for response in generate(self, self._hand_overs, backends, adapter, first, requests):
                yield response
        except asyncio.TimeoutError as error:
            ending = _text(asyncio.TimeoutError(str(error) or f"no end within {self.session_timeout:.0f} s"))
        except Exception as error:
            ending = _text(error)
        yield _ending(ending)
        await asyncio.sleep(_CLIENT_CLOSES_S)  # ends at once when the client closes

    async def rpc_requests(self, requests: Requests, context: P2PContext) -> Responses:
        """Any number of requests, one after the other. Metadata of the first message of each: `request`, and
        the number of its `tensors`. Answers come as they are ready; each tensor of one, and its ending, tell
        the NUMBER of its request, counted from 0.

        `push` stores an adapter for the named blocks: one flat fp32 tensor per block, in the order of the
        uids; `header` is an encoded AdapterHeader. It is answered once the adapter can be used.

        `forward` takes inputs (B, S, H) and `active_adapter`, and gives outputs. With `packed` (see
        PackedRows), here and in `backward`, rows share prefixes. With `keep` (a name), the server keeps the
        inputs for the backward, if it has room. With `session`, another server hands the inputs over; with
        `hand_over` (see Receiver), the outputs go to another server as well, and the ending tells whether
        they arrived. With `quiet`, the client gets outputs only if they did not.

        `echo` gives back hidden states (B, S, H), for who measures the connection.

        `hand_over` brings inputs to the request or generation named `session`, from the server before; with
        the step's `facts`.

        `backward` takes inputs and grad_outputs (B, S, H), `active_adapter` and `need_input_grad`, and gives
        the gradient of the inputs (empty when not needed) and one flat fp32 gradient per block. With `kept`
        (the name), the inputs are those of the forward, and do not travel. With `sum`
        (a name, the index of this micro-batch, their number), the flat gradients are empty but for the
        request that completes a block's sum.
        """
        async with aclosing(with_signs_of_life(self._responses(requests, context), self.pulse)) as responses:
            async for response in responses:
                yield response

    async def _responses(self, requests: Requests, context: P2PContext) -> Answers:
        outgoing: Outgoing = asyncio.Queue(maxsize=2)
        work = asyncio.ensure_future(self._take_requests(requests, context, outgoing))
        try:
            while (messages := await outgoing.get()) is not None:
                for message in messages:
                    yield message
        finally:
            work.cancel()

    async def _take_requests(self, requests: Requests, context: P2PContext, outgoing: Outgoing) -> None:
        """Reads a stream's requests one after the other; answers them beside each other, at most _AT_ONCE."""
        running: set[asyncio.Task[None]] = set()
        slots = asyncio.Semaphore(_AT_ONCE)
        try:
            for number in itertools.count():
                try:
                    first = await within(self.step_timeout, anext(requests), "message")
                except (StopAsyncIteration, asyncio.TimeoutError):
                    break
                if not first.uid:
                    break
                await slots.acquire()
                try:
                    request = await self._read(first, requests, context)
                except Exception as error:  # what follows may be a part of what was not read
                    await asyncio.gather(*running)
                    await outgoing.put([_ending(_text(error), {NUMBER: number, CLOSING: True})])
                    await asyncio.sleep(_CLIENT_CLOSES_S)
                    break
                task = asyncio.ensure_future(self._answer(number, request, outgoing))
                running.add(task)
                task.add_done_callback(running.discard)
                task.add_done_callback(lambda _: slots.release())
                task.add_done_callback(partial(self._done_with, request))
            await asyncio.gather(*running)
        except Exception as error:  # the client's side of the stream
            _text(error)
        finally:
            for task in running:
                task.cancel()
        await outgoing.put(None)

    def _done_with(self, request: _Request, _answering: asyncio.Task[None]) -> None:
        self.turns.give_back(request.client, request.turn_bytes)

    async def _answer(self, number: int, request: _Request, outgoing: Outgoing) -> None:
        ending, told = "", {NUMBER: number}
        metadata = request.metadata
        numbered, codec = MSGPackSerializer.dumps(told), metadata.get(CODEC)
        try:
            async with timeout(self.request_timeout):
                answer = await self._KINDS[metadata["request"]](self, request)
                handed_on = self._hand_overs.start(answer[0], metadata, codec) if answer else None
                if handed_on is not None and metadata.get("quiet") and await handed_on:
                    answer = []
                for tensor in answer:
                    parts = tensor_parts(tensor, codec)
                    messages = [runtime_pb2.ExpertResponse(tensors=[part]) for part in parts]
                    messages[0].metadata = numbered
                    await outgoing.put(messages)
                if handed_on is not None:
                    told[HANDED_OVER] = await handed_on
        except asyncio.TimeoutError:
            ending = _text(server_busy(f"this request was not done within {self.request_timeout:.0f} s"))
        except Exception as error:
            ending = _text(error)
        await outgoing.put([_ending(ending, told)])

    async def _read(
        self, first: runtime_pb2.ExpertRequest, requests: Requests, context: P2PContext
    ) -> _Request:
        """All of a request; refuses one that is larger than can be used, before it fills the memory."""
        client = str(context.remote_id)
        metadata = MSGPackSerializer.loads(first.metadata)
        backends = self._backends(first.uid)
        self._check_weights(first.uid, metadata)
        what = metadata.get("request")
        if what not in self._KINDS:
            raise ShapeError(f"requests are {', '.join(self._KINDS)}, not {what!r}")
        if what != "hand_over":  # one for every token
            self._log_request(what, first.uid.split(), context)
        if what == "forward" and metadata.get("session") is not None:
            return _Request(0, client, backends, metadata, [])  # another server brings them
        left = self._most_to_read(metadata, backends)
        async with AsyncExitStack() as unless_read:
            try:
                size = declared_bytes(first, left) * metadata["tensors"]  # those of one request are alike
                await self.turns.take(client, size)
                unless_read.callback(self.turns.give_back, client, size)
                async with timeout(self.request_timeout):
                    tensors = await _read_tensors(first, requests, metadata, left)
            except ShapeError as error:
                if what != "push":
                    raise
                raise adapter_rejected(
                    f"{error} (at most {backends[0].store.max_bytes_per_client} bytes of adapter are kept "
                    "per client, --adapter_bytes_per_client)"
                ) from error
            unless_read.pop_all()
        return _Request(size, client, backends, metadata, tensors)

    def _most_to_read(self, metadata: dict[str, Any], backends: Sequence[LoraBackend]) -> int:
        """Numbers of all tensors of a request."""
        backend = backends[0]
        if metadata["request"] == "push":
            left, count = backend.store.max_bytes_per_client // 4, len(backends)
        else:
            count = 2
            left = count * backend.forward_pool.max_batch_size * MAX_WIDTH * backend.config.hidden_size
        if not 1 <= metadata.get("tensors", 0) <= count:
            raise ShapeError(f"{metadata.get('tensors')!r} tensors, where at most {count} belong")
        return left

    async def _handed_over(self, session: str) -> Tensor:
        with self._managed_session(session):
            async for tensor, _ in delivered(self, session):
                return tensor
        raise ShapeError(f"nothing was handed over to {session!r}")

    async def _deliver(self, request: _Request) -> list[Tensor]:
        (hidden,) = _checked_hidden(request.tensors, 1)
        metadata = request.metadata
        await deliver(self, str(metadata.get("session")), hidden, metadata.get("facts") or {})
        return []

    async def _echo(self, request: _Request) -> list[Tensor]:
        return list(_checked_hidden(request.tensors, 1))

    def _check_weights(self, uids: str, metadata: dict[str, Any]) -> None:
        """A client may have met another server under this address before; see `SwarmClient`."""
        expected = metadata.get(WEIGHTS)
        if expected is not None and expected != weights_key(b.weights for b in self._backends(uids)):
            raise ServerMismatch(f"blocks {uids} have other weights or another dtype here than when asked")

    async def _store(self, request: _Request) -> list[Tensor]:
        backends, header = request.backends, request.metadata.get("header")
        _check_header(request.metadata, backends, request.tensors)
        blocks = [backend.block_index for backend in backends]
        stored = request.client, header, blocks, *request.tensors
        await self.store_pool.submit_task(torch.zeros(1), *stored)
        return []

    async def _forward(self, request: _Request) -> list[Tensor]:
        backends, metadata, tensors = request.backends, request.metadata, request.tensors
        if metadata.get("session") is not None:
            tensors = [await self._handed_over(str(metadata["session"]))]
        (hidden,) = _checked_hidden(tensors, 1)
        packed = _checked_packed(metadata.get("packed"), hidden, backends)
        if metadata.get("keep") is not None:
            self._kept.put(request.client, str(metadata["keep"])[:_MAX_NAME], hidden)
        return [await self.training.forward(backends, hidden, self._get_active_adapter(metadata), packed)]

    async def _backward(self, request: _Request) -> list[Tensor]:
        backends, metadata, tensors = request.backends, request.metadata, request.tensors
        if metadata.get("kept") is not None:
            tensors = [self._kept.take(str(metadata["kept"])[:_MAX_NAME]), *tensors]
        inputs, grad_outputs = _checked_hidden(tensors, 2)
        key = self._get_active_adapter(metadata)
        if key and not is_adapter_key(key):
            raise ShapeError("backward needs the key of a pushed adapter as active_adapter")
        need_input_grad = bool(metadata.get("need_input_grad", True))
        summed = _checked_sum(metadata.get("sum"))
        packed = _checked_packed(metadata.get("packed"), inputs, backends)
        return await self.training.backward(
            backends, inputs, grad_outputs, key, need_input_grad, summed, packed
        )

    _KINDS: ClassVar[dict[str, Callable[..., Awaitable[list[Tensor]]]]] = {
        "push": _store,
        "forward": _forward,
        "backward": _backward,
        "hand_over": _deliver,
        "echo": _echo,
    }

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """Petals' answer plus what a training client checks before it relies on this server."""
        info = MSGPackSerializer.loads((await super().rpc_info(request, context)).serialized_info)
        backends = self.module_backends
        backend = backends[request.uid] if request.uid else next(iter(backends.values()))
        config = backend.config
        bytes_per_token, bytes_per_row = cache_bytes(
            [other.cache_spec for other in backends.values()], backend.dtype
        )
        layers = {}
        for other in backends.values():
            layers[str(other.block_index)] = {path: list(sizes) for path, sizes in other.linears.items()}
        info[INFO_KEY] = {
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "num_blocks": config.num_hidden_layers,
            "linears": layers,
            "weights": {str(other.block_index): asdict(other.weights) for other in backends.values()},
            "max_batch_tokens": backend.forward_pool.max_batch_size,
            "max_length": self.inference_max_length,
            "cache_tokens": backend.memory_cache.max_size_bytes // bytes_per_token,
            "takes_padding": all(other.served.takes_padding for other in backends.values()),
            "kept_input_bytes": self._kept.max_bytes_per_client,
            "takes_sharing": all(other.served.takes_sharing for other in backends.values()),
            "cache_row_tokens": -(-bytes_per_row // bytes_per_token),
            "adapter_bytes": min(backend.store.max_bytes, backend.store.max_bytes_per_client),
            PROOF: self.membership.code_for(context.remote_id),
        }
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))


async def _read_tensors(
    first: runtime_pb2.ExpertRequest, requests: Requests, metadata: dict[str, Any], left: int
) -> list[Tensor]:
    """Tensors that have at most so many numbers together."""
    tensors: list[Tensor] = []
    message = first
    for i in range(metadata["tensors"]):
        if i > 0:
            message = await anext(requests)
        tensors.append(await whole_tensor(message, requests, left))
        left -= tensors[-1].numel()
    return [decoded(tensor, metadata.get(CODEC)) for tensor in tensors]


def _text(error: Exception) -> str:
    text = str(error) or type(error).__name__
    logger.info("a request was answered with: %s", text)
    return text


def _ending(error: str, told: Mapping[str, Any] | None = None) -> runtime_pb2.ExpertResponse:
    """Tells how an answer ended. hivemind's daemon resets a stream that the server closes: about one answer
    (or error) in three hundred does not arrive whole, and on the client's side a stream cut short looks like
    a complete one.
    """
    return runtime_pb2.ExpertResponse(metadata=MSGPackSerializer.dumps({**(told or {}), ENDING: error}))


def _checked_hidden(tensors: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    are_hidden = all(tensor.ndim == 3 and tensor.is_floating_point() for tensor in tensors)
    # What else crosses a boundary may make one wider than the other.
    if len(tensors) != count or not are_hidden or len({shape[:2] for shape in shapes}) != 1:
        raise ShapeError(f"expected {count} tensors of one shape (rows, tokens, H), got {shapes}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise not_finite(f"hidden states or gradients of shapes {shapes}")
    return tensors


def _check_header(metadata: dict[str, Any], backends: Sequence[LoraBackend], flats: Sequence[Tensor]) -> None:
    try:
        header = AdapterHeader.decode(metadata["header"])
    except (KeyError, ShapeError) as error:
        raise adapter_rejected(repr(error)) from error
    if len(flats) != len(backends):
        raise adapter_rejected(f"{len(flats)} tensors for {len(backends)} blocks")
    for backend, flat in zip(backends, flats, strict=True):
        block = backend.block_index
        if block not in header.blocks:
            raise adapter_rejected(f"block {block}: the header does not name it")
        layout = header.layout(block)
        numel = layout.block_numel
        for path, sizes in layout.targets.items():
            if backend.linears.get(path) != sizes:
                raise adapter_rejected(
                    f"target {path!r} has sizes {sizes}, but {backend.linears.get(path)} in block {block}"
                )
        if flat.dtype != torch.float32 or flat.shape != (numel,):
            raise adapter_rejected(
                f"block {block}: expected {numel} fp32 numbers, got {tuple(flat.shape)} {flat.dtype}"
            )
        if not torch.isfinite(flat).all():
            raise adapter_rejected(f"block {block}: the adapter has NaN or infinite numbers")
        if digest(flat) != header.blocks[block][1]:
            raise adapter_rejected(f"block {block}: the tensor is not the one the header names")


def _checked_sum(raw: Any) -> Sum | None:
    if raw is None:
        return None
    try:
        name, index, count = str(raw[0]), int(raw[1]), int(raw[2])
    except (TypeError, ValueError, LookupError) as error:
        raise ShapeError(f"malformed sum of gradients: {error!r}") from error
    if len(name) > _MAX_NAME or not 0 <= index < count:
        raise ShapeError(f"micro-batch {index} of {count} cannot be summed")
    return name, index, count


def _checked_packed(raw: Any, hidden: Tensor, backends: Sequence[LoraBackend]) -> PackedRows | None:
    if raw is None:
        return None
    if not all(backend.served.takes_sharing for backend in backends):
        raise ShapeError("these blocks take no rows that share prefixes")
    if len(hidden) != 1:
        raise ShapeError(f"rows that share prefixes come packed in one row, not in {len(hidden)}")
    tokens = hidden.shape[1]
    packed = PackedRows.decode(raw, tokens)
    most = MAX_UNPACKED * backends[0].forward_pool.max_batch_size
    if packed.unpacked(tokens) > most:
        raise ShapeError(f"rows that share prefixes have {packed.unpacked(tokens)} tokens, more than {most}")
    return packed
