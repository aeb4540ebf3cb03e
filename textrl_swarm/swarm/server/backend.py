"""One transformer block of a server, with LoRA applied per request. Runs in the server's compute process.

Knows nothing about sockets or where adapters come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from hivemind import BatchTensorDescriptor, TensorDescriptor
from hivemind.moe.server.module_backend import ModuleBackend
from petals.server.backend import TransformerBackend
from petals.server.memory_cache import MemoryCache
from petals.utils.misc import is_dummy
from torch import Tensor
from transformers import PretrainedConfig

from textrl_swarm.decoders.block import activations_per_token
from textrl_swarm.decoders.caches import CacheSpec, cache_bytes, keep_rows
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.models.layers import LayerSizes
from textrl_swarm.swarm.low_rank import add_hooks, applied
from textrl_swarm.swarm.protocol import AdapterHeader, ServedWeights, is_adapter_key
from textrl_swarm.swarm.server.accounts import FairTaskPool
from textrl_swarm.swarm.server.adapter_store import AdapterStore
from textrl_swarm.swarm.server.served_model import ServedBlock


class LoraBackend(TransformerBackend):
    """TransformerBackend for a block of any kind, whose forward, generation and backward obey a pushed
    adapter.

    All blocks of a server share the class attributes, which are set before the first block is made.
    """

    store: ClassVar[AdapterStore]

    shared_pools: ClassVar[tuple[FairTaskPool, ...]]
    """What is not one block's."""

    quantization: ClassVar[str | None] = None

    preloaded: ClassVar[Mapping[str, tuple[AdapterHeader, Mapping[int, Tensor]]]] = {}
    """Adapters of --adapters by the name that requests give: header, block index -> flat tensor."""

    def __init__(
        self,
        name: str,
        module: ServedBlock,
        *,
        config: PretrainedConfig,
        memory_cache: MemoryCache,
        backend_dtype: torch.dtype,
        max_chunk_size_bytes: int,
        **kwargs: Any,
    ):
        # Not TransformerBackend's own, which knows blocks of one kind.
        ModuleBackend.__init__(self, name, module, **kwargs)
        self.config = config
        self.memory_cache = memory_cache
        self.max_chunk_size_bytes = max_chunk_size_bytes
        self.dtype = backend_dtype
        self.served = module
        self.block_index = module.block.index
        self.cache_spec: CacheSpec = module.cache_spec
        self.device: torch.device = module.device
        self.linears: dict[str, LayerSizes] = module.linears
        add_hooks(module.block.module, self.linears)
        dtype = str(self.dtype).removeprefix("torch.")
        self.weights = ServedWeights(module.digest, dtype, self.quantization)
        self.inference_pool = self._pool(self.inference_step, "inference")
        self.forward_pool = self._pool(self.forward, "forward")
        self.backward_pool = self._pool(self.backward, "backward")
        own = BatchTensorDescriptor((), dtype=self.dtype), BatchTensorDescriptor((), dtype=torch.int64)
        self.inference_schema = (*self.args_schema, *own), self.kwargs_schema
        per_token, _ = cache_bytes([self.cache_spec], self.dtype)
        self.cache_bytes_per_token = Counter({self.device: per_token})

    def _pool(self, compute: Any, what: str) -> FairTaskPool:
        size = self.forward_pool.max_batch_size
        return FairTaskPool(compute, max_batch_size=size, device=self.device, name=f"{self.name}_{what}")

    def get_pools(self) -> tuple[FairTaskPool, ...]:
        return (*super().get_pools(), *self.shared_pools)

    def get_inference_cache_descriptors(self, batch_size: int, max_length: int) -> list[TensorDescriptor]:
        """The tensors of one session, in the order in which `inference_step` finds them."""
        return [
            TensorDescriptor(shape, dtype=dtype, device=self.device)
            for shape, dtype in self.cache_spec.tensors(batch_size, max_length, self.dtype)
        ]

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        """Applies a pushed adapter, or one that was loaded at start; "" or None = none."""
        if name is not None and name in self.preloaded:
            header, flats = self.preloaded[name]
            flat = flats.get(self.block_index)
        elif name is not None and is_adapter_key(name):
            header, flat = self.store.get(name, self.block_index)
        else:
            yield
            return
        with applied(header, self.block_index, flat) if flat is not None else nullcontext():
            yield

    def activation_bytes(self, rows: int, length: int) -> int:
        """What a backward keeps of the block's forward."""
        heads = getattr(self.config, "num_attention_heads", None) or 0
        per_token = activations_per_token(self.config.hidden_size, heads, length)
        return rows * length * per_token * self.dtype.itemsize

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        hidden, name, *packed = inputs
        with torch.no_grad(), self._adapter(name):
            return (self.served.block(hidden, *packed),)

    def backward(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Gradient (B, S, H) of a block's input (B, S, H), re-running its forward."""
        hidden, grad_outputs, name, *packed = inputs
        with torch.inference_mode(False), torch.enable_grad(), self._adapter(name):
            hidden = hidden.detach().clone().requires_grad_(True)
            outputs = self.served.block(hidden, *packed)
            return torch.autograd.grad(outputs, hidden, grad_outputs.to(outputs.dtype))

    @torch.inference_mode()
    def inference_step(
        self, hidden_states: Tensor, hypo_ids: Tensor, inference_info: Any
    ) -> tuple[Tensor, ...]:
        """Output (B, S, H) for the next S tokens of each row.

        Args:
            inference_info: petals' InferenceMetadata, or our GenerationStep.
        """
        chunk: Chunk | None = getattr(inference_info, "chunk", None)
        if chunk is None:
            chunk = Chunk(inference_info.prefix_length)
        with (
            self.memory_cache.use_cache(*inference_info.cache_handles) as tensors,
            self._adapter(inference_info.active_adapter),
        ):
            if not is_dummy(hypo_ids):  # beams
                keep_rows(tensors, hypo_ids.tolist())
            return (self.served.step(hidden_states, tensors, chunk, self.max_chunk_size_bytes),)
