"""A server's network side: petals' RPCs, plus three of ours: they take an adapter, generate with it, and
return its gradients.

Runs in processes forked from the server, which see only a copy of its memory: whatever must be known by all
of them goes through a task pool to the compute process. Stock RPCs keep their stock names on the wire, so
stock Petals clients work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from async_timeout import timeout
from hivemind.p2p import P2PContext
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from petals.server.handler import TransformerConnectionHandler
from torch import Tensor

from textrl_swarm.decoders.caches import cache_bytes
from textrl_swarm.errors import ServerMismatch, ShapeError
from textrl_swarm.swarm.protocol import (
    ENDING,
    INFO_KEY,
    WEIGHTS,
    AdapterHeader,
    adapter_rejected,
    digest,
    is_adapter_key,
    weights_key,
)
from textrl_swarm.swarm.server.backend import LoraBackend
from textrl_swarm.swarm.server.generation import generate
from textrl_swarm.swarm.streaming import tensor_parts
from textrl_swarm.swarm.stub import Requests, Responses, wire_name

logger = logging.getLogger(__name__)

_BACKWARD_PRIORITY = 2.0  # petals' own for forward and backward; generation (1.0) goes first
_PUSH_PRIORITY = 0.5  # before any computation
_CLIENT_CLOSES_S = 30.0  # how long a stream stays open for a client that was told how it ended


class LoraHandler(TransformerConnectionHandler):
    """TransformerConnectionHandler that also stores adapters and computes their gradients."""

    _rpc_handlers = None  # hivemind caches these two on the class; inherited, they would hide the new RPCs
    _stub_type = None

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        return wire_name(namespace, method_name)

    def _get_active_adapter(self, metadata: dict[str, Any]) -> str:
        name = metadata.get("active_adapter") or ""
        return (
            name
            if is_adapter_key(name)
            else super()._get_active_adapter({**metadata, "active_adapter": name})
        )

    def _backends(self, uids: str) -> Sequence[LoraBackend]:
        return tuple(self.module_backends[uid] for uid in self._check_uids(uids))

    async def rpc_forward_stream(self, requests: Requests, context: P2PContext) -> Responses:
        """Petals' own."""
        async for response in self._answer(super().rpc_forward_stream, requests, context):
            yield response

    async def rpc_inference(self, requests: Requests, context: P2PContext) -> Responses:
        """Petals' own."""
        async for response in self._answer(super().rpc_inference, requests, context):
            yield response

    async def rpc_generate(self, requests: Requests, context: P2PContext) -> Responses:
        """Generation with the caches on the server, for rows of unequal length.

        Metadata of the first message: `rows`, `max_length` (columns of the caches), `active_adapter`,
        `alloc_timeout` (seconds to wait for free caches). Each step is a tensor (b, k, H), with `chunk` (see
        Chunk) and `last_only` (answer with the last token of each row) in its metadata, and is answered by
        the outputs. A message without a tensor ends the generation.
        """
        async for response in self._answer(partial(generate, self), requests, context):
            yield response

    async def rpc_lora_push(self, requests: Requests, context: P2PContext) -> Responses:
        """Stores an adapter for the named blocks: one flat fp32 tensor per block, in the order of the uids.

        Metadata of the first message: `header`, an encoded AdapterHeader. Answers once the adapter can be
        used.
        """
        async for response in self._answer(self._store, requests, context):
            yield response

    async def rpc_lora_backward(self, requests: Requests, context: P2PContext) -> Responses:
        """Gradients of a chain of blocks. Request: inputs and grad_outputs (B, S, H); metadata
        `active_adapter`, `need_input_grad`.

        Answers with the gradient of the inputs (empty when not needed) and one flat fp32 gradient per block,
        always as a stream: hivemind's unary answers cannot carry more than 4 MiB.
        """
        async for response in self._answer(self._backward, requests, context):
            yield response

    async def _answer(
        self,
        serve: Callable[[Requests, P2PContext], Responses],
        requests: Requests,
        context: P2PContext,
    ) -> Responses:
        """Refuses requests that expect other weights, tells clients that ask for it how the answer ended, and
        leaves the stream open until they have closed it.

        hivemind's daemon resets a stream that the server closes: about one answer (or error) in three hundred
        does not arrive whole, and on the client's side a stream cut short looks like a complete one. Stock
        clients do not ask, and get what stock servers give.
        """
        first_metadata: dict[str, Any] = {}

        async def watched() -> Requests:
            async for request in requests:
                if request.metadata and not first_metadata:
                    first_metadata.update(MSGPackSerializer.loads(request.metadata))
                    self._check_weights(request.uid, first_metadata)
                yield request

        ending = ""
        try:
            async for response in serve(watched(), context):
                yield response
        except Exception as error:
            if ENDING not in first_metadata:
                raise
            ending = str(error) or type(error).__name__
            logger.info("a request was answered with: %s", ending)
        if ENDING in first_metadata:
            yield runtime_pb2.ExpertResponse(metadata=MSGPackSerializer.dumps({ENDING: ending}))
            await asyncio.sleep(_CLIENT_CLOSES_S)  # ends at once when the client closes

    def _check_weights(self, uids: str, metadata: dict[str, Any]) -> None:
        """A client may have met another server under this address before; see `SwarmClient`."""
        expected = metadata.get(WEIGHTS)
        if expected is not None and expected != weights_key(b.weights for b in self._backends(uids)):
            raise ServerMismatch(f"blocks {uids} have other weights or another dtype here than when asked")

    async def _store(self, requests: Requests, context: P2PContext) -> Responses:
        async with timeout(self.request_timeout):
            store = next(iter(self.module_backends.values())).store
            bounded = _bounded(requests, store.max_bytes_per_client)
            uids, flats, metadata = await self._gather_inputs(bounded, context)
            backends = self._backends(uids)
            header = _checked_header(metadata, backends, flats)
            blocks = [backend.block_index for backend in backends]
            await backends[0].store_pool.submit_task(
                torch.zeros(1),
                str(context.remote_id),
                metadata["header"],
                blocks,
                *flats,
                priority=_PUSH_PRIORITY,
            )
            self._log_request("rpc_lora_push", uids.split(), context)
            yield runtime_pb2.ExpertResponse(metadata=MSGPackSerializer.dumps({"key": header.key}))

    async def _backward(self, requests: Requests, context: P2PContext) -> Responses:
        async with timeout(self.request_timeout):
            uids, (inputs, grad_outputs), metadata = await self._gather_inputs(requests, context)
            backends = self._backends(uids)
            self._log_request("rpc_lora_backward", uids.split(), context)
            key = self._get_active_adapter(metadata)
            if key and not is_adapter_key(key):
                raise ShapeError("rpc_lora_backward needs the key of a pushed adapter as active_adapter")
            need_input_grad = bool(metadata.get("need_input_grad", True))
            grads = await _run_backward(backends, inputs, grad_outputs, key, need_input_grad)
            for tensor in grads:
                for part in tensor_parts(tensor):
                    yield runtime_pb2.ExpertResponse(tensors=[part])

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
            "takes_padding": all(other.takes_padding for other in backends.values()),
            "cache_row_tokens": -(-bytes_per_row // bytes_per_token),
            "adapter_bytes": min(backend.store.max_bytes, backend.store.max_bytes_per_client),
        }
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))


async def _bounded(requests: Requests, max_bytes: int) -> Requests:
    """Refuses a stream that grows past what may be stored, before it fills the memory."""
    received = 0
    async for request in requests:
        received += sum(len(tensor.buffer) for tensor in request.tensors)
        if received > max_bytes:
            raise adapter_rejected(
                f"more than {max_bytes} bytes of adapter; this server keeps no more per client "
                "(--adapter_bytes_per_client)"
            )
        yield request


def _checked_header(
    metadata: dict[str, Any], backends: Sequence[LoraBackend], flats: Sequence[Tensor]
) -> AdapterHeader:
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
    return header


async def _run_backward(
    backends: Sequence[LoraBackend], inputs: Tensor, grad_outputs: Tensor, key: str, need_input_grad: bool
) -> list[Tensor]:
    """[gradient of the inputs or empty, flat gradient of backends[0], of backends[1], ...]"""
    hidden, grad = inputs.to(backends[0].dtype), grad_outputs.to(backends[-1].dtype)
    block_inputs = [hidden]
    for backend in backends[:-1]:
        (hidden,) = await backend.forward_pool.submit_task(hidden, key, priority=_BACKWARD_PRIORITY)
        block_inputs.append(hidden)
    flats: list[Tensor] = []
    for position in reversed(range(len(backends))):
        needed = need_input_grad or position > 0
        pool = backends[position].lora_backward_pool
        grad, flat = await pool.submit_task(
            block_inputs[position], grad, key, needed, priority=_BACKWARD_PRIORITY
        )
        flats.append(flat)
    return [grad, *reversed(flats)]
