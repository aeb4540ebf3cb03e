"""The model that a server serves: what its blocks need is known before their weights are loaded."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from petals.utils.convert_block import QuantType
from torch import nn
from transformers import PretrainedConfig

from textrl_swarm.decoders.block import cache_spec
from textrl_swarm.decoders.caches import CacheSpec, cache_bytes, server_cache_bytes
from textrl_swarm.decoders.checkpoint import Checkpoint
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.decoders.planner import Planner
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.decoders.tried import TriedBlock, trial_tokens
from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.models.layers import layers_of, quantizable_layers
from textrl_swarm.models.quantization import keep_differentiable, quantize_experts, quantize_linears

_NF4_BYTES = (
    4.25 / 8
)  # per number, with petals' compressed scales; measured by petals (server/block_utils.py)


def block_config(base: BaseModel) -> PretrainedConfig:
    """The configuration of the model's decoder, with what petals' server asks of its own configurations."""
    config = base.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    config.dht_prefix = base.dht_prefix
    config.num_key_value_groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    config.torch_dtype = config.dtype
    return config


class ServedBlock(TriedBlock):
    """A block ready for requests.

    Args:
        digest: of the checkpoint's numbers.
        tried: see TriedBlock.
    """

    def __init__(self, digest: str, *tried: Any):
        super().__init__(*tried)
        self.digest = digest


class ServedModel:
    """Makes blocks.

    Args:
        base: the model.
        dtype, device: of the blocks' arithmetic.
        download: see Checkpoint.

    Raises:
        ModelError: its blocks cannot be served one by one, or its weights cannot be found.
    """

    def __init__(self, base: BaseModel, dtype: torch.dtype, device: torch.device, **download: Any):
        self.dtype, self.device = dtype, device
        self.skeleton = Skeleton(base.config, dtype)
        self.planner = Planner(base.config, dtype, device, str(base))
        self._checkpoint = Checkpoint(base, self.skeleton, **download)

    @cached_property
    def cache_specs(self) -> list[CacheSpec]:
        """What each block of the model keeps per row of a generation."""
        return [cache_spec(block, i, self.planner) for i, block in enumerate(self.skeleton.blocks)]

    def cache_bytes(self, blocks: Iterable[int]) -> tuple[int, int]:
        """See `caches.cache_bytes`."""
        return cache_bytes([self.cache_specs[block] for block in blocks], self.dtype)

    def block_bytes(self, index: int, quant_type: QuantType) -> int:
        """Of a block's weights on the device."""
        numbers, linear = self._numbers(index)
        sizes = {QuantType.NONE: self.dtype.itemsize, QuantType.INT8: 1, QuantType.NF4: _NF4_BYTES}
        return round((numbers - linear) * self.dtype.itemsize + linear * sizes[quant_type])

    def quantized_share(self, index: int) -> float:
        """Of a block's numbers, those that can be quantised."""
        numbers, linear = self._numbers(index)
        return linear / numbers

    def _numbers(self, index: int) -> tuple[int, int]:
        """In a block's weights, and those of them that can be quantised."""
        block = self.skeleton.blocks[index]
        linear = sum(sizes.weights for sizes in quantizable_layers(block).values())
        return sum(parameter.numel() for parameter in block.parameters()), linear

    def blocks_within(self, memory: int, quant_type: QuantType, cache_tokens: int) -> int:
        """How many blocks fit into so many bytes, whichever they are: counted by the largest.

        Room is left for one backward: petals measured 2 GiB for BLOOM-176B (H = 14336) and scales by H
        (server/server.py).
        """
        most = 0
        for index in range(self.skeleton.num_blocks):
            per_token, per_row = self.cache_bytes([index])
            cache = server_cache_bytes(cache_tokens, per_token, per_row)
            most = max(most, self.block_bytes(index, quant_type) + cache)
        backward = 2 * (1 << 30) * self.planner.hidden_size // 14336
        return max(0, min((memory - backward) // most, self.skeleton.num_blocks))

    def tokens_per_second(
        self, index: int, quant_type: QuantType, *, tokens: int, steps: int, inference: bool
    ) -> float:
        """The measured speed of a block, on one row, `tokens` at a time.

        Args:
            inference: with a cache, each step behind the others; else each from the first token on.
        """
        served = self.make_ready(self.load(index), index, quant_type)
        spec = served.cache_spec
        hidden = trial_tokens(self.planner)[:, :1].expand(1, tokens, -1).contiguous()
        caches = []
        for shape, dtype in spec.tensors(1, (steps + 1) * tokens, self.dtype):
            caches.append(torch.zeros(shape, dtype=dtype, device=self.device))
        started_s = 0.0
        with torch.inference_mode():
            for step in range(steps + 1):
                if step == 1:  # the first one warms up
                    self._synchronize()
                    started_s = time.perf_counter()
                if inference:
                    served.block.step(hidden, spec, caches, Chunk(step * tokens))
                else:
                    served.block(hidden)
            self._synchronize()
        return steps * tokens / (time.perf_counter() - started_s)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def load(self, index: int) -> nn.Module:
        """A block of transformers' own with its weights, on the CPU. Raises ModelError."""
        return self._checkpoint.take_block(index)  # one that a server gives up again leaves the memory

    def make_ready(self, block: nn.Module, index: int, quant_type: QuantType) -> ServedBlock:
        """Quantises a block that `load` returned, moves it to its device and tries it.

        Raises:
            ModelError: it computes something else with a cache than without.
        """
        linears = layers_of(block)
        if quant_type != QuantType.NONE:
            quantize_linears(block, quant_type.name.lower())
            quantize_experts(block, quant_type.name.lower())
        block.requires_grad_(False)
        block.to(self.device)
        keep_differentiable(block)
        block.eval()
        digest = self._checkpoint.digest_block(index)
        return ServedBlock(digest, block, index, self.planner, self.cache_specs[index], linears)
