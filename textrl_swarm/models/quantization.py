"""8-bit and 4-bit weights on this machine. The door to bitsandbytes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.models.adapters import find_blocks

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def quantization_config(quantization: str, device: torch.device) -> BitsAndBytesConfig:
    """What transformers needs to load weights in "8bit" or "4bit" (nf4). Raises ConfigError without
    bitsandbytes.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"quantization={quantization!r} needs bitsandbytes; type: pip install bitsandbytes ({error})"
        ) from error
    if quantization == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_notice)
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
    )


def _is_no_cast_notice(record: logging.LogRecord) -> bool:
    """bitsandbytes logs at every 8-bit matrix product that it computes in fp16: thousands of lines per
    rollout.
    """
    return "inputs will be cast from" not in str(record.msg)


def check_quantized(model: PreTrainedModel, quantization: str) -> None:
    """Finds out how much of the blocks was quantized: transformers skips layers of classes it does not know
    in silence.

    Raises:
        ModelError: nothing was quantized. When less than half was, a warning says how much.
    """
    name = type(model).__name__
    parameters = list(find_blocks(model)[1].parameters())
    unchanged = sum(p.nbytes for p in parameters if p.dtype not in (torch.int8, torch.uint8))
    share = unchanged / sum(p.nbytes for p in parameters)
    if share == 1:
        raise ModelError(
            f"quantization={quantization!r} reaches no weight in the blocks of {name} (unusual kinds of "
            "layers): "
            "leave it out"
        )
    if share > 0.5:
        logger.warning(
            "quantization=%r leaves %.0f %% of the bytes in the blocks of %s unchanged",
            quantization,
            100 * share,
            name,
        )


def keep_differentiable(module: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights. Call it before any forward of a model that is to be
    trained.

    On processors with AVX512-BF16, bitsandbytes repacks them at the first forward in evaluation mode, for a
    kernel that has no backward and fails on narrow layers.

    Raises:
        ModelError: the weights are repacked already. Repacking rounds the scales, so bitsandbytes' own
            inverse does not restore the same weights.
    """
    for path, layer in module.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ModelError(
                    f"bitsandbytes has repacked {path} for inference, at its first forward on this CPU, "
                    "and its "
                    "gradients would be wrong: load the model again and make the policy before using it, "
                    "or pass its "
                    "directory with quantization='4bit'"
                )
