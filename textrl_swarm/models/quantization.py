"""8-bit and 4-bit weights on this machine. The door to bitsandbytes."""

from __future__ import annotations

import copy
import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import AutoQuantizationConfig

from textrl_swarm.config import QUANTIZATIONS
from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.models import experts
from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.models.layers import (
    as_linear,
    expert_parameters,
    find_blocks,
    linear_layers,
    linear_of,
    quantizable_layers,
    routed_experts,
)
from textrl_swarm.models.pretrained import load_weights

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_DEQUANTIZED_FORMATS = ("mxfp4", "fp8")


def saved_quantization(base: BaseModel) -> str | None:
    """How the weights that are trained on are quantised on the disk: "8bit", "4bit" (bitsandbytes), or None =
    they are not, or are dequantised when they are loaded.

    Raises:
        ModelError: they are quantised by another method (GPTQ, AWQ, ...).
    """
    settings = _stored_settings(base.config)
    if settings is None or dequantizing_config(base.config) is not None:
        return None
    for bits in QUANTIZATIONS:
        if settings.get(f"load_in_{bits}"):
            return bits
    raise ModelError(
        f"the weights of {base} are quantised by {settings.get('quant_method', 'an unknown method')}; only "
        "those of bitsandbytes (8bit, 4bit), MXFP4 and FP8 can be used here: name the model that they were "
        "made from, with quantization='8bit' or '4bit' to save memory"
    )


def dequantizing_config(config: PretrainedConfig) -> Any:
    """What makes transformers turn stored numbers into those of the model's dtype while it reads them; None
    for weights that are not stored in MXFP4 (gpt-oss) or FP8 (DeepSeek V3, Qwen).
    """
    settings = _stored_settings(config)
    if settings is None or settings.get("quant_method") not in _DEQUANTIZED_FORMATS:
        return None
    return AutoQuantizationConfig.from_dict({**settings, "dequantize": True})


def _stored_settings(config: PretrainedConfig) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def require_bitsandbytes(what: str) -> None:
    """Raises ConfigError, naming what needs it, where bitsandbytes cannot be imported."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{what} needs bitsandbytes; type: pip install bitsandbytes ({error})") from error


def silence_8bit_casts() -> None:
    """bitsandbytes logs at every 8-bit matrix product that it computes in fp16: thousands of lines per
    rollout.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_notice)


def load_unquantized(base: BaseModel, dtype: torch.dtype | str) -> PreTrainedModel:
    """A model that bitsandbytes did not quantise; other stored formats are dequantised. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    stored = dequantizing_config(base.config)
    options = {} if stored is None else {"quantization_config": stored}
    return load_weights(AutoModelForCausalLM, base, dtype=dtype, **options)


def load_plain_weights(base: BaseModel) -> PreTrainedModel:
    """The model in its own dtype; quantised weights are dequantised. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    if saved_quantization(base) is None:
        return load_unquantized(base, "auto")
    require_bitsandbytes(f"{base}, whose weights are quantised,")
    quantized = load_weights(AutoModelForCausalLM, base, dtype="auto", device_map={"": "cpu"})
    quantized.dequantize()
    # A new model: transformers 5 cannot save one that it loaded from quantised weights, dequantised or not.
    config = copy.deepcopy(quantized.config)
    vars(config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=quantized.dtype)
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    plain.name_or_path = base.name
    return plain.eval()


def quantization_config(quantization: str, device: torch.device) -> BitsAndBytesConfig:
    """What transformers needs to load weights in "8bit" or "4bit" (nf4). Raises ConfigError without
    bitsandbytes.
    """
    from transformers import BitsAndBytesConfig

    require_bitsandbytes(f"quantization={quantization!r}")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
    )


def quantize_linears(block: nn.Module, kind: str) -> None:
    """Puts bitsandbytes' layers in the place of a block's linear layers. They are rounded when they are moved
    to their device.

    Args:
        kind: "int8" or "nf4", as petals' servers have them (utils/convert_block.py).
    """
    for path in linear_layers(block):
        block.set_submodule(path, _quantized(as_linear(block.get_submodule(path)), kind))


def quantize_experts(block: nn.Module, kind: str) -> None:
    """The same with routed experts, which transformers and petals leave as they are."""
    for _, module in list(routed_experts(block)):
        for name in expert_parameters(module):
            experts.quantize(module, name, lambda weight: _quantized(linear_of(weight), kind))


def _quantized(linear: nn.Linear, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer: nn.Module
    if kind == "int8":  # the threshold is that of Dettmers et al. 2022, arXiv 2208.07339
        layer = _linear_8bit()(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.LinearNF4(*sizes, compress_statistics=True, device="meta")
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=True
        )
    layer.bias = linear.bias
    return layer


def warn_of_misread_rows(block: nn.Module, device: torch.device, name: str) -> None:
    """Says so when bitsandbytes reads 4-bit rows of this block wrongly: on CPUs, version 0.50 takes one scale
    for another when a row is an odd multiple of 32 numbers.
    """
    sizes = {own.fan_in for own in quantizable_layers(block).values()}
    misread = sorted(fan_in for fan_in in sizes if device.type == "cpu" and _misreads(fan_in))
    if misread:
        logger.warning(
            "bitsandbytes misreads the 4-bit weights of layers with %s inputs on this CPU: %s is another "
            "model here than on a GPU; use 8 bits, or none",
            " and ".join(map(str, misread)),
            name,
        )


@functools.cache
def _misreads(fan_in: int) -> bool:
    import bitsandbytes.functional as bnb

    weight = torch.randn((8, fan_in), generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-2, 2, 8)[:, None]  # scales that differ show when they are swapped
    again = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
    return bool(((again - weight).norm(dim=1) > 0.3 * weight.norm(dim=1)).any())


@functools.cache
def _linear_8bit() -> type[nn.Module]:
    import bitsandbytes as bnb

    class Linear8bit(bnb.nn.Linear8bitLt):
        """Takes inputs of any shape; bitsandbytes' own fails with four dimensions (DeepSeek's latents)."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    return Linear8bit


def _is_no_cast_notice(record: logging.LogRecord) -> bool:
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
