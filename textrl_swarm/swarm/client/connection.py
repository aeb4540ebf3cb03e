"""A client's connection to one model's blocks in one swarm: finds the servers and checks that they hold this
model.

Knows nothing about tokens or training; `policies/remote.py` puts embeddings and heads around it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivemind.dht import DHT
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from torch import Tensor

from textrl_swarm.config import ServerChecks, Timeouts
from textrl_swarm.decoders.boundary import Boundary
from textrl_swarm.decoders.sharing import SharedPrefix
from textrl_swarm.errors import AddressError, ConfigError, ServerMismatch
from textrl_swarm.models.blocks import blocks_text
from textrl_swarm.models.layers import LayerSizes
from textrl_swarm.swarm.access import ensure_identity
from textrl_swarm.swarm.client.chain import BlockChain, run_in_background
from textrl_swarm.swarm.client.end_blocks import EndBlocks, EndSession
from textrl_swarm.swarm.client.own_blocks import OwnBlocks
from textrl_swarm.swarm.client.routing import Router, Span
from textrl_swarm.swarm.client.rpc import ServerCalls, short_id
from textrl_swarm.swarm.client.session import GenerationSession
from textrl_swarm.swarm.node import start_client_node
from textrl_swarm.swarm.protocol import AdapterSnapshot, ServedWeights, held_blocks, read_sizes, read_weights
from textrl_swarm.swarm.traffic import Traffic

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"(/[a-z0-9]+/[^/\s]+)+/p2p/[1-9A-HJ-NP-Za-km-z]{30,}")


@dataclass(frozen=True)
class ModelFingerprint:
    """What must agree between a client and the servers whose blocks it uses."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_blocks: int


@dataclass(frozen=True)
class _Known:
    """The weights that a block must have, and whose they are."""

    digest: str
    owner: str


def check_addresses(initial_peers: Sequence[str]) -> list[str]:
    """Raises AddressError for an empty list or an address that is not a libp2p multiaddress with a peer
    id.
    """
    addresses = (
        [initial_peers] if isinstance(initial_peers, str) else [str(address) for address in initial_peers]
    )
    if not addresses:
        raise AddressError(
            "initial_peers is empty; give the address that `textrl-swarm serve` prints, or None to use "
            "this machine"
        )
    for address in addresses:
        if not _ADDRESS.fullmatch(address):
            raise AddressError(
                f"{address!r} is not a peer's address; it should look like "
                "/ip4/192.0.2.7/tcp/31337/p2p/12D3Koo..., "
                "as `textrl-swarm serve` prints it"
            )
    return addresses


def join(
    initial_peers: Sequence[str], timeout_s: float, identity: str | Path | None = None
) -> tuple[DHT, P2P]:
    """A client node of a swarm and its libp2p daemon; `shut_down` ends both.

    Args:
        identity: file with the node's private key; None = a new one.

    Raises:
        AddressError: an address is malformed, or none of the peers answers.
        ConfigError: the identity cannot be used.
    """
    addresses = check_addresses(initial_peers)
    options: dict[str, Any] = {"client_mode": True, "num_workers": 32, "startup_timeout": timeout_s}
    if identity is not None:
        ensure_identity(identity)
        options["identity_path"] = str(identity)
    with joining(addresses):
        dht = start_client_node(addresses, **options)
    try:
        return dht, run_in_background(dht.replicate_p2p())
    except BaseException:
        shut_down(dht, None)
        raise


@contextlib.contextmanager
def joining(addresses: Sequence[str]) -> Iterator[None]:
    """Turns hivemind's errors for initial peers that do not answer into an AddressError."""
    try:
        yield
    except (P2PDaemonError, concurrent.futures.TimeoutError, TimeoutError, RuntimeError) as error:
        if "already taken" in str(error):
            raise ConfigError(
                f"{_first_line(error)}: end the other run, or give this one an identity of its own"
            ) from error
        if isinstance(error, RuntimeError) and "initial_peers" not in str(error):
            raise  # about the weights, not about the swarm
        raise AddressError(
            f"none of the initial peers answered: {', '.join(addresses)} ({_first_line(error)}); "
            "is the server running, and is this the address that it printed?"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class SwarmClient:
    """Forward, backward and generation over a model's remote blocks.

    Args:
        dht, p2p: a running client node and its libp2p daemon.
        fingerprint: of the client's model; servers of another model are refused.
        checkpoint: block index -> digest of its weights, as far as the client has them (models/digests.py).
        ends: the blocks that this machine computes.
        checks, own: see BlockChain.
        secret: of the swarm.
        allowed: ids of the servers that may be used; () = all.
        boundary: what travels between blocks; None = hidden states.
        owns_dht: end both on close; False when a petals model of the user's owns them.

    Raises:
        BlocksUnavailable, ServerMismatch, AccessDenied: some block has no usable server within
            `timeouts.discovery_s`.
    """

    def __init__(
        self,
        dht: DHT,
        p2p: P2P,
        dht_prefix: str,
        fingerprint: ModelFingerprint,
        timeouts: Timeouts,
        *,
        checkpoint: Mapping[int, str],
        ends: EndBlocks,
        checks: ServerChecks | None = None,
        own: OwnBlocks | None = None,
        secret: bytes | None = None,
        allowed: Sequence[str] = (),
        boundary: Boundary | None = None,
        owns_dht: bool = True,
    ):
        self._ends = ends
        self._own = own
        self.traffic = Traffic()
        self.fingerprint = fingerprint
        self._known: dict[int, _Known] = {
            block: _Known(digest, "this machine's checkpoint") for block, digest in checkpoint.items()
        }
        self._forms: dict[str, str] = {}  # form of the weights -> the first server that computes with it
        self._close: Callable[[], object] = (
            weakref.finalize(self, shut_down, dht, p2p) if owns_dht else _nothing
        )
        self.carries_more = boundary is not None and bool(boundary.parts)
        """Whether numbers travel beside hidden states."""
        self._calls = ServerCalls(p2p, timeouts, self.traffic, boundary, secret=secret)
        self.router = Router(dht, dht_prefix, fingerprint.num_blocks, self._inspect, allowed)
        self.chain = BlockChain(self.router, self._calls, checks=checks, own=own)
        self.linears: dict[int, dict[str, LayerSizes]] = {}
        """Block index -> path of a layer inside it -> sizes, as those have it that compute the block."""
        self.spans: list[Span] = []
        route = self.router.route(ends.inner.start, ends.inner.stop, timeout_s=timeouts.discovery_s)
        try:
            self.spans = run_in_background(route)
        except BaseException:
            self.close()
            raise
        self.linears.update(ends.linears)

    async def _inspect(self, span: Span, uid: str) -> ServerMismatch | range | None:
        """Why a server cannot serve this client, or the blocks that it holds where they are not all of the
        span's, or None; called before a server is used, and again after it failed. Keeps the smallest limits
        seen.
        """
        info = await self._calls.info(span.peer, "")  # it may hold none of the blocks that are announced
        differing = []
        for name, ours in vars(self.fingerprint).items():
            if info.get(name) != ours:
                differing.append(f"{name} {info.get(name)} (client: {ours})")
        if differing:
            return ServerMismatch(
                f"server {short_id(span.peer)} announces {self.router.dht_prefix!r} but holds another model: "
                f"{', '.join(differing)}"
            )
        weights = read_weights(info, range(span.start, span.stop))
        if weights is None:
            return held_blocks(info) or ServerMismatch(
                f"server {short_id(span.peer)} does not say which weights it holds; start it anew, with the "
                "textrl-swarm of this client"
            )
        if self.spans and self.chain.limits.takes_sharing and not info["takes_sharing"]:
            return ServerMismatch(
                f"server {short_id(span.peer)} cannot compute once what rows have in common, as this client "
                "asks; continue the run from its last checkpoint to do without"
            )
        misfit = self._other_weights(span, weights)
        if misfit is not None:
            return ServerMismatch(misfit)
        self._calls.expect(span.peer, {self.router.uids[block]: held for block, held in weights.items()})
        self._tell_mixture(span, weights)
        self.chain.limits = self.chain.limits.within(info)
        self.chain.passes.room[span.peer] = info["kept_input_bytes"]
        self.chain.hand_overs.round_trip_s[span.peer] = await self._calls.round_trip_s(span.peer, uid)
        for block in range(span.start, span.stop):
            layers = info["linears"][str(block)]
            self.linears[block] = {path: read_sizes(sizes) for path, sizes in layers.items()}
        return None

    def _other_weights(self, span: Span, weights: Mapping[int, ServedWeights]) -> str | None:
        """Why these are not the weights that the client expects; else None, and new ones are expected from
        now on.
        """
        server = f"server {short_id(span.peer)}"
        differing = [
            block for block, held in weights.items() if self._known.get(block, held).digest != held.digest
        ]
        if differing:
            known = self._known[differing[0]]
            return (
                f"{server} announces {self.router.dht_prefix!r} but holds another model: the weights of "
                f"{blocks_text(differing)} ({weights[differing[0]].digest[:12]}...) are not those of "
                f"{known.owner} ({known.digest[:12]}...)"
            )
        for block, held in weights.items():
            self._known.setdefault(block, _Known(held.digest, server))
        return None

    def _tell_mixture(self, span: Span, weights: Mapping[int, ServedWeights]) -> None:
        form = weights[span.start].form
        if form in self._forms:
            return
        self._forms[form] = str(span)
        if len(self._forms) > 1:
            mixture = "; ".join(f"{owner}: {form}" for form, owner in self._forms.items())
            logger.warning(
                "the servers of %r do not compute alike, so results depend on which of them answers (%s)",
                self.router.dht_prefix,
                mixture,
            )

    def use_codec(self, codec: str | None) -> None:
        """From now on hidden states travel so, in both directions."""
        self._calls.codec = codec
        if self._own is not None:
            self._own.codec = codec

    def blocks(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        adapter: AdapterSnapshot | None = None,
        flats: Mapping[int, Tensor] | None = None,
        shared: SharedPrefix | None = None,
    ) -> Tensor:
        """See BlockChain.__call__; the blocks of this machine may be among them."""
        ends, inner = self._ends, self._ends.inner
        batches = self.chain.cut(hidden, shared if ends.takes_sharing else None)
        own = adapter, flats or {}, batches
        hidden = ends(hidden, range(start, min(stop, inner.start)), *own)
        first, end = max(start, inner.start), min(stop, inner.stop)
        if first < end:
            hidden = self.chain(hidden, first, end, adapter, flats, shared)
        return ends(hidden, range(max(start, inner.stop), stop), *own)

    @property
    def takes_padding(self) -> bool:
        """Whether rows of unequal length may share a generation."""
        return self.chain.limits.takes_padding and self._ends.takes_padding

    def session(self, adapter: AdapterSnapshot | None, *, rows: int, max_length: int) -> GenerationSession:
        """A generation with the caches on the servers, for rows of at most `max_length` tokens."""
        return GenerationSession(self.chain, self._ends.inner, adapter, rows=rows, max_length=max_length)

    def end_session(self, adapter: AdapterSnapshot | None, *, rows: int, max_length: int) -> EndSession:
        """What this machine's own blocks do in it."""
        return self._ends.session(adapter, rows=rows, max_length=max_length)

    def close(self) -> None:
        """Ends the DHT node and its daemon. Safe to call twice; also runs when the program ends."""
        with contextlib.suppress(Exception):  # as in shut_down
            run_in_background(self._calls.close())
        if self._own is not None:
            self._own.close()
        self._close()


def _nothing() -> None:
    """Closes nothing: the user's petals model owns the connection."""


def shut_down(dht: DHT, p2p: P2P | None) -> None:
    """Ends a client node's process and daemon; never raises."""
    with contextlib.suppress(Exception):  # whatever state the daemons are in, they must end
        if p2p is not None:
            RemoteExpertWorker.run_coroutine(p2p.shutdown(), return_future=True).result(timeout=5)
    with contextlib.suppress(Exception):
        dht.shutdown()
        dht.join(5)
