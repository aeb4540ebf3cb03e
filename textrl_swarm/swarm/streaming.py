"""Tensors that are larger than a message, one after the other in an open stream.

Knows nothing about what they mean.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p.p2p_daemon import DEFAULT_MAX_MSG_SIZE
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming
from torch import Tensor

from textrl_swarm.errors import ShapeError
from textrl_swarm.swarm.codec import decode, encode


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


async def whole_tensor(first: Any, messages: AsyncIterator[Any], max_numbers: int) -> Tensor:
    """The tensor whose first part is in the message `first`, and whose others are in the next messages;
    encoded as it was sent.

    Raises:
        ShapeError: it has more numbers than `max_numbers`, or parts that do not belong together; before all
            of them are read.
        EOFError: the stream ends before it is complete.
    """
    (part,) = first.tensors
    numbers = torch.Size(part.size).numel()
    if numbers > max_numbers:
        raise ShapeError(f"a tensor of {tuple(part.size)} is larger than the {max_numbers} numbers allowed")
    most_bytes = 8 * max(1, numbers) + 1024  # whatever the dtype and its frame
    parts, received = [part], len(part.buffer)
    while len(parts) < part.chunks:
        try:
            message = await anext(messages)
        except StopAsyncIteration:
            raise EOFError(f"only {len(parts)} of {part.chunks} parts of a tensor arrived") from None
        parts += message.tensors
        received += sum(len(more.buffer) for more in message.tensors)
        if received > most_bytes or not message.tensors:
            raise ShapeError(f"the parts of a tensor of {tuple(part.size)} do not fit together")
    return deserialize_torch_tensor(combine_from_streaming(parts))
