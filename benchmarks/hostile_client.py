"""A client that sends a server what no client would: the other side of fuzz.py, in a process of its own.

    python benchmarks/hostile_client.py ADDRESS UID --requests N [--seed S]
    python benchmarks/hostile_client.py ADDRESS UID --flood RPC --megabytes M

Prints one line of JSON: how many requests of each RPC came to which end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import dht_pb2, runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from textrl_swarm.swarm.protocol import JOINING
from textrl_swarm.swarm.stub import wire_name

STREAMS = ("rpc_forward_stream", "rpc_backward_stream", "rpc_inference", "rpc_generate", "rpc_requests")
CALLS = ("rpc_info", "rpc_forward", "rpc_backward", "rpc_push")
RECORDS = ("rpc_ping", "rpc_store", "rpc_find")
WAIT_S = 0.5  # for an answer; what comes later counts as none
AT_ONCE = 16
KINDS = ("push", "forward", "backward", "hand_over", "echo")

ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=40)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
SIZES = st.lists(st.integers(0, 8) | st.sampled_from([2**16, 2**31, 2**32 - 1]), max_size=6)

CHANGES = ("size", "dtype", "chunks", "compression", "buffer")
DTYPES = ("float64", "bool", "complex64", "object")
SUBKEYS = st.sampled_from([b"", MSGPackSerializer.dumps(None)]) | st.binary(max_size=9)
VALUES = st.binary(max_size=99) | st.just(bytes(100_000)) | ANY.map(MSGPackSerializer.dumps)
NODE_ID = DHTID.generate().to_bytes()


def sensible(draw: Any, hidden: int) -> torch.Tensor:
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.int64]))
    tensor = torch.zeros(rows, tokens, hidden).to(dtype)
    if tensor.is_floating_point() and draw(st.integers(0, 5)) == 0:
        tensor[0, 0, 0] = draw(st.sampled_from([float("nan"), float("inf"), 1e38]))
    return tensor


@st.composite
def tensors(draw: Any, hidden: int) -> runtime_pb2.Tensor:
    """One that could be meant, most often with something wrong about it."""
    part = serialize_torch_tensor(sensible(draw, hidden))
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=2)):
        if change == "size":
            del part.size[:]
            part.size.extend(draw(SIZES))
        elif change == "dtype":
            part.dtype = draw(st.text(max_size=12) | st.sampled_from(DTYPES))
        elif change == "chunks":
            part.chunks = draw(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 3))
        elif change == "compression":
            part.compression = draw(st.integers(0, 5))
        else:
            part.buffer = draw(st.binary(max_size=200) | st.just(bytes(1 << 20)))
    return part


@st.composite
def metadata(draw: Any) -> bytes:
    """Of all RPCs together, with some of it replaced."""
    said: dict[Any, Any] = {
        "request": draw(st.sampled_from(KINDS)),
        "tensors": draw(st.integers(0, 3)),
        "active_adapter": draw(st.sampled_from(["", "", "lora-" + "0" * 40, "../../etc/passwd"])),
        "max_length": draw(st.sampled_from([4, 64, 2048, 2**40, -1])),
        "rows": draw(st.sampled_from([1, 3, 2**31])),
        "alloc_timeout": draw(st.sampled_from([0.0, 0.1, 1e9, -1.0])),
        "session": draw(st.none() | st.text(max_size=80)),
        "session_id": draw(st.none() | st.text(max_size=80)),
        "step": draw(st.integers(-1, 3)),
        "chunk": draw(st.just({}) | st.dictionaries(st.sampled_from(["past", "padding", "keep"]), ANY)),
        "need_input_grad": True,
        "args_structure": draw(st.none() | ANY),
        "next_servers": draw(st.just([]) | ANY),
        "hand_over": draw(st.just([]) | ANY),
        "header": draw(st.binary(max_size=60)),
        "sum": draw(st.none() | ANY),
        "packed": draw(st.none() | ANY),
        "keep": draw(st.none() | st.text(max_size=80)),
        "output_compression": draw(st.none() | st.lists(st.integers(-1, 9), max_size=3)),
    }
    for name in draw(st.lists(st.sampled_from(sorted(said)), max_size=3)):
        said[name] = draw(ANY)
    for name in draw(st.lists(st.sampled_from(sorted(said)), max_size=6)):
        said.pop(name, None)
    packed = MSGPackSerializer.dumps(said)
    return packed if draw(st.integers(0, 9)) else packed[: draw(st.integers(0, len(packed)))]


@st.composite
def messages(draw: Any, uid: str, hidden: int) -> bytes:
    prefix = uid.rpartition(".")[0]
    named = draw(
        st.sampled_from([uid, uid, f"{uid} {prefix}.1", f"{prefix}.1 {uid}", f"{prefix}.9", "", JOINING])
        | st.text(max_size=30)
    )
    parts = draw(st.lists(tensors(hidden), max_size=3))
    raw = runtime_pb2.ExpertRequest(uid=named, tensors=parts, metadata=draw(metadata())).SerializeToString()
    return raw if draw(st.integers(0, 9)) else draw(st.binary(max_size=300))


@st.composite
def records(draw: Any, method: str) -> bytes:
    node = dht_pb2.NodeInfo(node_id=draw(st.binary(max_size=24) | st.just(NODE_ID)))
    keys = draw(st.lists(st.binary(max_size=24) | st.just(NODE_ID), max_size=5))
    message: Any
    if method == "rpc_ping":
        message = dht_pb2.PingRequest(peer=node, validate=draw(st.booleans()))
    elif method == "rpc_find":
        message = dht_pb2.FindRequest(peer=node, keys=keys * draw(st.sampled_from([1, 1, 2000])))
    else:
        message = dht_pb2.StoreRequest(peer=node, keys=keys)
        for _ in keys:
            message.subkeys.append(draw(SUBKEYS))
            message.values.append(draw(VALUES))
            message.expiration_time.append(draw(st.floats() | st.just(get_dht_time() + 60)))
            message.in_cache.append(draw(st.booleans()))
    raw = message.SerializeToString()
    return raw if draw(st.integers(0, 9)) else draw(st.binary(max_size=300))


class Hostile:
    def __init__(self, p2p: P2P, server: PeerID):
        self.p2p = p2p
        self.server = server
        self.ends: dict[str, Counter[str]] = {}

    async def send(self, method: str, raw: list[bytes], length: int | None, ends: bool) -> None:
        try:
            if method in STREAMS:
                end = await asyncio.wait_for(self._stream(method, raw, length, ends), 10)
            else:
                name = f"DHTProtocol.{method}" if method in RECORDS else wire_name(None, method)
                call = self.p2p._client.call_unary_handler(self.server, name, raw[0])
                await asyncio.wait_for(call, WAIT_S)
                end = "answered"
        except P2PHandlerError:
            end = "refused"
        except asyncio.TimeoutError:
            end = "no answer yet"
        except Exception as error:
            end = type(error).__name__
        self.ends.setdefault(method, Counter())[end] += 1

    async def _stream(self, method: str, raw: list[bytes], length: int | None, ends: bool) -> str:
        _, reader, writer = await self.p2p.call_binary_stream_handler(self.server, wire_name(None, method))
        try:
            for message in raw:
                writer.write(P2P.MESSAGE_MARKER + (length or len(message)).to_bytes(8, "big") + message)
            if ends:
                await P2P.send_protobuf(P2P.END_OF_STREAM, writer)
            await writer.drain()
            marker = await asyncio.wait_for(reader.readexactly(1), WAIT_S)
            return "answered" if marker == P2P.MESSAGE_MARKER else "refused"
        except (asyncio.IncompleteReadError, ConnectionError):
            return "closed"
        finally:
            writer.close()

    async def flood(self, method: str, uid: str, megabytes: int) -> str:
        """Parts of one tensor that never ends."""
        said = MSGPackSerializer.dumps({"request": "push", "tensors": 1, "max_length": 4, "rows": 1})
        first = serialize_torch_tensor(torch.zeros(1, 1, 64))
        first.chunks, first.buffer = 1 << 30, bytes(4 << 20)
        more = runtime_pb2.Tensor(buffer=first.buffer)
        _, reader, writer = await self.p2p.call_binary_stream_handler(self.server, wire_name(None, method))
        answer = asyncio.ensure_future(reader.read(1000))
        sent = 0
        try:
            while sent < megabytes and not answer.done():
                part = more if sent else first
                request = runtime_pb2.ExpertRequest(uid=uid, tensors=[part], metadata=b"" if sent else said)
                await asyncio.wait_for(P2P.send_protobuf(request, writer), 5)
                sent += 4
        except (asyncio.TimeoutError, ConnectionError) as error:
            return f"stopped after {sent} MB: {type(error).__name__}"
        finally:
            answer.cancel()
            writer.close()
        return f"cut off after {sent} MB" if sent < megabytes else f"took {sent} MB"


async def attack(options: argparse.Namespace) -> dict[str, Any]:
    p2p = await P2P.create(initial_peers=[options.address], host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    hostile = Hostile(p2p, PeerID.from_base58(options.address.rsplit("/", 1)[1]))
    try:
        if options.flood:
            return {options.flood: await hostile.flood(options.flood, options.uid, options.megabytes)}
        async for batch in _batches(options):
            await asyncio.gather(*(hostile.send(*request) for request in batch))
        return {method: dict(ends) for method, ends in sorted(hostile.ends.items())}
    finally:
        await p2p.shutdown()


async def _batches(options: argparse.Namespace) -> AsyncIterator[list[tuple[Any, ...]]]:
    """The requests, drawn beforehand: hypothesis and an event loop do not mix."""
    made = drawn(options.uid, options.hidden, options.requests, options.seed)
    for start in range(0, len(made), AT_ONCE):
        yield made[start : start + AT_ONCE]


def drawn(uid: str, hidden: int, count: int, chosen_seed: int) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []

    @seed(chosen_seed)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        method = data.draw(st.sampled_from([*STREAMS, *STREAMS, *CALLS, *RECORDS]))
        raw = [data.draw(records(method) if method in RECORDS else messages(uid, hidden))]
        length = None
        if method in STREAMS:
            raw += data.draw(st.lists(messages(uid, hidden), max_size=3))
            length = data.draw(st.sampled_from([None] * 9 + [2**63, 1 << 30, 3]))
        elif method == "rpc_info":
            named = data.draw(st.text(max_size=30) | st.just(uid))
            raw = [runtime_pb2.ExpertUID(uid=named).SerializeToString()]
        found.append((method, raw, length, data.draw(st.booleans())))

    draw()
    rng = random.Random(chosen_seed)
    while len(found) < count:  # hypothesis stops when it has drawn the same too often
        found.append(rng.choice(found))
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("uid")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flood")
    parser.add_argument("--megabytes", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    json.dump(asyncio.run(attack(options)), sys.stdout)


if __name__ == "__main__":
    main()
