"""Pushed adapters, kept in the server's compute process: bounded in bytes, least recently used evicted first.

One thread (petals' Runtime) calls everything here, so there are no locks. Knows nothing about the network or
about blocks' code.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_swarm.swarm.protocol import (
    ADAPTER_IDLE_S,
    AdapterHeader,
    adapter_missing,
    adapter_rejected,
    server_busy,
)


@dataclass
class _Entry:
    owner: str
    """Peer id of the client that pushed it first."""

    header: AdapterHeader

    blocks: dict[int, Tensor]
    """Block index -> flat fp32 (block_numel,)."""

    used_at: float
    """In time.monotonic seconds."""

    @property
    def size_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self.blocks.values())


class AdapterStore:
    """Adapters by key.

    Args:
        max_bytes: of all adapters together.
        max_bytes_per_client: of one client's; when it pushes more, its own oldest are evicted.
        idle_s: how long others' adapters must not have been used before they are evicted.
    """

    def __init__(self, max_bytes: int, max_bytes_per_client: int, idle_s: float = ADAPTER_IDLE_S):
        self.max_bytes = max_bytes
        self.max_bytes_per_client = max_bytes_per_client
        self._idle_s = idle_s
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
            AdapterRejected: the adapter is larger than a client's share.
            ServerBusy: others use what fills the store.
        """
        held = self._entries[header.key].blocks.keys() if header.key in self._entries else ()
        total = 4 * sum(header.layout(block).block_numel for block in {*held, *blocks})
        limit = min(self.max_bytes, self.max_bytes_per_client)
        if total > limit:
            raise adapter_rejected(
                f"{total} bytes of adapter, this server keeps at most {limit} per client "
                "(--adapter_bytes_per_client)"
            )
        self._make_room(
            owner, header.key, total - 4 * sum(header.layout(block).block_numel for block in held)
        )
        with torch.inference_mode(False):  # a tensor born in inference mode could never take part in backward
            fresh = {
                block: flat.detach().to(device=device, dtype=torch.float32, copy=True)
                for block, flat in blocks.items()
            }
        entry = self._entries.setdefault(header.key, _Entry(owner, header, {}, time.monotonic()))
        for block, flat in fresh.items():
            entry.blocks.setdefault(block, flat)
        self._use(header.key)

    def get(self, key: str, block: int) -> tuple[AdapterHeader, Tensor | None]:
        """Header and flat tensor of one block, None for a block that this adapter does not change; counts as
        a use.

        Raises:
            AdapterMissing: the adapter changes this block, and is not here.
        """
        entry = self._entries.get(key)
        if entry is None or (block in entry.header.blocks and block not in entry.blocks):
            raise adapter_missing(key, block)
        self._use(key)
        return entry.header, entry.blocks.get(block)

    def _use(self, key: str) -> None:
        self._entries[key].used_at = time.monotonic()
        self._entries.move_to_end(key)

    def _make_room(self, owner: str, keep: str, size_bytes: int) -> None:
        """For so many bytes more of the adapter `keep`. What nobody uses goes first, then the owner's own."""
        while (
            self._used_by(owner) + size_bytes > self.max_bytes_per_client
            and (key := self._oldest(keep, owner)) is not None
        ):
            del self._entries[key]
        while self.size_bytes + size_bytes > self.max_bytes:
            key = self._oldest(keep, idle_s=self._idle_s) or self._oldest(keep, owner)
            if key is None:
                raise server_busy(
                    f"no room for {size_bytes} bytes of adapter beside those in use (--adapter_bytes)"
                )
            del self._entries[key]

    def _oldest(self, keep: str, owner: str | None = None, idle_s: float = 0.0) -> str | None:
        """The least recently used key other than `keep`: of one owner if given, not used for so long."""
        used_before = time.monotonic() - idle_s
        for key, entry in self._entries.items():
            if key != keep and owner in (None, entry.owner) and entry.used_at <= used_before:
                return key
        return None

    def _used_by(self, owner: str) -> int:
        return sum(entry.size_bytes for entry in self._entries.values() if entry.owner == owner)
