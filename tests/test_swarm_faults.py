"""Servers die at every possible moment, and users type what users type.

A run that lost servers must end with the very numbers of the run that lost none: `torch.equal`, no tolerance.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from plain_peft import FAST, PlainPeft, assert_same, connect, fill, greedy, random_tokens, run, two_steps
from safetensors.torch import load_file, save_file
from transformers import BloomConfig

from textrl_swarm.config import LoraSettings, SamplingConfig, Timeouts
from textrl_swarm.errors import (
    AdapterError,
    AdapterRejected,
    AddressError,
    BlocksUnavailable,
    ConfigError,
    LaunchError,
    ModelError,
    PromptError,
    RemoteFailure,
    ServerFailed,
    ServerMismatch,
)
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.client.rpc import GenerationStream, ServerCalls
from textrl_swarm.swarm.client.session import GenerationSession
from textrl_swarm.swarm.local import LocalSwarm

pytestmark = [pytest.mark.swarm, pytest.mark.usefixtures("as_if_far_away")]

TOKENS = random_tokens(6, 9, seed=3)
TOKENS[3:, :6] = TOKENS[:3, :6]  # two rows of each prompt, which travels once
PROMPTS = [row.tolist() for row in (TOKENS[0, :2], TOKENS[1, :7], TOKENS[2, :5])]
SAMPLING = SamplingConfig(max_new_tokens=8, num_samples=2, seed=9)
SHORT = Timeouts(connect_s=5, request_s=10, discovery_s=3, recovery_s=4)

# ----------------------------------------------------------------------------------------------- lost servers


@pytest.fixture(scope="module")
def replicas(tiny_bloom):
    """Server 0 has all four blocks; servers 1 and 2 half of them each. Clients prefer server 0."""
    with LocalSwarm(tiny_bloom(seed=4), spans=[(0, 4), (0, 2), (2, 4)]) as swarm:
        yield swarm


def only(swarm: LocalSwarm, *indices: int) -> None:
    """These servers run and no others."""
    for i, server in enumerate(swarm.servers):
        if server.running and i not in indices:
            swarm.kill(i)
        elif not server.running and i in indices:
            swarm.start(i)


@pytest.fixture(scope="module")
def undisturbed(replicas):
    """Parameters after `train`, and a rollout after that."""
    with connect(replicas, filled=70) as policy:
        return two_steps(policy, TOKENS), policy.generate(PROMPTS, SAMPLING)


def assert_equal_parameters(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def assert_equal_rollouts(found, expected) -> None:
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert torch.equal(found.old_logprobs, expected.old_logprobs)
    assert torch.equal(found.values, expected.values)


def test_training_is_the_same_on_either_route(replicas, undisturbed):
    """Whole model on one server, or halves on two: nothing but the route may differ."""
    only(replicas, 1, 2)
    with connect(replicas, filled=70) as policy:
        assert policy.num_servers == 2
        assert_equal_parameters(two_steps(policy, TOKENS), undisturbed[0])


@pytest.mark.parametrize(
    "moment",
    # Sums of gradients are lost with their server in a test below.
    [pytest.param(moment, marks=pytest.mark.slow) for moment in ("before forward 0", "before backward 0")],
)
def test_a_replica_takes_over(replicas, undisturbed, moment):
    only(replicas, 0, 1, 2)
    reached = []
    with connect(replicas, filled=70) as policy:
        assert policy.num_servers == 1, "server 0 is preferred, so that its loss matters"

        def disturb(now):
            if now == moment:
                reached.append(now)
                replicas.kill(0)

        found = two_steps(policy, TOKENS, disturb)
    assert reached
    assert_equal_parameters(found, undisturbed[0])


def during_generation(monkeypatch, at_call: int, disturb) -> list[int]:
    """Calls `disturb` before a session's call `at_call`; returns a list that then has one entry."""
    original, calls, reached = GenerationSession.run, [], []

    def run(self, steps):
        calls.append(self)
        if calls.count(self) == at_call and not reached:
            reached.append(at_call)
            disturb()
        return original(self, steps)

    monkeypatch.setattr(GenerationSession, "run", run)
    return reached


def test_a_replica_takes_over_in_the_middle_of_a_generation(replicas, undisturbed, monkeypatch):
    only(replicas, 0, 1, 2)
    with connect(replicas, filled=70) as policy:
        two_steps(policy, TOKENS)
        reached = during_generation(monkeypatch, 5, lambda: replicas.kill(0))
        rollout = policy.generate(PROMPTS, SAMPLING)
    assert reached
    assert_equal_rollouts(rollout, undisturbed[1])


def _freeze(swarm: LocalSwarm, how: str) -> None:
    """Server 0 says nothing more, and its connections stay open, unless it is killed two seconds later."""
    pid = swarm.servers[0].pid
    if how == "all of it":
        os.killpg(pid, signal.SIGSTOP)
    else:
        os.kill(pid, signal.SIGSTOP)
    if how == "killed":
        threading.Timer(2.0, swarm.kill, args=(0,)).start()


@pytest.mark.timeout(100)  # a request's own is 120 s
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("what computes", "computing process has stopped"),
        pytest.param("all of it", "no sign of life for 8 s", marks=pytest.mark.slow),
        pytest.param("killed", "the connection is closed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("work", ["generation", pytest.param("training", marks=pytest.mark.slow)])
def test_a_frozen_server_is_left(replicas, undisturbed, monkeypatch, caplog, how, text, work):
    only(replicas, 0, 1, 2)
    caplog.set_level("INFO")
    with connect(replicas, filled=70, timeouts=Timeouts()) as policy:
        assert policy.num_servers == 1
        if work == "generation":
            two_steps(policy, TOKENS)
            during_generation(monkeypatch, 5, lambda: _freeze(replicas, how))
            assert_equal_rollouts(policy.generate(PROMPTS, SAMPLING), undisturbed[1])
        else:
            frozen = []

            def disturb(now):
                if now == "before backward 0":
                    frozen.append(_freeze(replicas, how))

            assert_equal_parameters(two_steps(policy, TOKENS, disturb), undisturbed[0])
            assert frozen
    replicas.kill(0)
    assert text in caplog.text


@pytest.fixture(scope="module")
def undisturbed_halves(replicas):
    """A rollout in which server 1 hands over to server 2."""
    only(replicas, 1, 2)
    with connect(replicas, filled=70) as policy:
        two_steps(policy, TOKENS)
        return policy.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda swarm, servers: swarm.kill(0), id="a server is lost"),
        pytest.param(
            lambda swarm, servers: servers.append("answer lost"),
            id="an answer is lost",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda swarm, servers: servers.append("no sums"), id="no server keeps sums"),
    ],
)
def test_sums_of_gradients_are_the_same_whatever_happens(replicas, monkeypatch, disturb):
    """Six micro-batches of a row each; the server adds up their gradients, and is lost with half of them."""
    only(replicas, 0, 1, 2)
    monkeypatch.setattr("textrl_swarm.swarm.protocol._MIN_MICRO_BATCH_TOKENS", 9)
    original, received, told = ServerCalls.backward, [], []

    async def backward(self, peer, uids, hidden, grad, key, sizes, needed, summed=None, *more):
        name, index, count = summed or ("", 0, 1)
        if "no sums" in told and summed:
            summed = name + str(index), 0, 2  # that are never completed
        answer = await original(self, peer, uids, hidden, grad, key, sizes, needed, summed, *more)
        received.append((name, index, count))
        if len(received) == 3 and disturbed:
            disturb(replicas, told)
        if told == ["answer lost"] and index == 3:
            told.append("once")
            raise ServerFailed("the answer was lost")
        return answer

    monkeypatch.setattr(ServerCalls, "backward", backward)
    outcomes = []
    for disturbed in (False, True):
        received.clear()
        with connect(replicas, filled=71) as policy:
            assert policy.num_servers == 1
            policy._client.chain.max_bytes_in_flight = 1  # one after the other
            outcomes.append(run(policy, random_tokens(6, 9, seed=3)))  # that share nothing
        if not disturbed:
            assert [(index, count) for _, index, count in received] == [(i, 6) for i in range(6)]
    assert len(received) > 6 or told == ["answer lost", "once"]
    assert_equal_parameters(outcomes[1].grads, outcomes[0].grads)


def replaced(swarm: LocalSwarm, i: int) -> threading.Thread:
    """Kills server i at once and starts it again from another thread, as a supervisor would."""
    swarm.kill(i)
    thread = threading.Thread(target=swarm.start, args=(i,))
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("lost", "at"),
    [
        pytest.param(1, "before", marks=pytest.mark.slow),  # starts of servers
        pytest.param(2, "before", marks=pytest.mark.slow),
        pytest.param(1, "sent", marks=pytest.mark.slow),
        (2, "sent"),
    ],
)
def test_a_server_is_lost_while_one_hands_over_to_the_other(
    replicas, undisturbed_halves, monkeypatch, lost, at
):
    only(replicas, 1, 2)
    original, handed_over, threads = GenerationStream.send, [], []

    async def send(self, *args, receivers=(), **options):
        handed_over.append(bool(receivers))
        is_time = sum(handed_over) == 4 and handed_over[-1]
        if is_time and at == "before":
            threads.append(replaced(replicas, lost))
        await original(self, *args, receivers=receivers, **options)
        if is_time and at == "sent":
            threads.append(replaced(replicas, lost))

    with connect(replicas, filled=70) as policy:
        two_steps(policy, TOKENS)
        monkeypatch.setattr(GenerationStream, "send", send)
        assert_equal_rollouts(policy.generate(PROMPTS, SAMPLING), undisturbed_halves)
        assert policy.num_servers == 2
    (thread,) = threads
    thread.join()


@pytest.mark.parametrize(
    "lost", [pytest.param(1, id="who gives", marks=pytest.mark.slow), pytest.param(2, id="who takes")]
)
def test_a_server_is_lost_in_a_forward_that_is_handed_over(replicas, undisturbed, monkeypatch, lost):
    only(replicas, 1, 2)
    original, asked, threads = ServerCalls.forward, [], []

    async def forward(self, *args, plan, **options):
        asked.append(plan.session is not None or bool(plan.receivers))
        answer = asyncio.ensure_future(original(self, *args, plan=plan, **options))
        await asyncio.sleep(0)
        if asked.count(True) == 2 and not threads:  # both are asked
            threads.append(replaced(replicas, lost))
        return await answer

    with connect(replicas, filled=70) as policy:
        monkeypatch.setattr(ServerCalls, "forward", forward)
        assert_equal_parameters(two_steps(policy, TOKENS), undisturbed[0])
    (thread,) = threads
    thread.join()


@pytest.mark.parametrize(
    "lost", [pytest.param(1, id="who gave", marks=pytest.mark.slow), pytest.param(2, id="who took")]
)
def test_a_server_is_lost_before_the_backward_of_what_was_handed_over(
    replicas, undisturbed, monkeypatch, lost
):
    """Nobody but server 2 had its inputs: server 1 computes them again."""
    only(replicas, 1, 2)
    backward, forward, threads, asked = ServerCalls.backward, ServerCalls.forward, [], []

    async def losing(self, peer, uids, inputs, *args, **options):
        asked.append("backward of what is kept" if isinstance(inputs, str) else "backward")
        if not threads:
            threads.append(replaced(replicas, lost))
        return await backward(self, peer, uids, inputs, *args, **options)

    async def recorded(self, peer, uids, *args, **options):
        asked.append(f"forward from {uids[0].rpartition('.')[2]}")
        return await forward(self, peer, uids, *args, **options)

    with connect(replicas, filled=70) as policy:
        monkeypatch.setattr(ServerCalls, "backward", losing)
        monkeypatch.setattr(ServerCalls, "forward", recorded)
        assert_equal_parameters(two_steps(policy, TOKENS), undisturbed[0])
    assert asked[:3] == ["forward from 0", "forward from 2", "backward of what is kept"]
    if lost == 2:
        assert "forward from 0" in asked[3 : asked.index("forward from 2", 3)]
    (thread,) = threads
    thread.join()


def test_without_a_replica_the_run_waits_for_the_restart(replicas, undisturbed, monkeypatch, caplog):
    only(replicas, 1, 2)
    threads = []
    with connect(replicas, filled=70) as policy:
        found = two_steps(
            policy,
            TOKENS,
            lambda now: threads.append(replaced(replicas, 2)) if now == "before backward 0" else None,
        )
        assert len(threads) == 1
        assert_equal_parameters(found, undisturbed[0])
        threads[0].join()
        expected = policy.generate(PROMPTS, SAMPLING)
        assert torch.equal(expected.tokens, undisturbed[1].tokens)  # one server had all rows in one session
        reached = during_generation(monkeypatch, 6, lambda: threads.append(replaced(replicas, 1)))
        assert_equal_rollouts(policy.generate(PROMPTS, SAMPLING), expected)
        assert reached
        threads[1].join()
    assert "no server holds blocks 2..3 now; waiting up to" in caplog.text


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda policy: run(policy, TOKENS), id="training"),
        pytest.param(lambda policy: greedy(policy, PROMPTS, 4), id="generation", marks=pytest.mark.slow),
    ],
)
def test_without_replica_or_restart_it_fails_within_the_deadline(replicas, work):
    only(replicas, 1, 2)
    with connect(replicas, filled=70, timeouts=SHORT) as policy:
        work(policy)
        replicas.kill(2)
        fill(policy, 71)
        started = time.monotonic()
        with pytest.raises((BlocksUnavailable, RemoteFailure), match=r"block\(?s?\)? 2\.\.3") as failure:
            work(policy)
        assert time.monotonic() - started < 3 * SHORT.recovery_s
    if isinstance(failure.value, BlocksUnavailable):
        assert failure.value.missing == (2, 3)


def test_missing_blocks_are_named_when_a_policy_is_made(replicas):
    only(replicas, 1)
    started = time.monotonic()
    with pytest.raises(
        BlocksUnavailable, match=r"no server holds blocks 2\.\.3 of .* --block_indices 2:4"
    ) as failure:
        connect(replicas, timeouts=SHORT)
    assert failure.value.missing == (2, 3)
    assert time.monotonic() - started < 15


@pytest.mark.slow  # another start of servers; the default run shall stay under ten minutes
def test_the_only_server_comes_back(tiny_bloom):
    """Nobody is left to ask where the blocks are; the server must be found under its old address.

    In the end no process is left.
    """
    with nothing_left() as started, LocalSwarm(tiny_bloom(seed=4), num_servers=1) as swarm:
        assert {"p2pd", "torch_shm_manager"} <= {process.name() for process in started()}
        with connect(swarm, filled=72) as policy:
            expected = policy(TOKENS).logits
            thread = replaced(swarm, 0)
            assert torch.equal(policy(TOKENS).logits, expected)
            thread.join()
        swarm.kill(0)
        swarm.kill(0)
    swarm.close()


@contextlib.contextmanager
def nothing_left():
    """Yields a function that gives the processes started since; at the end not even a zombie may be left."""
    ours = torch.zeros(1).share_memory_()  # torch starts a manager process for it, which ends with us
    before = set(psutil.Process().children(recursive=True))

    def started() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - before

    yield started
    psutil.wait_procs(
        started(), timeout=5
    )  # the manager of a server that ended by itself sees it a moment later
    assert not started()
    assert ours.is_shared()


# ---------------------------------------------------------------------------------- servers that answer badly


def misbehave(monkeypatch, times: int, error: Exception) -> list[str]:
    """The next `times` requests fail; returns what was asked. Measuring a server's distance goes on."""
    calls, original = [], ServerCalls._request

    async def request(self, peer, what, *args, **options):
        if what != "echo":
            calls.append(what)
            if len(calls) <= times:
                raise error
        return await original(self, peer, what, *args, **options)

    monkeypatch.setattr(ServerCalls, "_request", request)
    return calls


def test_a_passing_fault_is_retried(two_servers, monkeypatch, tmp_path):
    with connect(two_servers, filled=80) as policy:
        plain = PlainPeft(policy, tmp_path)
        calls = misbehave(monkeypatch, 1, ServerFailed("the line was cut"))
        assert_same(run(policy, TOKENS), plain.run(TOKENS))
        assert calls.count("push") == 3  # one of the two was lost


def test_an_error_that_the_server_reports_again_and_again_is_believed(two_servers, monkeypatch):
    with connect(two_servers, filled=80) as policy:
        calls = misbehave(
            monkeypatch,
            100,
            ServerFailed("push on server …abc failed: out of memory", answered=True),
        )
        with pytest.raises(
            RemoteFailure,
            match=r"forward through blocks 0\.\.3 failed 3 times, last: .* out of memory; "
            "look at that server's log",
        ):
            policy(TOKENS)
        assert calls == 6 * ["push"]  # to both servers at once


def test_a_server_that_never_keeps_the_adapter_is_not_asked_for_ever(two_servers, monkeypatch):
    from textrl_swarm.errors import AdapterMissing

    with connect(two_servers, filled=81, timeouts=SHORT) as policy:
        forward = ServerCalls.forward
        monkeypatch.setattr(ServerCalls, "forward", _raising(AdapterMissing("gone again")))
        with pytest.raises(RemoteFailure, match="does not keep the adapter"):
            policy(TOKENS)
        monkeypatch.setattr(ServerCalls, "forward", forward)
        policy(TOKENS)


def _raising(error: Exception):
    async def call(*args, **options):
        raise error

    return call


def test_answers_that_are_not_finite_are_not_used(two_servers, monkeypatch):
    original = ServerCalls._request

    async def request(self, *args, **options):
        answer = await original(self, *args, **options)
        return replace(answer, tensors=[tensor * float("nan") for tensor in answer.tensors])

    with connect(two_servers, filled=82, timeouts=SHORT) as policy:
        monkeypatch.setattr(ServerCalls, "_request", request)
        with pytest.raises((RemoteFailure, BlocksUnavailable)) as failure:
            policy(TOKENS)
    assert "returned NaN or infinite numbers" in str(failure.value)


def test_gradients_of_another_size_are_not_used(two_servers, monkeypatch):
    original = ServerCalls._request

    async def request(self, peer, what, *args, **options):
        answer = await original(self, peer, what, *args, **options)
        if what != "backward":
            return answer
        first, *flats = answer.tensors
        return replace(answer, tensors=[first, *(torch.cat([flat, flat]) for flat in flats)])

    with connect(two_servers, filled=82, timeouts=SHORT) as policy:
        monkeypatch.setattr(ServerCalls, "_request", request)
        with pytest.raises((RemoteFailure, BlocksUnavailable), match="returned a gradient of shape"):
            run(policy, TOKENS)


# -------------------------------------------------------------------------------------------- no process left


PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from textrl_swarm.swarm.local import LocalSwarm
with LocalSwarm(sys.argv[1], num_servers=1) as swarm:
    print(*(server.pid for server in swarm.servers), flush=True)
    time.sleep(600)
"""


def test_servers_end_with_their_parent(tiny_bloom):
    """Whatever ends the program that owns the swarm."""
    command = [sys.executable, "-c", PARENT, str(tiny_bloom(seed=4))]
    signals = [signal.SIGKILL, signal.SIGINT]
    temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # a short path, as sockets need
    parents = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        for _ in signals
    ]
    servers = {int(pid) for parent in parents for pid in parent.stdout.readline().split()}
    started = [
        process for parent in parents for process in psutil.Process(parent.pid).children(recursive=True)
    ]
    assert servers <= {process.pid for process in started}
    assert [process.name() for process in started].count("p2pd") >= 2
    for parent, how in zip(parents, signals, strict=True):
        parent.send_signal(how)
        try:
            parent.wait(30)
        finally:
            parent.kill()  # Popen's own exit would wait for ever
            parent.stdout.close()
    deadline = time.monotonic() + 15
    while (alive := [process for process in started if _alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive
    assert _ours(temporary) == []
    shutil.rmtree(temporary)


@pytest.mark.slow  # another start of servers
def test_a_server_that_inherits_an_ignored_sigint_can_be_asked_to_leave(tiny_bloom):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with LocalSwarm(tiny_bloom(seed=4), num_servers=1) as swarm:
            server, deadline = swarm.servers[0], time.monotonic() + 60
            while server.running and time.monotonic() < deadline:
                server.interrupt()  # again, should the first one come while it still starts its threads
                time.sleep(3)
            assert not server.running
    finally:
        signal.signal(signal.SIGINT, before)


def _ours(temporary: Path) -> list[str]:
    """What the project and hivemind left in a temporary directory."""
    return [path.name for path in temporary.iterdir() if re.match("textrl-swarm|hivemind", path.name)]


CLIENT = """
import os, signal, sys
from textrl_swarm import load_policy
policy = load_policy(sys.argv[1], initial_peers=[sys.argv[2]])
if sys.argv[3] == "killed":
    os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.slow  # two processes, half a minute
def test_a_client_leaves_no_socket_behind(two_servers):
    """What a killed client leaves goes when the next one starts."""
    temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    command = [sys.executable, "-c", CLIENT, two_servers.model, two_servers.initial_peers[0]]
    left = []
    for how in ("killed", "ends"):
        environment = {**os.environ, "TMPDIR": str(temporary)}
        subprocess.run([*command, how], env=environment, start_new_session=True, timeout=120)
        left.append(_ours(temporary))
    assert len(left[0]) == 1
    assert left[1] == []
    shutil.rmtree(temporary)


def _alive(process: psutil.Process) -> bool:
    """Not ended; one that was handed to us, its new parent, is collected."""
    with contextlib.suppress(ChildProcessError):  # not ours
        os.waitpid(process.pid, os.WNOHANG)
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_server_that_cannot_start_says_why(tiny_bloom):
    with (
        nothing_left(),
        pytest.raises(
            LaunchError, match=r"(?s)ended with exit code 2 .*unrecognized arguments: --no_such_option"
        ),
    ):
        LocalSwarm(tiny_bloom(seed=4), num_servers=2, server_options=["--no_such_option", "1"]).__enter__()


@pytest.mark.slow  # another start of a server
def test_weights_that_do_not_fit_are_told_before_they_are_loaded(tmp_path):
    BloomConfig(hidden_size=14336, n_layer=70, n_head=112).save_pretrained(tmp_path)
    index = {"metadata": {}, "weight_map": {"h.0.mlp.dense_h_to_4h.weight": "never-there.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with (
        nothing_left(),
        pytest.raises(LaunchError, match=r"70 block\(s\) .* need 643\.\d GiB .*--quant_type nf4"),
    ):
        LocalSwarm(tmp_path, num_servers=1).__enter__()


@pytest.mark.slow  # another start of servers; the default run shall stay under ten minutes
def test_damaged_weights_end_the_server(tiny_bloom, tmp_path):
    """Petals alone would ask the hub for the file again, every half minute, for ever."""
    directory = tmp_path / "damaged"
    shutil.copytree(tiny_bloom(seed=4), directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    started = time.monotonic()
    with pytest.raises(LaunchError, match=r"(?s)model\.safetensors"):
        LocalSwarm(directory, num_servers=1, start_timeout_s=60).__enter__()
    assert time.monotonic() - started < 50


# -------------------------------------------------------------------------------------------------- bad input

PEER = "/p2p/12D3KooWEjGpdZERBm1ua8EKtKtU1UQzHqe7vY22kCjuXqdUBbCr"


@pytest.mark.parametrize(
    ("addresses", "error", "text"),
    [
        ([], AddressError, "initial_peers is empty"),
        ("", AddressError, "'' is not a peer's address"),
        (
            ["localhost:31337"],
            AddressError,
            "'localhost:31337' is not a peer's address; it should look like /ip4/",
        ),
        (["/ip4/127.0.0.1/tcp/1"], AddressError, "is not a peer's address"),
        (["/ip4/127.0.0.1/tcp/1/p2p/short"], AddressError, "is not a peer's address"),
        (
            [f"/ip4/127.0.0.1/tcp/1{PEER}"],
            AddressError,
            "none of the initial peers answered: /ip4/127.0.0.1/tcp/1/p2p/",
        ),
        ([f"/ip4/999.0.0.1/tcp/1{PEER}"], AddressError, "/ip4/999.0.0.1/tcp/1"),
        ([f"/ip4/127.0.0.1/tcp/99999999{PEER}"], AddressError, "/tcp/99999999"),
    ],
)
def test_bad_addresses(tiny_bloom, addresses, error, text):
    started = time.monotonic()
    with pytest.raises(error, match=re.escape(text)):
        load_policy(tiny_bloom(seed=1), initial_peers=addresses, timeouts=FAST)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            lambda: {"quantization": "8bit"},
            ConfigError,
            "quantization='8bit' is for local models; in a swarm the servers hold the weights",
        ),
        (
            lambda: {"lora": LoraSettings(targets=("query_key",))},
            ConfigError,
            "did you mean 'query_key_value'? known: dense,",
        ),
        (lambda: {"lora": LoraSettings(r=0)}, ConfigError, "rank r must be a whole number >= 1, got 0"),
        (
            lambda: {"lora": LoraSettings(layers=0)},
            ConfigError,
            "layers must be None (all blocks) or a whole number >= 1",
        ),
        (
            lambda: {"lora": LoraSettings(layers=5)},
            ConfigError,
            "LoRA layers=5, but the model has 4 blocks; use 1 to 4",
        ),
        (
            lambda: {"dht_prefix": "elsewhere", "timeouts": SHORT},
            BlocksUnavailable,
            "no server holds blocks 0..3 of 'elsewhere'",
        ),
        (
            lambda: {"dht_prefix": "elsewhere", "timeouts": SHORT},
            BlocksUnavailable,
            "this swarm serves 'bloom",
        ),
    ],
)
def test_bad_settings(two_servers, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        load_policy(
            two_servers.model, initial_peers=two_servers.initial_peers, **{"timeouts": FAST, **options()}
        )


def test_servers_of_another_model_are_refused(two_servers, tiny_bloom):
    other = tiny_bloom(seed=1, hidden=32, vocab=64)
    with pytest.raises(
        ServerMismatch,
        match=r"holds another model: hidden_size 64 \(client: 32\), vocab_size 128 \(client: 64\)",
    ):
        load_policy(
            other, initial_peers=two_servers.initial_peers, dht_prefix=two_servers.dht_prefix, timeouts=FAST
        )


def _model_files(directory: Path, **config) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("swarm", [False, True], ids=["load_policy", "LocalSwarm"])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path / "nowhere", "there is no directory"),
        (
            lambda path: _model_files(path / "bare", model_type="bloom"),
            "has a config.json but no weights; expected one of model.safetensors",
        ),
        (lambda path: (path / "empty").mkdir() or path / "empty", "has no config.json"),
        (lambda path: "no/such-model", "'no/such-model' is neither a model directory nor a model on the hub"),
    ],
)
def test_bad_models(tmp_path, make, text, swarm):
    model = make(tmp_path)
    with pytest.raises(ModelError, match=re.escape(text)):
        LocalSwarm(model) if swarm else load_policy(model, initial_peers=[f"/ip4/127.0.0.1/tcp/1{PEER}"])


@pytest.mark.parametrize("swarm", [False, True], ids=["load_policy", "LocalSwarm"])
def test_models_that_cannot_be_cut_into_blocks(tmp_path, swarm):
    model = _model_files(tmp_path / "t5", model_type="t5")
    (model / "model.safetensors").touch()
    with pytest.raises(ModelError, match="t5 is an encoder-decoder model; only decoders can be cut"):
        LocalSwarm(model) if swarm else load_policy(model, initial_peers=[f"/ip4/127.0.0.1/tcp/1{PEER}"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_servers": 5}, "4 blocks can be split over 1 to 4 servers, not 5"),
        ({"num_servers": 0}, "4 blocks can be split over 1 to 4 servers, not 0"),
        ({"quantization": "16bit"}, "quantization must be None, '8bit' or '4bit', got '16bit'"),
        ({"spans": [(0, 2), (2, 5)]}, "span (2, 5) is not within blocks 0..4"),
        ({"spans": [(1, 1)]}, "span (1, 1) is not within blocks 0..4"),
        ({"spans": []}, "spans is empty"),
    ],
)
def test_bad_swarms(tiny_bloom, options, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        LocalSwarm(tiny_bloom(seed=1), **options)


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (
            lambda policy: policy.generate([[5] * 395], SamplingConfig(max_new_tokens=8)),
            r"395 tokens; .* makes 403, but the servers' cache .* allows 400",
        ),
        (
            lambda policy: policy(random_tokens(2, 65)),
            r"a sequence of 65 tokens is longer than the servers take at once \(64\)",
        ),
        (lambda policy: policy(torch.tensor([[5, 999]])), r"token ids must be in 0\.\.127, got 5\.\.999"),
        (lambda policy: policy.generate([[]]), "prompt 0 is empty"),
        (lambda policy: policy.generate([]), "the prompt list is empty"),
    ],
)
def test_bad_prompts(small_server, work, text):
    with connect(small_server) as policy, pytest.raises(PromptError, match=text):
        work(policy)


def _damage(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _not_finite(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_damage, "adapter_model.safetensors cannot be read"),
        (_not_finite, "has NaN or infinite numbers in base_model.model.transformer.h.0"),
        (shutil.rmtree, "holds no adapter: there is no adapter_config.json"),
        (
            lambda path: (path / "adapter_model.safetensors").unlink(),
            "holds no adapter: there is no adapter_model.safetensors",
        ),
    ],
)
def test_bad_adapters(two_servers, tmp_path, spoil, text):
    with connect(two_servers, filled=90) as policy:
        policy.save_adapter(tmp_path / "adapter")
        spoil(tmp_path / "adapter")
        before = {
            name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()
        }
        with pytest.raises(AdapterError, match=re.escape(text)):
            policy.load_adapter(tmp_path / "adapter")
        assert_equal_parameters(policy.trainable_parameters(), before)


def test_an_adapter_of_another_model_or_rank_is_refused(two_servers, hub_model, tmp_path):
    with load_policy(hub_model, lora=LoraSettings(r=4)) as policy:
        policy.save_adapter(tmp_path / "other model")
    with connect(two_servers, LoraSettings(r=2)) as policy:
        policy.save_adapter(tmp_path / "other rank")
    with connect(two_servers) as policy:
        with pytest.raises(
            AdapterError,
            match=r"does not fit: 8 tensors are unknown here.* made for base model 'tests/tiny-bloom\.v1'",
        ):
            policy.load_adapter(tmp_path / "other model")
        with pytest.raises(
            AdapterError,
            match=r"does not fit: .* has shape \(2, .*expected \(4, .* r=2, .*this policy .*r=4, ",
        ):
            policy.load_adapter(tmp_path / "other rank")


@pytest.mark.parametrize(
    ("change", "lora", "text"),
    [
        (
            lambda p: next(iter(p.values())).data.fill_(float("nan")),
            LoraSettings(r=4),
            "refused the adapter: block 0: the adapter has NaN",
        ),
        (lambda p: None, LoraSettings(r=1400), r"refused the adapter: .*--adapter_bytes_per_client"),
    ],
    ids=["NaN", "too large"],
)
def test_an_adapter_that_servers_refuse_is_not_pushed_again(two_servers, change, lora, text):
    with connect(two_servers, lora, filled=91) as policy:
        change(policy.adapter_parameters())
        for work in (lambda: policy(TOKENS), lambda: greedy(policy, PROMPTS, 2)):
            started = time.monotonic()
            with pytest.raises(AdapterRejected, match=text):
                work()
            assert time.monotonic() - started < 5
        with policy.adapter_disabled():
            policy(TOKENS)


def test_close_twice_and_errors_after_it(two_servers):
    policy = connect(two_servers)
    policy.close()
    policy.close()
