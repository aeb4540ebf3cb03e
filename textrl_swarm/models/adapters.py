"""LoRA adapters inside a model: which layers they change, what their tensors are called, how they start.

The door to peft, with `adapter_files.py`. Names are those of PEFT's state dict, e.g.
`base_model.model.transformer.h.3.self_attention.dense.lora_A.weight`. Knows nothing about files, servers or
processes.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as LoraConfig
from peft import PeftModel as PeftModel
from peft import get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import Tensor, nn

from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import ConfigError, ModelError, closest
from textrl_swarm.models import experts
from textrl_swarm.models.layers import (
    LayerSizes,
    expert_layers,
    expert_modules,
    find_blocks,
    is_conv1d,
    is_routed,
    layers_of,
    short_name,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# -------------------------------------------------------------------------------------- which layers


def choose_targets(
    layers: Mapping[str, LayerSizes], targets: tuple[str, ...] | None
) -> dict[str, LayerSizes]:
    """The layers of a block to adapt.

    Args:
        layers: path inside a block, e.g. "self_attention.dense" -> sizes.
        targets: last parts of paths ("dense", of routed experts with their module's name:
            "experts.down_proj") or whole paths; None = all linear layers, and no routed experts.

    Raises:
        ConfigError: a target that no layer matches, with the closest that exists.
    """
    if targets is None:
        return {path: sizes for path, sizes in layers.items() if sizes.experts is None}
    names = {path: short_name(path, sizes) for path, sizes in layers.items()}
    for target in targets:
        if target not in names and target not in names.values():
            raise ConfigError(
                f"LoRA target {target!r} is no linear layer of this model's blocks; "
                f"{closest(target, set(names.values()))}"
            )
    return {path: sizes for path, sizes in layers.items() if {path, names[path]} & set(targets)}


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


def model_lora_config(
    settings: LoraSettings,
    model: PreTrainedModel,
    base_model: str,
    find_unused: Callable[[Mapping[str, str]], set[str]],
) -> LoraConfig:
    """A configuration with which PEFT adapts the chosen layers of the last blocks and nothing else.

    Blocks may differ (attention in every fourth, experts in all but the first): a name is adapted in the
    blocks that have it.

    Args:
        base_model: directory or hub id; "" when the model came as an object without a name.
        find_unused: see `never_called`; from path in the model -> path inside its block to those that no
            forward calls.

    Raises:
        ConfigError: unknown targets, or more layers than there are.
        ModelError: PEFT cannot be told to adapt these layers.
    """
    blocks_path, blocks = find_blocks(model)
    first = first_adapted_block(len(blocks), settings.layers)
    paths: dict[str, str] = {}  # path in the model -> path inside its block
    layers: dict[str, LayerSizes] = {}
    for i in range(first, len(blocks)):
        for path, sizes in layers_of(blocks[i]).items():
            paths[f"{blocks_path}.{i}.{path}"] = path
            layers[path] = sizes
    targets = choose_targets(layers, settings.targets)
    linears = {module: path for module, path in paths.items() if layers[path].experts is None}
    chosen = {module: path for module, path in linears.items() if path in targets}
    unfit = _renamed_by_peft(chosen, model) | _refused_by_peft(chosen, model) | find_unused(chosen)
    if unfit:
        targets = _leave_out(unfit, targets, settings, type(model).__name__)
    wanted = {module for module, path in paths.items() if path in targets}
    if not wanted:
        raise ModelError(
            f"the blocks of {type(model).__name__} have no linear layers that LoRA could be applied to"
        )
    wanted_linears = wanted & linears.keys()
    parameters = wanted - wanted_linears
    if first == 0:  # else PEFT needs the whole paths: it would adapt the experts of all blocks
        parameters = {short_name(path, layers[paths[path]]) for path in parameters}
    # With layers_to_transform, PEFT needs the name of the list of blocks, e.g. "h".
    only_last = {"layers_to_transform": list(range(first, len(blocks))), "layers_pattern": _leaf(blocks_path)}
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        use_rslora=settings.rank_stabilized,
        lora_dropout=0.0,
        target_modules=sorted({_leaf(path) for path in wanted_linears}),
        target_parameters=sorted(parameters) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model or None,
        inference_mode=False,
        **(only_last if first > 0 and wanted_linears else {}),
    )
    # Else PEFT warns and sets it.
    config.fan_in_fan_out = any(is_conv1d(model.get_submodule(path)) for path in wanted_linears)
    if _matched_modules(config, model) != wanted_linears:  # others outside the blocks have one of these names
        config.target_modules = {paths[module] for module in wanted_linears}
        config.layers_to_transform = list(range(first, len(blocks)))
        config.layers_pattern = blocks_path
    if odd := matched_layers(config, model) ^ wanted:
        raise ModelError(
            f"PEFT cannot tell {sorted(odd)[0]} from layers of the same name; "
            "choose others with LoraSettings(targets=...)"
        )
    return config


def matched_layers(config: LoraConfig, model: nn.Module) -> set[str]:
    """Paths of the linear layers and of the experts' parameters that PEFT would adapt."""
    return _matched_modules(config, model) | _matched_parameters(config, model)


def _matched_modules(config: LoraConfig, model: nn.Module) -> set[str]:
    if not config.target_modules:
        return set()
    return {path for path, _ in model.named_modules() if check_target_module_exists(config, path)}


def _matched_parameters(config: LoraConfig, model: nn.Module) -> set[str]:
    names = config.target_parameters or ()
    return {
        path
        for path in expert_layers(model)
        if any(path == name or path.endswith(f".{name}") for name in names)
    }


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


def _refused_by_peft(modules: Mapping[str, str], model: PreTrainedModel) -> set[str]:
    """Paths inside a block with a name that PEFT adapts in no model of this kind, e.g. Mamba's `out_proj`."""
    refused = set()
    for leaf in {_leaf(path) for path in modules.values()}:
        holder: Any = nn.ModuleDict({leaf: nn.Linear(1, 1, device="meta")})
        holder.config = model.config
        try:
            with torch.random.fork_rng(devices=[]), without_peft_notices():
                inject_adapter_in_model(LoraConfig(r=1, target_modules=[leaf]), holder)
        except ValueError:
            refused.add(leaf)
    return {path for path in modules.values() if _leaf(path) in refused}


def _keeps_its_name(path: str, model: nn.Module) -> bool:
    config = LoraConfig(target_modules=[path])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # a part of a fused layer; its other parts have such names too
        return False
    return config.target_modules == {path}


def _leave_out(
    unfit: set[str], targets: dict[str, LayerSizes], settings: LoraSettings, model: str
) -> dict[str, LayerSizes]:
    """The targets without those that cannot be adapted. Raises ModelError when the user named them, or none
    is left.
    """
    kept = {path: sizes for path, sizes in targets.items() if path not in unfit}
    message = (
        f"{model}: LoRA cannot adapt {', '.join(sorted(unfit))} "
        "(never called by a forward, refused by PEFT, or taken by it for experts of older models)"
    )
    if settings.targets is not None or not kept:
        raise ModelError(f"{message}; choose others with LoraSettings(targets=...)")
    logger.warning("%s; adapted are %s", message, ", ".join(sorted(kept)))
    return kept


# ---------------------------------------------------------------------------- names and first values


def weight_name(module: str, part: str) -> str:
    """PEFT's state-dict name of the LoRA matrix `part` ("A" or "B") of the layer at a path in the model."""
    return f"base_model.model.{module}.lora_{part}.weight"


def adapted_paths(block: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Path of an adapted layer inside a block -> path of PEFT's own layer there, which names the tensors.

    They are the same for linear layers. Of a module of experts, one of PEFT's layers wraps the other; which,
    is asked of PEFT itself.

    Args:
        block: on the meta device, or with weights.
        layers: paths of all its adapted layers.
    """
    found = {path: path for path in layers}
    for experts_path, module in expert_modules(block):
        inside = expert_layers(module)
        wanted = [name for name in inside if f"{experts_path}.{name}" in found]
        if not wanted:
            continue
        holder = nn.ModuleDict({"experts": copy.deepcopy(module).to("meta")})
        config = LoraConfig(r=1, target_modules=[], target_parameters=[f"experts.{name}" for name in wanted])
        with torch.random.fork_rng(devices=[]), without_peft_notices():
            inject_adapter_in_model(config, holder)
        for path, wrapper in holder.named_modules():
            if isinstance(wrapper, ParamWrapper):
                inner = path.removeprefix("experts")  # "" or ".base_layer"
                found[f"{experts_path}.{wrapper.parameter_name}"] = f"{experts_path}{inner}"
    return found


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
        with (
            torch.random.fork_rng(devices=[]),
            without_peft_notices(),
            experts.shown_as_parameters(model),
        ):
            adapted = get_peft_model(model, config)
        _route_experts(adapted)
        return adapted
    except Exception as error:  # PEFT checks names, types of layers and types of models, in many places
        raise ModelError(
            f"PEFT cannot adapt {type(model).__name__}: {error} Choose layers with "
            "LoraSettings(targets=...), "
            f"tried: {', '.join(sorted({*(config.target_modules or ()), *(config.target_parameters or ())}))}"
        ) from error


def _route_experts(model: PeftModel) -> None:
    """Lets tokens pass through the low-rank matrices of their experts; PEFT's wrappers would make new
    matrices of all experts at every forward, and only hold the tensors now. Experts with code of their own
    keep PEFT's way.
    """
    wrappers: dict[nn.Module, dict[str, ParamWrapper]] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and is_routed(module.get_base_layer()):
            module._activate_lora = lambda _: nullcontext()
            wrappers.setdefault(module.get_base_layer(), {})[module.parameter_name] = module
    for layer, own in wrappers.items():
        experts.route(layer, partial(_update, own))


def _update(wrappers: Mapping[str, ParamWrapper], name: str) -> experts.LowRank | None:
    wrapper = wrappers.get(name)
    if wrapper is None or wrapper.disable_adapters:
        return None
    (adapter,) = wrapper.active_adapters
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    return experts.LowRank(a, b, wrapper.scaling[adapter])


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
        if isinstance(module, BaseTunerLayer) and not path.endswith(".base_layer"):
            model.set_submodule(path, module.get_base_layer())
    experts.restore(model)
    vars(model).pop("peft_config", None)
