"""A block's computation with a low-rank update per request: no weight is wrapped or copied.

Forward hooks on the linear layers, and the forward of routed experts (models/experts.py), add it, so fp32,
bf16, int8 and nf4 blocks are adapted alike:

    out + (x A^T) B^T * alpha / r

Knows nothing about servers, or where adapters come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from textrl_swarm.models.experts import LowRank, add_to_matrices, route
from textrl_swarm.models.layers import LayerSizes, is_routed
from textrl_swarm.swarm.protocol import AdapterHeader

# What is added at this moment, by target path, to what the present thread computes.
_ACTIVE: ContextVar[Mapping[str, LowRank]] = ContextVar("active updates", default={})  # noqa: B039


def _add_low_rank(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    update = _ACTIVE.get().get(path)
    if update is None:
        return output
    a, b, scale = update
    return (output + F.linear(F.linear(args[0].to(a.dtype), a), b) * scale).to(output.dtype)


def _active_in(experts_path: str, parameter: str) -> LowRank | None:
    return _ACTIVE.get().get(f"{experts_path}.{parameter}")


@contextmanager
def applied(header: AdapterHeader, block: int, flat: Tensor) -> Iterator[None]:
    """What blocks with hooks compute here has the update of one block's adapter added."""
    views = header.layout(block).views(flat)
    token = _ACTIVE.set({path: LowRank(a, b, header.scale) for path, (a, b) in views.items()})
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def add_hooks(block: nn.Module, linears: Mapping[str, LayerSizes]) -> None:
    """Makes transformers' own block obey `applied`.

    Args:
        linears: path of a layer that can be adapted -> its sizes.
    """
    for path, sizes in linears.items():
        if sizes.experts is None:
            block.get_submodule(path).register_forward_hook(partial(_add_low_rank, path))
        else:  # one for all parameters of a module
            experts_path, _, name = path.rpartition(".")
            experts, active = block.get_submodule(experts_path), partial(_active_in, experts_path)
            if is_routed(experts):
                route(experts, active)
            else:
                add_to_matrices(experts, name, active)
