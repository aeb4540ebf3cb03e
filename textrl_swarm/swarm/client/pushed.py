"""Which servers hold which adapters, and sending them to those that do not."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from hivemind.p2p import PeerID

from textrl_swarm.swarm.client.routing import Router, Span
from textrl_swarm.swarm.client.rpc import ServerCalls
from textrl_swarm.swarm.protocol import AdapterSnapshot


class PushedAdapters:
    """What this client has sent, as far as servers still hold it."""

    def __init__(self, router: Router, calls: ServerCalls):
        self._router = router
        self._calls = calls
        self._held: set[tuple[PeerID, str, int]] = set()  # (peer, adapter key, block)
        self._locks: defaultdict[PeerID, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ensure(self, span: Span, adapter: AdapterSnapshot | None) -> str:
        """Makes sure that the server holds the adapter for these blocks; returns the key to name in requests
        ("" = none).
        """
        blocks = [] if adapter is None else adapter.blocks_within(range(span.start, span.stop))
        if adapter is None or not blocks:
            return ""
        async with self._locks[span.peer]:
            needed = [block for block in blocks if (span.peer, adapter.key, block) not in self._held]
            if needed:
                await self._calls.push(
                    span.peer, [self._router.uids[block] for block in needed], needed, adapter
                )
                self._held.update((span.peer, adapter.key, block) for block in needed)
        return adapter.key

    def forget(self, span: Span, adapter: AdapterSnapshot | None) -> None:
        """Notes that the server no longer holds this adapter: it evicted the adapter, or was restarted."""
        if adapter is not None:
            self._held -= {(span.peer, adapter.key, block) for block in range(span.start, span.stop)}
