"""Which servers hold which adapters, and sending them to those that do not."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict

from hivemind.p2p import PeerID

from textrl_swarm.swarm.client.routing import Router, Span
from textrl_swarm.swarm.client.rpc import ServerCalls
from textrl_swarm.swarm.protocol import AdapterSnapshot

_REMEMBERED = 16  # adapters of a server; a run uses one or two at a time, and a new one after every step


class PushedAdapters:
    """What this client has sent, as far as servers still hold it."""

    def __init__(self, router: Router, calls: ServerCalls):
        self._router = router
        self._calls = calls
        # Blocks by the key of the adapter, the one that was used last at the end.
        self._held: defaultdict[PeerID, OrderedDict[str, set[int]]] = defaultdict(OrderedDict)
        self._locks: defaultdict[PeerID, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ensure(self, span: Span, adapter: AdapterSnapshot | None) -> str:
        """Makes sure that the server holds the adapter for these blocks; returns the key to name in requests
        ("" = none).
        """
        blocks = [] if adapter is None else adapter.blocks_within(range(span.start, span.stop))
        if adapter is None or not blocks:
            return ""
        async with self._locks[span.peer]:
            held = self._held[span.peer]
            needed = [block for block in blocks if block not in held.get(adapter.key, ())]
            if needed:
                await self._calls.push(
                    span.peer, [self._router.uids[block] for block in needed], needed, adapter
                )
                held.setdefault(adapter.key, set()).update(needed)
            held.move_to_end(adapter.key)
            while len(held) > _REMEMBERED:
                held.popitem(last=False)
        return adapter.key

    def forget(self, span: Span, adapter: AdapterSnapshot | None) -> None:
        """Notes that the server no longer holds this adapter: it evicted the adapter, or was restarted."""
        if adapter is not None:
            self._held[span.peer].get(adapter.key, set()).difference_update(range(span.start, span.stop))
