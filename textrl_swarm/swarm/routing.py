"""Which server runs which blocks. Reads the DHT, remembers who failed, and waits (within a deadline) for blocks that nobody holds.

Routes are sticky: the same blocks go to the same servers until one of them fails, because every new server must first be sent the adapter.
Knows nothing about tensors or adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
from hivemind.dht import DHT, DHTNode
from hivemind.p2p import PeerID
from petals.constants import DTYPE_MAP
from petals.data_structures import ModelInfo, ServerState
from petals.utils.dht import compute_spans, get_remote_module_infos

from textrl_swarm.errors import BlocksUnavailable, ServerMismatch
from textrl_swarm.swarm.protocol import CAPABILITY
from textrl_swarm.swarm.rpc import ServerFailed

logger = logging.getLogger(__name__)

_BAN_S = 2.0  # first ban of a server that failed; doubles with each failure in a row
_MAX_BAN_S = 240.0
_POLL_S = 1.0  # how often the DHT is asked again while blocks are missing


@dataclass(frozen=True)
class Span:
    """Blocks start..stop (half-open) on one server."""

    peer: PeerID
    start: int
    stop: int
    dtype: torch.dtype  # in which the server computes and answers
    throughput: float

    def __str__(self) -> str:
        return f"blocks {self.start}..{self.stop - 1} on server …{str(self.peer)[-6:]}"


class Router:
    """Chooses servers for spans of blocks.

    Args:
        dht: a running client node.
        inspect: coroutine (span, uid of its first block) -> reason why this server cannot be used, or None; asked once per server.
    """

    def __init__(self, dht: DHT, dht_prefix: str, num_blocks: int, inspect: Callable[[Span, str], Awaitable[str | None]]):
        self.dht, self.dht_prefix, self.num_blocks = dht, dht_prefix, num_blocks
        self.uids = [f"{dht_prefix}.{block}" for block in range(num_blocks)]
        self._inspect = inspect
        self._accepted: set[PeerID] = set()
        self._refused: dict[PeerID, str] = {}  # servers of another model, for good
        self._failures: dict[PeerID, tuple[int, float]] = {}  # failures in a row, banned until (monotonic s)
        self._spans: list[Span] = []
        self._untrainable: list[Span] = []
        self._salt = str(dht.peer_id)  # clients break ties differently, so that replicas share the load

    async def route(self, start: int, stop: int, *, timeout_s: float) -> list[Span]:
        """Servers for blocks start..stop, in order; waits until all can be had.

        Raises:
            ServerMismatch: the only servers that hold some of the blocks belong to another model.
            BlocksUnavailable: nobody held some of the blocks until the deadline.
        """
        deadline = time.monotonic() + timeout_s
        told = False
        while True:
            chain = await self._plan(start, stop)
            if chain is not None:
                return chain
            await self._refresh()
            chain = await self._plan(start, stop)
            if chain is not None:
                return chain
            missing = self._missing(start, stop)
            if missing and self._refused and not told:
                raise ServerMismatch(next(iter(self._refused.values())))
            if time.monotonic() >= deadline:
                raise self._unavailable(missing or tuple(range(start, stop)), timeout_s)
            if not told:
                told = True
                logger.warning("no server holds block(s) %s now; waiting up to %.0f s for one", _listed(missing), timeout_s)
            await asyncio.sleep(_POLL_S)

    def report_failure(self, peer: PeerID) -> None:
        """Routes around this server for a while. Requests that fail together count once."""
        if self._failures.get(peer, (0, 0.0))[1] > time.monotonic():
            return
        count = self._failures.get(peer, (0, 0.0))[0] + 1
        self._failures[peer] = (count, time.monotonic() + min(_BAN_S * 2 ** (count - 1), _MAX_BAN_S))

    def report_success(self, peer: PeerID) -> None:
        self._failures.pop(peer, None)

    async def _plan(self, start: int, stop: int) -> list[Span] | None:
        chain: list[Span] = []
        block = start
        while block < stop:
            span = self._best(block)
            if span is None:
                return None
            if span.peer not in self._accepted:
                try:
                    reason = await self._inspect(span, self.uids[span.start])
                except ServerFailed as error:
                    logger.warning("%s", error)
                    self.report_failure(span.peer)
                    continue
                if reason is not None:
                    self._refused[span.peer] = reason
                    continue
                self._accepted.add(span.peer)
            end = min(span.stop, stop)
            chain.append(Span(span.peer, block, end, span.dtype, span.throughput))
            block = end
        return chain

    def _best(self, block: int) -> Span | None:
        """The usable server that did not fail lately and reaches furthest from this block; then the faster one.

        Ties are broken differently by different clients.
        """
        now = time.monotonic()

        def usable(span: Span) -> bool:
            banned_until = self._failures.get(span.peer, (0, 0.0))[1]
            return span.start <= block < span.stop and span.peer not in self._refused and banned_until <= now

        def preference(span: Span) -> tuple:
            return (
                span.peer not in self._failures,
                span.stop,
                span.throughput,
                hashlib.sha256((self._salt + str(span.peer)).encode()).digest(),
            )

        return max(filter(usable, self._spans), key=preference, default=None)

    def _missing(self, start: int, stop: int) -> tuple[int, ...]:
        return tuple(block for block in range(start, stop) if self._best(block) is None)

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(None, self._ask)
        self._spans, self._untrainable = [], []
        for span in compute_spans(infos, min_state=ServerState.ONLINE).values():
            info = span.server_info
            dtype = DTYPE_MAP.get(info.torch_dtype, torch.float32)
            ours = Span(span.peer_id, span.start, span.end, dtype if dtype != "auto" else torch.float32, info.throughput)
            (self._spans if CAPABILITY in info.adapters else self._untrainable).append(ours)
        known = {span.peer for span in self._spans}
        if known:  # a server that failed and that nobody lists any more need not be remembered
            self._failures = {peer: failure for peer, failure in self._failures.items() if peer in known}

    def _ask(self):
        infos = get_remote_module_infos(self.dht, self.uids, latest=True)
        if any(info.servers for info in infos):
            return infos
        # perhaps all the peers we knew were gone at once, and some are back: hivemind itself never asks the initial ones again
        self.dht.run_coroutine(_greet_initial_peers)
        return get_remote_module_infos(self.dht, self.uids, latest=True)

    def _unavailable(self, missing: Sequence[int], waited_s: float) -> BlocksUnavailable:
        message = f"no server holds block(s) {_listed(missing)} of {self.dht_prefix!r} (waited {waited_s:.0f} s); "
        stock = [span for span in self._untrainable if span.start <= missing[0] < span.stop]
        if stock:
            message += f"stock petals servers hold {stock[0]}, but they cannot train LoRA: start servers with `textrl-swarm serve`"
        else:
            others = self._other_models()
            if others and not self._spans:
                message += f"this swarm serves {', '.join(map(repr, others))}: pass dht_prefix= if one of them is meant, or "
            message += f"start a server: textrl-swarm serve MODEL --block_indices {missing[0]}:{missing[-1] + 1} --initial-peers ..."
        return BlocksUnavailable(message, tuple(missing))

    def _other_models(self) -> list[str]:
        return [name for name in announced_models(self.dht) if name != self.dht_prefix]


def announced_models(dht: DHT, timeout_s: float | None = None) -> dict[str, ModelInfo]:
    """Name -> what servers announce about a model; entries that make no sense are left out, for anyone can write some."""
    found = dht.get("_petals.models", latest=True, return_future=True).result(timeout_s)
    models = {}
    if found is not None and isinstance(found.value, dict):
        for name, entry in found.value.items():
            with contextlib.suppress(TypeError, ValueError):
                models[str(name)] = ModelInfo.from_dict(entry.value)
    return models


async def _greet_initial_peers(dht: DHT, node: DHTNode) -> None:
    """Runs in the DHT's process."""
    peers = [PeerID.from_base58(str(address).rsplit("/p2p/", 1)[-1]) for address in dht.initial_peers or ()]
    await asyncio.gather(*map(node.protocol.call_ping, peers))


def _listed(blocks: Sequence[int]) -> str:
    """0..3, 7 for (0, 1, 2, 3, 7)."""
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and block == ranges[-1][1] + 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    return ", ".join(f"{first}..{last}" if last > first else str(first) for first, last in ranges)
