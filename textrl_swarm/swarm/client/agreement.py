"""Whether two servers computed the same, as far as their arithmetic allows.

Honest servers differ by rounding: little in fp32, more in 16 bits; and by quantisation, where not both
quantise alike. Limits lie above all that honest servers were seen to differ by, and as far as they can below
what lies change (`benchmarks/lies.py` prints both). Knows nothing about requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textrl_swarm.swarm.protocol import ServedWeights

_ROUNDING = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}
_QUANTISATION = {None: 0.0, "int8": 0.1, "nf4": 0.5}
_GRADIENTS = 2.0  # differ by more than hidden states
_WITHIN = 0.9  # share of the tokens that must agree: routers of experts decide otherwise now and then
_STANDING = 0.1  # share of a hidden state's length that counts beside what the blocks changed of it


def limit(first: ServedWeights, second: ServedWeights, *, of_gradients: bool = False) -> float:
    """By how much honest servers with these weights may differ at most."""
    most = max(_ROUNDING.get(each.dtype, _ROUNDING["bfloat16"]) for each in (first, second))
    if first.form != second.form:  # weights in another dtype are quantised to other numbers
        most += max(_QUANTISATION[each.quantization] for each in (first, second))
    return most * (_GRADIENTS if of_gradients else 1.0)


def difference_of_tokens(claimed: Tensor, found: Tensor, given: Tensor) -> float:
    """Between hidden states, or their gradients (..., W), relative to what blocks made of the `given` ones.
    A tenth of the tokens may differ by more.
    """
    claimed, found, given = (tensor.float().flatten(0, -2) for tensor in (claimed, found, given))
    width = min(claimed.shape[-1], found.shape[-1], given.shape[-1])
    claimed, found, given = (tensor[:, :width] for tensor in (claimed, found, given))
    scale = (found - given).norm(dim=1) + _STANDING * found.norm(dim=1)
    return _largest((claimed - found).norm(dim=1), scale).quantile(_WITHIN).item()


def difference_of_vectors(claimed: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest between vectors, relative to their lengths."""
    differences = [0.0]
    for one, other in zip(claimed, found, strict=True):
        if one.shape != other.shape:
            return float("inf")
        differences.append(_largest((one - other).float().norm()[None], other.float().norm()[None]).item())
    return max(differences)


def _largest(difference: Tensor, scale: Tensor) -> Tensor:
    """Their ratio; 0 where both are."""
    return torch.where(difference == 0, 0.0, difference / scale.clamp(min=1e-30))
