"""Generation on a server: rows of unequal length that share caches, join them by their prompts and leave when
they have ended.

The client says where in the caches each message's tokens belong (decoders/chunks.py); here that is checked
against what was allocated. Knows nothing about adapters, prompts or sampling.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import torch
from async_timeout import timeout
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from petals.data_structures import Handle
from petals.server.block_functions import MAX_NF4_SHORT_INFERENCE_TOKENS, MAX_SHORT_INFERENCE_TOKENS
from petals.server.memory_cache import AllocationFailed
from torch import Tensor

from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.errors import ShapeError
from textrl_swarm.swarm.protocol import CODEC, not_finite, server_busy
from textrl_swarm.swarm.server.backend import LoraBackend
from textrl_swarm.swarm.server.guarded import GuardedHandler, giving_way
from textrl_swarm.swarm.server.hand_over import HandOvers, delivered, in_order
from textrl_swarm.swarm.streaming import decoded, tensor_parts, whole_tensor
from textrl_swarm.swarm.stub import Requests, Responses

MAX_WIDTH = 8  # numbers per token over H: hidden states and what else crosses the boundary
_NO_INDICES = torch.empty(0, dtype=torch.int64)  # petals' way to say "do not reorder the cache"


@dataclass(frozen=True)
class GenerationStep:
    """What a backend is told beside the hidden states; petals' InferenceMetadata in a wider form."""

    uid: str
    cache_handles: tuple[Handle, ...]
    active_adapter: str
    chunk: Chunk


async def generate(
    handler: GuardedHandler,
    hand_overs: HandOvers,
    backends: Sequence[LoraBackend],
    adapter: str,
    first: runtime_pb2.ExpertRequest,
    requests: Requests,
) -> Responses:
    """See LoraHandler.rpc_generate.

    Args:
        hand_overs: of this process.
        adapter: name of a pushed one or of one that was loaded at start; "" = none.
        first: message of the client.
        requests: the others.

    Raises:
        ShapeError: numbers that make no sense, or do not fit what was allocated.
        ServerBusy: others have the caches.
    """
    opening = MSGPackSerializer.loads(first.metadata)
    rows, max_length, timeout_s = _opening(opening, handler, backends)
    codec, session = opening.get(CODEC), opening.get("session")
    memory = backends[0].memory_cache
    async with timeout(handler.session_timeout), AsyncExitStack() as until_the_end:
        allocated = handler._allocate_cache(
            backends, batch_size=rows, max_length=max_length, timeout=timeout_s
        )
        try:
            handles = await until_the_end.enter_async_context(allocated)
        except AllocationFailed as error:
            share = memory.current_size_bytes / memory.max_size_bytes
            raise server_busy(
                f"no room for caches of {rows} x {max_length} tokens within {timeout_s:.0f} s, for other "
                f"generations have {share:.0%} of it (--attn_cache_tokens)"
            ) from error
        handed_over = None
        if session is not None:
            until_the_end.enter_context(handler._managed_session(str(session)))
            handed_over = delivered(handler, str(session))
        steps = in_order(_steps(first, requests, backends[0]), handed_over, handler.step_timeout)
        await until_the_end.enter_async_context(aclosing(steps))
        yielding = giving_way(steps, handler.reason_to_end)
        await until_the_end.enter_async_context(aclosing(yielding))
        live = rows
        async for hidden, metadata in yielding:
            chunk = Chunk.decode(metadata.get("chunk", {}))
            if not torch.isfinite(hidden).all():
                raise not_finite(f"hidden states of shape {tuple(hidden.shape)}")
            step_rows, length, _ = _checked(hidden).shape
            chunk.require_fit(step_rows, length, live, max_length)
            live = len(chunk.keep) or live
            hidden = await _compute(backends, handles, hidden.to(backends[0].dtype), adapter, chunk)
            hand_overs.start(hidden, metadata, codec)
            answered = hidden[:, -1:] if metadata.get("last_only") else hidden
            for part in tensor_parts(answered.contiguous(), codec):
                yield runtime_pb2.ExpertResponse(tensors=[part])


def _opening(
    metadata: Mapping[str, Any], handler: GuardedHandler, backends: Sequence[LoraBackend]
) -> tuple[int, int, float]:
    """Rows, tokens in each, and seconds to wait for their caches."""
    try:
        rows, max_length = int(metadata["rows"]), int(metadata["max_length"])
        timeout_s = float(metadata.get("alloc_timeout", 0.0))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ShapeError(f"malformed opening of a generation: {error!r}") from error
    if rows < 1 or not 1 <= max_length <= handler.inference_max_length:
        raise ShapeError(
            f"a generation of {rows} rows of {max_length} tokens was asked for; rows may have 1 to "
            f"{handler.inference_max_length} here (--inference_max_length)"
        )
    memory = backends[0].memory_cache
    caches = [
        cache for backend in backends for cache in backend.get_inference_cache_descriptors(rows, max_length)
    ]
    if memory.get_allocation_size(*caches) > memory.max_size_bytes:
        raise ShapeError(
            f"caches for {rows} x {max_length} tokens are more than this server has (--attn_cache_tokens)"
        )
    return rows, max_length, timeout_s


async def _steps(
    first: runtime_pb2.ExpertRequest, requests: Requests, backend: LoraBackend
) -> AsyncIterator[tuple[Tensor, dict[str, Any]]]:
    """What the client sends of each step: a tensor and its metadata."""
    most = backend.forward_pool.max_batch_size * MAX_WIDTH * backend.config.hidden_size
    request = first
    while request.tensors:
        metadata = MSGPackSerializer.loads(request.metadata)
        yield decoded(await whole_tensor(request, requests, most), metadata.get(CODEC)), metadata
        try:
            request = await anext(requests)
        except StopAsyncIteration:
            return


def _checked(hidden: Tensor) -> Tensor:
    if hidden.ndim != 3 or not hidden.is_floating_point():
        raise ShapeError(
            f"hidden states are {hidden.dtype} {tuple(hidden.shape)}, not (rows, tokens, H) floats"
        )
    return hidden


async def _compute(
    backends: Sequence[LoraBackend],
    handles: Sequence[Sequence[Handle]],
    hidden: Tensor,
    adapter: str,
    chunk: Chunk,
) -> Tensor:
    """As petals does: the blocks in one task when there are few tokens, else one after the other, so that
    other requests come in between.
    """
    steps = []
    for backend, own in zip(backends, handles, strict=True):
        steps.append(GenerationStep(backend.name, tuple(own), adapter, chunk))
    is_nf4 = backends[0].quantization == "nf4"
    most = MAX_NF4_SHORT_INFERENCE_TOKENS if is_nf4 else MAX_SHORT_INFERENCE_TOKENS
    groups = [(backends[0], steps)]
    if hidden.shape[0] * hidden.shape[1] > most:
        groups = [(backend, [step]) for backend, step in zip(backends, steps, strict=True)]
    for backend, together in groups:
        (hidden,) = await backend.inference_pool.submit_task(
            hidden, _NO_INDICES, tuple(together), *[None] * len(together)
        )
    return hidden
