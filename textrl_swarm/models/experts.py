"""Routed experts with LoRA, or in 8 or 4 bits: computed for the tokens that are routed to them only.

PEFT's own layer (`target_parameters`) adds each expert's update to its matrix at every forward, a second copy
of all experts. The update is low-rank, so here the tokens of an expert pass through its two small matrices:

    x W^T + (x A^T) B^T * alpha / r

which is the same number up to rounding. Neither transformers nor petals quantises these parameters; here each
expert becomes one layer of bitsandbytes.

Source: the experts' interface is transformers' (integrations/moe.py, 5.23); A and B of all experts lie in two
matrices as PEFT has them (tuners/lora/layer.py, ParamWrapper, 0.21).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from textrl_swarm.models.layers import expert_parameters, routed_experts


class LowRank(NamedTuple):
    """An update of all experts of one parameter."""

    a: Tensor
    """(r * experts, in): the rows of one expert together."""

    b: Tensor
    """(out, r * experts): the columns of one rank together."""

    scale: float
    """alpha / r"""


Active: TypeAlias = Callable[[str], LowRank | None]  # name of a parameter -> its update at this moment


def route(experts: Any, active: Active) -> None:
    """From now on, calls of a module of experts add what `active` names.

    The model's own code runs while there is nothing to add. Undone by `restore`.
    """
    if not isinstance(vars(experts).get("forward"), _RoutedForward):
        experts.forward = _RoutedForward(experts)
    experts.forward.active = active


def add_to_matrices(experts: nn.Module, name: str, active: Active) -> None:
    """For experts with code of their own: from now on, what `active` names is added to the matrices that the
    code finds in a parameter, as PEFT does it. That costs new matrices of all experts in every call.
    """
    nn.utils.parametrize.register_parametrization(experts, name, _Added(name, active))


class _Added(nn.Module):
    def __init__(self, name: str, active: Active):
        super().__init__()
        self.name, self.active = name, active

    def forward(self, matrices: Tensor) -> Tensor:
        update = self.active(self.name)
        if update is None:
            return matrices
        a = update.a.unflatten(0, (len(matrices), -1)).to(matrices.dtype)
        b = update.b.unflatten(1, (-1, len(matrices))).permute(2, 0, 1).to(matrices.dtype)
        return torch.baddbmm(matrices, b, a, alpha=update.scale)


def restore(model: nn.Module) -> None:
    """Takes out what `route` put in; quantised experts stay as they are."""
    for _, experts in routed_experts(model):
        forward = vars(experts).get("forward")
        if isinstance(forward, _RoutedForward):
            forward.active = _nothing
            if not any(isinstance(module, QuantizedExperts) for module in experts.children()):
                del experts.forward


class QuantizedExperts(nn.ModuleList):
    """One layer per expert, in the place of a parameter.

    Args:
        parameter: (experts, ., .), with the numbers of all.
        make: a quantised layer for a weight (out, in).
        is_transposed: the parameter holds (experts, in, out).
    """

    def __init__(self, parameter: Tensor, make: Callable[[Tensor], nn.Module], is_transposed: bool):
        super().__init__()
        self.shape, self.dtype = parameter.shape, parameter.dtype
        for matrix in parameter:
            self.append(make(matrix.T if is_transposed else matrix))


def quantize(experts: Any, name: str, make: Callable[[Tensor], nn.Module]) -> None:
    """Puts quantised layers in the place of one parameter."""
    parameter = getattr(experts, name)
    delattr(experts, name)
    setattr(experts, name, QuantizedExperts(parameter.data, make, experts.is_transposed))
    if "forward" not in vars(experts):
        route(experts, _nothing)


@contextmanager
def shown_as_parameters(model: nn.Module) -> Iterator[None]:
    """For PEFT, which looks for parameters: stand-ins of the right shape, without memory, in the place of
    quantised experts.
    """
    hidden = []
    for _, experts in list(routed_experts(model)):
        for name, layers in list(experts.named_children()):
            if isinstance(layers, QuantizedExperts):
                device = next(layers.parameters()).device
                nothing = torch.zeros((), dtype=layers.dtype, device=device).expand(layers.shape)
                delattr(experts, name)
                setattr(experts, name, nn.Parameter(nothing, requires_grad=False))
                hidden.append((experts, name, layers))
    try:
        yield
    finally:
        for experts, name, layers in hidden:
            delattr(experts, name)
            setattr(experts, name, layers)


def _nothing(name: str) -> None:
    return None


class _RoutedForward:
    """The forward of a module of experts."""

    def __init__(self, experts: Any):
        self.experts = experts
        self.active: Active = _nothing

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum (T, H) of each token's experts, for tokens (T, H), experts (T, K), weights (T, K)."""
        experts: Any = self.experts
        up, down = expert_parameters(experts)
        updates = {name: self.active(name) for name in (up, down)}
        is_quantized = any(isinstance(getattr(experts, name), QuantizedExperts) for name in updates)
        if not is_quantized and not any(updates.values()):
            return type(experts).forward(experts, hidden, chosen, weights)
        tokens, per_token = chosen.shape
        expert_of, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(expert_of, minlength=experts.num_experts)
        routed = _Routed(experts, expert_of, counts.cumsum(0, dtype=torch.int32), counts.tolist())
        states = routed.apply(up, hidden[order // per_token], updates[up])
        states = experts._apply_gate(states) if experts.has_gate else experts.act_fn(states)
        states = routed.apply(down, states, updates[down])
        if experts.has_post_expert_norm:
            states = experts.post_expert_norm(states)
        states = states * weights.flatten()[order, None]
        states = states[order.argsort()].view(tokens, per_token, -1).sum(dim=1)
        return states.to(hidden.dtype)


class _Routed(NamedTuple):
    """Rows sorted by their expert."""

    experts: Any
    expert_of: Tensor
    ends: Tensor
    counts: list[int]

    def apply(self, name: str, rows: Tensor, update: LowRank | None) -> Tensor:
        """Outputs (S, out) of each row's own expert, for rows (S, in)."""
        matrices = getattr(self.experts, name)
        bias = getattr(self.experts, f"{name}_bias")[self.expert_of] if self.experts.has_bias else None
        if isinstance(matrices, QuantizedExperts):
            output = self._one_by_one(rows, lambda expert, own: matrices[expert](own))
            output = output if bias is None else output + bias
        else:
            output = _grouped_linear(rows, matrices, self.ends, bias, self.experts.is_transposed)
        if update is None:
            return output
        # unbind: its backward writes one gradient for all experts, that of indexing one for each.
        a = update.a.unflatten(0, (len(self.counts), -1)).unbind(0)
        b = update.b.unflatten(1, (-1, len(self.counts))).unbind(2)
        low_rank = self._one_by_one(
            rows.to(update.a.dtype), lambda expert, own: F.linear(F.linear(own, a[expert]), b[expert])
        )
        return (output + low_rank * update.scale).to(output.dtype)

    def _one_by_one(self, rows: Tensor, layer: Callable[[int, Tensor], Tensor]) -> Tensor:
        parts = rows.split(self.counts)
        return torch.cat([layer(i, own) for i, own in enumerate(parts) if own.shape[0] > 0])
