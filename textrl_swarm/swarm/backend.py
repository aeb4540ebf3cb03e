"""One transformer block of a server, with LoRA applied per request. Runs in the server's compute process.

The low-rank update is added by forward hooks on the linear layers, so fp32, bf16, int8 and nf4 blocks are served alike and no weight is
wrapped or copied:  out + (x A^T) B^T * alpha / r.  Knows nothing about sockets or where adapters come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from petals.server.backend import TransformerBackend
from petals.server.task_pool import PrioritizedTaskPool
from petals.utils.convert_block import convert_block
from torch import Tensor, nn

from textrl_swarm.adapters import keep_differentiable
from textrl_swarm.swarm.adapter_store import AdapterStore
from textrl_swarm.swarm.protocol import AdapterHeader, is_adapter_key

# What the hooks add at this moment: target path -> (A, B, alpha / r). Petals' Runtime is one thread and runs one request at a time.
_ACTIVE: dict[str, tuple[Tensor, Tensor, float]] = {}

HOOKED = "textrl_swarm_linears"  # attribute of a block: target path -> (in_features, out_features)


def _add_low_rank(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if path not in _ACTIVE:
        return output
    a, b, scale = _ACTIVE[path]
    return (output + F.linear(F.linear(args[0].to(a.dtype), a), b) * scale).to(output.dtype)


def convert_and_hook_block(block, block_index, config, tensor_parallel_devices, output_device, quant_type, adapters=None, **kwargs):
    """Petals' convert_block, then a hook on every linear layer. Blocks split over several devices get none: their layers are slices."""
    converted = convert_block(block, block_index, config, tensor_parallel_devices, output_device, quant_type, adapters=adapters, **kwargs)
    keep_differentiable(converted)
    converted.eval()  # petals leaves blocks in training mode, where a model with dropout would give random answers
    linears: dict[str, tuple[int, int]] = {}
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
    scale = header.alpha / header.r
    previous, _ACTIVE = _ACTIVE, {path: (a, b, scale) for path, (a, b) in header.views(flat).items()}
    try:
        yield
    finally:
        _ACTIVE = previous


class LoraBackend(TransformerBackend):
    """TransformerBackend whose forward, generation and backward obey a pushed adapter.

    `store`, `store_pool` and `preloaded` (adapters of --adapters, by the name that requests give) are shared by all blocks of a server and
    set on the class before the first block is made.
    """

    store: AdapterStore
    store_pool: PrioritizedTaskPool
    preloaded: ClassVar[Mapping[str, tuple[AdapterHeader, Mapping[int, Tensor]]]] = {}  # name -> header, block index -> flat

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.block_index = int(self.name.rsplit(".", 1)[1])
        self.linears: dict[str, tuple[int, int]] = getattr(self.module, HOOKED)
        self.lora_backward_pool = PrioritizedTaskPool(
            self.lora_backward,
            max_batch_size=self.forward_pool.max_batch_size,
            device=self.forward_pool.device,
            name=f"{self.name}_lora_backward",
        )

    def get_pools(self):
        return (*super().get_pools(), self.lora_backward_pool, self.store_pool)

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[str | None]:
        """Applies a pushed adapter or one that was loaded at start; yields the name to hand to petals, which has none of its own."""
        if name in self.preloaded:
            header, flats = self.preloaded[name]
            flat = flats.get(self.block_index)
        elif is_adapter_key(name):
            header, flat = self.store.get(name, self.block_index)
        else:
            yield name
            return
        with _applied(header, flat) if flat is not None else nullcontext():
            yield ""

    def forward(self, *inputs):
        *tensors, name = inputs
        with self._adapter(name) as stock_name:
            return super().forward(*tensors, stock_name)

    def backward(self, *inputs):
        *tensors, name = inputs
        with self._adapter(name) as stock_name:
            return super().backward(*tensors, stock_name)

    def inference_step(self, hidden_states, hypo_ids, inference_info):
        with self._adapter(inference_info.active_adapter) as stock_name:
            return super().inference_step(hidden_states, hypo_ids, dataclasses.replace(inference_info, active_adapter=stock_name))

    def lora_backward(self, inputs: Tensor, grad_outputs: Tensor, key: str, need_input_grad: bool) -> tuple[Tensor, Tensor]:
        """Gradients of one block, re-running its forward.

        Args:
            inputs, grad_outputs: (B, S, H).
            key: of a pushed adapter.
            need_input_grad: False spares the pass through the layers below the first adapted one.

        Returns:
            gradient of the inputs (B, S, H), or an empty tensor; gradient of the block's flat adapter tensor, fp32 (block_numel,).
        """
        header, flat = self.store.get(key, self.block_index)
        if flat is None:
            raise ValueError(f"adapter {key} leaves block {self.block_index} alone: it has no gradient")
        with torch.inference_mode(False), torch.enable_grad():
            inputs = inputs.detach().clone().requires_grad_(need_input_grad)
            leaf = flat.detach().requires_grad_(True)
            with _applied(header, leaf), self._peft_module.using_adapter(""):
                (outputs,) = self.module(inputs)
            wanted = (inputs, leaf) if need_input_grad else (leaf,)
            *grad_inputs, grad_leaf = torch.autograd.grad(outputs, wanted, grad_outputs.to(outputs.dtype))
        return (grad_inputs[0] if need_input_grad else torch.empty(0), grad_leaf)

    def shutdown(self):
        self.lora_backward_pool = None
        super().shutdown()
