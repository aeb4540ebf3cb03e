"""What client and server agree on, the adapter store, and the parts of the swarm that need no server."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import time
from concurrent.futures import Future
from unittest.mock import MagicMock

import pytest
import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.streaming import split_for_streaming

from textrl_swarm.config import Timeouts
from textrl_swarm.decoders.boundary import Boundary
from textrl_swarm.errors import (
    AdapterMissing,
    AdapterRejected,
    AddressError,
    BlocksUnavailable,
    ConfigError,
    InputsMissing,
    RemoteFailure,
    ServerBusy,
    ServerFailed,
    ServerMismatch,
)
from textrl_swarm.models.blocks import split_evenly
from textrl_swarm.models.layers import LayerSizes
from textrl_swarm.swarm.client.rpc import ServerCalls
from textrl_swarm.swarm.protocol import (
    ENDING,
    NUMBER,
    AdapterHeader,
    AdapterLayout,
    AdapterSnapshot,
    adapter_header,
    adapter_missing,
    adapter_rejected,
    digest,
    held_blocks,
    is_adapter_key,
)
from textrl_swarm.swarm.server.adapter_store import AdapterStore
from textrl_swarm.swarm.server.kept_inputs import KeptInputs
from textrl_swarm.swarm.stub import ServerStub
from textrl_swarm.swarm.traffic import Traffic

TARGETS = {"attention.dense": LayerSizes(3, 2), "mlp.experts.down_proj": LayerSizes(2, 4, experts=5)}
R = 2
NUMEL = R * (3 + 2) + 5 * R * (2 + 4)


def flat(seed: int = 0) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


def snapshot(seed: int = 0, blocks=(0, 1), r: int = R, alpha: float = 4.0) -> AdapterSnapshot:
    layouts = dict.fromkeys(blocks, AdapterLayout(r, TARGETS))
    return AdapterSnapshot.take(layouts, alpha, {block: flat(seed + block) for block in blocks})


# ------------------------------------------------------------------------------------------------- the header


def test_layout_by_hand():
    """A of the first target row by row, then its B, then the next target's."""
    layout = AdapterHeader(R, 4.0, (TARGETS,), {0: (0, "")}).layout(0)
    assert layout.block_numel == NUMEL
    numbers = torch.arange(float(NUMEL))
    views = layout.views(numbers)
    assert list(views) == list(TARGETS)
    a, b = views["attention.dense"]
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert b.tolist() == [[6, 7], [8, 9]]
    a, b = views["mlp.experts.down_proj"]
    assert a.shape == (5 * R, 2) and b.shape == (4, 5 * R), "of five experts"
    assert a[:2].tolist() == [[10, 11], [12, 13]]
    assert b[0, :2].tolist() == [30, 31]
    b[0, 0] = -1
    assert numbers[30] == -1, "views share the memory"


def test_header_survives_the_wire():
    header = snapshot().header
    again = AdapterHeader.decode(header.encode())
    assert again == header
    assert again.key == header.key
    assert [list(kind) for kind in again.kinds] == [list(TARGETS)], "the order is part of the layout"


def test_blocks_of_one_kind_share_a_layout():
    other = {"mlp": LayerSizes(2, 4)}
    layouts = {block: AdapterLayout(R, other if block == 1 else TARGETS) for block in range(4)}
    header = adapter_header(layouts, 4.0, dict.fromkeys(layouts, ""))
    assert header.kinds == (TARGETS, other)
    assert {block: kind for block, (kind, _) in header.blocks.items()} == {0: 0, 1: 1, 2: 0, 3: 0}
    assert AdapterHeader.decode(header.encode()).layout(1) == layouts[1]


def test_same_numbers_same_key():
    assert snapshot(1).key == snapshot(1).key
    assert is_adapter_key(snapshot(1).key)


@pytest.mark.parametrize(
    "other",
    [snapshot(2), snapshot(1, alpha=5.0), snapshot(1, blocks=(0,)), snapshot(1, blocks=(0, 2))],
    ids=["numbers", "alpha", "fewer", "which"],
)
def test_anything_else_another_key(other):
    assert other.key != snapshot(1).key


def test_swapped_targets_are_another_key():
    swapped = dict(reversed(TARGETS.items()))
    assert (
        AdapterSnapshot.take({0: AdapterLayout(R, swapped)}, 4.0, {0: flat()}).key
        != AdapterSnapshot.take({0: AdapterLayout(R, TARGETS)}, 4.0, {0: flat()}).key
    )


def test_digest_sees_every_bit():
    numbers = flat()
    changed = numbers.clone()
    changed[-1] = torch.nextafter(changed[-1], torch.tensor(torch.inf))
    assert digest(numbers) == digest(numbers.clone())
    assert digest(changed) != digest(numbers)
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


@pytest.mark.parametrize(
    "name",
    [None, "", "lora-", "lora-xyz", "artek0chumak/bloom-560m", snapshot().key + "0", snapshot().key.upper()],
)
def test_other_names_are_not_adapter_keys(name):
    assert not is_adapter_key(name)


GOOD = json.loads(snapshot().header.encode())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "malformed adapter header"),
        (b"\xff\xfe", "malformed adapter header"),
        (b"[]", "malformed adapter header"),
        (b"null", "malformed adapter header"),
        (json.dumps({**GOOD, "kinds": None}).encode(), "malformed adapter header"),
        (json.dumps({**GOOD, "kinds": [None]}).encode(), "malformed adapter header"),
        (json.dumps({**GOOD, "kinds": [{"mlp": [1, 2]}]}).encode(), "malformed adapter header"),
        (json.dumps({**GOOD, "kinds": [{"mlp": ["many", 1, None]}]}).encode(), "malformed adapter header"),
        (json.dumps({**GOOD, "blocks": {"first": [0, ""]}}).encode(), "malformed adapter header"),
        (json.dumps({**GOOD, "blocks": {"0": ""}}).encode(), "malformed adapter header"),
        (
            json.dumps({name: GOOD[name] for name in ("r", "alpha", "kinds")}).encode(),
            "malformed adapter header",
        ),
        (json.dumps({**GOOD, "r": 0}).encode(), "impossible values: r=0"),
        (json.dumps({**GOOD, "alpha": -1}).encode(), "impossible values: r=2, alpha=-1.0"),
        (json.dumps({**GOOD, "alpha": float("nan")}).encode(), "impossible values: r=2, alpha=nan"),
        (json.dumps({**GOOD, "alpha": float("inf")}).encode(), "impossible values: r=2, alpha=inf"),
        (json.dumps({**GOOD, "kinds": []}).encode(), "0 kinds of blocks"),
        (json.dumps({**GOOD, "kinds": [{}]}).encode(), "impossible values"),
        (json.dumps({**GOOD, "kinds": [{"mlp": [-2, 4, None]}]}).encode(), "impossible values"),
        (json.dumps({**GOOD, "kinds": [{"mlp": [-2, -4, None]}]}).encode(), "impossible values"),
        (json.dumps({**GOOD, "kinds": [{"mlp": [2, 4, -1]}]}).encode(), "impossible values"),
        (json.dumps({**GOOD, "blocks": {}}).encode(), "impossible values"),
        (json.dumps({**GOOD, "blocks": {"0": [1, ""]}}).encode(), "impossible values"),
        (json.dumps({**GOOD, "blocks": {"0": [-1, ""]}}).encode(), "impossible values"),
    ],
)
def test_headers_of_strangers(data, text):
    with pytest.raises(ValueError, match=text):
        AdapterHeader.decode(data)


# -------------------------------------------------------------------------------------------------- the store


def put(store: AdapterStore, adapter: AdapterSnapshot, owner: str = "me", blocks=None) -> None:
    chosen = {block: adapter.blocks[block] for block in (blocks or adapter.blocks)}
    store.put(owner, adapter.header, chosen, "cpu")


ONE = 4 * NUMEL * 2  # bytes of a snapshot's two blocks


@pytest.mark.parametrize("error", [adapter_missing("lora-0", 3), adapter_rejected("too large")])
def test_errors_survive_the_way_from_process_to_process(error):
    """One that cannot be unpickled ends the thread that receives answers: all requests of a handler hang."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_what_was_put_can_be_had():
    store, adapter = AdapterStore(10 * ONE, 10 * ONE), snapshot()
    put(store, adapter)
    header, found = store.get(adapter.key, 1)
    assert header == adapter.header
    assert torch.equal(found, adapter.blocks[1])
    assert found.data_ptr() != adapter.blocks[1].data_ptr()
    assert store.size_bytes == ONE


def test_stored_tensors_can_take_part_in_backward():
    """Petals computes in inference mode; a tensor born there never can."""
    store, adapter = AdapterStore(10 * ONE, 10 * ONE), snapshot()
    with torch.inference_mode():
        put(store, adapter)
    leaf = store.get(adapter.key, 0)[1].detach().requires_grad_()
    leaf.square().sum().backward()
    assert torch.equal(leaf.grad, 2 * adapter.blocks[0])


def test_kept_inputs_have_bounds_and_are_given_once():
    kept = KeptInputs(max_bytes=5 << 16, max_bytes_per_client=3 << 16)
    names = ["a0", "a1", "b0", "a2", "b1", "a3"]
    for i, name in enumerate(names):
        kept.put(name[0], name, torch.full((1, 64, 256), float(i)))  # 64 KiB
    assert kept.take("a3").unique().tolist() == [5.0]
    for name in ("a0", "a3", "never"):  # over its owner's limit; given already; unknown
        with pytest.raises(InputsMissing, match=name):
            kept.take(name)
    assert all(kept.take(name).shape == (1, 64, 256) for name in ("a1", "a2", "b0", "b1"))


def test_kept_inputs_of_all_clients_have_bounds():
    kept = KeptInputs(max_bytes=3 << 16, max_bytes_per_client=3 << 16)
    for name in "abcd":
        kept.put(name, name, torch.zeros(1, 1, 8))  # a small one counts too
    with pytest.raises(InputsMissing):
        kept.take("a")
    kept.put("e", "e", torch.zeros(1, 64, 1024))  # larger than all
    assert kept.take("d").shape == (1, 1, 8)
    with pytest.raises(InputsMissing):
        kept.take("e")


def test_what_is_kept_does_not_change():
    kept, hidden = KeptInputs(1 << 20, 1 << 20), torch.zeros(1, 2, 4)
    kept.put("me", "name", hidden)
    hidden += 1
    assert not kept.take("name").any()


def test_putting_twice_changes_nothing():
    store, adapter = AdapterStore(10 * ONE, 10 * ONE), snapshot()
    put(store, adapter, blocks=[0])
    first = store.get(adapter.key, 0)[1]
    put(store, adapter)
    assert store.get(adapter.key, 0)[1] is first
    assert store.size_bytes == ONE


def test_missing_names_the_key_and_the_block():
    store, adapter = AdapterStore(10 * ONE, 10 * ONE), snapshot()
    with pytest.raises(AdapterMissing, match=f"ADAPTER_MISSING:{adapter.key}:0"):
        store.get(adapter.key, 0)
    put(store, adapter, blocks=[0])
    with pytest.raises(AdapterMissing, match=f"ADAPTER_MISSING:{adapter.key}:1"):
        store.get(adapter.key, 1)


def test_a_block_that_the_adapter_leaves_alone_is_not_missing():
    store, adapter = AdapterStore(10 * ONE, 10 * ONE), snapshot(blocks=(3,))
    put(store, adapter)
    assert store.get(adapter.key, 2) == (adapter.header, None)


def held(store: AdapterStore, adapters) -> list[int]:
    """Indices of the adapters that are there; asking without counting as a use."""
    return [i for i, adapter in enumerate(adapters) if adapter.key in store._entries]


def test_least_recently_used_goes_first():
    store, adapters = AdapterStore(3 * ONE, 3 * ONE), [snapshot(10 * i) for i in range(5)]
    for adapter in adapters[:3]:
        put(store, adapter)
    store.get(adapters[0].key, 0)
    put(store, adapters[3])
    assert held(store, adapters) == [0, 2, 3]
    put(store, adapters[2])
    put(store, adapters[4])
    assert held(store, adapters) == [2, 3, 4]
    assert store.size_bytes == 3 * ONE


def test_a_client_over_its_quota_loses_its_own():
    store, adapters = AdapterStore(10 * ONE, 2 * ONE), [snapshot(10 * i) for i in range(4)]
    put(store, adapters[0], "somebody else")
    for adapter in adapters[1:]:
        put(store, adapter, "greedy")
    assert held(store, adapters) == [0, 2, 3]


def test_an_adapter_in_use_makes_no_room_for_another_clients(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store, adapters = AdapterStore(3 * ONE, 3 * ONE, idle_s=60), [snapshot(10 * i) for i in range(5)]
    for adapter in adapters[:2]:
        put(store, adapter, "first")
    put(store, adapters[2], "second")
    now[0] = 59.0
    store.get(adapters[1].key, 0)
    with pytest.raises(ServerBusy, match=r"SERVER_BUSY: no room for .* beside those in use"):
        put(store, adapters[3], "third")
    assert held(store, adapters) == [0, 1, 2]
    now[0] = 61.0
    put(store, adapters[3], "third")  # in the place of one that nobody used for a minute
    assert held(store, adapters) == [1, 2, 3]
    now[0] = 62.0
    store.get(adapters[2].key, 0)
    put(store, adapters[4], "third")  # its own goes before those of others
    assert held(store, adapters) == [1, 2, 4]


def test_an_adapter_beyond_the_limit_is_refused_and_nothing_is_lost():
    store, adapters = AdapterStore(3 * ONE, ONE), [snapshot(), snapshot(10, blocks=(0, 1, 2))]
    put(store, adapters[0])
    with pytest.raises(
        AdapterRejected,
        match=f"ADAPTER_REJECTED: {ONE * 3 // 2} bytes of adapter, "
        f"this server keeps at most {ONE} per client",
    ):
        put(store, adapters[1])
    assert held(store, adapters) == [0]


def test_the_limit_holds_for_an_adapter_that_comes_in_pieces():
    """One push per block must not grow past what one push of all blocks may not."""
    store, adapter = AdapterStore(3 * ONE, ONE), snapshot(blocks=(0, 1, 2))
    put(store, adapter, blocks=[0])
    put(store, adapter, blocks=[1])
    with pytest.raises(AdapterRejected, match="this server keeps at most"):
        put(store, adapter, blocks=[2])
    assert store.size_bytes <= ONE


# ------------------------------------------------------------------------------------------ client-side parts


@pytest.mark.parametrize(
    ("num_blocks", "num_servers", "expected"),
    [
        (4, 2, [(0, 2), (2, 4)]),
        (5, 2, [(0, 2), (2, 5)]),
        (7, 3, [(0, 2), (2, 5), (5, 7)]),
        (3, 1, [(0, 3)]),
        (3, 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_split_evenly(num_blocks, num_servers, expected):
    assert split_evenly(num_blocks, num_servers) == expected


@pytest.mark.parametrize("num_servers", [0, 5, -1])
def test_split_into_too_many(num_servers):
    with pytest.raises(ConfigError, match=f"4 blocks can be split over 1 to 4 servers, not {num_servers}"):
        split_evenly(4, num_servers)


def test_addresses_that_are_fine():
    from textrl_swarm.swarm.client.connection import check_addresses

    peer = "/p2p/QmS9KwZptnVdB9FFV7uGgaTq4sEKBwcYeKZDfSpyKDUd1g"
    good = [
        f"/ip4/10.0.0.7/tcp/31337{peer}",
        f"/dns4/swarm.example.org/tcp/80{peer}",
        f"/ip6/::1/udp/9/quic-v1{peer}",
    ]
    assert check_addresses(good[:2]) == good[:2]
    assert check_addresses(good[0]) == [good[0]], "a single address may stand alone"
    with pytest.raises(AddressError):
        check_addresses([*good[:2], "nonsense"])


def attempts(recovery_s: float):
    from textrl_swarm.swarm.client.attempts import Attempts

    return Attempts("forward", recovery_s)


def test_attempts_end_by_time(monkeypatch):
    from textrl_swarm.swarm.client import attempts as module

    now, slept = [100.0], []

    async def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.asyncio, "sleep", sleep)

    async def fail_for_ever():
        tries = attempts(20)
        assert tries.left_s == 20
        while True:
            await tries.pause(ServerFailed("no answer"))

    with pytest.raises(RemoteFailure, match="forward failed 8 times, last: no answer"):
        asyncio.run(fail_for_ever())
    assert slept == [0, 0.5, 1, 2, 4, 8, 4.5]
    assert now[0] == 120


def test_attempts_end_when_the_adapter_is_lost_again_and_again():
    tries = attempts(20)
    with pytest.raises(RemoteFailure, match=r"does not keep the adapter .* larger --adapter_bytes"):
        for _ in range(100):
            tries.lost_adapter()


# ------------------------------------------------------------------------------------------------- the router


HELD = {"digest": "a", "dtype": "float32", "quantization": None}


class FakeDHT:
    """Records as petals' servers announce them."""

    def __init__(self, *spans):
        self.peer_id = "client"
        self.pid = os.getppid()  # a process with a child, as a node has its daemon
        self.spans = list(spans)  # (peer name, start, stop)
        self.initial_peers: list[str] = []
        self.greeted = 0

    def run_coroutine(self, coroutine, return_future=False):
        self.greeted += 1

    def get(self, key, latest, return_future):
        future = Future()
        future.set_result(None)
        return future


@pytest.fixture
def router(monkeypatch):
    """Function (*spans, refuse=()) -> Router over a fake DHT."""
    from hivemind.p2p import PeerID
    from petals.data_structures import RemoteModuleInfo, ServerInfo, ServerState

    from textrl_swarm.swarm.client import routing
    from textrl_swarm.swarm.protocol import CAPABILITY

    def infos(dht, uids, latest):
        found = []
        for block, uid in enumerate(uids):
            servers = {
                PeerID(name.encode()): ServerInfo(
                    ServerState.ONLINE,
                    throughput,
                    adapters={True: (CAPABILITY,), False: ()}.get(trains, (trains,)),
                    torch_dtype="float32",
                )
                for name, start, stop, throughput, trains in dht.spans
                if start <= block < stop
            }
            found.append(RemoteModuleInfo(uid, servers))
        return found

    monkeypatch.setattr(routing, "get_remote_module_infos", infos)

    def make(*spans, refuse=(), held=None):
        async def inspect(span, uid):
            name = span.peer.to_bytes().decode()
            own = (held or {}).get(name, range(span.start, span.stop))
            if not set(range(span.start, span.stop)) <= set(own):
                return own
            return ServerMismatch("another model") if name in refuse else None

        full = [(*span, 1.0, True)[:5] if len(span) == 3 else span for span in spans]
        return routing.Router(FakeDHT(*full), "tiny", 4, inspect)

    return make


def route(router, start=0, stop=4, timeout_s=0.0):
    chain = asyncio.run(router.route(start, stop, timeout_s=timeout_s))
    return [(span.peer.to_bytes().decode(), span.start, span.stop) for span in chain]


def test_the_furthest_reaching_server_is_taken(router):
    assert route(router(("a", 0, 2), ("b", 0, 3), ("c", 1, 4))) == [("b", 0, 3), ("c", 3, 4)]
    assert route(router(("a", 0, 4), ("b", 0, 2)), start=1, stop=2) == [("a", 1, 2)]


def test_a_server_that_holds_less_than_is_announced_is_used_for_that(router):
    """It was started anew under its old id; what it announced before has not expired yet."""
    made = router(("a", 0, 4), ("b", 0, 2), held={"a": range(2, 4)})
    for _ in range(2):  # announced anew each time
        assert route(made) == [("b", 0, 2), ("a", 2, 4)]
        made.report_failure(PeerID(b"a"))
        made._failures.clear()
    made = router(("a", 0, 2), ("b", 0, 4), held={"a": range(2, 4)})
    assert route(made, stop=2) == [("b", 0, 2)]
    with pytest.raises(BlocksUnavailable, match=r"no server holds blocks 0..1"):
        route(router(("a", 0, 4), held={"a": range(2, 4)}))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"2": HELD, "3": HELD}, range(2, 4)),
        ({}, None),
        ({"2": HELD, "4": HELD}, None),
        ({"x": HELD}, None),
        ({"2": {"digest": "a"}}, None),
        (7, None),
    ],
)
def test_what_a_server_says_that_it_holds(weights, expected):
    assert held_blocks({"weights": weights}) == expected
    assert held_blocks({}) is None


def test_servers_of_another_version_are_named_as_such(router):
    made = router(("old", 0, 4, 1.0, "textrl-swarm/lora-v1"))
    with pytest.raises(
        BlocksUnavailable, match=r"another protocol than this client \(textrl-swarm/lora-v6\)"
    ):
        route(made)


def test_among_equals_the_faster_is_taken(router):
    assert route(router(("slow", 0, 4, 1.0, True), ("fast", 0, 4, 9.0, True))) == [("fast", 0, 4)]


def test_a_failed_server_is_avoided_and_forgiven(router):
    made = router(("a", 0, 4), ("b", 0, 2), ("c", 2, 4))
    assert route(made) == [("a", 0, 4)]
    peer = next(span.peer for span in made._spans if span.stop - span.start == 4)
    made.report_failure(peer)
    assert route(made) == [("b", 0, 2), ("c", 2, 4)]
    made.report_success(peer)
    assert route(made) == [("a", 0, 4)]


def test_servers_of_another_model_are_passed_over(router):
    from textrl_swarm.errors import ServerMismatch

    assert route(router(("liar", 0, 4), ("b", 0, 2), ("c", 2, 4), refuse=["liar"])) == [
        ("b", 0, 2),
        ("c", 2, 4),
    ]
    with pytest.raises(ServerMismatch, match="another model"):
        route(router(("liar", 0, 4), ("b", 0, 2), refuse=["liar"]))


def test_a_refused_server_is_no_reason_for_blocks_that_it_does_not_hold(router):

    with pytest.raises(BlocksUnavailable, match=r"no server holds blocks 2, 3|no server holds blocks 2\.\.3"):
        route(router(("liar", 0, 2), ("b", 0, 2), refuse=["liar"]))


def test_missing_blocks_and_stock_servers_are_named(router):

    with pytest.raises(BlocksUnavailable, match=r"no server holds blocks 1, 3 of 'tiny'") as failure:
        route(router(("a", 0, 1), ("b", 2, 3)))
    assert failure.value.missing == (1, 3)
    with pytest.raises(
        BlocksUnavailable,
        match=r"stock petals servers hold blocks 0\.\.3 on server .*cannot train LoRA: start servers with",
    ):
        route(router(("stock", 0, 4, 1.0, False)))


def test_a_client_that_knows_nobody_greets_the_initial_peers_again(router):

    made = router()
    with pytest.raises(BlocksUnavailable):
        route(made)
    assert made.dht.greeted == 1


@pytest.mark.parametrize(
    ("boundary", "answer", "is_refused"),
    [
        (None, (1, 2, 3), False),
        (None, (1, 2, 6), True),
        (None, (1, 1, 3), True),
        (Boundary(3), (1, 2, 6), True),
        (Boundary(3, ("indices",)), (1, 2, 9), False),  # its size is the server's to know
        (Boundary(3, ("indices",)), (1, 2, 2), True),
        (Boundary(3, ("indices",)), (2, 2, 3), True),
    ],
)
def test_answers_of_another_shape_are_not_used(monkeypatch, boundary, answer, is_refused):
    class Stub:
        async def rpc_requests(self, requests):
            async def answered():
                await anext(requests)
                (part,) = split_for_streaming(serialize_torch_tensor(torch.zeros(answer)), 1 << 20)
                number = MSGPackSerializer.dumps({NUMBER: 0})
                yield runtime_pb2.ExpertResponse(tensors=[part], metadata=number)
                ending = MSGPackSerializer.dumps({NUMBER: 0, ENDING: ""})
                yield runtime_pb2.ExpertResponse(metadata=ending)

            return answered()

    monkeypatch.setattr(ServerStub, "get_stub", lambda *_: Stub())

    calls = ServerCalls(MagicMock(), Timeouts(), Traffic(), boundary)
    asked = calls.forward("peer", ["m.0"], torch.zeros(1, 2, 3), "")
    if is_refused:
        with pytest.raises(ServerFailed, match=r"returned shape .* for inputs of shape \(1, 2, 3\)"):
            asyncio.run(asked)
    else:
        assert asyncio.run(asked)[0].shape == answer
