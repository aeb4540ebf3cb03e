"""The weights of a checkpoint, read by the part: one block, or what is outside of the blocks.

Only the files that hold the part are downloaded, and only its tensors are read. Transformers' own conversion
renames them, fuses experts, dequantises MXFP4 and FP8, and casts. Knows nothing about servers.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.hub import cached_file

from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.errors import ModelError
from textrl_swarm.models.base_model import WEIGHT_FILES, BaseModel, reason_of
from textrl_swarm.models.digests import digest_tensors
from textrl_swarm.models.quantization import dequantizing_config


class Checkpoint:
    """A checkpoint on disk or on the hub, whole or in shards, safetensors or `.bin`.

    Args:
        base: the model.
        skeleton: of the same model; parts are loaded into it.
        download: how a file of the hub is asked for (cache_dir, token, revision of `cached_file`).

    Raises:
        ModelError: no weights, or an index that cannot be read.
    """

    def __init__(self, base: BaseModel, skeleton: Skeleton, **download: Any):
        self._base = base
        self._skeleton = skeleton
        self._download = download
        self._opened: dict[str, Any] = {}
        self._files = self._find_files()
        stored = dequantizing_config(base.config)
        self._quantizer = None if stored is None else AutoHfQuantizer.from_config(stored, pre_quantized=True)
        self._mapping = get_model_conversion_mapping(skeleton.model, hf_quantizer=self._quantizer)
        self._names = self._model_names()

    def load_block(self, block: int) -> nn.Module:
        """A block with its weights, on the CPU and in the skeleton's dtype.

        Raises:
            ModelError: weights are missing, damaged or hold NaN.
        """
        prefix = self._skeleton.block_prefix(block)
        self._load(lambda name: name.startswith(prefix), f"block {block}")
        return self._skeleton.blocks[block]

    def take_block(self, block: int) -> nn.Module:
        """As `load_block`; the skeleton does not hold it, so that its memory is free when the caller drops
        it.
        """
        spare = copy.deepcopy(self._skeleton.blocks[block])
        loaded = self.load_block(block)
        self._skeleton.blocks[block] = spare
        return loaded

    def digest_block(self, block: int) -> str:
        """Of a block's numbers, as models/digests.py has it for whole checkpoints."""
        prefix = self._skeleton.block_prefix(block)
        leaf = self._skeleton.blocks_path.rpartition(".")[2]
        inside = re.compile(rf"(?:.*?\.)?{re.escape(leaf)}\.{block}\.(.+)")
        names = {}
        for raw, name in self._names.items():
            if name.startswith(prefix):
                match = inside.fullmatch(raw)
                names[match[1] if match else raw] = raw
        try:
            return digest_tensors((name, self._tensor(names[name])) for name in sorted(names))
        finally:
            self._opened.clear()

    def load_outside(self) -> None:
        """Puts the weights outside of the blocks into the skeleton. Raises ModelError like `load_block`."""
        self._load(self._skeleton.is_outside, "what is outside of the blocks")

    def _load(self, is_wanted: Callable[[str], bool], what: str) -> None:
        model = self._skeleton.model
        names = [raw for raw, name in self._names.items() if is_wanted(name)]
        options = LoadStateDictConfig(
            hf_quantizer=self._quantizer,
            dtype=self._skeleton.dtype,
            dtype_plan=model._get_dtype_plan(self._skeleton.dtype),
            weight_mapping=self._mapping,
            device_map={"": torch.device("cpu")},
        )
        try:
            found, _ = convert_and_load_state_dict_in_model(
                model=model, state_dict=self._lazily(names), load_config=options
            )
        except ModelError:
            raise
        except Exception as error:  # a damaged file can fail in any way
            reason = reason_of(error, self._base.name)
            raise ModelError(f"the weights of {self._base} cannot be loaded: {reason}") from error
        finally:
            self._opened.clear()
        if found.mismatched_keys or found.error_msgs:
            raise ModelError(f"{what} of {self._base} does not fit its config.json: {found}")
        model.tie_weights()
        self._require_all(is_wanted, found.missing_keys, what)

    def _require_all(self, is_wanted: Callable[[str], bool], missing: Iterable[str], what: str) -> None:
        model = self._skeleton.model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        lacking = []
        for name in missing:
            if is_wanted(name) and (name not in parameters or parameters[name].is_meta):
                lacking.append(name)
        for name in lacking:
            raise ModelError(
                f"{len(lacking)} weights are missing in the checkpoint of {self._base.name!r}, e.g. {name}"
            )
        for name, parameter in parameters.items():
            if is_wanted(name) and parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise ModelError(
                    f"{name} in the checkpoint of {self._base.name!r} holds NaN or infinite numbers; it is "
                    "damaged"
                )

    # -- files

    def _find_files(self) -> Mapping[str, str]:
        """Name of a weight in the files -> file that holds it."""
        for name in WEIGHT_FILES:
            path = self._file(name, required=False)
            if path is None:
                continue
            if not name.endswith(".index.json"):
                return dict.fromkeys(self._open(name).keys(), name)
            try:
                return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                reason = reason_of(error, path.parent)
                raise ModelError(f"the weights of {self._base} cannot be loaded: {path}: {reason}") from error
        raise ModelError(f"{self._base} has no weights; expected one of {', '.join(WEIGHT_FILES)}")

    def _file(self, name: str, *, required: bool = True) -> Path | None:
        options = dict(self._download)
        if not required:
            options |= dict.fromkeys(
                ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
            )
        try:
            path = cached_file(self._base.name, name, **options)
        except OSError as error:
            raise ModelError(f"{name} of {self._base} cannot be read: {error}") from error
        return None if path is None else Path(path)

    def _open(self, name: str) -> Any:
        """Something with `keys()`, and tensors by key that are read when they are used."""
        if name not in self._opened:
            path = self._file(name)
            assert path is not None
            try:
                if path.suffix == ".safetensors":
                    self._opened[name] = safe_open(path, "pt")
                else:
                    self._opened[name] = _read_bin(path)
            except Exception as error:  # a damaged file can fail in any way
                reason = f"{name}: {reason_of(error, path.parent)}"
                raise ModelError(f"the weights of {path.parent} cannot be loaded: {reason}") from error
        return self._opened[name]

    def _tensor(self, raw: str) -> torch.Tensor:
        opened = self._open(self._files[raw])
        return opened[raw] if isinstance(opened, Mapping) else opened.get_tensor(raw)

    def _lazily(self, names: Iterable[str]) -> dict[str, Any]:
        tensors = {}
        for raw in names:
            opened = self._open(self._files[raw])
            tensors[raw] = opened[raw] if isinstance(opened, Mapping) else opened.get_slice(raw)
        return tensors

    def _model_names(self) -> dict[str, str]:
        """Name of a weight in the files -> its name in the model."""
        model = self._skeleton.model
        state = model.state_dict()
        prefix = model.base_model_prefix
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        names = {}
        for raw in self._files:
            name, _ = rename_source_key(raw, renamings, converters, prefix, state)
            if name not in state:  # as convert_and_load_state_dict_in_model does
                plain, _ = rename_source_key(raw, [], [], prefix, state)
                name = plain if plain in state else name
            names[raw] = name
        return names


def _read_bin(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:  # of a torch before 1.6: no zip file, to be read whole
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, Mapping):
        raise ModelError(f"{path} holds a {type(tensors).__name__}, no tensors by name")
    return tensors
