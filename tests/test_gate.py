"""What a server takes from whom: lengths, turns, accounts, headers, records; on a real server, too."""

from __future__ import annotations

import asyncio
import math
import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.dht.routing import DHTID, RoutingTable
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2, runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time
from petals.server.handler import TransformerConnectionHandler
from plain_peft import connect, random_tokens, run

from textrl_swarm.errors import InputsNotFinite, ServerBusy, ServerFailed, ShapeError
from textrl_swarm.swarm.client.chain import run_in_background
from textrl_swarm.swarm.client.rpc import ServerCalls
from textrl_swarm.swarm.protocol import JOINING
from textrl_swarm.swarm.records import GuardedProtocol, _Allowance
from textrl_swarm.swarm.server.accounts import CLIENT, Accounts, FairTaskPool
from textrl_swarm.swarm.server.gate import PART_BYTES, StreamLimits, Turns, _Arriving
from textrl_swarm.swarm.server.guarded import giving_way
from textrl_swarm.swarm.streaming import declared_bytes, require_finite, whole_tensor
from textrl_swarm.swarm.stub import ServerStub

PEER = PeerID.from_base58("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")

# ----------------------------------------------------------------------------------- messages of a stream


def framed(*messages: runtime_pb2.ExpertRequest, end: bool = True) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    for message in messages:
        raw = message.SerializeToString()
        reader.feed_data(P2P.MESSAGE_MARKER + len(raw).to_bytes(8, "big") + raw)
    if end:
        reader.feed_data(P2P.ERROR_MARKER + bytes(8))
    return reader


def named(name: str, size: int = 0) -> runtime_pb2.ExpertRequest:
    return runtime_pb2.ExpertRequest(uid=name, metadata=bytes(size))


async def received(arriving: _Arriving) -> list[str]:
    reading = asyncio.ensure_future(arriving.read())
    found = [message.uid async for message in arriving.messages()]
    await reading
    return found


def test_messages_come_in_order_until_the_end():
    async def check() -> None:
        arriving = _Arriving(framed(*map(named, "abc")), StreamLimits())
        assert await received(arriving) == ["a", "b", "c"]

    asyncio.run(check())


def test_a_greeting_that_nobody_asked_for_is_passed_over():
    async def check() -> None:
        messages = framed(named(f"{JOINING}code"), named("a"), named(f"{JOINING}b"))
        assert await received(_Arriving(messages, StreamLimits())) == ["a", f"{JOINING}b"]

    asyncio.run(check())


@pytest.mark.parametrize("size", [1001, 1 << 40, (1 << 64) - 1])
def test_a_message_is_refused_from_its_length_on(size):
    async def check() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(P2P.MESSAGE_MARKER + size.to_bytes(8, "big"))  # nothing follows
        with pytest.raises(ShapeError, match=f"a message of {size} bytes, where at most 1000 are allowed"):
            await asyncio.wait_for(_Arriving(reader, StreamLimits(message_bytes=1000)).read(), 5)

    asyncio.run(check())


def test_a_request_is_refused_when_it_grows_too_large():
    async def check() -> None:
        limits = StreamLimits(message_bytes=1000, request_bytes=1500)
        arriving = _Arriving(framed(named("a", 700), named("b", 700), named("c", 700)), limits)
        reading = asyncio.ensure_future(arriving.read())
        messages = arriving.messages()
        assert [(await anext(messages)).uid, (await anext(messages)).uid] == ["a", "b"]
        with pytest.raises(ShapeError, match="a request of more than 1500 bytes"):
            await asyncio.wait_for(reading, 5)

    asyncio.run(check())


def test_one_message_is_read_ahead_and_no_more():
    async def check() -> None:
        reader = framed(*(named(str(i), 1000) for i in range(20)))
        arriving = _Arriving(reader, StreamLimits())
        reading = asyncio.ensure_future(arriving.read())
        for _ in range(100):
            await asyncio.sleep(0)
        one = len(named("0", 1000).SerializeToString()) + 9
        assert arriving._read_bytes <= 2 * one  # one waits, and one for its place
        reading.cancel()

    asyncio.run(check())


def test_the_end_of_the_connection_is_noticed_while_nobody_reads():
    async def check() -> None:
        reader = framed(named("a"), end=False)
        arriving = _Arriving(reader, StreamLimits())
        reading = asyncio.ensure_future(arriving.read())
        await asyncio.sleep(0.01)
        assert not reading.done()
        reader.feed_eof()
        with pytest.raises(asyncio.IncompleteReadError):
            await asyncio.wait_for(reading, 5)

    asyncio.run(check())


def test_large_messages_take_turns_and_give_them_back():
    async def check() -> None:
        turns = Turns(3 * PART_BYTES, 3 * PART_BYTES)
        limits = StreamLimits(message_bytes=4 * PART_BYTES)
        big = named("big", 2 * PART_BYTES)
        arriving = _Arriving(framed(big, named("small"), big), limits, turns, "client")
        reading = asyncio.ensure_future(arriving.read())
        messages = arriving.messages()
        assert (await anext(messages)).uid == "big"
        assert turns.taken_bytes == len(big.SerializeToString())
        assert (await anext(messages)).uid == "small"
        await asyncio.sleep(0.01)
        assert turns.taken_bytes == len(big.SerializeToString())  # of the third, which is read ahead
        assert (await anext(messages)).uid == "big"
        with pytest.raises(StopAsyncIteration):
            await anext(messages)
        assert turns.taken_bytes == 0  # before the stream is closed
        arriving.close()
        assert turns.taken_bytes == 0
        reading.cancel()

    asyncio.run(check())


# -------------------------------------------------------------------------------------- turns and accounts


def test_the_turn_of_a_message_that_waited_for_the_one_before_is_given_back():
    async def check() -> None:
        big = named("big", 2 * PART_BYTES)
        turns = Turns(3 * PART_BYTES, 3 * PART_BYTES)  # for one
        arriving = _Arriving(framed(*[big] * 4), StreamLimits(message_bytes=4 * PART_BYTES), turns, "client")
        assert await asyncio.wait_for(received(arriving), 10) == ["big"] * 4
        assert turns.taken_bytes == 0

    asyncio.run(check())


def test_turns_of_each_client_and_of_all():
    async def check() -> None:
        turns = Turns(100, 60)
        await turns.take("a", 50)
        waiting = asyncio.ensure_future(turns.take("a", 20))  # more than its part
        await turns.take("b", 50)
        other = asyncio.ensure_future(turns.take("c", 1))  # all are taken
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert not other.done()
        turns.give_back("b", 50)
        await asyncio.wait_for(other, 5)
        assert not waiting.done()
        turns.give_back("a", 50)
        await asyncio.wait_for(waiting, 5)
        assert turns.taken_bytes == 21

    asyncio.run(check())


def test_a_request_that_is_larger_than_everything_takes_its_turn_alone():
    async def check() -> None:
        turns = Turns(100, 60)
        await turns.take("a", 500)
        other = asyncio.ensure_future(turns.take("b", 1))
        await asyncio.sleep(0.01)
        assert not other.done()
        turns.give_back("a", 500)
        await asyncio.wait_for(other, 5)

    asyncio.run(check())


def test_turns_come_in_order_and_are_not_lost():
    async def check() -> None:
        turns = Turns(100, 100)
        await turns.take("a", 50)
        large = asyncio.ensure_future(turns.take("b", 80))
        small = asyncio.ensure_future(turns.take("c", 10))
        await asyncio.sleep(0.01)
        assert not small.done()  # it would fit, and the one before it might never
        turns.give_back("a", 50)
        large.cancel()  # in the moment in which it is granted
        await asyncio.wait([large, small])
        assert turns.taken_bytes == 10
        waiting = asyncio.ensure_future(turns.take("b", 95))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        turns.give_back("c", 10)
        assert turns.taken_bytes == 0
        await asyncio.wait_for(turns.take("d", 100), 5)

    asyncio.run(check())


@pytest.fixture
def pools(monkeypatch):
    monkeypatch.setattr(FairTaskPool, "accounts", Accounts(), raising=False)
    made = [FairTaskPool(lambda x: (x,), 1024, name, start=True) for name in ("forward", "backward")]
    yield made
    for pool in made:
        pool.shutdown()


def submit(pool, client: str, number: int, tokens: int = 10) -> None:
    CLIENT.set(client)
    pool.submit_task(torch.full((1, tokens), float(number)), "adapter")


def order(pools, count: int) -> list[float]:
    """In which a server's runtime computes what was submitted."""
    until = time.monotonic() + 10
    while sum(pool._ordered_tasks.qsize() for pool in pools) < count and time.monotonic() < until:
        time.sleep(0.01)
    found = []
    for _ in range(count):
        pool = min((pool for pool in pools if not pool.empty), key=lambda pool: pool.priority)
        _, (task, _) = pool.load_batch_to_runtime(timeout=5)
        found.append(task[0, 0].item())
    return found


def test_the_tasks_of_one_client_keep_their_order(pools):
    for number in range(6):
        submit(pools[number % 2], "a", number)
    assert order(pools, 6) == [0, 1, 2, 3, 4, 5]


def test_a_client_with_much_to_do_does_not_keep_others_waiting(pools):
    for number in range(20):
        submit(pools[0], "a", number)
    submit(pools[1], "b", 100)
    submit(pools[0], "c", 200)
    assert set(order(pools, 22)[:3]) == {0, 100, 200}


def test_two_clients_with_much_to_do_have_equal_parts(pools):
    """Of the tokens, not of the tasks; a backward costs as much as three forwards."""
    for _ in range(12):
        submit(pools[0], "large", 1, tokens=224)
    for _ in range(40):
        submit(pools[0], "small", 0, tokens=44)
    found = order(pools, 52)[:30]
    large, small = 240 * sum(found), 60 * (len(found) - sum(found))
    assert 0.8 < large / small < 1.25


def test_a_backward_costs_as_much_as_three_forwards(pools):
    for _ in range(6):
        submit(pools[1], "a", 1)
    for _ in range(12):
        submit(pools[0], "b", 0)
    found = order(pools, 18)
    assert sum(found[:8]) in (2, 3)


def test_who_was_away_is_not_owed_anything(pools):
    submit(pools[0], "b", 9)
    assert order(pools, 1) == [9]
    for number in range(10):
        submit(pools[0], "a", number)
    assert order(pools, 5) == [0, 1, 2, 3, 4]
    for number in range(20, 30):
        submit(pools[0], "b", number)
    assert sum(number >= 20 for number in order(pools, 15)[:6]) <= 4


def test_who_has_more_than_its_part_of_the_caches_gives_way():
    accounts = Accounts()
    too_much = partial(accounts.has_too_much, all_bytes=100)
    with accounts.holding("a", 90):
        assert not too_much("a")  # nobody else wants them
        with accounts.wanting("a", 50):
            assert not too_much("a")
        with accounts.wanting("b", 50):
            assert too_much("a")
            assert not too_much("b")
        assert not too_much("a")
    with accounts.holding("a", 40), accounts.holding("b", 40), accounts.wanting("c", 30):
        assert too_much("a")
        assert too_much("b")
    with accounts.holding("a", 30), accounts.wanting("c", 80):
        assert not too_much("a")  # the other wants too much


def test_a_generation_goes_on_until_there_is_a_reason_to_end():
    reasons = iter([None, None, None, "others wait"])

    async def steps():
        for step in range(10):
            yield step

    async def check() -> list[int]:
        found = []
        with pytest.raises(ServerBusy, match="SERVER_BUSY: others wait"):
            async for step in giving_way(steps(), lambda idle_s, held_s: next(reasons)):
                found.append(step)
        return found

    assert asyncio.run(check()) == [0, 1, 2]


# ---------------------------------------------------------------------------------------- headers of tensors


def message(**changes) -> SimpleNamespace:
    part = serialize_torch_tensor(torch.ones(2, 3))
    for name, value in changes.items():
        if name == "size":
            del part.size[:]
            part.size.extend(value)
        else:
            setattr(part, name, value)
    return SimpleNamespace(tensors=[part])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "complex64"}, "no tensor that can be taken: 'complex64', 2 dimensions"),
        ({"dtype": ""}, "no tensor that can be taken"),
        ({"dtype": "x" * 1000}, "no tensor that can be taken"),
        ({"size": [1] * 6}, "no tensor that can be taken: 'float32', 6 dimensions"),
        ({"size": [1000, 1000]}, "larger than the 6 numbers allowed"),
        ({"size": [1 << 32 - 1] * 4}, "larger than the 6 numbers allowed"),
        ({"chunks": 1000}, "a tensor of 24 bytes cannot have 1000 parts"),
        ({"chunks": -1}, "cannot have -1 parts"),
        ({"compression": runtime_pb2.CompressionType.UNIFORM_8BIT}, "compression 4 of a tensor"),
    ],
)
def test_headers_that_are_refused(changes, reason):
    with pytest.raises(ShapeError, match=reason):
        declared_bytes(message(**changes), 6)


def test_headers_that_are_not_refused():
    assert declared_bytes(message(), 6) == 24
    assert declared_bytes(SimpleNamespace(tensors=[serialize_torch_tensor(torch.empty(0))]), 0) == 0
    with pytest.raises(ShapeError, match="2 tensors in a message"):
        declared_bytes(SimpleNamespace(tensors=message().tensors * 2), 6)


async def _nothing():
    for nothing in ():
        yield nothing


@pytest.mark.parametrize("buffer", [b"", bytes(20), bytes(28), bytes(1 << 16)])
def test_a_tensor_has_as_many_bytes_as_its_header_says(buffer):
    with pytest.raises(ShapeError, match=f"{len(buffer)} bytes of a tensor that was announced with 24"):
        asyncio.run(whole_tensor(message(buffer=buffer), _nothing(), 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_of_petals_requests_are_looked_at(dtype, number):
    numbers = torch.ones(5, dtype=dtype)
    require_finite(serialize_torch_tensor(numbers))
    numbers[3] = number
    with pytest.raises(InputsNotFinite, match="NOT_FINITE: hidden states or gradients with NaN or infinite"):
        require_finite(serialize_torch_tensor(numbers))


# ------------------------------------------------------------------------------------------- DHT records


def test_an_allowance_fills_up_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    allowance = _Allowance(100, 10)
    assert allowance.take(60)
    assert not allowance.take(60)
    now[0] += 2
    assert allowance.take(60)
    now[0] += 1000
    assert not allowance.take(101)
    assert allowance.take(100)


@pytest.fixture
def protocol(monkeypatch):
    monkeypatch.setattr(GuardedProtocol, "update_routing_table", MagicMock())
    made = GuardedProtocol(_initialized_with_create=True)
    made.p2p = MagicMock(peer_id=PEER)
    made.storage, made.cache = DHTLocalStorage(), DHTLocalStorage()
    made.routing_table = RoutingTable(DHTID.generate(), bucket_size=20, depth_modulo=5)
    made.bucket_size = 20
    made.node_info, made.record_validator = dht_pb2.NodeInfo(), None
    made.rpc_ping = MagicMock(side_effect=lambda *_: asyncio.sleep(0))
    return made


def store(protocol, *records) -> list[bool]:
    """Each of them is a key, a subkey or None, a value, and the seconds that it lasts."""
    request = dht_pb2.StoreRequest()
    for key, subkey, value, seconds in records:
        request.keys.append(key.rjust(20, b"0"))
        plain = protocol.IS_REGULAR_VALUE
        request.subkeys.append(plain if subkey is None else protocol.serializer.dumps(subkey))
        request.values.append(value)
        request.expiration_time.append(get_dht_time() + seconds)
        request.in_cache.append(False)
    context = SimpleNamespace(remote_id=PEER)
    return list(asyncio.run(protocol.rpc_store(request, context)).store_ok)


def test_records_that_are_taken_and_others(protocol):
    found = store(
        protocol,
        (b"a", "peer", b"value", 60),
        (b"b", "peer", bytes(100_000), 60),
        (b"c", None, b"value", 1e9),
        (b"d", None, b"value", math.nan),
        (b"e", None, b"value", 60),
        (b"f", None, b"value", math.inf),
    )
    assert found == [True, False, False, False, True, False]
    assert len(protocol.storage) == 2


def test_a_plain_value_does_not_take_the_place_of_what_peers_announced(protocol):
    assert store(protocol, (b"a", "peer", b"value", 60)) == [True]
    assert store(protocol, (b"a", None, b"nothing", 600)) == [False]
    (stored,) = (value.value for _, value in protocol.storage.items())
    assert isinstance(stored, DictionaryDHTValue)


def test_one_peer_cannot_fill_the_memory(protocol):
    for i in range(100):
        try:
            assert store(protocol, (str(i).encode(), "peer", bytes(60_000), 60)) == [True]
        except ShapeError as error:
            assert "bytes of records are too many now" in str(error)
            break
    assert 65 <= i <= 70  # 4 MiB
    request = dht_pb2.FindRequest(keys=[bytes(20)] * 1000)
    with pytest.raises(ShapeError, match="1000 keys are too many now"):
        for _ in range(17):
            asyncio.run(protocol.rpc_find(request, SimpleNamespace(remote_id=PEER)))
    with pytest.raises(ShapeError, match="an id of more than 20 bytes"):
        store(protocol, (bytes(21), None, b"", 60))
    with pytest.raises(ShapeError, match="5000 keys in a request"):
        store(protocol, *[(str(i).encode(), None, b"", 60) for i in range(5000)])


# ------------------------------------------------------------------------------------------ a real server


@pytest.mark.swarm
def test_numbers_that_are_not_finite_are_refused_and_nobody_is_blamed(small_server, monkeypatch):
    tokens = random_tokens(2, 5)
    with connect(small_server) as policy:
        calm = run(policy, tokens)
        embed = policy._parts.embed

        def broken(*args, **options):
            hidden = embed(*args, **options).clone()
            hidden[0, 0, 0] = math.nan
            return hidden

        with monkeypatch.context() as broken_embedding:
            broken_embedding.setattr(policy._parts, "embed", broken)
            with pytest.raises(InputsNotFinite, match=r"was sent hidden states .* with NaN or infinite"):
                policy(tokens)
            with (
                policy.session(2, 9) as session,
                pytest.raises(InputsNotFinite, match="was sent hidden states"),
            ):
                session.step(tokens)
        out = policy(tokens).logits
        with pytest.raises(InputsNotFinite, match="was sent hidden states or gradients"):
            (out * math.inf).sum().backward()
        assert not policy._client.router._failures
        again = run(policy, tokens)
        assert torch.equal(calm.logits, again.logits)


@pytest.mark.swarm
def test_a_server_that_says_so_without_reason_is_blamed(small_server, monkeypatch):
    from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError

    with connect(small_server) as policy:
        calls: ServerCalls = policy._client._calls

        async def lies(*args, **options):
            raise P2PHandlerError("NOT_FINITE: hidden states with NaN or infinite numbers")

        monkeypatch.setattr(calls._streams, "call", lies)
        span, uid = policy._client.spans[0], policy._client.router.uids[0]
        with pytest.raises(ServerFailed, match="which are not among those of this client"):
            run_in_background(calls.forward(span.peer, [uid], torch.zeros(1, 2, 64), ""))


@pytest.mark.swarm
@pytest.mark.parametrize("name", ["rpc_forward_stream", "rpc_backward_stream", "rpc_inference"])
def test_petals_streams_have_limits_too(small_server, name):
    """64 tokens of 64 numbers: four such tensors, and 8 MiB."""
    uid = f"{small_server.dht_prefix}.0"
    with connect(small_server) as policy:
        client = policy._client
        stub = TransformerConnectionHandler.get_stub(client._calls.p2p, client.spans[0].peer)

        async def send(parts: list[runtime_pb2.Tensor]) -> str:
            async def requests():
                for part in parts:
                    yield runtime_pb2.ExpertRequest(uid=uid, tensors=[part])
                await asyncio.sleep(20)

            try:
                async for _ in await getattr(stub, name)(requests()):
                    pass
            except Exception as error:
                return str(error)
            return ""

        part = serialize_torch_tensor(torch.zeros(1, 4, 64))
        huge = runtime_pb2.Tensor()
        huge.CopyFrom(part)
        huge.buffer = bytes(16 << 20)
        assert "where at most 8454144 are allowed" in run_in_background(send([huge]))
        tall = runtime_pb2.Tensor()
        tall.CopyFrom(part)
        tall.size[1] = 1 << 30
        assert "is larger than the 16384 numbers allowed" in run_in_background(send([tall]))
        nan = serialize_torch_tensor(torch.full((1, 4, 64), math.nan))
        assert "NOT_FINITE" in run_in_background(send([nan]))
        if name != "rpc_inference":
            endless = runtime_pb2.Tensor()
            endless.CopyFrom(part)
            endless.chunks = 1 << 30
            endless.buffer = bytes(1 << 20)
            more = runtime_pb2.Tensor(buffer=endless.buffer)
            assert "a request of more than" in run_in_background(send([endless, *[more] * 12]))


@pytest.mark.swarm
def test_a_client_has_a_number_of_streams(small_server):
    with connect(small_server) as policy:
        client = policy._client
        stub = ServerStub.get_stub(client._calls.p2p, client.spans[0].peer)

        async def flood() -> list[str]:
            ended = asyncio.Event()

            async def requests():
                await ended.wait()
                yield runtime_pb2.ExpertRequest()

            async def one() -> str:
                try:
                    async for _ in await stub.rpc_requests(requests()):
                        pass
                except Exception as error:
                    return str(error)
                return ""

            streams = [asyncio.ensure_future(one()) for _ in range(100)]
            refused, _ = await asyncio.wait(streams, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            ended.set()
            await asyncio.wait(streams)
            return [stream.result() for stream in refused]

        assert any("this client has 32 open streams" in text for text in run_in_background(flood()))
        run(policy, random_tokens(1, 3))


@pytest.mark.swarm
@pytest.mark.parametrize("seconds", [-1.0, 0.001, 1e9, math.nan])
def test_who_waits_for_caches_in_vain_takes_them_from_nobody(small_server, seconds):
    """400 tokens of caches: some of these get them, others wait and go away."""
    with connect(small_server) as policy:
        client = policy._client
        stub = ServerStub.get_stub(client._calls.p2p, client.spans[0].peer)
        uid = f"{small_server.dht_prefix}.0"
        opening = {
            "rows": 1,
            "max_length": 150,
            "active_adapter": "",
            "alloc_timeout": seconds,
            "last_only": 1,
        }
        first = runtime_pb2.ExpertRequest(
            uid=uid,
            tensors=[serialize_torch_tensor(torch.zeros(1, 1, 64))],
            metadata=MSGPackSerializer.dumps(opening),
        )

        async def wait() -> None:
            async def requests():
                yield first
                await asyncio.sleep(1)

            async for _ in await stub.rpc_generate(requests()):
                pass

        async def all_of_them() -> None:
            waiting = [asyncio.ensure_future(wait()) for _ in range(20)]
            await asyncio.wait(waiting, timeout=1)
            for one in waiting:
                one.cancel()
            await asyncio.wait(waiting)

        run_in_background(all_of_them())
        with policy.session(1, 350) as session:  # nearly all
            session.step(random_tokens(1, 5))
