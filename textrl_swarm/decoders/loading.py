"""Models loaded by the part: without their blocks, or block by block."""

from __future__ import annotations

from contextlib import suppress

import torch
from transformers import GenerationConfig, PreTrainedModel

from textrl_swarm.decoders.checkpoint import Checkpoint
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.errors import ConfigError
from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.models.quantization import quantize_experts, quantize_linears


def load_by_blocks(
    base: BaseModel, dtype: torch.dtype | str | None, device: torch.device, kind: str
) -> PreTrainedModel:
    """A model with quantised blocks. One block at a time is in memory as the checkpoint has it.

    Args:
        dtype: of what is not quantised; None or "auto" = that of the checkpoint.
        kind: "int8" or "nf4".

    Raises:
        ModelError: a weight is missing, or its file cannot be read.
    """
    skeleton, checkpoint = load_outside(base, dtype)
    for i in range(skeleton.num_blocks):
        block = checkpoint.load_block(i)
        quantize_linears(block, kind)
        quantize_experts(block, kind)
        block.to(device)
    skeleton.move(device)
    setattr(skeleton.model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return skeleton.model


def load_outside(base: BaseModel, dtype: torch.dtype | str | None) -> tuple[Skeleton, Checkpoint]:
    """A model without its blocks, and where to load them from. Files that hold nothing but blocks are not
    downloaded. Raises like `load_by_blocks`.
    """
    skeleton = Skeleton(base.config, _dtype(base, dtype))
    checkpoint = Checkpoint(base, skeleton)
    checkpoint.load_outside()
    skeleton.model.name_or_path = base.name
    with suppress(OSError):  # there need not be a generation_config.json
        skeleton.model.generation_config = GenerationConfig.from_pretrained(base.name)
    return skeleton, checkpoint


def _dtype(base: BaseModel, dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = base.config.dtype if dtype in (None, "auto") else dtype
    found = getattr(torch, str(name or "float32").removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype must be a torch dtype or its name, e.g. 'bfloat16', got {dtype!r}")
    return found
