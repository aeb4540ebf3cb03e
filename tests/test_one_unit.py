"""What belongs together ends together: the processes of a server, and those of a client."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from hivemind.p2p import P2P
from plain_peft import connect, random_tokens, run

from textrl_swarm.errors import RemoteFailure
from textrl_swarm.swarm import node
from textrl_swarm.swarm.local import LocalSwarm

pytestmark = pytest.mark.swarm

TOKENS = random_tokens(2, 6, seed=5)
END_S = 30  # processes of a busy machine


def _group(pid: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def _until_empty(processes) -> list[psutil.Process]:
    deadline = time.monotonic() + END_S
    while (left := processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_ctrl_c_waits_until_shared_memory_has_started(monkeypatch):
    """torch would loop for ever."""
    shared = []

    def share(tensor):
        signal.raise_signal(signal.SIGINT)
        shared.append(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            node._start_shared_memory()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(shared) == 1


@pytest.mark.parametrize(
    ("text", "starts"),
    [("none of the initial_peers responded to a ping", 3), ("something else", 1)],
)
def test_a_ping_that_was_not_answered_is_tried_again(monkeypatch, text, starts):
    started = []

    def start(peers, **options):
        started.append(peers)
        raise RuntimeError(text)

    monkeypatch.setattr(node, "_Node", start)
    with pytest.raises(RuntimeError, match=text):
        node.start_client_node(["/ip4/127.0.0.1/tcp/1"])
    assert len(started) == starts


@pytest.mark.parametrize(
    "part",
    [
        "its main process",
        pytest.param("its node", marks=pytest.mark.slow),
        pytest.param("its daemon", marks=pytest.mark.slow),
        pytest.param("a handler", marks=pytest.mark.slow),
    ],
)
def test_a_server_ends_with_any_of_its_parts(tiny_bloom, part):
    with LocalSwarm(tiny_bloom(seed=1), num_servers=1) as swarm:
        (server,) = swarm.servers
        members = _group(server.pid)
        daemons = [process for process in members if process.name() == "p2pd"]
        (daemon,) = (process for process in daemons if process.ppid() != server.pid)  # not petals' probe
        pids = {"its main process": server.pid, "its node": daemon.ppid(), "its daemon": daemon.pid}
        (pids["a handler"], *_) = (
            process.pid
            for process in members
            if process.name() != "p2pd" and process.pid not in pids.values()
        )
        os.kill(pids[part], signal.SIGKILL)
        assert not _until_empty(lambda: _group(server.pid))
        server.process.wait(END_S)
        swarm.start(0)
        with connect(swarm) as policy:
            run(policy, TOKENS)


_JOINING = """
import sys, time
from textrl_swarm.swarm import compat, node

node._TICK_S, node._FAREWELL_S = 0.01, 0.5
options = {"identity_path": sys.argv[1], "use_relay": False, "use_auto_relay": False}
node.start_server_node(sys.argv[2:], start=True, **options)
time.sleep(3)
print("lives", flush=True)
node.end_group()
"""


def test_a_server_that_joins_under_its_old_name_does_not_end(tmp_path, two_servers):
    """While it asks who else has its identity, a daemon comes and goes that is not its own."""
    P2P.generate_identity(str(tmp_path / "name.id"))
    arguments = [sys.executable, "-c", _JOINING, str(tmp_path / "name.id"), *two_servers.initial_peers]
    done = subprocess.run(arguments, capture_output=True, text=True, start_new_session=True, timeout=60)
    assert done.stdout == "lives\n", done.stderr


async def _knows(dht, peer_node):
    return set(peer_node.protocol.routing_table.peer_id_to_uid)


async def _forget_all(dht, peer_node):
    """As when nobody answers for a while."""
    table = peer_node.protocol.routing_table
    for uid, peer in list(table.uid_to_peer_id.items()):
        del table[uid]
        peer_node.blacklist.register_failure(peer)


def test_peers_that_lost_each_other_meet_again():
    options = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "use_relay": False, "use_auto_relay": False}
    first = node.start_client_node([], **options)
    others = [node.start_client_node(first.get_visible_maddrs(), **options) for _ in range(2)]
    nodes = [first, *others]
    everybody = {each.peer_id for each in nodes}

    def meet(wanted):
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            for each in nodes:
                node.greet_lost_peers(each)
            if all(each.run_coroutine(_knows) == wanted - {each.peer_id} for each in nodes):
                return True
            time.sleep(0.5)
        return False

    try:
        others[0].run_coroutine(functools.partial(_ping, others[1].peer_id))
        assert meet(everybody)
        for each in nodes:
            each.run_coroutine(_forget_all)
        assert not any(each.run_coroutine(_knows) for each in nodes)
        nodes.remove(first)
        first.shutdown()  # the two that are left know each other only from former days
        assert meet(everybody - {first.peer_id})
    finally:
        for each in {first, *nodes}:
            each.shutdown()


async def _ping(peer, dht, peer_node):
    await peer_node.protocol.call_ping(peer)


_CLIENT = """
import sys
from textrl_swarm.policies.loading import load_policy

policy = load_policy(sys.argv[1], initial_peers=sys.argv[2:])
policy.generate([[1, 2]])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("work", ["generation", "update"])
def test_a_client_whose_daemon_died_says_so_at_once(two_servers, work):
    """Waiting until `recovery_s` is over would end in another error."""
    with connect(two_servers) as policy:
        run(policy, TOKENS)
        with policy.session(2, 20) as session:
            session.step(TOKENS)
            (daemon,) = psutil.Process(policy._client.router.dht.pid).children()
            daemon.kill()
            with pytest.raises(RemoteFailure, match=r"this machine's libp2p daemon ended"):
                session.step(TOKENS[:, :1]) if work == "generation" else run(policy, TOKENS)


def test_a_killed_client_leaves_no_process(two_servers):
    arguments = [sys.executable, "-c", _CLIENT, str(two_servers.model), *two_servers.initial_peers]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as client:
        assert client.stdout.readline() == "ready\n"
        assert {process.name() for process in _group(client.pid)} >= {"p2pd"}
        client.kill()
    assert not _until_empty(lambda: _group(client.pid))
