"""Whether two servers computed the same, as far as their arithmetic allows.

Honest servers differ by rounding: little in fp32, more in 16 bits, and more behind more blocks. Servers that
quantise differently compute with other weights: between 4 bits and 16, gradients differ by as much as they
are long, so that nothing can be said. Limits lie above all that honest servers were seen to differ by, and as
far as they can below what lies change (`benchmarks/lies.py` prints both). Knows nothing about requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textrl_swarm.swarm.protocol import ServedWeights

# Of hidden states, for each block.
_ROUNDING = {"float32": 2.5e-4, "float16": 2.5e-3, "bfloat16": 2e-2}
_CODECS = {"fp16": 1e-3, "int8": 2e-2}  # a step more or less, for each time that hidden states are encoded
_INT8 = 5e-2  # which columns are outliers depends on the rows that are computed together
_MOST = 0.5
_GRADIENTS = 4.0  # differ by more than hidden states
_MOST_OF_GRADIENTS = 1.0
_WITHIN = 0.9  # share of the tokens that must agree: routers of experts decide otherwise now and then
_STANDING = 0.1  # share of a hidden state's length that counts beside what the blocks changed of it


def comparable(first: ServedWeights, second: ServedWeights) -> bool:
    """Whether their answers can be held against each other."""
    are_whole = first.quantization is None and second.quantization is None
    return are_whole or (first.dtype, first.quantization) == (second.dtype, second.quantization)


def limit(
    first: ServedWeights,
    second: ServedWeights,
    blocks: int,
    *,
    of_gradients: bool = False,
    codec: str | None = None,
    is_elsewhere: bool = False,
) -> float:
    """By how much honest servers with comparable weights may differ at most, behind so many blocks.

    Args:
        codec: in which hidden states travel, whose steps turn over with the last bits; None = as they are.
        is_elsewhere: whether they were encoded between other blocks, too.
    """
    of_each = max(_ROUNDING.get(each.dtype, _ROUNDING["bfloat16"]) for each in (first, second))
    step = _CODECS.get(codec or "", 0.0)
    of_each += step if is_elsewhere else 0.0
    if first.quantization == "int8":
        of_each += _INT8
    if of_gradients:
        return min(_MOST_OF_GRADIENTS, _GRADIENTS * (of_each * blocks + step))
    return min(_MOST, of_each * blocks + step)


def difference_of_tokens(claimed: Tensor, found: Tensor, given: Tensor) -> float:
    """Between hidden states, or their gradients (..., W), relative to what blocks made of the `given` ones.
    A tenth of the tokens may differ by more.
    """
    claimed, found, given = (tensor.float().flatten(0, -2) for tensor in (claimed, found, given))
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
