"""Pushed adapters, kept in the server's compute process: bounded in bytes, least recently used first out.

One thread (petals' Runtime) calls everything here, so there are no locks. Knows nothing about the network or about blocks' code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_swarm.swarm.protocol import MISSING, REJECTED, AdapterHeader

# Both travel between the server's processes: what is pickled are their arguments.


class AdapterMissing(LookupError):
    """The request names an adapter that is not here (never pushed, or pushed out by newer ones)."""

    def __init__(self, key: str, block: int):
        super().__init__(key, block)

    def __str__(self) -> str:
        return f"{MISSING}:{self.args[0]}:{self.args[1]}"


class AdapterRefused(ValueError):
    """The adapter will not be stored."""

    def __init__(self, why: str):
        super().__init__(why)

    def __str__(self) -> str:
        return f"{REJECTED}: {self.args[0]}"


@dataclass
class _Entry:
    owner: str  # peer id of the client that pushed it first
    header: AdapterHeader
    blocks: dict[int, Tensor]  # block index -> flat fp32 (header.block_numel,)

    @property
    def size_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self.blocks.values())


class AdapterStore:
    """Adapters by key.

    Args:
        max_bytes: of all adapters together.
        max_bytes_per_client: of one client's; its own oldest go first when it pushes more.
    """

    def __init__(self, max_bytes: int, max_bytes_per_client: int):
        self.max_bytes, self.max_bytes_per_client = max_bytes, max_bytes_per_client
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._entries.values())

    def put(self, owner: str, header: AdapterHeader, blocks: Mapping[int, Tensor], device: torch.device | str) -> None:
        """Adds blocks of an adapter; those already here stay as they are (same key, same numbers).

        Raises:
            AdapterRefused: it cannot fit even when everything that may go is gone.
        """
        held = self._entries[header.key].blocks.keys() if header.key in self._entries else ()
        total = 4 * header.block_numel * len({*held, *blocks})
        limit = min(self.max_bytes, self.max_bytes_per_client)
        if total > limit:
            raise AdapterRefused(f"{total} bytes of adapter, this server keeps at most {limit} per client (--adapter_bytes_per_client)")
        with torch.inference_mode(False):  # a tensor born in inference mode could never take part in backward
            fresh = {block: flat.detach().to(device=device, dtype=torch.float32, copy=True) for block, flat in blocks.items()}
        entry = self._entries.setdefault(header.key, _Entry(owner, header, {}))
        for block, flat in fresh.items():
            entry.blocks.setdefault(block, flat)
        self._entries.move_to_end(header.key)
        self._make_room(owner, keep=header.key)

    def get(self, key: str, block: int) -> tuple[AdapterHeader, Tensor | None]:
        """Header and flat tensor of one block, None for a block that this adapter leaves alone; counts as a use.

        Raises:
            AdapterMissing: the adapter changes this block, and is not here.
        """
        entry = self._entries.get(key)
        if entry is None or (block in entry.header.digests and block not in entry.blocks):
            raise AdapterMissing(key, block)
        self._entries.move_to_end(key)
        return entry.header, entry.blocks.get(block)

    def _make_room(self, owner: str, keep: str) -> None:
        def oldest(of_owner: str | None) -> str | None:
            return next((key for key, entry in self._entries.items() if key != keep and of_owner in (None, entry.owner)), None)

        def used_by(of_owner: str) -> int:
            return sum(entry.size_bytes for entry in self._entries.values() if entry.owner == of_owner)

        while used_by(owner) > self.max_bytes_per_client and (key := oldest(owner)) is not None:
            del self._entries[key]
        while self.size_bytes > self.max_bytes and (key := oldest(None)) is not None:
            del self._entries[key]
