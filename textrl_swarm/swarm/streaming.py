"""Tensors that are larger than a message, one after the other in an open stream.

Knows nothing about what they mean.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Collection
from typing import Any

import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p.p2p_daemon import DEFAULT_MAX_MSG_SIZE
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from torch import Tensor

from textrl_swarm.errors import ShapeError
from textrl_swarm.swarm.codec import decode, encode
from textrl_swarm.swarm.protocol import not_finite

_NAMES = ("float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool")
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}
_MAX_RANK = 5
_LEAST_PART_BYTES = 4096


def tensor_parts(tensor: Tensor, codec: str | None = None) -> list[runtime_pb2.Tensor]:
    """Parts of a tensor, each of which fits into a message.

    Args:
        codec: of tensors (rows, tokens, W); None = in their own dtype, as flat tensors always are.
    """
    if codec is not None and tensor.ndim == 3:
        tensor = encode(tensor, codec)
    return list(split_for_streaming(serialize_torch_tensor(tensor), DEFAULT_MAX_MSG_SIZE))


def decoded(tensor: Tensor, codec: str | None) -> Tensor:
    """What was given to `tensor_parts`, or nearly that."""
    return tensor if codec is None or tensor.ndim != 3 else decode(tensor, codec)


def declared_bytes(message: Any, max_numbers: int) -> int:
    """Of the tensor whose first part is in a message, as that part's header says.

    Raises:
        ShapeError: it is no header of ours, or has more numbers than `max_numbers`.
    """
    if len(message.tensors) != 1:
        raise ShapeError(f"{len(message.tensors)} tensors in a message, where one belongs")
    part = message.tensors[0]
    numbers, itemsize = require_header(part, max_numbers)
    if not 0 <= part.chunks <= 2 + numbers * itemsize // _LEAST_PART_BYTES:  # 0 = nothing to split
        raise ShapeError(f"a tensor of {numbers * itemsize} bytes cannot have {part.chunks} parts")
    return numbers * itemsize


def require_header(
    part: runtime_pb2.Tensor,
    max_numbers: int,
    compressions: Collection[int] = (runtime_pb2.CompressionType.NONE,),
) -> tuple[int, int]:
    """Numbers of the tensor to which a first part belongs, and bytes of each.

    Args:
        compressions: hivemind's that are taken.

    Raises:
        ShapeError: it has more, or too many dimensions, is of no dtype that travels, or compressed.
    """
    if part.compression not in compressions:
        raise ShapeError(f"compression {part.compression} of a tensor, which is not taken here")
    if part.dtype not in _DTYPES or len(part.size) > _MAX_RANK:
        raise ShapeError(f"no tensor that can be taken: {part.dtype[:32]!r}, {len(part.size)} dimensions")
    numbers = math.prod(part.size)
    if numbers > max_numbers:
        raise ShapeError(f"a tensor of {tuple(part.size)} is larger than the {max_numbers} numbers allowed")
    return numbers, _DTYPES[part.dtype].itemsize


def require_finite(part: runtime_pb2.Tensor) -> None:
    """Raises InputsNotFinite for a part of a tensor with NaN or infinite numbers, as far as it is not
    compressed.
    """
    dtype = _DTYPES.get(part.dtype, torch.bool)
    if not dtype.is_floating_point or part.compression != runtime_pb2.CompressionType.NONE or not part.buffer:
        return
    if len(part.buffer) % dtype.itemsize:
        raise ShapeError(f"{len(part.buffer)} bytes of {part.dtype} numbers")
    if not torch.isfinite(torch.frombuffer(bytearray(part.buffer), dtype=dtype)).all():
        raise not_finite("hidden states or gradients")


async def whole_tensor(first: Any, messages: AsyncIterator[Any], max_numbers: int) -> Tensor:
    """The tensor whose first part is in the message `first`, and whose others are in the next messages;
    encoded as it was sent.

    Raises:
        ShapeError: it has more numbers than `max_numbers`, or parts that do not belong together; before all
            of them are read.
        EOFError: the stream ends before it is complete.
    """
    size_bytes = declared_bytes(first, max_numbers)
    part = first.tensors[0]
    parts, received = [part], len(part.buffer)
    while len(parts) < part.chunks:
        try:
            message = await anext(messages)
        except StopAsyncIteration:
            raise EOFError(f"only {len(parts)} of {part.chunks} parts of a tensor arrived") from None
        parts += message.tensors
        received += sum(len(more.buffer) for more in message.tensors)
        if received > size_bytes or not message.tensors:
            raise ShapeError(f"the parts of a tensor of {tuple(part.size)} do not fit together")
    if received != size_bytes:
        raise ShapeError(f"{received} bytes of a tensor that was announced with {size_bytes}")
    return deserialize_torch_tensor(combine_from_streaming(parts))
