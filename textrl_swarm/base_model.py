"""The door to base models on disk or on the hub: is it there, what is it, and under which name does a swarm serve it.

Knows nothing about weights in memory or about servers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from textrl_swarm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_config(model: str | Path) -> PretrainedConfig:
    """The configuration of a model directory or hub id.

    Raises:
        ModelError: no such directory or hub id, no config.json, no weights or an adapter in the directory, code of its own, or no name.
    """
    from transformers import AutoConfig

    if not isinstance(model, (str, os.PathLike)):
        raise ModelError(f"model must be a directory, a hub id or a transformers model, got {type(model).__name__}")
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json; point to a directory written by save_pretrained")
        if not any((path / name).is_file() for name in WEIGHT_FILES):
            raise ModelError(f"{path} has a config.json but no weights; expected one of {', '.join(WEIGHT_FILES)}")
        if (path / "adapter_config.json").is_file():  # transformers would put that adapter into the model, or fail on it
            raise ModelError(
                f"{path} holds a model and, beside its weights, an adapter: move adapter_config.json and adapter_model.safetensors to a "
                "directory of their own (and give that as ref_adapter to start from it)"
            )
    elif path.exists():
        raise ModelError(f"{path} is a file; point to the directory that holds config.json and the weights")
    elif path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise ModelError(f"there is no directory {path}")
    try:
        return AutoConfig.from_pretrained(hub_name(model), trust_remote_code=False)  # None would ask on the terminal
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{str(model)!r} comes with code of its own, which is not run here: if you trust it, load it with "
                "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True) and pass the model"
            ) from error
        raise ModelError(f"{str(model)!r} is neither a model directory here nor a model that can be had from the hub: {error}") from error


def hub_name(model: str | Path) -> str:
    """`bigscience/bloom-petals` and its like were converted copies for old Petals; the original repositories serve now."""
    name = str(model)
    return name.removesuffix("-petals") if name.startswith("bigscience/") else name


def default_dht_prefix(model: str | Path) -> str:
    """The name under which a swarm announces this model's blocks: petals' own for hub ids, the directory's for directories.

    A dot or a space would end the name on the wire, so both become dashes.
    """
    path = Path(model)
    name = path.resolve().name if path.is_dir() else hub_name(model) + "-petals"
    return name.replace(".", "-").replace(" ", "-")
