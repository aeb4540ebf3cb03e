"""Hidden states and their gradients in fewer bytes, with a loss that a policy measures before it is used.

Knows nothing about messages or servers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from textrl_swarm.config import CODECS
from textrl_swarm.errors import ShapeError

_BLOCK = 128  # numbers that share a scale in int8
_SCALE_BYTES = 4


def encoded_bytes(width: int, codec: str) -> int:
    """Of one token with W numbers."""
    return 2 * width + _SCALE_BYTES if codec == "fp16" else width + _SCALE_BYTES * -(-width // _BLOCK)


def encode(tensor: Tensor, codec: str) -> Tensor:
    """(B, S, n) uint8 for numbers (B, S, W); n as `encoded_bytes` has it.

    fp16: each token's numbers over their largest, and that in fp32. int8: each 128 numbers of a token in
    steps of their largest / 127, and those steps in fp32.

    Source: Dettmers et al. 2021, arXiv 2110.02861 (blocks with scales of their own).
    """
    numbers = tensor.float()
    if codec == "fp16":
        scale = _steps(numbers, 1)
        return torch.cat([_bytes(scale), _bytes((numbers / scale).half())], dim=-1)
    width = numbers.shape[-1]
    blocks = F.pad(numbers, (0, -width % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    scale = _steps(blocks, 127)
    steps = (blocks / scale).round().to(torch.int8).flatten(-2)[..., :width]
    return torch.cat([_bytes(scale.flatten(-2)), _bytes(steps)], dim=-1)


def decode(encoded: Tensor, codec: str) -> Tensor:
    """The inverse: (B, S, W) fp32 numbers. Raises ShapeError for bytes that no numbers have."""
    size = encoded.shape[-1] if encoded.ndim == 3 and encoded.dtype == torch.uint8 else 0
    count = 1 if codec == "fp16" else -(-size // (_BLOCK + _SCALE_BYTES))
    rest = size - _SCALE_BYTES * count
    if codec not in CODECS or rest < 1 or (codec == "fp16" and rest % 2):
        raise ShapeError(f"{encoded.dtype} {tuple(encoded.shape)} are no hidden states in {codec!r}")
    head, body = encoded.split([_SCALE_BYTES * count, rest], dim=-1)
    scale = head.contiguous().view(torch.float32)
    if codec == "fp16":
        return body.contiguous().view(torch.float16).float() * scale
    blocks = F.pad(body.contiguous().view(torch.int8), (0, -rest % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    return (blocks * scale.unsqueeze(-1)).flatten(-2)[..., :rest]


def _steps(numbers: Tensor, count: int) -> Tensor:
    """(..., 1): the largest number of each last dimension over `count`; 1 for zeros."""
    scale = numbers.abs().amax(dim=-1, keepdim=True) / count
    return scale.masked_fill(scale == 0, 1.0)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)
