"""How many numbers and bytes a model has, from its configuration alone, before any weight is loaded.

A model without memory (torch's meta device) is built to count parameters, so that every architecture counts
itself. Knows nothing about servers, networks or training runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import ConfigError, ModelError, closest
from textrl_swarm.models.adapters import (
    LayerSizes,
    choose_targets,
    find_blocks,
    first_adapted_block,
    linear_layers,
)

FP32_BYTES = 4

# Bytes per number of a linear layer. 8bit: bitsandbytes adds an fp32 scale per row, counted in `block_bytes`.
# 4bit (nf4): an fp32 scale per 64 numbers; petals' servers compress these scales again and need 8 % less than
# counted here.
PRECISIONS = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}


@dataclass(frozen=True)
class ModelSizes:
    """Numbers (not bytes) in the parts of a model. Figures for one block are the mean over all blocks."""

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

    key_size: int
    """Numbers per token that one block's cache keeps for the keys, and again for the values."""

    block: int
    """Parameters of one block."""

    outside: int
    """Parameters of embeddings, final norm and output embeddings (tied ones once): a swarm's client holds
    only these.
    """

    linears: Mapping[str, LayerSizes]
    """Path of a linear layer inside a block -> (in_features, out_features), over all blocks."""

    block_linears: tuple[Mapping[str, LayerSizes], ...]
    """The same for each block."""

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.num_blocks * self.block + self.outside

    @property
    def block_linear(self) -> int:
        """Parameters of one block that quantization reaches: the weights of its linear layers."""
        weights = 0
        for layers in self.block_linears:
            weights += sum(fan_in * fan_out for fan_in, fan_out in layers.values())
        return weights // self.num_blocks


def model_sizes(config: PretrainedConfig) -> ModelSizes:
    """Counts the parameters of a decoder-only causal language model. Raises ModelError for anything else."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"a {config.model_type} model is no causal language model that transformers knows: {error}"
        ) from error
    blocks = find_blocks(model)[1]
    block = sum(p.numel() for p in blocks.parameters()) // len(blocks)
    text = config.get_text_config(decoder=True)  # of models that see images too
    block_linears = tuple(linear_layers(one) for one in blocks)
    return ModelSizes(
        num_blocks=len(blocks),
        hidden_size=text.hidden_size,
        head_size=model.get_output_embeddings().weight.shape[1],
        vocab_size=text.vocab_size,
        num_heads=getattr(text, "num_attention_heads", 0),
        key_size=_key_size(text),
        block=block,
        outside=sum(p.numel() for p in model.parameters()) - len(blocks) * block,
        linears={path: sizes for layers in block_linears for path, sizes in layers.items()},
        block_linears=block_linears,
    )


def _key_size(config: PretrainedConfig) -> int:
    heads = getattr(config, "num_attention_heads", 0)
    if heads == 0:  # e.g. RWKV and Mamba: their state does not grow with the sequence
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return head_dim  # the excluded case is Falcon 40B
    return head_dim * (getattr(config, "num_key_value_heads", None) or heads)


def adapted_layers(sizes: ModelSizes, lora: LoraSettings) -> list[LayerSizes]:
    """(in_features, out_features) of every linear layer that is adapted."""
    targets = choose_targets(sizes.linears, lora.targets)
    adapted_blocks = sizes.block_linears[first_adapted(sizes, lora) :]
    return [fans for layers in adapted_blocks for path, fans in layers.items() if path in targets]


def first_adapted(sizes: ModelSizes, lora: LoraSettings) -> int:
    """Index of the first adapted block."""
    return first_adapted_block(sizes.num_blocks, lora.layers)


def adapter_parameters(sizes: ModelSizes, lora: LoraSettings) -> int:
    """Numbers in the LoRA tensors: sum over adapted layers of r (in + out).

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    return sum(lora.r * (fan_in + fan_out) for fan_in, fan_out in adapted_layers(sizes, lora))


def value_head_parameters(sizes: ModelSizes) -> int:
    """Numbers in the value head: one linear layer with one output."""
    return sizes.head_size + 1


def block_bytes(sizes: ModelSizes, precision: str, rest: str = "bfloat16") -> int:
    """Memory of one block's weights.

        linear weights * bytes per number (+ 4 bytes per output row in 8 bits) + (norms and biases) * bytes of
        `rest`

    Args:
        precision: of the linear layers, a key of PRECISIONS.
        rest: precision of what is not quantized, when `precision` is 8bit or 4bit.
    """
    per_number = bytes_per_number(precision)
    if precision not in ("8bit", "4bit"):
        return int(sizes.block * per_number)
    scales = 0
    if precision == "8bit":
        rows = sum(fan_out for layers in sizes.block_linears for _, fan_out in layers.values())
        scales = FP32_BYTES * (rows // sizes.num_blocks)
    unquantized = sizes.block - sizes.block_linear
    return int(sizes.block_linear * per_number) + scales + int(unquantized * PRECISIONS[rest])


def bytes_per_number(precision: str) -> float:
    """Bytes per number of a linear layer's weights. Raises ConfigError for an unknown precision."""
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; {closest(precision, PRECISIONS)}")
    return PRECISIONS[precision]
