"""A look at a swarm from outside: which models it announces, who holds which blocks, who answers now and how
fast.

Announcements outlive their servers by a minute or more, so the survey asks every server, and reports
separately what a server announced about itself. Strangers write announcements: sizes are bounded and texts
are made printable. Knows nothing about policies or terminals.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import defaultdict
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.dht import DHT
from hivemind.p2p import P2P
from petals.constants import DTYPE_MAP
from petals.data_structures import ModelInfo, RemoteSpanInfo, ServerState
from petals.utils.dht import compute_spans, get_remote_module_infos

from textrl_swarm.config import SwarmAccess, Timeouts
from textrl_swarm.errors import (
    AccessDenied,
    BlocksUnavailable,
    ConfigError,
    ServerFailed,
    SwarmError,
    closest,
)
from textrl_swarm.models.blocks import BlockSpan, spans_of
from textrl_swarm.models.layers import short_name
from textrl_swarm.swarm.access import read_secret
from textrl_swarm.swarm.client.chain import run_in_background
from textrl_swarm.swarm.client.connection import join, shut_down
from textrl_swarm.swarm.client.routing import announced_models
from textrl_swarm.swarm.client.rpc import ServerCalls
from textrl_swarm.swarm.protocol import CAPABILITY, CAPABILITY_PREFIX, read_sizes, read_weights
from textrl_swarm.swarm.traffic import Traffic

_MAX_BLOCKS = 1000  # of one model; an announcement of more is malformed
_MAX_LAYERS = 100  # names per block
_MEASURED_BYTES = 256 << 10  # of hidden states, there and back
_TIMEOUTS = Timeouts(connect_s=5.0, request_s=10.0)


@dataclass(frozen=True)
class ServerReport:
    """One server of one model."""

    peer_id: str

    name: str | None
    """As its owner called it."""

    start: int
    """First block."""

    stop: int
    """Behind the last block."""

    state: str
    """"online", "joining" (still loading), "offline" (about to leave), "silent": announced, but does not
    answer, or "closed": does not let this machine in.
    """

    can_train: bool
    """Whether the server takes adapters and returns their gradients."""

    dtype: str | None
    """In which the server computes, e.g. "bfloat16"."""

    quantization: str | None
    """"int8", "nf4" or None."""

    answer_ms: float | None
    """Round trip of a small request, measured now."""

    token_ms: float | None
    """One token through all its blocks and back, measured now; None = cannot train, or was too busy."""

    bits_per_s: float | None
    """At which hidden states travel there and back, measured while the other servers are measured too; None =
    cannot train, or was too busy.
    """

    cache_tokens_left: int | None
    """Rows x tokens of generations that the server can still accept, as announced."""

    throughput: float
    """Tokens/s that the server announces (routing prefers more); 1 when the server did not measure it."""

    forward_rps: float | None
    """Tokens/s through one block, by the server's own measurement; None = not measured."""

    inference_rps: float | None
    """Generation steps/s through one block, likewise."""

    network_rps: float | None
    """Tokens/s of its network, likewise."""

    version: str | None
    """Of petals."""

    adapters: tuple[str, ...]
    """Adapters that the server loaded at its start."""

    weights: Mapping[int, str]
    """Block -> digest of its weights (models/digests.py); empty when the server did not tell."""

    layers: Mapping[int, tuple[str, ...]]
    """Block -> names of the layers that LoRA can adapt there; empty for servers that cannot train."""


@dataclass(frozen=True)
class Links:
    """The network between this machine and a chain of servers that hold all blocks."""

    servers: int

    bits_per_s: float
    """Of all of them together, per direction."""

    round_trip_s: float
    """Of a small request; the mean."""

    token_s: float
    """One token through all blocks."""


@dataclass(frozen=True)
class ModelReport:
    """One model of the swarm. Only servers that are online and answer count as holding blocks."""

    dht_prefix: str
    """The model's name in the swarm."""

    repository: str | None
    """The model's address on the hub; None for a directory."""

    num_blocks: int

    servers: tuple[ServerReport, ...]
    """By first block."""

    def copies(self, *, training: bool) -> tuple[int, ...]:
        """For each block, how many servers hold it; with `training`, only those that can train."""
        copies = [0] * self.num_blocks
        for server in self.servers:
            if server.state == "online" and (server.can_train or not training):
                for block in range(max(0, server.start), min(server.stop, self.num_blocks)):
                    copies[block] += 1
        return tuple(copies)

    @property
    def missing(self) -> tuple[BlockSpan, ...]:
        """Spans of blocks that nobody holds."""
        return self._lacking(self.copies(training=False))

    @property
    def untrainable(self) -> tuple[BlockSpan, ...]:
        """Spans of blocks that nobody can train, the missing ones among them."""
        return self._lacking(self.copies(training=True))

    @property
    def conflicting(self) -> tuple[BlockSpan, ...]:
        """Spans of blocks of which servers hold different weights: two models share the name."""
        digests: dict[int, set[str]] = defaultdict(set)
        for server in self.servers:
            for block, digest in server.weights.items():
                digests[block].add(digest)
        return tuple(spans_of(block for block, found in digests.items() if len(found) > 1))

    def links(self, blocks: range | None = None) -> Links | None:
        """Of the servers that a client would choose for some blocks, or for all, those that reach furthest;
        None when they do not hold all of them, or were not measured.
        """
        chosen: list[ServerReport] = []
        blocks = blocks or range(self.num_blocks)
        block = blocks.start
        while block < blocks.stop:
            able = (
                s for s in self.servers if s.state == "online" and s.can_train and s.start <= block < s.stop
            )
            server = max(able, key=lambda s: (s.stop, s.throughput), default=None)
            if server is None:
                return None
            chosen.append(server)
            block = server.stop
        rates = [server.bits_per_s for server in chosen if server.bits_per_s is not None]
        trips = [server.answer_ms for server in chosen if server.answer_ms is not None]
        tokens = [server.token_ms for server in chosen if server.token_ms is not None]
        if not len(rates) == len(trips) == len(tokens) == len(chosen):
            return None
        return Links(len(chosen), sum(rates), sum(trips) / len(trips) / 1000, sum(tokens) / 1000)

    @staticmethod
    def _lacking(copies: Sequence[int]) -> tuple[BlockSpan, ...]:
        return tuple(spans_of(block for block, count in enumerate(copies) if count == 0))


def survey(
    initial_peers: Sequence[str],
    dht_prefix: str | None = None,
    *,
    timeout_s: float = 60.0,
    access: SwarmAccess | None = None,
) -> tuple[ModelReport, ...]:
    """Looks at a swarm as a client and leaves nothing behind.

    Args:
        initial_peers: addresses of servers.
        dht_prefix: of the one model to report; None = all that are announced.
        timeout_s: for everything together.
        access: what lets this machine in.

    Raises:
        AddressError: an address is malformed, or none of the peers answers.
        BlocksUnavailable: no model is announced.
        ConfigError: the swarm does not announce `dht_prefix`.
        SwarmError: no answer in time.
    """
    deadline = time.monotonic() + timeout_s
    access = access or SwarmAccess()
    secret = read_secret(access.secret_file)
    dht, p2p = join(initial_peers, min(timeout_s, _TIMEOUTS.connect_s), access.identity)
    try:
        announced = announced_models(dht, _left_s(deadline))
        models = _chosen(announced, dht_prefix, str(dht.initial_peers[0]))
        return tuple(_report(dht, p2p, secret, name, info, deadline) for name, info in sorted(models.items()))
    except (concurrent.futures.TimeoutError, TimeoutError) as error:  # two classes before Python 3.11
        raise SwarmError(
            f"the swarm gave no complete answer within {timeout_s:.0f} s; try again, or through another "
            "address"
        ) from error
    finally:
        shut_down(dht, p2p)


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _chosen(models: dict[str, ModelInfo], dht_prefix: str | None, address: str) -> dict[str, ModelInfo]:
    models = {_printable(name): info for name, info in models.items() if info.num_blocks <= _MAX_BLOCKS}
    if not models:
        raise BlocksUnavailable(
            "a peer answered, but no model is announced in its swarm: servers announce theirs once their "
            "blocks are loaded; "
            f"wait for them, or start one: textrl-swarm serve MODEL --initial-peers {address}"
        )
    if dht_prefix is None:
        return models
    if dht_prefix not in models:
        raise ConfigError(f"this swarm serves no model called {dht_prefix!r}; {closest(dht_prefix, models)}")
    return {dht_prefix: models[dht_prefix]}


def _report(
    dht: DHT, p2p: P2P, secret: bytes | None, name: str, info: ModelInfo, deadline: float
) -> ModelReport:
    uids = [f"{name}.{block}" for block in range(info.num_blocks)]
    found = get_remote_module_infos(dht, uids, latest=True, return_future=True).result(_left_s(deadline))
    spans = [
        span for span in compute_spans(found, min_state=ServerState.OFFLINE).values() if span.start < span.end
    ]
    calls = ServerCalls(p2p, _TIMEOUTS, Traffic(), secret=secret)

    async def ask_all() -> list[ServerReport]:
        answers = asyncio.gather(*(_ask(calls, span, uids) for span in spans))
        try:
            return await asyncio.wait_for(answers, _left_s(deadline))
        finally:
            await calls.close()

    servers = sorted(
        run_in_background(ask_all()), key=lambda server: (server.start, server.stop, server.peer_id)
    )
    return ModelReport(name, _printable_or_none(info.repository), info.num_blocks, tuple(servers))


async def _ask(calls: ServerCalls, span: RemoteSpanInfo, uids: Sequence[str]) -> ServerReport:
    info = span.server_info
    state = info.state.name.lower()
    can_train = CAPABILITY in info.adapters
    answer_ms = token_ms = bits_per_s = cache_tokens_left = None
    weights: dict[int, str] = {}
    layers: dict[int, tuple[str, ...]] = {}
    if info.state == ServerState.ONLINE:
        try:
            # The first request also opens the connection, so it is not timed.
            about = await calls.info(span.peer_id, uids[span.start])
            answer_ms = await _milliseconds(calls.info(span.peer_id, uids[span.start]))
        except AccessDenied:
            state = "closed"
        except ServerFailed:
            state = "silent"
        else:
            held = read_weights(about, range(span.start, span.end)) or {}
            weights = {block: _printable(str(one.digest)) for block, one in held.items()}
            layers = _layers(about, range(span.start, span.end)) if can_train else {}
            if can_train:
                token_ms = await _token_ms(calls, span, uids, about)
                bits_per_s = await _bits_per_s(calls, span, uids, about)
    if info.cache_tokens_left is not None:
        # Of our servers, tokens in all their blocks; petals counts numbers of one block's keys or values.
        cache_tokens_left = info.cache_tokens_left // (1 if can_train else 2 * span.length)
    return ServerReport(
        peer_id=str(span.peer_id),
        name=_printable_or_none(info.public_name),
        start=span.start,
        stop=span.end,
        state=state,
        can_train=can_train,
        dtype=_printable_or_none(info.torch_dtype),
        quantization=None if info.quant_type in (None, "none") else _printable(info.quant_type),
        answer_ms=answer_ms,
        token_ms=token_ms,
        bits_per_s=bits_per_s,
        cache_tokens_left=cache_tokens_left,
        throughput=info.throughput,
        forward_rps=info.forward_rps,
        inference_rps=info.inference_rps,
        network_rps=info.network_rps,
        version=_printable_or_none(info.version),
        weights=weights,
        layers=layers,
        adapters=tuple(_printable(name) for name in info.adapters if not name.startswith(CAPABILITY_PREFIX)),
    )


def _layers(about: Mapping[str, Any], blocks: Iterable[int]) -> dict[int, tuple[str, ...]]:
    layers = {}
    try:
        for block in blocks:
            told = about["linears"][str(block)]
            names = {_printable(short_name(str(path), read_sizes(sizes))) for path, sizes in told.items()}
            layers[block] = tuple(sorted(names))[:_MAX_LAYERS]
    except (KeyError, TypeError, ValueError, AttributeError):  # strangers' answers
        return {}
    return layers


async def _token_ms(
    calls: ServerCalls, span: RemoteSpanInfo, uids: Sequence[str], about: dict[str, Any]
) -> float | None:
    announced = DTYPE_MAP.get(span.server_info.torch_dtype)
    dtype = announced if isinstance(announced, torch.dtype) else torch.float32
    try:
        token = torch.zeros(1, 1, int(about["hidden_size"]), dtype=dtype)
        return await _milliseconds(calls.forward(span.peer_id, uids[span.start : span.end], token, ""))
    except (ServerFailed, KeyError, TypeError, ValueError):
        return None


async def _bits_per_s(
    calls: ServerCalls, span: RemoteSpanInfo, uids: Sequence[str], about: dict[str, Any]
) -> float | None:
    try:
        width = int(about["hidden_size"])
        tokens = max(1, min(int(about["max_batch_tokens"]), _MEASURED_BYTES // (4 * width)))
        hidden = torch.zeros(1, tokens, width)
        peer, uid = span.peer_id, uids[span.start]
        least_ms = min([await _milliseconds(calls.echo(peer, uid, hidden[:, :1])) for _ in range(3)])
        took_ms = await _milliseconds(calls.echo(peer, uid, hidden))
    except (ServerFailed, KeyError, TypeError, ValueError):
        return None
    return 2 * 8 * hidden.nbytes / max(1e-3, (took_ms - least_ms) / 1000)


async def _milliseconds(call: Awaitable[object]) -> float:
    started = time.perf_counter()
    await call
    return (time.perf_counter() - started) * 1000


def _printable_or_none(text: str | None) -> str | None:
    return _printable(text) if text else None


def _printable(text: str) -> str:
    """A stranger's text without characters that could control a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)[:200]
