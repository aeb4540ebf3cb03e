"""Writing an adapter in PEFT's format or a merged model, each with a model card, and uploading it to the
hub.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors import SafetensorError

from textrl_swarm.errors import ExportError, ModelError
from textrl_swarm.export.card import CARD_FILE, TAG, model_card
from textrl_swarm.export.source import Source, adapter_config
from textrl_swarm.files import published
from textrl_swarm.models.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    VALUE_HEAD_WEIGHTS,
    merged_model,
)
from textrl_swarm.models.base_model import BaseModel, hub_name
from textrl_swarm.models.pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# All files that an export writes, in this version of transformers or another; tokenizers differ most.
_WRITTEN = (
    CARD_FILE,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    VALUE_HEAD_WEIGHTS,
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Merged:
    """A merged model on the disk."""

    dtype: torch.dtype
    """Of its weights, to which merging rounds the adapter's part."""

    missing_tokenizer: str | None
    """Why no tokenizer could be copied; None when one was."""


def require_target(source: Source, out: Path) -> None:
    """Raises ExportError unless `out` is new, empty, or an earlier export that may be replaced."""
    with _disk_errors(out):
        if out.exists() and not out.is_dir():
            raise ExportError(f"{out} is a file; name a directory")
        for what, needed in (
            ("base model", source.base_model),
            ("adapter", source.adapter),
            ("run", source.directory),
        ):
            if Path(needed).is_dir() and Path(needed).resolve().is_relative_to(out.resolve()):
                raise ExportError(
                    f"{out} holds the {what} that is to be exported ({needed}); name another directory"
                )
        foreign = _foreign(out) if out.is_dir() else []
    if foreign:
        listed = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        raise ExportError(
            f"refusing to overwrite {out}: it contains files that no export wrote ({listed}); "
            "move them away or name another directory"
        )


def _foreign(out: Path) -> list[str]:
    """Files that no export of ours wrote; without a model card of ours that is all of them."""
    try:
        is_ours = TAG in (ModelCard.load(out / CARD_FILE).data.tags or ())
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        is_ours = False
    foreign = []
    for path in out.iterdir():
        is_written = path.is_file() and any(fnmatch(path.name, name) for name in _WRITTEN)
        if not (is_ours and is_written):
            foreign.append(path.name)
    return sorted(foreign)


def write_adapter(source: Source, out: Path) -> None:
    """Writes the adapter with a model card. Raises ExportError when it cannot be written."""
    with _disk_errors(out), published(out) as staging:
        for name in (ADAPTER_WEIGHTS, VALUE_HEAD_WEIGHTS):
            if (source.adapter / name).is_file():
                shutil.copyfile(source.adapter / name, staging / name)
        settings = {**adapter_config(source.adapter), "base_model_name_or_path": hub_name(source.base_model)}
        (staging / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        model_card(source, merged=False).save(staging / CARD_FILE)


def write_merged(source: Source, base: BaseModel, out: Path) -> Merged:
    """Writes the base model with the adapter added to its weights, the tokenizer and a model card.

    Raises:
        ExportError: it cannot be written.
        AdapterError: the adapter does not fit the model.
    """
    model = merged_model(base, source.adapter)
    tokenizer, missing = _tokenizer(base)
    with _disk_errors(out), published(out) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        model_card(source, merged=True).save(staging / CARD_FILE)
    return Merged(model.dtype, missing)


def _tokenizer(base: BaseModel) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    try:
        return load_tokenizer(base.name), None
    except ModelError as error:
        return None, str(error)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turns a full disk, a mount point or missing permission into an ExportError that names the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out} cannot be written: {error}; make room or name another directory") from error


def push_to_hub(directory: Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads an export; returns its address. Raises ExportError when the hub cannot be reached or
    refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=str(directory), repo_id=repo_id, commit_message="Adapter trained with textrl_swarm"
        )
    except Exception as error:  # huggingface_hub and its HTTP library raise many kinds
        raise ExportError(
            f"{directory} is written, but {repo_id} could not be uploaded: {error}\n"
            "Log in with `hf auth login` (or set HF_TOKEN), look at the network, and rerun the command."
        ) from error
    return str(address)
