"""A look at a swarm from outside: which models it announces, who holds which blocks, who answers now and how fast.

Announcements outlive their servers by a minute or more, so every server is asked; what it announced about itself is reported as such.
Strangers write announcements: sizes are bounded and texts are made printable. Knows nothing about policies or terminals.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hivemind.dht import DHT
from hivemind.p2p import P2P
from petals.constants import DTYPE_MAP
from petals.data_structures import ModelInfo, RemoteSpanInfo, ServerState
from petals.utils.dht import compute_spans, get_remote_module_infos

from textrl_swarm.errors import BlocksUnavailable, ConfigError, SwarmError, closest
from textrl_swarm.swarm.chain import run_in_background
from textrl_swarm.swarm.client import check_addresses, joining, shut_down
from textrl_swarm.swarm.protocol import CAPABILITY
from textrl_swarm.swarm.routing import announced_models
from textrl_swarm.swarm.rpc import ServerCalls, ServerFailed, Timeouts, Traffic

_MAX_BLOCKS = 1000  # of one model; more is no model that anyone has
_TIMEOUTS = Timeouts(connect_s=5.0, request_s=10.0)


@dataclass(frozen=True)
class ServerReport:
    """One server of one model."""

    peer_id: str
    name: str | None  # as its owner called it
    start: int  # first block
    stop: int  # behind the last block
    state: str  # "online", "joining" (still loading), "offline" (about to leave), or "silent": announced, but does not answer now
    can_train: bool  # takes adapters and returns their gradients
    dtype: str | None  # in which it computes, e.g. "bfloat16"
    quantization: str | None  # "int8", "nf4" or None
    answer_ms: float | None  # round trip of a small request, measured now
    token_ms: float | None  # one token through all its blocks and back, measured now; None = cannot train, or was too busy
    cache_tokens_left: int | None  # rows x tokens of generations that it can still take up, as announced
    throughput: float  # tokens/s that it announces (routing prefers more); 1 when it was not measured
    forward_rps: float | None  # tokens/s through one block, as it measured itself; None = did not
    inference_rps: float | None  # generation steps/s through one block, likewise
    network_rps: float | None  # tokens/s of its network, likewise
    version: str | None  # of petals
    adapters: tuple[str, ...]  # that it loaded at its start


@dataclass(frozen=True)
class ModelReport:
    """One model of the swarm. Only servers that are online and answer count as holding blocks."""

    dht_prefix: str  # its name in the swarm
    repository: str | None  # its address on the hub; None for a directory
    num_blocks: int
    servers: tuple[ServerReport, ...]  # by first block

    def copies(self, *, training: bool) -> tuple[int, ...]:
        """For each block, how many servers hold it; with `training`, only those that can train."""
        usable = [server for server in self.servers if server.state == "online" and (server.can_train or not training)]
        return tuple(sum(server.start <= block < server.stop for server in usable) for block in range(self.num_blocks))

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of blocks that nobody holds."""
        return _ranges(copies == 0 for copies in self.copies(training=False))

    @property
    def untrainable(self) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of blocks that nobody can train, the missing ones among them."""
        return _ranges(copies == 0 for copies in self.copies(training=True))


def _ranges(flags) -> tuple[tuple[int, int], ...]:
    found, start = [], 0
    for flag, group in itertools.groupby(flags):
        stop = start + len(list(group))
        if flag:
            found.append((start, stop))
        start = stop
    return tuple(found)


def survey(initial_peers: Sequence[str], dht_prefix: str | None = None, *, timeout_s: float = 60.0) -> tuple[ModelReport, ...]:
    """Looks at a swarm as a client and leaves nothing behind.

    Args:
        initial_peers: addresses of servers.
        dht_prefix: of the one model to report; None = all that are announced.
        timeout_s: for everything together.

    Raises:
        AddressError: an address is malformed, or none of the peers answers.
        BlocksUnavailable: no model is announced.
        ConfigError: the swarm does not announce `dht_prefix`.
        SwarmError: no answer in time.
    """
    addresses = check_addresses(initial_peers)
    deadline = time.monotonic() + timeout_s
    with joining(addresses):
        dht = DHT(addresses, client_mode=True, num_workers=32, startup_timeout=min(timeout_s, _TIMEOUTS.connect_s), start=True)
    p2p = None
    try:
        p2p = run_in_background(dht.replicate_p2p())
        models = _chosen(announced_models(dht, max(0.0, deadline - time.monotonic())), dht_prefix, addresses[0])
        return tuple(_report(dht, p2p, name, info, deadline) for name, info in sorted(models.items()))
    except (concurrent.futures.TimeoutError, TimeoutError) as error:  # two classes before Python 3.11
        raise SwarmError(f"the swarm gave no complete answer within {timeout_s:.0f} s; try again, or through another address") from error
    finally:
        shut_down(dht, p2p)


def _chosen(models: dict[str, ModelInfo], dht_prefix: str | None, address: str) -> dict[str, ModelInfo]:
    models = {_printable(name): info for name, info in models.items() if info.num_blocks <= _MAX_BLOCKS}
    if not models:
        raise BlocksUnavailable(
            "a peer answered, but no model is announced in its swarm: servers announce theirs once their blocks are loaded; "
            f"wait for them, or start one: textrl-swarm serve MODEL --initial-peers {address}"
        )
    if dht_prefix is None:
        return models
    if dht_prefix not in models:
        raise ConfigError(f"this swarm serves no model called {dht_prefix!r}; {closest(dht_prefix, models)}")
    return {dht_prefix: models[dht_prefix]}


def _report(dht: DHT, p2p: P2P, name: str, info: ModelInfo, deadline: float) -> ModelReport:
    uids = [f"{name}.{block}" for block in range(info.num_blocks)]
    found = get_remote_module_infos(dht, uids, latest=True, return_future=True).result(max(0.0, deadline - time.monotonic()))
    spans = [span for span in compute_spans(found, min_state=ServerState.OFFLINE).values() if span.start < span.end]
    calls = ServerCalls(p2p, _TIMEOUTS, Traffic())

    async def ask_all() -> list[ServerReport]:
        asked = asyncio.gather(*(_ask(calls, span, uids) for span in spans))
        return await asyncio.wait_for(asked, max(0.0, deadline - time.monotonic()))

    servers = sorted(run_in_background(ask_all()), key=lambda server: (server.start, server.stop, server.peer_id))
    return ModelReport(name, info.repository and _printable(info.repository), info.num_blocks, tuple(servers))


async def _ask(calls: ServerCalls, span: RemoteSpanInfo, uids: Sequence[str]) -> ServerReport:
    info = span.server_info
    state, can_train = info.state.name.lower(), CAPABILITY in info.adapters
    answer_ms = token_ms = None
    if info.state == ServerState.ONLINE:
        try:
            about = await calls.info(span.peer_id, uids[span.start])  # the first request also opens the connection
            answer_ms = await _milliseconds(calls.info(span.peer_id, uids[span.start]))
        except ServerFailed:
            state = "silent"
        else:
            token_ms = await _token_ms(calls, span, uids, about) if can_train else None
    return ServerReport(
        peer_id=str(span.peer_id), name=info.public_name and _printable(info.public_name), start=span.start, stop=span.end, state=state,
        can_train=can_train, dtype=info.torch_dtype and _printable(info.torch_dtype),
        quantization=None if info.quant_type in (None, "none") else _printable(info.quant_type), answer_ms=answer_ms, token_ms=token_ms,
        # petals counts numbers of one block's keys or values
        cache_tokens_left=None if info.cache_tokens_left is None else info.cache_tokens_left // (2 * span.length),
        throughput=info.throughput, forward_rps=info.forward_rps, inference_rps=info.inference_rps, network_rps=info.network_rps,
        version=info.version and _printable(info.version), adapters=tuple(_printable(name) for name in info.adapters if name != CAPABILITY),
    )  # fmt: skip


async def _token_ms(calls: ServerCalls, span: RemoteSpanInfo, uids: Sequence[str], about: dict) -> float | None:
    dtype = DTYPE_MAP.get(span.server_info.torch_dtype)
    try:
        token = torch.zeros(1, 1, int(about["hidden_size"]), dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32)
        return await _milliseconds(calls.forward(span.peer_id, uids[span.start : span.end], token, ""))
    except (ServerFailed, KeyError, TypeError, ValueError):
        return None


async def _milliseconds(call) -> float:
    started = time.perf_counter()
    await call
    return (time.perf_counter() - started) * 1000


def _printable(text: str) -> str:
    """Without what could steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)[:200]
