"""What `from_pretrained` loads, for local policies and for the client's part of a model in a swarm: whole, or
with an error that says what is wrong.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.models.base_model import BaseModel, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_weights(model_class: Any, base: BaseModel, **options: Any) -> PreTrainedModel:
    """`model_class.from_pretrained` that never returns a model with random weights.

    Args:
        model_class: a transformers model class, or AutoModelForCausalLM.
        options: further arguments of `from_pretrained`.

    Raises:
        ModelError: the weights cannot be read, or some are missing.
    """
    try:
        model, found = model_class.from_pretrained(
            base.name, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:  # a damaged file can fail in any way
        reason = reason_of(error, base.name)
        raise ModelError(f"the weights of {base.name!r} cannot be loaded: {reason}") from error
    if found["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"{len(missing)} weights are missing in the checkpoint of {base.name!r}, e.g. {missing[0]}"
        )
    return model


def require_finite(model: torch.nn.Module, name: str) -> None:
    """Raises ModelError when a parameter of `model` holds NaN or infinite numbers."""
    for path, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{path} in the checkpoint of {name!r} holds NaN or infinite numbers; it is damaged"
            )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises ModelError when there is none, or none that works."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # what tokenizers raises for a damaged file is a plain Exception
        reason = reason_of(error, model)
        raise ModelError(f"the tokenizer of {model!r} cannot be loaded: {reason}") from error
    # Where its files are missing, transformers makes an empty one for many families, and says nothing.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ModelError(f"{model!r} has no tokenizer: there are no files with its vocabulary")
    return tokenizer


def find_tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model; None when there is none that works: prompts must then be token ids."""
    if not model:  # an object that was not loaded: "" would mean the current directory
        return None
    try:
        return load_tokenizer(model)
    except ModelError as error:
        if any(Path(model).glob("tokenizer*")):
            logger.warning("%s; prompts must be token ids", error)
        return None


def usable_device(device: torch.device | str | int) -> torch.device:
    """The device that torch means by a name. Raises ConfigError when this machine has no such device."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:  # Assertion: no CUDA
        raise ConfigError(f"device={device!r} cannot be used on this machine: {error}") from error
