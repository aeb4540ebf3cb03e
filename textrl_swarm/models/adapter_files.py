"""Adapters on disk and on the hub, in PEFT's format: writing, reading, and refusing what is not plain LoRA.

Knows nothing about models in memory, except to merge an adapter into one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import AdapterError
from textrl_swarm.models.adapters import adapted_paths, matched_layers, without_peft_notices
from textrl_swarm.models.base_model import WEIGHT_FILES, BaseModel, damage_in
from textrl_swarm.models.layers import LayerSizes, find_blocks, layers_of
from textrl_swarm.models.quantization import load_plain_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
VALUE_HEAD_WEIGHTS = "value_head.safetensors"
_PICKLED_WEIGHTS = "adapter_model.bin"

# Of init_lora_weights; the others change the base weights, so the adapter belongs to the changed ones.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "mica", "orthogonal")
# Settings of PEFT's LoraConfig that make the adapted layer another function than W + (alpha / r) * B A.
_OTHER_FUNCTIONS = (
    "use_dora",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_IN_BLOCK = re.compile(r"\.(\d+)\.(.+)\.lora_([AB])\.weight")  # ....h.3.self_attention.dense.lora_A.weight
_IN_MODEL = re.compile(r"\.(\d+)\..*?([^.]+\.[^.]+)$")  # model.layers.3.mlp.experts.down_proj


# ------------------------------------------------------------------------------------------- writing


def save_tensors(
    directory: str | Path, tensors: Mapping[str, Tensor], config: LoraConfig, value_head: Mapping[str, Tensor]
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` loads, and the value head beside it.

    Raises:
        AdapterError: `directory` is a file, or holds a model.
    """
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; give a directory to save the adapter in")
    if any((path / name).is_file() for name in WEIGHT_FILES):
        raise AdapterError(
            f"{path} holds a model, which transformers would load with the adapter in it: "
            "give the adapter a directory of its own"
        )
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    save_file(_plain(tensors), path / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    save_file(_plain(value_head), path / VALUE_HEAD_WEIGHTS)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------- reading


def load_tensors(
    directory: str | Path, expected: Mapping[str, Tensor], config: LoraConfig
) -> dict[str, Tensor]:
    """Reads an adapter that fits `expected` (name -> tensor of the right shape) exactly.

    Raises:
        AdapterError: no adapter there, another kind, or made for another model or other LoRA settings.
    """
    path = Path(directory).expanduser()
    _require_adapter(path)
    found_config = _read_config(path)
    tensors = read_tensors(path / ADAPTER_WEIGHTS)
    difference = _difference(tensors, expected)
    if difference:
        raise AdapterError(
            f"the adapter in {path} does not fit: {difference}. It was made for {_summary(found_config)}; "
            f"this policy has {_summary(config)}"
        )
    _require_one_scale(found_config, path)
    if _scaling(found_config) != _scaling(config):
        differs = bool(found_config.use_rslora) != bool(config.use_rslora)
        stabilized = f", rank_stabilized={bool(found_config.use_rslora)}" if differs else ""
        raise AdapterError(
            f"the adapter in {path} is scaled by {_scale(found_config)}, this policy by {_scale(config)}; "
            f"make the policy with alpha={found_config.lora_alpha:g}{stabilized}"
        )
    return tensors


def _scaling(config: LoraConfig) -> tuple[int, float, bool]:
    return config.r, float(config.lora_alpha), bool(config.use_rslora)


def _scale(config: LoraConfig) -> str:
    root = "sqrt " if config.use_rslora else ""
    return f"alpha / {root}r = {config.lora_alpha:g} / {root}{config.r}"


def _require_one_scale(config: LoraConfig, path: Path) -> None:
    if config.rank_pattern or config.alpha_pattern:
        raise AdapterError(
            f"the adapter in {path} has rank_pattern or alpha_pattern; only one rank and alpha for all "
            "layers is supported"
        )


def read_settings(directory: str | Path) -> LoraSettings:
    """The settings with which a policy can take over an adapter. Raises AdapterError."""
    config = _read_config(Path(directory).expanduser())
    targets, blocks = config.target_modules, config.layers_to_transform
    if isinstance(targets, str) or not (targets or config.target_parameters):
        raise AdapterError(
            f"the adapter in {directory} has target_modules={targets!r}; "
            "only a list of names of linear layers is supported"
        )
    if isinstance(blocks, int):
        blocks = [blocks]
    # Of some blocks only, parameters are named by whole paths.
    whole = [match for name in config.target_parameters or () if (match := _IN_MODEL.search(name))]
    experts = {match[2] for match in whole} or config.target_parameters or ()
    adapted = blocks or {match[1] for match in whole}
    return LoraSettings(
        r=config.r,
        alpha=config.lora_alpha,
        rank_stabilized=bool(config.use_rslora),
        targets=tuple(sorted({*(targets or ()), *experts})),
        layers=len(adapted) or None,
    )


def find_adapter(name: str) -> tuple[Path, str]:
    """Directory of an adapter given as a directory or hub id, and the name under which servers announce it.

    Servers announce a directory's last part, or the hub id.

    Raises:
        AdapterError: neither a directory nor an adapter on the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])), name
    except Exception as error:  # huggingface_hub and its HTTP library raise many kinds
        raise AdapterError(f"{name!r} is neither a directory nor an adapter on the hub: {error}") from error


def read_blocks(
    directory: Path, model: PreTrainedModel
) -> tuple[LoraSettings, dict[int, dict[str, tuple[Tensor, Tensor]]]]:
    """An adapter block by block: index -> path of an adapted layer inside the block -> A and B, both fp32.

    Args:
        model: that it is for; its weights are not looked at.

    Raises:
        AdapterError: no adapter there, one with parts that servers cannot apply, or one for another model.
    """
    settings, config = read_settings(directory), _read_config(directory)
    _require_adapter(directory)
    _require_one_scale(config, directory)
    expected = _expected_parts(config, model)
    tensors: dict[tuple[int, str, str], Tensor] = {}
    for name, tensor in read_tensors(directory / ADAPTER_WEIGHTS).items():
        match = _IN_BLOCK.search(name)
        if match is None or not name.endswith(match.group()):
            raise AdapterError(
                f"the adapter in {directory} has {name}, which is no LoRA weight inside a block"
            )
        block, own_path, part = int(match[1]), match[2], match[3]
        if (block, own_path) not in expected:
            raise AdapterError(
                f"the adapter in {directory} does not fit the model: it changes {own_path} in block {block}"
            )
        tensors[block, own_path, part] = tensor.float()
    blocks: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for (block, own_path), (path, sizes) in expected.items():
        pair: list[Tensor] = []
        for part, shape in zip("AB", sizes.shapes(settings.r), strict=True):
            found = tensors.get((block, own_path, part))
            if found is None:
                raise AdapterError(
                    f"the adapter in {directory} is incomplete: its {ADAPTER_CONFIG} also adapts {path} in "
                    f"block {block}"
                )
            if found.shape != shape:
                raise AdapterError(
                    f"the adapter in {directory} does not fit the model: {path} in block {block} has the "
                    f"shape {tuple(found.shape)}, expected {shape}"
                )
            pair.append(found)
        blocks.setdefault(block, {})[path] = pair[0], pair[1]
    return settings, blocks


def _expected_parts(
    config: LoraConfig, model: PreTrainedModel
) -> dict[tuple[int, str], tuple[str, LayerSizes]]:
    """Block, path of PEFT's layer inside it -> path and sizes of the adapted layer."""
    adapted = matched_layers(config, model)
    blocks_path, blocks = find_blocks(model)
    expected = {}
    for i, block in enumerate(blocks):
        layers = layers_of(block)
        own = [path for path in layers if f"{blocks_path}.{i}.{path}" in adapted]
        for path, peft_path in adapted_paths(block, own).items():
            expected[i, peft_path] = path, layers[path]
    return expected


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file. Raises AdapterError when it is damaged or holds NaN or infinite numbers."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {damage_in(path.parent) or error}") from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterError(
            f"{path} has NaN or infinite numbers in {broken[0]} ({len(broken)} tensors in all)"
        )
    return tensors


def require_no_textrl_model(path: Path) -> None:
    """Raises AdapterError for what TextRL itself saved, which this package cannot use."""
    if (path / "model.pt").is_file() and not (path / ADAPTER_CONFIG).is_file():
        raise AdapterError(
            f"{path} was saved by TextRL itself (model.pt holds an output layer, no adapter); "
            "train again with this package"
        )


def _require_adapter(path: Path) -> None:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise AdapterError(f"{path} holds no adapter: there is no {name}{conversion_hint(path)}")


def conversion_hint(path: Path) -> str:
    """What to type where an adapter's weights are a pickle, as older versions of PEFT wrote; else ""."""
    if not (path / _PICKLED_WEIGHTS).is_file():
        return ""
    return (
        f', but {_PICKLED_WEIGHTS}, a pickle; convert it: cd {shlex.quote(str(path))} && python -c "import '
        "torch, safetensors.torch as s; "
        f"t = torch.load('{_PICKLED_WEIGHTS}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous().clone() for k, v in t.items()}}, '{ADAPTER_WEIGHTS}')\""
    )


def _read_config(path: Path) -> LoraConfig:
    if not (path / ADAPTER_CONFIG).is_file():
        raise AdapterError(f"{path} holds no adapter: there is no {ADAPTER_CONFIG}")
    try:
        config = PeftConfig.from_pretrained(str(path))
    # ImportError: LoftQ's configuration needs SciPy.
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path / ADAPTER_CONFIG} cannot be read: {error!r}") from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", "nameless")
        raise AdapterError(f"{path} holds a {kind} adapter; only LoRA adapters can be loaded")
    _require_plain_lora(path, config)
    return config


def _require_plain_lora(path: Path, config: LoraConfig) -> None:
    """Raises AdapterError unless the adapted model is W + (alpha / r) * B A with the base model's own W."""
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise AdapterError(
            f"the adapter in {path} has init_lora_weights={config.init_lora_weights!r}, which changed the "
            "base weights: convert it (save it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it into the "
            "base model"
        )
    for name in _OTHER_FUNCTIONS:
        if value := getattr(config, name, None):
            raise AdapterError(
                f"the adapter in {path} has {name}={value!r}; only plain LoRA can be loaded: "
                "merge it into the base model"
            )


def _summary(config: LoraConfig) -> str:
    targets = (
        config.target_modules
        if isinstance(config.target_modules, str)
        else sorted(config.target_modules or ())
    )
    blocks = "all" if config.layers_to_transform is None else config.layers_to_transform
    experts = f" and {sorted(config.target_parameters)}" if config.target_parameters else ""
    return (
        f"base model {config.base_model_name_or_path!r}, r={config.r}, targets {targets}{experts}, "
        f"blocks {blocks}"
    )


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    missing = sorted(expected.keys() - found.keys())
    if missing:
        return f"{len(missing)} tensors are missing, e.g. {missing[0]}"
    extra = sorted(found.keys() - expected.keys())
    if extra:
        return f"{len(extra)} tensors are unknown here, e.g. {extra[0]}"
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            return f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
    return None


# ------------------------------------------------------------------------------------------- merging


def merged_model(base: BaseModel, adapter: str | Path) -> PreTrainedModel:
    """A transformers model with the adapter added to the weights: W + (alpha / r) * B A, in the weights' own
    dtype. Quantised weights are dequantised first.

    Raises:
        ModelError: the base model cannot be loaded.
        AdapterError: the adapter does not fit the model.
    """
    model = load_plain_weights(base)
    try:
        with without_peft_notices():
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"the adapter in {adapter} does not fit {base}: {error}") from error
