"""Pushed adapters, kept in the server's compute process: bounded in bytes, least recently used evicted first.

One thread (petals' Runtime) calls everything here, so there are no locks. Knows nothing about the network or
about blocks' code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_swarm.swarm.protocol import AdapterHeader, adapter_missing, adapter_rejected


@dataclass
class _Entry:
    owner: str
    """Peer id of the client that pushed it first."""

    header: AdapterHeader

    blocks: dict[int, Tensor]
    """Block index -> flat fp32 (block_numel,)."""

    @property
    def size_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self.blocks.values())


class AdapterStore:
    """Adapters by key.

    Args:
        max_bytes: of all adapters together.
        max_bytes_per_client: of one client's; when it pushes more, its own oldest are evicted.
    """

    def __init__(self, max_bytes: int, max_bytes_per_client: int):
        self.max_bytes = max_bytes
        self.max_bytes_per_client = max_bytes_per_client
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first

    @property
    def size_bytes(self) -> int:
        """Bytes of all adapters together."""
        return sum(entry.size_bytes for entry in self._entries.values())

    def put(
        self, owner: str, header: AdapterHeader, blocks: Mapping[int, Tensor], device: torch.device | str
    ) -> None:
        """Adds blocks of an adapter; blocks already here stay unchanged (same key, same numbers).

        Raises:
            AdapterRejected: the adapter does not fit even after evicting everything that may be evicted.
        """
        held = self._entries[header.key].blocks.keys() if header.key in self._entries else ()
        total = 4 * sum(header.layout(block).block_numel for block in {*held, *blocks})
        limit = min(self.max_bytes, self.max_bytes_per_client)
        if total > limit:
            raise adapter_rejected(
                f"{total} bytes of adapter, this server keeps at most {limit} per client "
                "(--adapter_bytes_per_client)"
            )
        with torch.inference_mode(False):  # a tensor born in inference mode could never take part in backward
            fresh = {
                block: flat.detach().to(device=device, dtype=torch.float32, copy=True)
                for block, flat in blocks.items()
            }
        entry = self._entries.setdefault(header.key, _Entry(owner, header, {}))
        for block, flat in fresh.items():
            entry.blocks.setdefault(block, flat)
        self._entries.move_to_end(header.key)
        self._make_room(owner, keep=header.key)

    def get(self, key: str, block: int) -> tuple[AdapterHeader, Tensor | None]:
        """Header and flat tensor of one block, None for a block that this adapter does not change; counts as
        a use.

        Raises:
            AdapterMissing: the adapter changes this block, and is not here.
        """
        entry = self._entries.get(key)
        if entry is None or (block in entry.header.blocks and block not in entry.blocks):
            raise adapter_missing(key, block)
        self._entries.move_to_end(key)
        return entry.header, entry.blocks.get(block)

    def _make_room(self, owner: str, keep: str) -> None:
        while (
            self._used_by(owner) > self.max_bytes_per_client
            and (key := self._oldest(keep, owner)) is not None
        ):
            del self._entries[key]
        while self.size_bytes > self.max_bytes and (key := self._oldest(keep)) is not None:
            del self._entries[key]

    def _oldest(self, keep: str, owner: str | None = None) -> str | None:
        """The least recently used key, of one owner if given, other than `keep`."""
        for key, entry in self._entries.items():
            if key != keep and owner in (None, entry.owner):
                return key
        return None

    def _used_by(self, owner: str) -> int:
        return sum(entry.size_bytes for entry in self._entries.values() if entry.owner == owner)
