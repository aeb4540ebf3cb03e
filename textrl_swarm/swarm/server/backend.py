"""One transformer block of a server, with LoRA applied per request. Runs in the server's compute process.

Forward hooks on the linear layers add the low-rank update, so fp32, bf16, int8 and nf4 blocks are served
alike and no weight is wrapped or copied:

    out + (x A^T) B^T * alpha / r

Knows nothing about sockets or where adapters come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from petals.server.backend import TransformerBackend
from petals.server.task_pool import PrioritizedTaskPool
from petals.utils.convert_block import convert_block
from torch import Tensor, nn

from textrl_swarm.errors import ShapeError
from textrl_swarm.models.adapters import LayerSizes
from textrl_swarm.models.digests import digest_weights
from textrl_swarm.models.quantization import keep_differentiable
from textrl_swarm.swarm.protocol import AdapterHeader, ServedWeights, is_adapter_key
from textrl_swarm.swarm.server.adapter_store import AdapterStore

# What the hooks add at this moment: target path -> (A, B, alpha / r). Petals' Runtime is one thread, one
# request at a time.
_ACTIVE: dict[str, tuple[Tensor, Tensor, float]] = {}

HOOKED = "textrl_swarm_linears"  # attribute of a block: path of a layer -> (in_features, out_features)


_LOADED: dict[int, str] = {}  # block index -> digest of what was read from the checkpoint


def note_loaded(block_prefix: str, weights: Mapping[str, Tensor]) -> None:
    """Keeps the digest of a block's weights as petals read them from the checkpoint ("transformer.h.3.")."""
    _LOADED[int(block_prefix.rstrip(".").rsplit(".", 1)[1])] = digest_weights(weights)


def _add_low_rank(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if path not in _ACTIVE:
        return output
    a, b, scale = _ACTIVE[path]
    return (output + F.linear(F.linear(args[0].to(a.dtype), a), b) * scale).to(output.dtype)


def convert_and_hook_block(*args: Any, **kwargs: Any) -> nn.Module:
    """Petals' convert_block, then a hook on every linear layer.

    Blocks split over several devices get no hooks: their layers are slices. petals' own way to apply
    `adapters` knows only old versions of peft; the hooks apply them instead.
    """
    converted = convert_block(*args, **{**kwargs, "adapters": ()})
    keep_differentiable(converted)
    converted.eval()  # petals leaves blocks in training mode, where dropout would make answers random
    linears: dict[str, LayerSizes] = {}
    if len(converted.module_shards) == 1:
        for path, module in converted.module_shards[0].named_modules():
            if isinstance(module, nn.Linear):  # bitsandbytes' layers are nn.Linear too
                linears[path] = (module.in_features, module.out_features)
                module.register_forward_hook(partial(_add_low_rank, path))
    setattr(converted, HOOKED, linears)
    return converted


@contextmanager
def _applied(header: AdapterHeader, flat: Tensor) -> Iterator[None]:
    global _ACTIVE
    previous = _ACTIVE
    _ACTIVE = {path: (a, b, header.scale) for path, (a, b) in header.layout.views(flat).items()}
    try:
        yield
    finally:
        _ACTIVE = previous


class LoraBackend(TransformerBackend):
    """TransformerBackend whose forward, generation and backward obey a pushed adapter.

    All blocks of a server share the class attributes, which are set before the first block is made.
    """

    store: ClassVar[AdapterStore]

    store_pool: ClassVar[PrioritizedTaskPool]

    quantization: ClassVar[str | None] = None

    preloaded: ClassVar[Mapping[str, tuple[AdapterHeader, Mapping[int, Tensor]]]] = {}
    """Adapters of --adapters by the name that requests give: header, block index -> flat tensor."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.block_index = int(self.name.rsplit(".", 1)[1])
        self.linears: dict[str, LayerSizes] = getattr(self.module, HOOKED)
        dtype = str(self.dtype).removeprefix("torch.")
        self.weights = ServedWeights(_LOADED[self.block_index], dtype, self.quantization)
        self.lora_backward_pool = PrioritizedTaskPool(
            self.lora_backward,
            max_batch_size=self.forward_pool.max_batch_size,
            device=self.forward_pool.device,
            name=f"{self.name}_lora_backward",
        )

    def get_pools(self) -> tuple[PrioritizedTaskPool, ...]:
        return (*super().get_pools(), self.lora_backward_pool, self.store_pool)

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[str | None]:
        """Applies a pushed adapter, or one that was loaded at start; yields the name to hand to petals
        instead.
        """
        if name is not None and name in self.preloaded:
            header, flats = self.preloaded[name]
            flat = flats.get(self.block_index)
        elif name is not None and is_adapter_key(name):
            header, flat = self.store.get(name, self.block_index)
        else:
            yield name
            return
        with _applied(header, flat) if flat is not None else nullcontext():
            yield ""

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, name = inputs
        with self._adapter(name) as stock_name:
            return super().forward(*tensors, stock_name)

    def backward(self, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, name = inputs
        with self._adapter(name) as stock_name:
            return super().backward(*tensors, stock_name)

    def inference_step(
        self, hidden_states: Tensor, hypo_ids: Tensor, inference_info: Any
    ) -> tuple[Tensor, ...]:
        with self._adapter(inference_info.active_adapter) as stock_name:
            stock_info = dataclasses.replace(inference_info, active_adapter=stock_name)
            return super().inference_step(hidden_states, hypo_ids, stock_info)

    def lora_backward(
        self, inputs: Tensor, grad_outputs: Tensor, key: str, need_input_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of one block, re-running its forward.

        Args:
            inputs, grad_outputs: (B, S, H).
            key: of a pushed adapter.
            need_input_grad: False spares the pass through the layers below the first adapted one.

        Returns:
            Gradient of the inputs (B, S, H), or an empty tensor; gradient of the block's flat adapter tensor,
            fp32 (block_numel,).
        """
        header, flat = self.store.get(key, self.block_index)
        if flat is None:
            raise ShapeError(
                f"adapter {key} does not change block {self.block_index}, so it has no gradient there"
            )
        with torch.inference_mode(False), torch.enable_grad():
            inputs = inputs.detach().clone().requires_grad_(need_input_grad)
            leaf = flat.detach().requires_grad_(True)
            with _applied(header, leaf), self._peft_module.using_adapter(""):
                (outputs,) = self.module(inputs)
            wanted = (inputs, leaf) if need_input_grad else (leaf,)
            *grad_inputs, grad_leaf = torch.autograd.grad(outputs, wanted, grad_outputs.to(outputs.dtype))
        return (grad_inputs[0] if need_input_grad else torch.empty(0), grad_leaf)

    def shutdown(self) -> None:
        self.lora_backward_pool = None
        super().shutdown()
