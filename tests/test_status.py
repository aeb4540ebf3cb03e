"""`status` on one bare DHT node, to which anything can be announced, and on real servers.

Its screen is tested on made-up reports.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

pytest.importorskip("petals")
from hivemind import DHT, get_dht_time
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2PContext, ServicerBase
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from petals.data_structures import ServerInfo, ServerState

from textrl_swarm import cli
from textrl_swarm.commands.status import show_model, to_json
from textrl_swarm.errors import AddressError, BlocksUnavailable, ConfigError
from textrl_swarm.swarm.client.survey import ModelReport, ServerReport, survey
from textrl_swarm.swarm.protocol import CAPABILITY

ADDRESS = "/ip4/192.0.2.7/tcp/31337/p2p/12D3KooWMkdAkJw8nTLLrZg8nZbmzt9vWnn4h2Zn5nYxQbnYwTcE"
NOBODY = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def server(start: int, stop: int, **changes) -> ServerReport:
    facts = {
        "peer_id": NOBODY, "name": None, "state": "online", "can_train": True,
        "dtype": "bfloat16", "quantization": "int8", "version": "2.2.0.post1", "adapters": (),
        "answer_ms": 12.3, "token_ms": 456.7, "bits_per_s": 25e6, "cache_tokens_left": 4096,
        "throughput": 1.0, "forward_rps": None, "inference_rps": None, "network_rps": None,
        "weights": {}, "layers": {},
    }  # fmt: skip
    return ServerReport(start=start, stop=stop, **{**facts, **changes})


def model(num_blocks: int, *servers: ServerReport, repository: str | None = None) -> ModelReport:
    return ModelReport("bigscience/bloom-petals", repository, num_blocks, servers)


def screen(report: ModelReport, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show_model(report, ADDRESS, Console(file=out, width=80, highlight=False))
    out.flush()
    return out.buffer.getvalue().decode(encoding)


def test_layers_are_told_by_kind_of_block():
    dense, mixture = ("down_proj", "q_proj"), ("experts.down_proj", "q_proj")
    report = model(
        4, server(0, 2, layers={0: dense, 1: mixture}), server(2, 4, layers={2: mixture, 3: mixture})
    )
    shown = screen(report)
    assert "Layers that LoRA can adapt:" in shown
    assert "block 0: down_proj, q_proj" in shown
    assert "blocks 1..3: experts.down_proj, q_proj" in shown
    assert "LoRA" not in screen(model(1, server(0, 1)))


# ---------------------------------------------------------------------------------- what follows from reports


def test_only_servers_that_answer_hold_blocks_and_only_some_can_train():
    report = model(
        7,
        server(0, 3),
        server(2, 4, can_train=False),
        server(3, 6, state="silent"),
        server(4, 5, state="joining"),
        server(5, 6, state="offline"),
    )
    assert report.copies(training=False) == (1, 1, 2, 1, 0, 0, 0)
    assert report.copies(training=True) == (1, 1, 1, 0, 0, 0, 0)
    assert report.missing == ((4, 7),)
    assert report.untrainable == ((3, 7),)


def test_gaps_are_half_open_ranges():
    assert model(6, server(1, 2), server(4, 5)).missing == ((0, 1), (2, 4), (5, 6))
    assert model(6, server(0, 6)).missing == ()


# ------------------------------------------------------------------------------------------------- the screen


@pytest.mark.parametrize("num_blocks", [1, 4, 70, 71, 1000])
def test_everything_but_commands_fits_80_columns(num_blocks):
    half = num_blocks // 2
    shown = screen(
        model(
            num_blocks,
            server(
                0,
                num_blocks,
                name="a server with a long name",
                quantization="nf4",
                dtype="float32",
                token_ms=123456.0,
            ),
            server(half, num_blocks, state="silent", answer_ms=None, token_ms=None, cache_tokens_left=None),
            server(0, num_blocks, can_train=False, cache_tokens_left=123456789),
            repository="https://huggingface.co/bigscience/bloom",
        )
    )
    assert max(map(len, shown.splitlines())) <= 80


def bar(shown: str) -> tuple[str, str]:
    """The coverage and the copies, without their labels."""
    lines = shown.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("copies"))
    return lines[at - 1].strip(), lines[at].removeprefix("copies").strip()


def test_coverage_has_a_column_for_each_block():
    shown = screen(model(8, server(0, 3), server(2, 5), server(4, 7, can_train=False)))
    assert bar(shown) == ("█████▒▒·", "11212110")
    assert "█ can be trained   ▒ held, but nobody can train it   · missing" in shown


def test_coverage_of_many_blocks_shows_the_worst_of_each_column():
    shown = screen(model(140, server(0, 139), server(0, 60)))
    assert bar(shown) == ("█" * 69 + "·", "2" * 30 + "1" * 39 + "0")
    assert bar(screen(model(70, server(0, 70)))) == ("█" * 70, "1" * 70)
    assert bar(screen(model(71, server(0, 71)))) == ("█" * 36, "1" * 36)
    assert "a column is 2 blocks" in shown
    assert shown.splitlines()[2].split() == ["block", *map(str, range(0, 140, 20))]


def test_a_plain_terminal_gets_plain_characters():
    shown = screen(model(4, server(0, 2, name="größer"), server(2, 3, can_train=False)), encoding="ascii")
    assert bar(shown)[0] == "##o."
    assert "gr??er" in shown


@pytest.mark.parametrize(
    ("report", "told", "commands"),
    [
        (model(4, server(0, 4)), "A client can train and generate now; no copy to spare of blocks 0..3.", []),
        (model(4, server(0, 4), server(0, 4)), "every block has a copy to spare.", []),
        (model(4, server(0, 3), server(2, 4)), "no copy to spare of blocks 0..1, 3.", []),
        (
            model(3, server(0, 3, weights={0: "a", 1: "b", 2: "c"}), server(1, 3, weights={1: "b", 2: "d"})),
            "Two models share this name: servers differ in the weights of block 2;",
            [],
        ),
        (
            model(2, server(0, 1), server(1, 2, quantization=None)),
            "The servers do not compute alike (bf16; int8, bf16): results depend on which",
            [],
        ),
        (
            model(4, server(0, 2), server(2, 4, can_train=False)),
            "only servers that run stock petals hold blocks 2..3.",
            ["2:4"],
        ),
        (model(4, server(1, 2)), "Nothing can run now: nobody holds blocks 0, 2..3.", ["0:1", "2:4"]),
        (model(4, server(0, 3)), "nobody holds block 3.", ["3:4"]),
        (model(4), "nobody holds blocks 0..3.", ["0:4"]),
        (
            model(4, server(0, 2, can_train=False)),
            "Only servers that run stock petals, and cannot train, hold blocks 0..1.",
            ["0:4"],
        ),
        (model(4, server(0, 2), server(2, 4, state="joining")), "Being loaded: blocks 2..3.", ["2:4"]),
        (
            model(4, server(0, 4), server(0, 2, state="silent")),
            "1 server announced blocks and did not answer",
            [],
        ),
        (
            model(4, server(0, 2), server(2, 4, state="closed")),
            "This machine is not let in by the servers of blocks 2..3: they ask for the swarm's secret",
            [],
        ),
        (
            model(4, server(0, 2, state="closed")),
            "This machine is not let in by the servers of blocks 0..1: they ask",
            ["0:4"],
        ),
    ],
)
def test_the_verdict_and_what_to_type(report, told, commands):
    shown = " ".join(screen(report).split())
    assert told in shown
    for blocks in commands:
        assert f"textrl-swarm serve MODEL --block_indices {blocks} --initial-peers {ADDRESS}" in shown
    assert shown.count("textrl-swarm serve") == len(commands)


def test_a_model_of_the_hub_is_served_by_its_name():
    shown = screen(model(2, repository="https://huggingface.co/bigscience/bloom"))
    assert "textrl-swarm serve bigscience/bloom --block_indices 0:2" in shown


def test_json_has_every_field():
    report = model(2, server(0, 1, name="mine"))
    (read,) = json.loads(to_json([report]))["models"]
    assert read["servers"][0] == {**dataclasses.asdict(report.servers[0]), "adapters": []}
    assert (read["copies"], read["trainable_copies"], read["missing"], read["untrainable"]) == (
        [1, 0],
        [1, 0],
        [[1, 2]],
        [[1, 2]],
    )
    assert (read["can_train"], read["can_generate"], read["num_blocks"]) == (False, False, 2)


# -------------------------------------------------------------------------------------------- a bare DHT node


class TransformerConnectionHandler(ServicerBase):
    """Answers only rpc_info, as a stock petals server does; the class's name is the RPC's on the wire."""

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        return runtime_pb2.ExpertInfo(serialized_info=MSGPackSerializer.dumps({"version": "2.2.0"}))


class Node:
    """A swarm of one node that holds nothing but what is announced."""

    def __init__(self):
        self.dht = DHT(
            host_maddrs=["/ip4/127.0.0.1/tcp/0"], use_relay=False, use_auto_relay=False, start=True
        )
        self.addresses = [str(address) for address in self.dht.get_visible_maddrs()]
        self._p2p = None

    def announce_model(self, name: str, num_blocks: object, **more) -> None:
        value = {"num_blocks": num_blocks, **more}
        assert self.dht.store("_petals.models", value, get_dht_time() + 300, subkey=name)

    def announce_server(self, name: str, peer_id: str, blocks: range, **more) -> None:
        info = ServerInfo(
            ServerState.ONLINE,
            1.0,
            start_block=blocks.start,
            end_block=blocks.stop,
            **{"torch_dtype": "float32", **more},
        )
        for block in blocks:
            assert self.dht.store(f"{name}.{block}", info.to_tuple(), get_dht_time() + 300, subkey=peer_id)

    def serve_stock(self) -> str:
        """Begins to answer like a stock server, if it did not yet; returns its peer id."""
        if self._p2p is not None:
            return str(self.dht.peer_id)
        self._p2p = RemoteExpertWorker.run_coroutine(self.dht.replicate_p2p())
        RemoteExpertWorker.run_coroutine(TransformerConnectionHandler().add_p2p_handlers(self._p2p))
        return str(self.dht.peer_id)

    def close(self) -> None:
        if self._p2p is not None:
            RemoteExpertWorker.run_coroutine(self._p2p.shutdown())
        self.dht.shutdown()
        self.dht.join()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def test_a_swarm_without_models_says_how_to_start_one(node):  # before the other tests announce some
    with pytest.raises(BlocksUnavailable) as caught:
        survey(node.addresses)
    assert "no model is announced" in str(caught.value)
    assert f"textrl-swarm serve MODEL --initial-peers {node.addresses[0]}" in str(caught.value)


def test_servers_are_asked_whatever_they_announced(node):
    node.announce_model("mixed", 4)
    stock = node.serve_stock()
    node.announce_server(
        "mixed",
        stock,
        range(0, 2),
        quant_type="nf4",
        cache_tokens_left=8000,
        version="2.2.0",
        adapters=("theirs",),
    )
    node.announce_server("mixed", NOBODY, range(2, 4), adapters=(CAPABILITY,))
    (report,) = survey(node.addresses, "mixed")
    here, gone = report.servers
    assert (here.peer_id, here.state, here.can_train, here.start, here.stop) == (stock, "online", False, 0, 2)
    assert (here.quantization, here.dtype, here.cache_tokens_left, here.adapters) == (
        "nf4",
        "float32",
        2000,
        ("theirs",),
    )
    assert here.answer_ms > 0
    assert (gone.peer_id, gone.state, gone.can_train, gone.answer_ms) == (NOBODY, "silent", True, None)
    assert report.missing == ((2, 4),)
    assert report.untrainable == ((0, 4),)


def test_strangers_cannot_announce_nonsense_or_steer_the_terminal(node):
    node.announce_model("huge", 10**9)
    node.announce_model("wrong", "many")
    node.announce_model("model", 2, repository="\x1b[2Jgone")
    node.announce_server("model", NOBODY, range(0, 2), public_name="\x1b[31m[r]", quant_type="\x07")
    reports = survey(node.addresses)
    assert {"huge", "wrong"}.isdisjoint(report.dht_prefix for report in reports)
    shown = screen(next(report for report in reports if report.dht_prefix == "model"))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "?[2Jgone" in shown
    assert "?[31m[r]" in shown


def test_an_unknown_name_gets_the_closest(node):
    node.announce_model("bloom", 1)
    with pytest.raises(ConfigError, match=r"no model called 'blom'; did you mean 'bloom'\? known: "):
        survey(node.addresses, "blom")


def test_addresses_where_nobody_answers():
    with pytest.raises(AddressError, match="none of the initial peers answered"):
        survey([f"/ip4/127.0.0.1/tcp/9/p2p/{NOBODY}"])


@pytest.mark.parametrize(
    ("peers", "told"), [(["localhost:31337"], "is not a peer's address"), ([], "initial_peers is empty")]
)
def test_malformed_addresses(peers, told):
    with pytest.raises(AddressError, match=told):
        survey(peers)


# ----------------------------------------------------------------------------------------------- real servers


def textrl_swarm(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "textrl_swarm.cli", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_links_are_those_of_the_servers_that_a_client_would_choose():
    short = server(0, 2, answer_ms=1000.0)
    found = model(5, short, server(0, 3), server(2, 5, answer_ms=32.3, token_ms=43.3)).links()
    assert (found.servers, found.bits_per_s) == (2, 50e6)
    assert (found.round_trip_s, found.token_s) == pytest.approx((0.0223, 0.5))
    assert model(5, server(0, 3)).links() is None
    assert model(3, server(0, 3, bits_per_s=None)).links() is None
    assert "22 ms to a server and back" in screen(model(5, server(0, 3), server(3, 5, answer_ms=32.3)))


@pytest.mark.swarm
def test_real_servers_can_train_and_say_how_fast(two_servers):
    (report,) = survey(two_servers.initial_peers)
    assert (report.dht_prefix, report.num_blocks) == (two_servers.dht_prefix, 4)
    assert [(s.start, s.stop, s.state, s.can_train) for s in report.servers] == [
        (0, 2, "online", True),
        (2, 4, "online", True),
    ]
    assert {(s.dtype, s.quantization) for s in report.servers} == {("float32", None)}
    for found in report.servers:
        assert 0 < found.answer_ms < found.token_ms + 1000
        assert found.bits_per_s > 1e6
        assert 0 < found.cache_tokens_left <= 4096
    assert report.untrainable == ()


@pytest.mark.slow  # a fresh process
@pytest.mark.swarm
def test_json_alone_is_on_standard_output(two_servers):
    done = textrl_swarm("status", "--initial-peers", *two_servers.initial_peers, "--json")
    assert done.returncode == 0, done.stderr
    (read,) = json.loads(done.stdout)["models"]
    assert read["can_train"]
    assert read["dht_prefix"] == two_servers.dht_prefix


def status_here(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["textrl-swarm", "status", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_a_gap_is_exit_code_3(node, monkeypatch, capsys):
    node.announce_model("empty", 3)
    assert status_here(monkeypatch, "--initial-peers", node.addresses[0], "--dht-prefix", "empty") == 3
    shown = capsys.readouterr().out
    assert "nobody holds blocks 0..2" in shown
    assert f"textrl-swarm serve MODEL --block_indices 0:3 --initial-peers {node.addresses[0]}" in shown


def test_blocks_that_stock_servers_hold_are_a_gap_too(node, monkeypatch):
    node.announce_model("stock", 2)
    node.announce_server("stock", node.serve_stock(), range(0, 2))
    assert status_here(monkeypatch, "--initial-peers", node.addresses[0], "--dht-prefix", "stock") == 3


def test_an_error_is_exit_code_1_and_leaves_standard_output_empty(node, monkeypatch, capsys):
    node.announce_model("empty", 3)
    assert (
        status_here(monkeypatch, "--initial-peers", node.addresses[0], "--dht-prefix", "emty", "--json") == 1
    )
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "did you mean 'empty'?" in shown.err


def test_arguments_that_are_no_addresses_are_refused(monkeypatch, capsys):
    assert status_here(monkeypatch, "--initial-peers", ADDRESS, "--jsn") == 2
    assert "--jsn" in capsys.readouterr().err
