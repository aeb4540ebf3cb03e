"""LoRA adapters inside a model: which layers they change, what their tensors are called, how they start.

The door to peft, with `adapter_files.py`. Names are those of PEFT's state dict, e.g.
`base_model.model.transformer.h.3.self_attention.dense.lora_A.weight`. Knows nothing about files, servers or
processes.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as LoraConfig
from peft import PeftModel as PeftModel
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import Tensor, nn

from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import ConfigError, ModelError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LayerSizes = tuple[int, int]  # (in_features, out_features)

# Subclasses of nn.Linear that compute something else: the routers of Llama 4 and PhiMoE return pairs,
# DeepSeek V4 has a matrix for each group.
_OTHER_LINEARS = ("Router", "GroupedLinear")


# -------------------------------------------------------------------------------------- which layers


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the language model's transformer blocks, and its path in the whole model (which may see
    images too).

    Raises:
        ModelError: the model has no such list.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if found:
        decoder_modules = set(model.get_decoder().modules())  # in ModernBERT the decoder is called head
        return next(((path, module) for path, module in found if module in decoder_modules), found[0])
    if count is None:
        reason = "its configuration has no num_hidden_layers"
    else:
        reason = f"it has no list of {count} transformer blocks"
    raise ModelError(
        f"{type(model).__name__} (model type {model.config.model_type}) is not supported: {reason}"
    )


def linear_layers(block: nn.Module) -> dict[str, LayerSizes]:
    """Path inside the block -> (in_features, out_features); GPT-2's Conv1D counts as linear."""
    layers: dict[str, LayerSizes] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and not type(module).__name__.endswith(_OTHER_LINEARS):
            layers[path] = (module.in_features, module.out_features)
        elif _is_conv1d(module):
            fan_in, fan_out = module.weight.shape
            layers[path] = (fan_in, fan_out)
    return layers


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def as_linear(layer: Any) -> nn.Linear:
    """A linear layer as nn.Linear; GPT-2's Conv1D is one with its weight transposed."""
    if isinstance(layer, nn.Linear):
        return layer
    fan_in, fan_out = layer.weight.shape
    linear = nn.Linear(fan_in, fan_out, device="meta")
    linear.weight = nn.Parameter(layer.weight.T.contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear


def choose_targets(
    linears: Mapping[str, LayerSizes], targets: tuple[str, ...] | None
) -> dict[str, LayerSizes]:
    """The linear layers of a block to adapt.

    Args:
        linears: path inside a block, e.g. "self_attention.dense" -> (in_features, out_features).
        targets: last parts of paths ("dense") or whole paths; None = all.

    Raises:
        ConfigError: a target that no layer matches, with the closest that exists.
    """
    if targets is None:
        return dict(linears)
    leaves = {_leaf(path) for path in linears}
    for target in targets:
        if target not in leaves and target not in linears:
            raise ConfigError(
                f"LoRA target {target!r} is no linear layer of this model's blocks; {closest(target, leaves)}"
            )
    return {path: sizes for path, sizes in linears.items() if path in targets or _leaf(path) in targets}


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def first_adapted_block(num_blocks: int, layers: int | None) -> int:
    """Index of the first of the last `layers` blocks. Raises ConfigError when there are not that many."""
    if layers is None:
        return 0
    if layers > num_blocks:
        raise ConfigError(
            f"LoRA layers={layers}, but the model has {num_blocks} blocks; use 1 to {num_blocks}, or None "
            "for all"
        )
    return num_blocks - layers


def lora_config(
    settings: LoraSettings, targets: Iterable[str], num_blocks: int, blocks_name: str, base_model: str
) -> LoraConfig:
    """What PEFT needs to rebuild the adapter on the base model.

    Args:
        targets: paths of the adapted layers inside a block.
        blocks_name: the last part of the path of the list of blocks, e.g. "h".
        base_model: directory or hub id; "" when the model came as an object without a name.
    """
    first = first_adapted_block(num_blocks, settings.layers)
    leaves = {_leaf(path) for path in targets} if settings.targets is None else set(settings.targets)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=sorted(leaves),
        layers_to_transform=list(range(first, num_blocks)) if first > 0 else None,
        layers_pattern=blocks_name if first > 0 else None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model or None,
        inference_mode=False,
    )


def model_lora_config(
    settings: LoraSettings,
    model: PreTrainedModel,
    base_model: str,
    find_unused: Callable[[Mapping[str, str]], set[str]],
) -> LoraConfig:
    """A configuration with which PEFT adapts the chosen linear layers of the last blocks and nothing else.

    Blocks may differ (attention in every fourth, experts in all but the first): a name is adapted in the
    blocks that have it.

    Args:
        find_unused: see `never_called`; from path in the model -> path inside its block to those that no
            forward calls.

    Raises:
        ConfigError: unknown targets, or more layers than there are.
        ModelError: PEFT cannot be told to adapt these layers.
    """
    blocks_path, blocks = find_blocks(model)
    first = first_adapted_block(len(blocks), settings.layers)
    paths: dict[str, str] = {}  # path in the model -> path inside its block
    linears: dict[str, LayerSizes] = {}
    for i in range(first, len(blocks)):
        for path, sizes in linear_layers(blocks[i]).items():
            paths[f"{blocks_path}.{i}.{path}"] = path
            linears[path] = sizes
    targets = choose_targets(linears, settings.targets)
    chosen = {module: path for module, path in paths.items() if path in targets}
    unfit = _renamed_by_peft(chosen, model) | find_unused(chosen)
    if unfit:
        targets = _leave_out(unfit, targets, settings, type(model).__name__)
    wanted = {module for module, path in paths.items() if path in targets}
    if not wanted:
        raise ModelError(
            f"the blocks of {type(model).__name__} have no linear layers that LoRA could be applied to"
        )
    config = lora_config(settings, targets, len(blocks), _leaf(blocks_path), base_model)
    # Else PEFT warns and sets it.
    config.fan_in_fan_out = any(_is_conv1d(model.get_submodule(path)) for path in wanted)
    if matched_modules(config, model) != wanted:  # something outside the blocks has one of these names
        config.target_modules = set(targets)
        config.layers_to_transform = list(range(first, len(blocks)))
        config.layers_pattern = blocks_path
    if odd := matched_modules(config, model) ^ wanted:
        raise ModelError(
            f"PEFT cannot tell {sorted(odd)[0]} from layers of the same name; "
            "choose others with LoraSettings(targets=...)"
        )
    return config


def matched_modules(config: LoraConfig, model: nn.Module) -> set[str]:
    """Paths of the modules that PEFT would adapt."""
    return {path for path, _ in model.named_modules() if check_target_module_exists(config, path)}


def _renamed_by_peft(modules: Mapping[str, str], model: nn.Module) -> set[str]:
    """Paths inside a block whose name PEFT would map to a fused expert, or not find again in a saved adapter.

    Transformers 5 stores experts fused and renamed, and PEFT converts the names of older adapters.

    Args:
        modules: path in the model -> path inside its block.
    """
    names = {
        module: weight_name(module, "A") for module, path in modules.items() if _keeps_its_name(path, model)
    }
    state = dict.fromkeys(names.values(), torch.zeros(1, 1))
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), state).keys()
    return {path for module, path in modules.items() if names.get(module) not in loaded}


def _keeps_its_name(path: str, model: nn.Module) -> bool:
    config = LoraConfig(target_modules=[path])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # a part of a fused layer; its other parts have such names too
        return False
    return config.target_modules == {path}


def never_called(modules: Mapping[str, str], model: nn.Module, run: Callable[[], object]) -> set[str]:
    """Paths inside a block whose layers a forward (`run`) does not call.

    Examples are cross-attention without an encoder, and weights that the model's code reads as matrices
    (Mamba's dt_proj). LoRA would do nothing there, but would change the model when it is merged. If any
    expert of a layer is called, all count as called.

    Args:
        modules: path in the model -> path inside its block.
    """
    called: set[str] = set()
    hooks = []
    for module, path in modules.items():
        hook = model.get_submodule(module).register_forward_hook(
            lambda *_, path=path: called.add(_any_expert(path))
        )
        hooks.append(hook)
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {path for path in modules.values() if _any_expert(path) not in called}


def _any_expert(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def _leave_out(
    unfit: set[str], targets: dict[str, LayerSizes], settings: LoraSettings, model: str
) -> dict[str, LayerSizes]:
    """The targets without those that cannot be adapted. Raises ModelError when the user named them, or none
    is left.
    """
    kept = {path: sizes for path, sizes in targets.items() if path not in unfit}
    message = (
        f"{model}: LoRA cannot adapt {', '.join(sorted(unfit))} "
        "(never called by a forward, or taken for experts of older models by PEFT)"
    )
    if settings.targets is not None or not kept:
        raise ModelError(f"{message}; choose others with LoraSettings(targets=...)")
    logger.warning("%s; adapted are %s", message, ", ".join(sorted(kept)))
    return kept


# ---------------------------------------------------------------------------- names and first values


def weight_name(module: str, part: str) -> str:
    """PEFT's state-dict name of the LoRA matrix `part` ("A" or "B") of the layer at a path in the model."""
    return f"base_model.model.{module}.lora_{part}.weight"


def initial_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """First value of one adapter tensor: A uniform as in nn.Linear, B zero, so that the policy begins as the
    base model.

    Depends on the name and the seed only, not on order or machine: a swarm policy and a local one begin
    alike.

        A[i, j] ~ U(-1 / sqrt(in), 1 / sqrt(in))

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; the bound is PEFT's (kaiming_uniform with a =
    sqrt(5)).
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


# ------------------------------------------------------------------------- in a model, and out again


def add_adapter(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Puts LoRA layers into the model. Raises ModelError; some layers may be in it even then, until
    `remove_adapter`.
    """
    try:
        # PEFT's first values are replaced by ours: the random numbers that it draws must not count.
        with torch.random.fork_rng(devices=[]), without_peft_notices():
            return get_peft_model(model, config)
    except Exception as error:  # PEFT checks names, types of layers and types of models, in many places
        raise ModelError(
            f"PEFT cannot adapt {type(model).__name__}: {error} Choose layers with "
            "LoraSettings(targets=...), "
            f"tried: {', '.join(sorted(config.target_modules))}"
        ) from error


@contextmanager
def without_peft_notices() -> Iterator[None]:
    """Hides the deprecation warning that transformers gives PEFT, which asks for an attribute by its old
    name.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        yield


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT's layers are in the model."""
    return isinstance(model, PeftModel) or any(
        isinstance(module, BaseTunerLayer) for module in model.modules()
    )


def remove_adapter(model: nn.Module) -> None:
    """Puts back the layers that PEFT wrapped, even if it stopped half-way."""
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(path, module.get_base_layer())
    vars(model).pop("peft_config", None)
