"""Which server runs which blocks. Reads the DHT, remembers who failed, and waits for blocks that nobody
holds.

Routes are sticky: the same blocks go to the same servers until one of them fails, because every new server
must first be sent the adapter. Knows nothing about tensors or adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from hivemind.dht import DHT
from hivemind.p2p import PeerID
from petals.constants import DTYPE_MAP
from petals.data_structures import ModelInfo, RemoteModuleInfo, ServerState
from petals.utils.dht import compute_spans, get_remote_module_infos

from textrl_swarm.errors import (
    AccessDenied,
    BlocksUnavailable,
    RemoteFailure,
    ServerBusy,
    ServerFailed,
    SwarmError,
)
from textrl_swarm.models.blocks import blocks_text
from textrl_swarm.swarm.client.rpc import short_id
from textrl_swarm.swarm.node import greet_lost_peers, is_cut_off
from textrl_swarm.swarm.protocol import CAPABILITY, CAPABILITY_PREFIX

logger = logging.getLogger(__name__)

_BAN_S = 2.0  # first ban of a server that failed; doubles with each failure in a row
_MAX_BAN_S = 240.0
_BUSY_S = 15.0  # how long others are preferred to a server that had no room
_LOOK_AGAIN_S = 60.0  # how often for servers that could check others
_RANDOM = random.SystemRandom()  # nobody shall know who is asked
_NAMED = 5  # servers in a message
_POLL_S = 1.0  # how often the DHT is asked again while blocks are missing


@dataclass(frozen=True)
class Span:
    """Blocks start..stop (half-open) on one server."""

    peer: PeerID
    start: int
    stop: int

    dtype: torch.dtype
    """In which the server computes and answers."""

    throughput: float
    """Tokens/s that the server announces."""

    def __str__(self) -> str:
        return f"{blocks_text(range(self.start, self.stop))} on server {short_id(self.peer)}"


@dataclass(frozen=True)
class _Failures:
    """A server's failures since its last success."""

    in_a_row: int

    banned_until: float
    """In time.monotonic seconds."""

    last: ServerFailed | None = None

    @property
    def is_banned(self) -> bool:
        return self.banned_until > time.monotonic()


_NO_FAILURES = _Failures(0, -math.inf)


class Router:
    """Chooses servers for spans of blocks.

    Args:
        dht: a running client node.
        inspect: coroutine (span, uid of its first block) -> why this server cannot be used, or the blocks
            that it holds where they are not all of the span's, or None; called again when a server failed or
            holds other blocks than before.
        allowed: ids of the servers that may be used; () = all.
    """

    def __init__(
        self,
        dht: DHT,
        dht_prefix: str,
        num_blocks: int,
        inspect: Callable[[Span, str], Awaitable[SwarmError | range | None]],
        allowed: Collection[str] = (),
    ):
        self.dht = dht
        self.dht_prefix = dht_prefix
        self.num_blocks = num_blocks
        self.uids = [f"{dht_prefix}.{block}" for block in range(num_blocks)]
        self._inspect = inspect
        self._allowed = frozenset(allowed)
        self._accepted: dict[PeerID, tuple[int, int]] = {}  # the blocks start..stop that were inspected
        self._refused: dict[PeerID, SwarmError] = {}  # why servers are never used
        self._refuted: dict[str, str] = {}  # those whose answers were wrong, by their ids, for good
        self._failures: dict[PeerID, _Failures] = {}
        self._busy_until: dict[PeerID, float] = {}  # in time.monotonic seconds
        self._spans: list[Span] = []
        self._refreshed_at = -math.inf  # in time.monotonic seconds
        self._untrainable: list[Span] = []
        self._other_version: list[Span] = []
        self._not_allowed: list[Span] = []
        self._salt = str(dht.peer_id)  # clients break ties differently, so that replicas share the load

    async def route(self, start: int, stop: int, *, timeout_s: float) -> list[Span]:
        """Servers for blocks start..stop, in order; waits until every block has one.

        Raises:
            ServerMismatch: the only servers that hold some of the blocks belong to another model.
            AccessDenied: they do not let this client in.
            BlocksUnavailable: nobody held some of the blocks until the deadline.
            RemoteFailure: this machine's daemon has ended.
        """
        deadline = time.monotonic() + timeout_s
        warned = False
        refused = len(self._refused)
        while True:
            chain = await self._plan(start, stop)
            if chain is not None:
                return chain
            if is_cut_off(self.dht):
                raise RemoteFailure(
                    "this machine's libp2p daemon ended (was it killed?), so that no server can be reached: "
                    "run the same command again"
                )
            await self._refresh()
            chain = await self._plan(start, stop)
            if chain is not None:
                return chain
            missing = self._missing(start, stop)
            is_over = time.monotonic() >= deadline
            refusal = self._refusal(missing)
            is_hopeless = len(self._refused) > refused and not self._may_come_back(missing)
            if refusal is not None and (is_over or is_hopeless):
                raise refusal
            if is_over:
                raise self._unavailable(missing or tuple(range(start, stop)), timeout_s)
            if not warned:
                warned = True
                logger.warning(
                    "no server holds %s now; waiting up to %.0f s for one", blocks_text(missing), timeout_s
                )
            await asyncio.sleep(_POLL_S)

    def report_failure(self, peer: PeerID, error: ServerFailed | None = None) -> None:
        """Routes around this server for a while, and inspects it again before it is used. Requests that fail
        together count once. Of one that is busy only others are preferred, if there are any.
        """
        if isinstance(error, ServerBusy):
            self._busy_until[peer] = time.monotonic() + _BUSY_S
            return
        self._accepted.pop(peer, None)
        earlier = self._failures.get(peer, _NO_FAILURES)
        if earlier.is_banned:
            return
        ban_s = min(_BAN_S * 2**earlier.in_a_row, _MAX_BAN_S)
        self._failures[peer] = _Failures(earlier.in_a_row + 1, time.monotonic() + ban_s, error)

    def report_success(self, peer: PeerID) -> None:
        """Forgets this server's failures."""
        self._failures.pop(peer, None)

    def refute(self, peer: str, reason: str) -> None:
        """Never uses this server again."""
        self._refuted[peer] = reason

    @property
    def spans(self) -> Sequence[Span]:
        """What was announced when last looked for, usable or not."""
        return self._spans

    def is_refuted(self, peer: str) -> bool:
        """Whether `refute` was told of it."""
        return peer in self._refuted

    async def others(self, start: int, stop: int, but: Collection[PeerID]) -> list[Span] | None:
        """Servers for blocks start..stop, chosen at random, or None when it takes some of these peers. Does
        not wait, and looks for new ones now and then.
        """
        chain = await self._plan(start, stop, but)
        if chain is None and time.monotonic() > self._refreshed_at + _LOOK_AGAIN_S:
            await self._refresh()
            chain = await self._plan(start, stop, but)
        return chain

    async def _plan(self, start: int, stop: int, but: Collection[PeerID] | None = None) -> list[Span] | None:
        chain: list[Span] = []
        block = start
        while block < stop:
            span = self._best(block) if but is None else self._any(block, but)
            if span is None:
                return None
            if self._accepted.get(span.peer) != (span.start, span.stop):
                try:
                    reason = await self._inspect(span, self.uids[span.start])
                except AccessDenied as error:
                    reason = error
                except ServerFailed as error:
                    logger.warning("%s", error)
                    self.report_failure(span.peer, error)
                    continue
                if isinstance(reason, range):
                    self._hold(span, reason)
                    continue
                if reason is not None:
                    logger.warning("%s; it is not used", reason)
                    self._refused[span.peer] = reason
                    continue
                self._accepted[span.peer] = (span.start, span.stop)
            end = min(span.stop, stop)
            chain.append(Span(span.peer, block, end, span.dtype, span.throughput))
            block = end
        return chain

    def _hold(self, span: Span, blocks: range) -> None:
        """A server that was started anew under its old id holds these blocks; announcements of others, from
        before, will expire.
        """
        start, stop = max(span.start, blocks.start), min(span.stop, blocks.stop)
        i = self._spans.index(span)
        self._spans[i : i + 1] = [replace(span, start=start, stop=stop)] if start < stop else []

    def _best(self, block: int) -> Span | None:
        """The usable server that has room, did not fail lately and reaches furthest from this block; then the
        faster one.

        Different clients break ties differently.
        """

        def preference(span: Span) -> tuple[bool, bool, int, float, bytes]:
            tie_break = hashlib.sha256((self._salt + str(span.peer)).encode()).digest()
            has_room = self._busy_until.get(span.peer, -math.inf) <= time.monotonic()
            return (has_room, span.peer not in self._failures, span.stop, span.throughput, tie_break)

        return max(self._usable(block), key=preference, default=None)

    def _any(self, block: int, but: Collection[PeerID]) -> Span | None:
        """One of those that reach furthest."""
        found = [span for span in self._usable(block) if span.peer not in but]
        furthest = max((span.stop for span in found), default=0)
        return _RANDOM.choice([span for span in found if span.stop == furthest]) if found else None

    def _usable(self, block: int) -> Iterator[Span]:
        for span in self._spans:
            is_out = span.peer in self._refused or str(span.peer) in self._refuted
            is_banned = self._failures.get(span.peer, _NO_FAILURES).is_banned
            if span.start <= block < span.stop and not is_out and not is_banned:
                yield span

    def _missing(self, start: int, stop: int) -> tuple[int, ...]:
        return tuple(block for block in range(start, stop) if self._best(block) is None)

    def _refusal(self, blocks: Iterable[int]) -> SwarmError | None:
        """Why a server that holds one of these blocks was refused; None when no such server was."""
        for span in self._spans:
            if span.peer in self._refused and any(span.start <= block < span.stop for block in blocks):
                return self._refused[span.peer]
        return None

    def _may_come_back(self, blocks: Iterable[int]) -> bool:
        """Whether each of these blocks is announced by a server that was not refused, though it failed."""
        usable = [span for span in self._spans if span.peer not in self._refused]
        return all(any(span.start <= block < span.stop for span in usable) for block in blocks)

    async def _refresh(self) -> None:
        self._refreshed_at = time.monotonic()
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(None, self._ask)
        self._spans = []
        self._untrainable = []
        self._other_version = []
        self._not_allowed = []
        for span in compute_spans(infos, min_state=ServerState.ONLINE).values():
            info = span.server_info
            dtype = DTYPE_MAP.get(info.torch_dtype, torch.float32)
            ours = Span(
                span.peer_id,
                span.start,
                span.end,
                dtype if dtype != "auto" else torch.float32,
                info.throughput,
            )
            if self._allowed and str(span.peer_id) not in self._allowed:
                self._not_allowed.append(ours)
            elif CAPABILITY in info.adapters:
                self._spans.append(ours)
            elif any(name.startswith(CAPABILITY_PREFIX) for name in info.adapters):
                self._other_version.append(ours)
            else:
                self._untrainable.append(ours)
        known = {span.peer for span in self._spans}
        if known:  # failures of servers that nobody lists any more need not be remembered
            self._failures = {peer: failure for peer, failure in self._failures.items() if peer in known}

    def _ask(self) -> list[RemoteModuleInfo]:
        infos = get_remote_module_infos(self.dht, self.uids, latest=True)
        if not all(info.servers for info in infos):
            greet_lost_peers(self.dht)  # they may know who holds the rest; the next look finds what they say
        return infos

    def _unavailable(self, missing: Sequence[int], waited_s: float) -> BlocksUnavailable:
        message = f"no server holds {blocks_text(missing)} of {self.dht_prefix!r} (waited {waited_s:.0f} s); "
        stock, other_version, not_allowed = (
            [span for span in spans if span.start <= missing[0] < span.stop]
            for spans in (self._untrainable, self._other_version, self._not_allowed)
        )
        if not_allowed and not any(span.start <= missing[0] < span.stop for span in self._spans):
            names = ", ".join(str(span.peer) for span in not_allowed[:_NAMED])
            message += (
                f"{len(not_allowed)} server(s) that hold them are not among allowed_servers ({names}): "
                "add them if you trust them"
            )
        elif other_version:
            message += (
                f"{other_version[0]} runs another version of textrl-swarm, which speaks another protocol "
                f"than this client ({CAPABILITY}): install the same version on both"
            )
        elif stock:
            message += (
                f"stock petals servers hold {stock[0]}, but they cannot train LoRA: "
                "start servers with `textrl-swarm serve`"
            )
        else:
            others = self._other_models()
            if others and not self._spans:
                served = ", ".join(map(repr, others))
                message += f"this swarm serves {served}: pass dht_prefix= if you mean one of them, or "
            failing = [span for span in self._spans if span.start <= missing[0] < span.stop]
            for span in failing:
                message += f"{self._refuted[str(span.peer)]}; " if str(span.peer) in self._refuted else ""
            for failure in (self._failures.get(span.peer, _NO_FAILURES).last for span in failing):
                message += f"{str(failure).splitlines()[0]}; " if failure is not None else ""
            message += (
                "start a server: textrl-swarm serve MODEL "
                f"--block_indices {missing[0]}:{missing[-1] + 1} --initial-peers ..."
            )
        return BlocksUnavailable(message, tuple(missing))

    def _other_models(self) -> list[str]:
        return [name for name in announced_models(self.dht) if name != self.dht_prefix]


def announced_models(dht: DHT, timeout_s: float | None = None) -> dict[str, ModelInfo]:
    """Name -> what servers announce about a model. Anyone can write entries; malformed ones are left out."""
    found = dht.get("_petals.models", latest=True, return_future=True).result(timeout_s)
    models = {}
    if found is not None and isinstance(found.value, dict):
        for name, entry in found.value.items():
            with contextlib.suppress(TypeError, ValueError):
                models[str(name)] = ModelInfo.from_dict(entry.value)
    return models
