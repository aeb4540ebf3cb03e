"""Models for policies on this machine, loaded or taken as they are: in full precision, 8-bit or 4-bit.

Any decoder-only Hugging Face model. Knows nothing about adapters.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from textrl_swarm.config import QUANTIZATIONS, LoraSettings
from textrl_swarm.decoders.loading import load_by_blocks
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.models.adapters import has_adapter
from textrl_swarm.models.base_model import BaseModel, resolve
from textrl_swarm.models.layers import routed_experts
from textrl_swarm.models.pretrained import find_tokenizer, load_weights, usable_device
from textrl_swarm.models.quantization import (
    check_quantized,
    dequantizing_config,
    load_unquantized,
    quantization_config,
    require_bitsandbytes,
    saved_quantization,
    warn_of_misread_rows,
)
from textrl_swarm.policies.local import POLICY, LocalPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_local_policy(
    model: str | Path | BaseModel | nn.Module,
    *,
    quantization: str | None,
    lora: LoraSettings,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None,
    gradient_checkpointing: bool = False,
) -> LocalPolicy:
    """See `loading.load_policy`."""
    if quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantization must be None, '8bit' or '4bit', got {quantization!r}")
    if isinstance(model, nn.Module):
        earlier = vars(model).get(POLICY)
        if earlier is not None:
            logger.warning(
                "this model was another policy's: that policy is closed now, and what it learned is no "
                "longer in the model"
            )
            earlier.close()
        plain = _require_plain_decoder(model)
        _require_same_options(plain, quantization, dtype, device)
        found = tokenizer or find_tokenizer(plain.name_or_path)
        return LocalPolicy(plain, lora, seed, found, gradient_checkpointing)
    base = resolve(model)
    _require_decoder(base.config, base.name)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    place = usable_device(default_device if device is None else device)
    loaded = _load(base, quantization, dtype, place)
    return LocalPolicy(loaded, lora, seed, tokenizer or find_tokenizer(base.name), gradient_checkpointing)


def _load(
    base: BaseModel, quantization: str | None, dtype: torch.dtype | str | None, device: torch.device
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    saved = saved_quantization(base)
    found = saved or quantization
    if found is None:
        return load_unquantized(base, dtype or "auto").to(device)
    options: dict[str, Any] = {"dtype": dtype or "auto", "device_map": {"": device}}
    if saved is not None:
        if quantization not in (None, saved):
            raise ConfigError(
                f"quantization={quantization!r}, but the weights of {base} are saved in {saved}: leave it out"
            )
        require_bitsandbytes(f"{base}, whose weights are saved in {saved},")
    else:
        options["quantization_config"] = quantization_config(found, device)
    blocks = Skeleton(base.config, torch.float32).blocks
    is_stored_otherwise = dequantizing_config(base.config) is not None
    if saved is None and (is_stored_otherwise or any(True for _ in routed_experts(blocks))):
        # transformers quantises no experts, and nothing that is stored in another format.
        model = load_by_blocks(base, dtype, device, "int8" if found == "8bit" else "nf4")
    else:
        model = load_weights(AutoModelForCausalLM, base, **options)
    check_quantized(model, found)
    if found == "4bit":
        warn_of_misread_rows(blocks, device, base.name)
    return model


def _require_same_options(
    model: PreTrainedModel,
    quantization: str | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> None:
    """Options of loading do not change a loaded model. Raises ConfigError when they ask for another one."""
    if quantization is not None:
        raise ConfigError(
            "quantization is chosen when weights are loaded: pass the model's directory or hub id, "
            "or a quantized model"
        )
    wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted not in (None, "auto", model.dtype):
        raise ConfigError(
            f"dtype={dtype!r}, but the model is loaded in {model.dtype}: convert it with model.to(dtype), "
            "or leave dtype out"
        )
    if device is not None and usable_device(device) != model.device:
        raise ConfigError(
            f"device={device!r}, but the model is on {model.device}: move it with model.to(device), "
            "or leave device out"
        )


def _require_decoder(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({config.model_type}); only decoder-only language models "
            "can be "
            "trained: use one of those, e.g. bigscience/bloomz-560m in the place of an instruction-tuned "
            "T5, or gpt2 "
            "in that of BART"
        )


def _require_plain_decoder(model: nn.Module) -> PreTrainedModel:
    name = type(model).__name__
    if has_adapter(model):
        raise ModelError(
            "this model already has a PEFT adapter: pass the base model, then policy.load_adapter(directory)"
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{name} is no transformers model; pass one, or a directory or hub id")
    _require_decoder(model.config, name)
    return model
