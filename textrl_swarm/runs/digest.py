"""Digests of values of any type, by which a run knows its prompts again. Knows nothing about prompts."""

from __future__ import annotations

import copyreg
import hashlib
import math
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textrl_swarm.errors import PromptError


def content_digest(value: Any) -> str:
    """Hex SHA-256 of what a value holds; the same in every process, whatever hash seeds and addresses are.

    Mappings and sets count without their order, tuples as lists. Arrays, tensors and images count by type,
    shape and contents; other objects by what pickle would take of them; callables by their names; what cannot
    be pickled by its class.

    Raises:
        PromptError: containers are nested too deep.
    """
    try:
        return hashlib.sha256(_encoded(value, ())).hexdigest()
    except RecursionError as error:
        raise PromptError(
            "the values of a prompt are nested too deep to be compared; flatten them"
        ) from error


def _encoded(value: Any, around: tuple[int, ...]) -> bytes:
    """`around`: ids of the containers that the value is in, outermost first, so that loops end."""
    encode = _CONSTANTS.get(type(value)) or next(
        (f for t, f in _CONSTANTS.items() if isinstance(value, t)), None
    )
    if encode is not None:
        return encode(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _encoded_bytes("array", (str(value.dtype), value.shape), np.ascontiguousarray(value).tobytes())
    if isinstance(value, np.generic):
        return _encoded(np.asarray(value), around)
    if isinstance(value, Tensor):
        return _encoded_tensor(value)
    if _is_image(value):
        return _encoded_bytes("image", (value.mode, value.size, value.getpalette()), value.tobytes())
    if id(value) in around:
        return _tagged(b"loop", str(around.index(id(value))).encode())
    around = (*around, id(value))
    if isinstance(value, np.ndarray):
        return _tagged(b"objects", _encoded([value.shape, value.ravel().tolist()], around))
    if isinstance(value, (list, tuple)):
        return _tagged(b"list", *[_encoded(entry, around) for entry in value])
    if isinstance(value, (set, frozenset)):
        return _tagged(b"set", *sorted([_encoded(entry, around) for entry in value]))
    if isinstance(value, Mapping):
        entries = [_tagged(_encoded(key, around), _encoded(entry, around)) for key, entry in value.items()]
        return _tagged(b"dict", *sorted(entries))
    return _encoded_object(value, around)


# Subclasses count as these, too; bool stands before int, of which it is one.
_CONSTANTS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"none",
    bool: lambda value: b"bool:%d" % value,
    int: lambda value: b"int:" + hex(value).encode(),
    float: lambda value: b"float:" + (b"nan" if math.isnan(value) else struct.pack(">d", value)),
    str: lambda value: b"str:" + str.encode(value, "utf-8", "surrogatepass"),
    bytes: lambda value: b"bytes:" + value,
    bytearray: lambda value: b"bytes:" + value,
}


def _encoded_bytes(kind: str, facts: tuple[Any, ...], contents: bytes) -> bytes:
    return _tagged(kind.encode(), repr(facts).encode(), hashlib.sha256(contents).digest())


def _encoded_tensor(tensor: Tensor) -> bytes:
    facts = (str(tensor.dtype), tuple(tensor.shape), str(tensor.layout))
    try:
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        numbers = dense.cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except (RuntimeError, NotImplementedError):  # a tensor without numbers, or of an unusual kind
        numbers = b""
    return _encoded_bytes("tensor", facts, numbers)


def _is_image(value: Any) -> bool:
    """Of PIL, which nobody has to install; pickle would count file names, too."""
    image = sys.modules.get("PIL.Image")
    return image is not None and isinstance(value, image.Image)


def _encoded_object(value: Any, around: tuple[int, ...]) -> bytes:
    if callable(value):
        owner = value if hasattr(value, "__qualname__") and hasattr(value, "__module__") else type(value)
        return _tagged(b"callable", f"{owner.__module__}.{owner.__qualname__}".encode())
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        parts = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception:  # a lock, a file
        return _tagged(b"class", f"{type(value).__module__}.{type(value).__qualname__}".encode())
    if isinstance(parts, str):  # a global's name
        return _tagged(b"global", parts.encode())
    # callable, its arguments, state, and iterators over a list's and a dict's entries
    fields = [list(part) if i in (3, 4) and part is not None else part for i, part in enumerate(parts)]
    return _tagged(b"object", _encoded(fields, around))


def _tagged(tag: bytes, *parts: bytes) -> bytes:
    """Parts can be told from each other: each follows its length."""
    return b"".join(b"%d:%b" % (len(part), part) for part in (tag, *parts))
