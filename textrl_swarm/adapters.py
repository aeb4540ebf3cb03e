"""LoRA adapters by name: which layers, what they are called, how they start, how they are saved and loaded. The door to peft.

Names are those of PEFT's state dict, e.g. `base_model.model.transformer.h.3.self_attention.dense.lora_A.weight`.
Knows nothing about servers, processes or how the numbers are used.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers, convert_peft_config_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from textrl_swarm.base_model import WEIGHT_FILES
from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import AdapterError, ConfigError, ModelError, closest

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
VALUE_HEAD_WEIGHTS = "value_head.safetensors"


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks of the language model, and its path in the whole model (which may see images too)."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    inside = set(model.get_decoder().modules())  # which is the head, in ModernBERT
    if found:
        return next(((path, module) for path, module in found if module in inside), found[0])
    expected = "its configuration has no num_hidden_layers" if count is None else f"it has no list of {count} transformer blocks"
    raise ModelError(f"{type(model).__name__} (model type {model.config.model_type}) is not supported: {expected}")


def linear_layers(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Path inside the block -> (in_features, out_features); GPT-2's Conv1D counts, subclasses that compute something else do not."""
    layers = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and not type(module).__name__.endswith(_OTHER_LINEARS):
            layers[path] = (module.in_features, module.out_features)
        elif is_conv1d(module):
            layers[path] = tuple(module.weight.shape)
    return layers


_OTHER_LINEARS = ("Router", "GroupedLinear")  # of Llama 4 and PhiMoE, which return pairs; of DeepSeek V4, a matrix for each group


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def choose_targets(linears: Mapping[str, tuple[int, int]], targets: tuple[str, ...] | None) -> dict[str, tuple[int, int]]:
    """The linear layers of a block to adapt.

    Args:
        linears: path inside a block, e.g. "self_attention.dense" -> (in_features, out_features).
        targets: last parts of paths ("dense") or whole paths; None = all.

    Raises:
        ConfigError: a target that no layer matches, with the closest that exists.
    """
    if targets is None:
        return dict(linears)
    leaves = {path.rsplit(".", 1)[-1] for path in linears}
    for target in targets:
        if target not in leaves and target not in linears:
            raise ConfigError(f"LoRA target {target!r} is no linear layer of this model's blocks; {closest(target, leaves)}")
    return {path: sizes for path, sizes in linears.items() if path in targets or path.rsplit(".", 1)[-1] in targets}


def first_adapted_block(num_blocks: int, layers: int | None) -> int:
    """Index of the first of the last `layers` blocks. Raises ConfigError when there are not that many."""
    if layers is not None and layers > num_blocks:
        raise ConfigError(f"LoRA layers={layers}, but the model has {num_blocks} blocks; use 1 to {num_blocks}, or None for all")
    return 0 if layers is None else num_blocks - layers


def lora_config(settings: LoraSettings, targets: Iterable[str], num_blocks: int, blocks_name: str, base_model: str) -> LoraConfig:
    """What PEFT needs to rebuild the adapter on the base model; `blocks_name` is the list of blocks' own name, e.g. "h"."""
    first = first_adapted_block(num_blocks, settings.layers)
    leaves = sorted({path.rsplit(".", 1)[-1] for path in targets} if settings.targets is None else set(settings.targets))
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=leaves,
        layers_to_transform=list(range(first, num_blocks)) if first > 0 else None,
        layers_pattern=blocks_name if first > 0 else None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model or None,
        inference_mode=False,
    )


def model_lora_config(settings: LoraSettings, model: nn.Module, base_model: str, tokens: Tensor) -> LoraConfig:
    """A configuration with which PEFT adapts the chosen linear layers of the last blocks, and nothing else, here and wherever it is loaded.

    Blocks may differ (attention in every fourth, experts in all but the first): a name is adapted in the blocks that have it.

    Raises:
        ConfigError: unknown targets, or more layers than there are.
        ModelError: PEFT cannot be told to adapt these layers.
    """
    blocks_path, blocks = find_blocks(model)
    first = first_adapted_block(len(blocks), settings.layers)
    found = {
        f"{blocks_path}.{i}.{path}": (path, sizes) for i in range(first, len(blocks)) for path, sizes in linear_layers(blocks[i]).items()
    }
    targets = choose_targets(dict(found.values()), settings.targets)
    chosen = {module: path for module, (path, _) in found.items() if path in targets}
    unfit = _converted(chosen, model) | _uncalled(chosen, model, tokens)
    if unfit:
        targets = _without(targets, unfit, settings, type(model).__name__)
    wanted = {module for module, (path, _) in found.items() if path in targets}
    if not wanted:
        raise ModelError(f"the blocks of {type(model).__name__} have no linear layers that LoRA could be applied to")
    config = lora_config(settings, targets, len(blocks), blocks_path.rsplit(".", 1)[-1], base_model)
    config.fan_in_fan_out = any(is_conv1d(model.get_submodule(path)) for path in wanted)  # or PEFT sets it, with a warning
    if _matched(config, model) != wanted:  # something else has one of these names
        config.target_modules = set(targets)
        config.layers_to_transform, config.layers_pattern = list(range(first, len(blocks))), blocks_path
    if odd := _matched(config, model) ^ wanted:
        raise ModelError(f"PEFT cannot tell {sorted(odd)[0]} from layers of the same name; choose others with LoraSettings(targets=...)")
    return config


def _matched(config: LoraConfig, model: nn.Module) -> set[str]:
    return {path for path, _ in model.named_modules() if check_target_module_exists(config, path)}


def _converted(modules: Mapping[str, str], model: nn.Module) -> set[str]:
    """The paths inside a block (values of `modules`, by path in the model) that to PEFT mean something else.

    Transformers 5 stores experts fused and renamed, and PEFT converts old adapters' names: it takes a layer that happens to have such a
    name for an expert, or does not find it again.
    """
    names = {module: f"base_model.model.{module}.lora_A.weight" for module, path in modules.items() if _means_itself(path, model)}
    state = dict.fromkeys(names.values(), torch.zeros(1, 1))
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), state).keys()
    return {path for module, path in modules.items() if names.get(module) not in loaded}


def _uncalled(modules: Mapping[str, str], model: nn.Module, tokens: Tensor) -> set[str]:
    """Likewise the paths whose layers a forward never calls: cross-attention without an encoder, or weights that the model's code reads as
    matrices (Mamba's dt_proj). LoRA would do nothing there, but change the model when it is merged. One called expert speaks for all."""
    called: set[str] = set()
    hooks = [
        model.get_submodule(module).register_forward_hook(lambda *_, path=path: called.add(_kind(path))) for module, path in modules.items()
    ]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return {path for path in modules.values() if _kind(path) not in called}


def _kind(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def _without(targets: dict[str, tuple[int, int]], unfit: set[str], settings: LoraSettings, model: str) -> dict[str, tuple[int, int]]:
    """Leaves out what was not asked for by name. Raises ModelError otherwise."""
    kept = {path: sizes for path, sizes in targets.items() if path not in unfit}
    message = (
        f"{model}: LoRA cannot adapt {', '.join(sorted(unfit))} (never called by a forward, or taken for experts of older models by PEFT)"
    )
    if settings.targets is not None or not kept:
        raise ModelError(f"{message}; choose others with LoraSettings(targets=...)")
    logger.warning("%s; adapted are %s", message, ", ".join(sorted(kept)))
    return kept


def _means_itself(path: str, model: nn.Module) -> bool:
    config = LoraConfig(target_modules=[path])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # a part of what is fused; its other parts have such names too
        return False
    return config.target_modules == {path}


def add_adapter(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Puts LoRA layers into the model. Raises ModelError; some may be in it even then, until `remove_adapter`."""
    try:
        with torch.random.fork_rng(devices=[]), _without_notices():  # PEFT draws from the global generator; ours replace them
            return get_peft_model(model, config)
    except Exception as error:  # PEFT checks names, types of layers and types of models, in many places
        raise ModelError(
            f"PEFT cannot adapt {type(model).__name__}: {error} Choose layers with LoraSettings(targets=...), "
            f"tried: {', '.join(sorted(config.target_modules))}"
        ) from error


@contextmanager
def _without_notices() -> Iterator[None]:
    """PEFT still asks transformers for something by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def remove_adapter(model: nn.Module) -> None:
    """Puts back the layers that PEFT wrapped, even if it stopped half-way."""
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(path, module.get_base_layer())
    vars(model).pop("peft_config", None)


def initial_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Start of one adapter tensor: A uniform as in nn.Linear, B zero, so that the adapted model begins as the base model.

    Depends on the name and the seed only, not on order or machine: a swarm policy and a local one begin alike.

        A[i, j] ~ U(-1 / sqrt(in), 1 / sqrt(in))

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; the bound is PEFT's (kaiming_uniform with a = sqrt(5)).
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def save_tensors(directory: str | Path, tensors: Mapping[str, Tensor], config: LoraConfig, value_head: Mapping[str, Tensor]) -> None:
    """Writes an adapter that `PeftModel.from_pretrained` loads, and the value head beside it."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise AdapterError(f"{path} is a file; give a directory to save the adapter in")
    if any((path / name).is_file() for name in WEIGHT_FILES):
        raise AdapterError(f"{path} holds a model, which transformers would load with the adapter in it: give a directory of its own")
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    save_file(_plain(tensors), path / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    save_file(_plain(value_head), path / VALUE_HEAD_WEIGHTS)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def load_tensors(directory: str | Path, expected: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Reads an adapter that fits `expected` (name -> tensor of the right shape) exactly.

    Raises:
        AdapterError: no adapter there, another kind, or made for another model or other LoRA settings.
    """
    path = Path(directory)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise AdapterError(f"{path} holds no adapter: there is no {name}")
    found_config = _read_config(path)
    tensors = read_tensors(path / ADAPTER_WEIGHTS)
    difference = _difference(tensors, expected)
    if difference:
        raise AdapterError(
            f"the adapter in {path} does not fit: {difference}. It was made for {_summary(found_config)}; "
            f"this policy has {_summary(config)}"
        )
    if found_config.use_rslora or found_config.rank_pattern or found_config.alpha_pattern:
        raise AdapterError(f"the adapter in {path} has use_rslora, rank_pattern or alpha_pattern; only one alpha / r for all is supported")
    if (found_config.r, found_config.lora_alpha) != (config.r, config.lora_alpha):
        raise AdapterError(
            f"the adapter in {path} is scaled by alpha / r = {found_config.lora_alpha} / {found_config.r}, "
            f"this policy by {config.lora_alpha} / {config.r}; make the policy with alpha={found_config.lora_alpha}"
        )
    return tensors


_IN_BLOCK = re.compile(r"\.(\d+)\.(.+)\.lora_([AB])\.weight")  # ....h.3.self_attention.dense.lora_A.weight


def find_adapter(name: str) -> tuple[Path, str]:
    """Directory of an adapter given as a directory or hub id, and the name under which servers announce it: the directory's, or the id.

    Raises:
        AdapterError: neither.
    """
    path = Path(name)
    if path.is_dir():
        return path, path.resolve().name
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])), name
    except Exception as error:  # huggingface_hub and its HTTP library raise many kinds
        raise AdapterError(f"{name!r} is neither a directory nor an adapter that can be had from the hub: {error}") from error


def read_blocks(directory: Path) -> tuple[LoraSettings, dict[int, dict[str, tuple[Tensor, Tensor]]]]:
    """An adapter block by block: index -> path of a linear layer inside the block -> A (r, in), B (out, r).

    Raises:
        AdapterError: no adapter there, or one with parts that servers cannot apply.
    """
    settings = read_settings(directory)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise AdapterError(f"{directory} holds no adapter: there is no {ADAPTER_WEIGHTS}")
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in read_tensors(directory / ADAPTER_WEIGHTS).items():
        match = _IN_BLOCK.search(name)
        if match is None or not name.endswith(match.group()):
            raise AdapterError(f"the adapter in {directory} has {name}, which is no LoRA weight inside a block")
        block, path, part = int(match[1]), match[2], match[3]
        found.setdefault(block, {}).setdefault(path, {})[part] = tensor.float()
    blocks = {block: {path: (pair.get("A"), pair.get("B")) for path, pair in sorted(layers.items())} for block, layers in found.items()}
    shapes = [{path: tuple(None if t is None else t.shape for t in pair) for path, pair in layers.items()} for layers in blocks.values()]
    if not shapes or any(shape != shapes[0] or None in sum(shape.values(), ()) for shape in shapes):
        raise AdapterError(f"the adapter in {directory} is incomplete: every adapted block needs A and B of the same layers")
    if any(a.shape[0] != settings.r for layers in blocks.values() for a, _ in layers.values()):
        raise AdapterError(f"the adapter in {directory} has ranks other than the r={settings.r} of its {ADAPTER_CONFIG}")
    return settings, blocks


def keep_differentiable(module) -> None:
    """On processors with AVX512-BF16 bitsandbytes repacks 4-bit weights, at the first forward in evaluation mode, for a kernel that has no
    backward (and fails on narrow layers). Call it before any forward of a quantised model that is to be trained.

    Raises:
        ModelError: it has happened. It rounds the scales, so bitsandbytes' own inverse does not bring the same weights back.
    """
    for path, layer in module.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ModelError(
                    f"bitsandbytes has repacked {path} for inference, at its first forward on this CPU, and its gradients would be wrong: "
                    "load the model again and make the policy before using it, or pass its directory with quantization='4bit'"
                )


def merged_model(base_model: str, adapter: str | Path):
    """A transformers model with the adapter added to the weights: W + (alpha / r) * B A, in the weights' own dtype.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    try:
        with _without_notices():
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"the adapter in {adapter} does not fit {base_model}: {error}") from error


def read_settings(directory: str | Path) -> LoraSettings:
    """The settings with which a policy can take over an adapter. Raises AdapterError."""
    config = _read_config(Path(directory))
    targets, blocks = config.target_modules, config.layers_to_transform
    if not targets or isinstance(targets, str):
        raise AdapterError(f"the adapter in {directory} has target_modules={targets!r}; only a list of names of linear layers is supported")
    if isinstance(blocks, int):
        blocks = [blocks]
    return LoraSettings(r=config.r, alpha=config.lora_alpha, targets=tuple(sorted(targets)), layers=len(blocks) if blocks else None)


def _read_config(path: Path) -> LoraConfig:
    if not (path / ADAPTER_CONFIG).is_file():
        raise AdapterError(f"{path} holds no adapter: there is no {ADAPTER_CONFIG}")
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # ImportError: LoftQ's needs SciPy
        raise AdapterError(f"{path / ADAPTER_CONFIG} cannot be read: {error!r}") from error
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{path} holds a {getattr(config.peft_type, 'value', 'nameless')} adapter; only LoRA adapters can be loaded")
    _require_plain_lora(path, config)
    return config


_PLAIN_STARTS = (True, False, "gaussian", "eva", "mica", "orthogonal")  # the others change the base weights: the adapter belongs to those
_OTHER_FUNCTIONS = (
    "use_dora", "alora_invocation_tokens", "use_qalora", "use_bdlora", "layer_replication", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


def _require_plain_lora(path: Path, config: LoraConfig) -> None:
    """That the adapted model is W + (alpha / r) * B A with the base model's W."""
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise AdapterError(
            f"the adapter in {path} has init_lora_weights={config.init_lora_weights!r}, which changed the base weights: convert it, "
            "i.e. save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge it into the base model"
        )
    for name in _OTHER_FUNCTIONS:
        if value := getattr(config, name, None):
            raise AdapterError(f"the adapter in {path} has {name}={value!r}; only plain LoRA can be loaded: merge it into the base model")


def _summary(config: LoraConfig) -> str:
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    blocks = "all" if config.layers_to_transform is None else config.layers_to_transform
    return f"base model {config.base_model_name_or_path!r}, r={config.r}, targets {targets}, blocks {blocks}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises AdapterError when it is damaged or holds NaN or infinite numbers."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterError(f"{path} has NaN or infinite numbers in {broken[0]} ({len(broken)} tensors in all)")
    return tensors


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        return f"{len(missing)} tensors are missing, e.g. {missing[0]}"
    if extra:
        return f"{len(extra)} tensors are unknown here, e.g. {extra[0]}"
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            return f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
    return None
