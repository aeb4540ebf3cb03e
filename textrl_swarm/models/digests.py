"""Digests of the weights of transformer blocks, as a checkpoint holds them.

Client and servers compute them from their own copies of a checkpoint. A digest depends on the numbers and not
on how they are stored: fp16 or bf16 weights and the same weights saved in fp32 have one digest, as have
safetensors and `.bin` files, sharded or not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor

from textrl_swarm.models.base_model import WEIGHT_FILES

logger = logging.getLogger(__name__)

_Read: TypeAlias = Callable[[str], Tensor]  # key in a file -> tensor
_Weight: TypeAlias = Callable[[], Tensor]

_CHUNK_NUMBERS = 1 << 22  # hashed at a time, so that the fp32 copy stays small


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of one block's weights: name inside the block and tensor, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {_digest_numbers(tensor)}\n".encode())
    return total.hexdigest()


def _digest_numbers(tensor: Tensor) -> str:
    numbers = hashlib.sha256()
    for part in tensor.detach().cpu().flatten().split(_CHUNK_NUMBERS):
        exact = part.float() if part.is_floating_point() and part.itemsize < 4 else part
        numbers.update(exact.contiguous().view(torch.uint8).numpy().data)
    return numbers.hexdigest()


def checkpoint_digests(model: str, blocks_path: str) -> dict[int, str]:
    """Block index -> digest of its weights, for the blocks whose weights are all on this machine.

    Reads those weights once (about 1 GB/s per core); at most two tensors are in memory at a time. A file that
    cannot be read is passed over with a warning, and its blocks with it.

    Args:
        model: directory or hub id; of a hub id, what lies in the hub's local cache.
        blocks_path: of the list of blocks in the model, e.g. "transformer.h". Checkpoints of a model without
            output embeddings leave out the first part.
    """
    head, _, rest = blocks_path.partition(".")
    pattern = re.compile(rf"(?:{re.escape(head)}\.)?{re.escape(rest)}\.(\d+)\.(.+)")
    blocks: dict[int, dict[str, _Weight | None]] = defaultdict(dict)
    for key, read in _tensors(model):
        match = pattern.fullmatch(key)
        if match is not None:
            blocks[int(match[1])][match[2]] = None if read is None else partial(read, key)
    whole = {block: weights for block, weights in sorted(blocks.items()) if None not in weights.values()}
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(whole, pool.map(_digest_lazily, whole.values()), strict=True))


def _digest_lazily(weights: Mapping[str, _Weight]) -> str:
    return digest_tensors((name, read()) for name, read in sorted(weights.items()))


def _tensors(model: str) -> Iterator[tuple[str, _Read | None]]:
    """(key, reader of its file, or None where that file is not here) of a checkpoint's tensors."""
    for name in WEIGHT_FILES:
        path = _local_file(model, name)
        if path is None:
            continue
        if not name.endswith(".index.json"):
            keys, read = _opened(path)
            yield from ((key, read) for key in keys)
            return
        shards: dict[str, str] = json.loads(path.read_text())["weight_map"]
        readers = {shard: _opened(_local_file(model, shard))[1] for shard in set(shards.values())}
        yield from ((key, readers[shard]) for key, shard in shards.items())
        return


def _opened(path: Path | None) -> tuple[Iterable[str], _Read | None]:
    """Keys of a weight file, and a function that reads the tensor of a key; no tensor is read before. Nothing
    for a file that is not here or cannot be read: damaged, or a .bin of before torch 1.6, all or nothing.
    """
    if path is None:
        return (), None
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, "pt")
            return file.keys(), file.get_tensor
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return tensors.keys(), tensors.__getitem__
    except Exception as error:  # whatever a file makes its reader raise
        logger.warning("%s cannot be read, so its blocks are not compared with the servers': %s", path, error)
        return (), None


def _local_file(model: str, name: str) -> Path | None:
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    cached = try_to_load_from_cache(model, name)
    return Path(cached) if isinstance(cached, str) else None
