"""How many numbers and bytes a model has, from its configuration alone, before any weight is loaded.

A model without memory (torch's meta device) is built to count parameters and to see what blocks keep in their
caches, so that every architecture counts itself. Knows nothing about servers, networks or training runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from textrl_swarm.config import LoraSettings
from textrl_swarm.decoders.block import cache_spec
from textrl_swarm.decoders.caches import CacheSpec
from textrl_swarm.decoders.planner import Planner
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.errors import ConfigError, ModelError, closest
from textrl_swarm.models.adapters import choose_targets, first_adapted_block
from textrl_swarm.models.layers import LayerSizes, layers_of, quantizable_layers

FP32_BYTES = 4

# Bytes per number of a linear layer. 8bit: bitsandbytes adds an fp32 scale per row, counted in `block_bytes`.
# 4bit (nf4): an fp32 scale per 64 numbers; petals' servers compress these scales again and need 8 % less than
# counted here.
PRECISIONS = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}


@dataclass(frozen=True)
class ModelSizes:
    """Numbers (not bytes) in the parts of a model."""

    num_blocks: int

    hidden_size: int
    """H, numbers per token between two blocks."""

    head_size: int
    """Numbers per token that output embeddings and value head read; differs from H only in models such as
    opt-350m.
    """

    vocab_size: int

    num_heads: int
    """0 in models without attention."""

    caches: tuple[CacheSpec, ...]
    """What each block keeps for the tokens of a generation."""

    blocks: tuple[int, ...]
    """Parameters of each block."""

    outside: int
    """Parameters of embeddings, final norm and output embeddings (tied ones once): a swarm's client holds
    only these.
    """

    layers: Mapping[str, LayerSizes]
    """Path inside a block -> sizes of its linear layers and routed experts, over all blocks."""

    block_layers: tuple[Mapping[str, LayerSizes], ...]
    """The same for each block."""

    quantizable: tuple[Mapping[str, LayerSizes], ...]
    """Of each block, what 8 and 4 bits reach."""

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(self.blocks) + self.outside


def model_sizes(config: PretrainedConfig) -> ModelSizes:
    """Counts the parameters of a decoder-only causal language model. Raises ModelError for anything else."""
    skeleton = Skeleton(config, torch.float32)
    blocks = tuple(sum(p.numel() for p in block.parameters()) for block in skeleton.blocks)
    block_layers = tuple(layers_of(one) for one in skeleton.blocks)
    return ModelSizes(
        num_blocks=len(blocks),
        hidden_size=skeleton.hidden_size,
        head_size=skeleton.model.get_output_embeddings().weight.shape[1],
        vocab_size=skeleton.config.vocab_size,
        num_heads=getattr(skeleton.config, "num_attention_heads", 0),
        caches=_caches(skeleton),
        blocks=blocks,
        outside=sum(p.numel() for p in skeleton.model.parameters()) - sum(blocks),
        layers={path: sizes for layers in block_layers for path, sizes in layers.items()},
        block_layers=block_layers,
        quantizable=tuple(quantizable_layers(one) for one in skeleton.blocks),
    )


def _caches(skeleton: Skeleton) -> tuple[CacheSpec, ...]:
    try:
        planner = Planner(skeleton.model.config, skeleton.dtype, "cpu")
        return tuple(cache_spec(block, i, planner) for i, block in enumerate(skeleton.blocks))
    except ModelError:  # its blocks do not run alone; on one machine they need not
        return (_usual_cache(skeleton.config),) * skeleton.num_blocks


def _usual_cache(config: PretrainedConfig) -> CacheSpec:
    heads = getattr(config, "num_attention_heads", 0)
    if heads == 0:  # e.g. RWKV: its state does not grow with the sequence
        return CacheSpec()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads, head_dim
    return CacheSpec(key=kept, value=kept)


def adapted_layers(sizes: ModelSizes, lora: LoraSettings, blocks: range | None = None) -> list[LayerSizes]:
    """The sizes of every layer that is adapted.

    Args:
        blocks: among which it is; None = all.
    """
    targets = choose_targets(sizes.layers, lora.targets)
    found = []
    for block in blocks or range(sizes.num_blocks):
        if block >= first_adapted(sizes, lora):
            found += [own for path, own in sizes.block_layers[block].items() if path in targets]
    return found


def first_adapted(sizes: ModelSizes, lora: LoraSettings) -> int:
    """Index of the first adapted block."""
    return first_adapted_block(sizes.num_blocks, lora.layers)


def adapter_parameters(sizes: ModelSizes, lora: LoraSettings, blocks: range | None = None) -> int:
    """Numbers in the LoRA tensors: sum over adapted layers of r (in + out), of routed experts for each.

    Args:
        blocks: among which the layers are; None = all.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    return sum(lora.r * own.low_rank for own in adapted_layers(sizes, lora, blocks))


def value_head_parameters(sizes: ModelSizes) -> int:
    """Numbers in the value head: one linear layer with one output."""
    return sizes.head_size + 1


def block_bytes(sizes: ModelSizes, block: int, precision: str, rest: str = "bfloat16") -> int:
    """Memory of one block's weights.

        linear weights * bytes per number (+ 4 bytes per output row in 8 bits) + (norms and biases) * bytes of
        `rest`

    Args:
        precision: of the linear layers and routed experts, a key of PRECISIONS.
        rest: precision of what is not quantized, when `precision` is 8bit or 4bit.
    """
    per_number = bytes_per_number(precision)
    if precision not in ("8bit", "4bit"):
        return int(sizes.blocks[block] * per_number)
    layers = sizes.quantizable[block].values()
    quantized = sum(own.weights for own in layers)
    rows = sum(own.fan_out * (own.experts or 1) for own in layers) if precision == "8bit" else 0
    unquantized = sizes.blocks[block] - quantized
    return int(quantized * per_number) + FP32_BYTES * rows + int(unquantized * PRECISIONS[rest])


def bytes_per_number(precision: str) -> float:
    """Bytes per number of a linear layer's weights. Raises ConfigError for an unknown precision."""
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; {closest(precision, PRECISIONS)}")
    return PRECISIONS[precision]
