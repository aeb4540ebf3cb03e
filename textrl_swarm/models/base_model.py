"""Base models on disk or on the hub: whether one is there, what it is, and under which name a swarm serves
it.

Knows nothing about weights in memory or about servers.
"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textrl_swarm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


_OWN_CODE = "code of its own, which is not run here"


# What stands in the place of a file after a download that went wrong, by how it begins.
_STAND_INS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; type `git lfs pull` there",
    b"<": "a web page, not the file itself; download it again",
}
_MODEL_FILES = (".json", ".bin", ".safetensors")


@dataclass(frozen=True)
class BaseModel:
    """A model that `resolve` found: its name and its config.json, read once."""

    name: str
    """Directory or hub id, as transformers takes it."""

    config: PretrainedConfig

    dht_prefix: str
    """The name under which a swarm announces the model's blocks, unless the user chooses another."""

    def __str__(self) -> str:
        return self.name

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of its language model."""
        return self.config.get_text_config(decoder=True).num_hidden_layers


def resolve(model: str | Path | BaseModel, **download: Any) -> BaseModel:
    """Finds a model by directory or hub id and reads its configuration.

    Args:
        download: how a file of the hub is asked for (revision, token, cache_dir of `from_pretrained`).

    Raises:
        ModelError: no such directory or hub id, no config.json, no weights or an adapter in the directory,
            code of its own, or not a name at all.
    """
    if isinstance(model, BaseModel):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise ModelError(
            f"model must be a directory, a hub id or a transformers model, got {type(model).__name__}"
        )
    path = Path(model).expanduser()
    if str(model).startswith("~"):
        model = path
    if path.is_dir():
        _require_model_directory(path)
    elif path.exists():
        raise ModelError(f"{path} is a file; point to the directory that holds config.json and the weights")
    elif looks_like_path(model):
        raise ModelError(f"there is no directory {path}")
    name = hub_name(model)
    return BaseModel(name, _read_config(name, **download), _dht_prefix(name))


def _require_model_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; point to a directory written by save_pretrained")
    if not any((path / name).is_file() for name in WEIGHT_FILES):
        raise ModelError(
            f"{path} has a config.json but no weights; expected one of {', '.join(WEIGHT_FILES)}"
        )
    for name in ("config.json", "generation_config.json"):  # transformers ignores damage of the second
        if (path / name).is_file():
            _require_json_object(path / name)
    # transformers would load that adapter into the model, or fail on it.
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path} holds a model and, beside its weights, an adapter: move adapter_config.json and "
            "adapter_model.safetensors to a directory of their own (and give that as ref_adapter to start "
            "from it)"
        )


def _read_config(name: str, **download: Any) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        # None would ask on the terminal.
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **download)
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        if _wants_to_run_code(error):
            raise ModelError(
                f"{name!r} comes with {_OWN_CODE}: if you trust it, load it with "
                "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True) and pass the model"
            ) from error
        if Path(name).is_dir():
            raise ModelError(f"{name}/config.json describes no model: {reason_of(error, name)}") from error
        raise ModelError(f"{name!r} is neither a model directory nor a model on the hub: {error}") from error


def reason_of(error: Exception, directory: str | Path) -> str:
    """Why transformers could not load something from a model's files."""
    if _wants_to_run_code(error):
        return f"it comes with {_OWN_CODE}"
    if damage := damage_in(directory):
        return damage
    if isinstance(error, pickle.UnpicklingError):  # torch's own text recommends weights_only=False
        return "a .bin file there is no checkpoint of tensors, or is damaged; download it again"
    return str(error) or repr(error)


def damage_in(directory: str | Path) -> str | None:
    """The first file of a directory that is something else than its name says; None when there is none."""
    for path in sorted(Path(directory).glob("*")):
        if path.suffix in _MODEL_FILES and path.is_file():
            with path.open("rb") as file:
                start = file.read(64).lstrip()
            for beginning, what in _STAND_INS.items():
                if start.startswith(beginning):
                    return f"{path} is {what}"
            if not start:
                return f"{path} is empty; copy or download it again"
    return None


def _require_json_object(path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        problem = None if isinstance(found, dict) else f"it holds a {type(found).__name__}, no JSON object"
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise ModelError(
            f"{path} cannot be read: {damage_in(path.parent) or problem}; copy or download it again"
        )


def _wants_to_run_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def looks_like_path(name: str | Path) -> bool:
    """Whether a name that is no directory must have been meant as one: hub ids have the form `owner/name`."""
    return Path(name).is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1


def hub_name(model: str | Path) -> str:
    """The name to load a model by.

    `bigscience/bloom-petals` and its like were converted copies for old Petals; the original repositories
    serve now.
    """
    name = str(model)
    is_converted_copy = name.startswith("bigscience/") and not Path(name).is_dir()
    return name.removesuffix("-petals") if is_converted_copy else name


def _dht_prefix(name: str) -> str:
    """Petals' own name for hub ids, the directory's name for directories.

    A dot or a space would end the name on the wire, so both become dashes.
    """
    path = Path(name)
    prefix = path.resolve().name if path.is_dir() else name + "-petals"
    return prefix.replace(".", "-").replace(" ", "-")
