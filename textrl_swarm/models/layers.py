"""Which layers a decoder's blocks have: linear ones, and routed experts.

Knows nothing about adapters, files or servers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from textrl_swarm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerSizes(NamedTuple):
    """Of a linear layer, or of a parameter that holds one such matrix for each expert of a mixture."""

    fan_in: int
    """in_features"""

    fan_out: int
    """out_features"""

    experts: int | None = None
    """How many matrices; None = one, of a layer of its own."""

    @property
    def weights(self) -> int:
        """Numbers in the matrices."""
        return self.fan_in * self.fan_out * (self.experts or 1)

    @property
    def low_rank(self) -> int:
        """Numbers in a LoRA update of rank 1."""
        return (self.fan_in + self.fan_out) * (self.experts or 1)

    def shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the matrices A and B of an update of rank r."""
        ranks = r * (self.experts or 1)
        return (ranks, self.fan_in), (self.fan_out, ranks)


# Subclasses of nn.Linear that compute something else: the routers of Llama 4 and PhiMoE return pairs,
# DeepSeek V4 has a matrix for each group.
_OTHER_LINEARS = ("Router", "GroupedLinear")

# What a router that is a plain linear layer is called (AFMoE, Hunyuan, Gemma 4).
_ROUTERS = ("router", "gate")

_EXPERT_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


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


def layers_of(block: nn.Module) -> dict[str, LayerSizes]:
    """Everything in a block that LoRA can adapt: path -> sizes."""
    return linear_layers(block) | expert_layers(block)


def quantizable_layers(block: nn.Module) -> dict[str, LayerSizes]:
    """What of it bitsandbytes can quantise: all but experts with code of their own."""
    own = tuple(f"{path}." for path, experts in expert_modules(block) if not is_routed(experts))
    return {path: sizes for path, sizes in layers_of(block).items() if not path.startswith(own)}


def linear_layers(block: nn.Module) -> dict[str, LayerSizes]:
    """Path inside the block -> sizes; GPT-2's Conv1D counts as linear, a mixture's router does not."""
    layers: dict[str, LayerSizes] = {}
    experts = expert_layers(block)
    counts = {sizes.experts for sizes in experts.values()}
    within_experts = tuple(f"{path}." for path in experts)  # once quantised, they are layers themselves
    for path, module in block.named_modules():
        if path.startswith(within_experts):
            continue
        if isinstance(module, nn.Linear) and not type(module).__name__.endswith(_OTHER_LINEARS):
            is_router = module.out_features in counts and not set(_ROUTERS).isdisjoint(path.split("."))
            if not is_router:
                layers[path] = LayerSizes(module.in_features, module.out_features)
        elif is_conv1d(module):
            layers[path] = LayerSizes(*module.weight.shape)
    return layers


def expert_layers(block: nn.Module) -> dict[str, LayerSizes]:
    """Path of a parameter that holds a matrix for each expert, e.g. "mlp.experts.down_proj" -> sizes.

    Experts that are modules of their own count as linear layers.
    """
    layers: dict[str, LayerSizes] = {}
    for path, experts in expert_modules(block):
        for name in expert_parameters(experts):
            count, first, second = getattr(experts, name).shape
            is_transposed = getattr(experts, "is_transposed", False)  # which of them is which, for PEFT
            sizes = (first, second) if is_transposed else (second, first)
            layers[f"{path}.{name}".lstrip(".")] = LayerSizes(*sizes, experts=count)
    return layers


def expert_parameters(experts: Any) -> list[str]:
    """Names of the parameters with a matrix for each expert, in the order of their use."""
    return [name for name in _EXPERT_MATRICES if len(getattr(getattr(experts, name, None), "shape", ())) == 3]


def expert_modules(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that hold the experts of a mixture in three-dimensional parameters, by path."""
    for path, module in block.named_modules():
        if expert_parameters(module):
            yield path, module


def is_routed(experts: nn.Module) -> bool:
    """Whether a module of experts is one that transformers' `use_experts_implementation` decorates
    (integrations/moe.py, 5.23): it takes tokens (T, H), the experts chosen for each (T, K) and their weights
    (T, K). Llama 4's is not: all its experts compute all tokens.
    """
    return hasattr(experts, "is_transposed") and hasattr(experts, "has_post_expert_norm")


def routed_experts(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The decorated ones of `expert_modules`."""
    return ((path, experts) for path, experts in expert_modules(block) if is_routed(experts))


def short_name(path: str, sizes: LayerSizes) -> str:
    """The end of a layer's path by which it is named in settings: "q_proj", "experts.down_proj"."""
    return ".".join(path.split(".")[-1 if sizes.experts is None else -2 :])


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is transposed."""
    return type(module).__name__ == "Conv1D"


def as_linear(layer: Any) -> nn.Linear:
    """A linear layer as nn.Linear; GPT-2's Conv1D is one with its weight transposed."""
    if isinstance(layer, nn.Linear):
        return layer
    return linear_of(layer.weight.T, layer.bias)


def linear_of(weight: Any, bias: Any = None) -> nn.Linear:
    """A layer with these numbers (out, in), (out,)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.bias = bias
    return linear


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
