"""What a server's DHT node takes from others: records from members, of a bounded size, number and age.

hivemind's own takes any number of records of any age from anyone. Knows nothing about what they say.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Any, ClassVar

import hivemind.dht.node
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import get_dht_time

from textrl_swarm.errors import ShapeError
from textrl_swarm.swarm.access import AllowList, Door, Membership

_MAX_RECORD_BYTES = 64 << 10
_MAX_KEYS = 1024  # of one request
_BURST_KEYS = 16384  # that one peer may ask for at once
_KEYS_PER_S = 512  # and from then on
_ID_BYTES = 20  # of a node or a key
_MAX_AGE_S = 3600.0
_BURST_BYTES = 4 << 20  # from one peer at once
_BYTES_PER_S = 16 << 10  # and from then on
_ALL_BURST_BYTES = 64 << 20  # from all
_ALL_BYTES_PER_S = 1 << 20
_MAX_PEERS = 10_000  # that are remembered


class _Allowance:
    """How much may come now: a bucket that fills up again with time."""

    def __init__(self, burst: int, per_s: int):
        self._most = burst
        self._per_s = per_s
        self._left = float(burst)
        self._since = time.monotonic()

    def take(self, count: int) -> bool:
        """Whether so many may come; then they are taken."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._since) * self._per_s)
        self._since = now
        if count > self._left:
            return False
        self._left -= count
        return True


class GuardedProtocol(DHTProtocol):
    """DHTProtocol of a node that belongs to a server."""

    allowed: ClassVar[AllowList | None] = None
    """Peers whose records are taken; None = all."""

    secret: ClassVar[bytes | None] = None
    """Of the swarm."""

    _rpc_handlers = None  # hivemind caches these two on the class
    _stub_type = None

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        return DHTProtocol._get_handle_name(namespace, method_name)  # it has the name of the class

    @functools.cached_property
    def _door(self) -> Door:
        return Door(self.allowed, Membership(self.secret, self.p2p.peer_id))

    @functools.cached_property
    def _allowances(self) -> dict[tuple[PeerID, str], _Allowance]:
        return {}

    @functools.cached_property
    def _allowance(self) -> _Allowance:
        return _Allowance(_ALL_BURST_BYTES, _ALL_BYTES_PER_S)

    def get_stub(self, peer: PeerID) -> Any:
        """As hivemind's; what is stored at others comes with a proof."""
        return _Proving(super().get_stub(peer), self._door.membership.code_for(peer))

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """As hivemind's, for the records that can be taken; the others count as not stored."""
        peer = context.remote_id
        code = request.auth.signature.decode(errors="replace")
        self._door.admit(peer)
        self._door.require_code(peer, code)
        _require_usable(request)
        taken = [i for i in range(len(request.keys)) if self._is_usable(request, i)]
        size = sum(len(request.values[i]) + len(request.subkeys[i]) for i in taken)
        own = self._allowance_of(peer, "stored", _BURST_BYTES, _BYTES_PER_S)
        if not (own.take(size) and self._allowance.take(size)):
            raise ShapeError(f"{size} bytes of records are too many now")
        fields = ("keys", "subkeys", "values", "expiration_time", "in_cache")
        rest = dht_pb2.StoreRequest(
            peer=request.peer, **{name: [getattr(request, name)[i] for i in taken] for name in fields}
        )
        response = await super().rpc_store(rest, context)
        stored = dict(zip(taken, response.store_ok, strict=True))
        del response.store_ok[:]
        response.store_ok.extend(stored.get(i, False) for i in range(len(request.keys)))
        return response

    def _allowance_of(self, peer: PeerID, what: str, burst: int, per_s: int) -> _Allowance:
        if len(self._allowances) >= _MAX_PEERS:
            self._allowances.clear()
        return self._allowances.setdefault((peer, what), _Allowance(burst, per_s))

    def _is_usable(self, request: dht_pb2.StoreRequest, i: int) -> bool:
        """Neither too large nor too old, and no plain value where there is a dictionary of several peers."""
        size = len(request.keys[i]) + len(request.subkeys[i]) + len(request.values[i])
        age_s = request.expiration_time[i] - get_dht_time()
        is_plain = request.subkeys[i] == self.IS_REGULAR_VALUE
        found = self.storage.get(DHTID.from_bytes(request.keys[i])) if is_plain else None
        is_taken = found is not None and isinstance(found.value, DictionaryDHTValue)
        return size <= _MAX_RECORD_BYTES and math.isfinite(age_s) and age_s <= _MAX_AGE_S and not is_taken

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """As hivemind's."""
        _require_usable(request)
        own = self._allowance_of(context.remote_id, "asked", _BURST_KEYS, _KEYS_PER_S)
        if not own.take(len(request.keys)):
            raise ShapeError(f"{len(request.keys)} keys are too many now")
        return await super().rpc_find(request, context)


class _Proving:
    """A stub whose rpc_store shows a code."""

    def __init__(self, stub: Any, code: str | None):
        self._stub = stub
        self._code = code

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)
        code = self._code
        if name != "rpc_store" or code is None:
            return method

        async def store(request: dht_pb2.StoreRequest, **options: Any) -> Any:
            request.auth.signature = code.encode()
            return await method(request, **options)

        return store


def _require_usable(request: Any) -> None:
    if len(request.keys) > _MAX_KEYS:
        raise ShapeError(f"{len(request.keys)} keys in a request, where at most {_MAX_KEYS} are allowed")
    if any(len(name) > _ID_BYTES for name in (*request.keys, request.peer.node_id)):
        raise ShapeError(f"an id of more than {_ID_BYTES} bytes")


def guard_records(allowed: AllowList | None, secret: bytes | None) -> None:
    """From now on, DHT nodes of this process and of those that it forks are guarded so."""
    GuardedProtocol.allowed, GuardedProtocol.secret = allowed, secret
    hivemind.dht.node.DHTProtocol = GuardedProtocol
