"""Training while servers die, stall, leave and join: does it notice, go on, and learn the very same?

    python benchmarks/chaos.py [--faults 119] [--alone 32] [--seed 0] [--kind KIND ...]

Each round is a rollout and an update. Into every round comes one fault, at a seeded moment: before a call to
a server, or while the server has it. What was sampled and learned is compared, bit for bit, with the same
round of a run that nothing disturbs. In every fourth round a second trainer works beside the first.

Three servers hold the blocks twice, and what a fault broke is mended after its round. Then two servers hold
them once, and somebody mends what broke after some seconds, for which the trainers wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from harness import DistantSwarm, report
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LoraSettings, PPOConfig, SamplingConfig, Timeouts, load_policy
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.errors import ServerFailed
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.policies.base import Policy
from textrl_swarm.swarm.client.chain import run_in_background
from textrl_swarm.swarm.client.passes import Passes
from textrl_swarm.swarm.client.routing import Router
from textrl_swarm.swarm.client.rpc import GenerationStream, ServerCalls
from textrl_swarm.swarm.client.session import GenerationSession
from textrl_swarm.swarm.local import LocalSwarm

SPANS, OTHER_SPANS = [(0, 4), (0, 2), (2, 4)], [(0, 4), (0, 3), (3, 4)]
ALONE, OTHER_ALONE = [(0, 2), (2, 4)], [(0, 3), (3, 4)]
NEWCOMER = len(SPANS)  # a server that runs only while it is wanted
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
SAMPLING = SamplingConfig(max_new_tokens=8, num_samples=2, stop_token_ids=())
CACHE_TOKENS = 512
OPTIONS = ("--attn_cache_tokens", str(CACHE_TOKENS))
TIMEOUTS = Timeouts(request_s=120, recovery_s=60)
CALLS = ("step", "push", "forward", "backward")
KILLED_AFTER_S, PARTED_S, PAUSED_S, MENDED_AFTER_S = 2.0, 20.0, 5.0, 10.0


# --------------------------------------------------------------------------------------- what can break


class Chaos(DistantSwarm):
    """Servers on links that can break, and everything that can be done to them.

    Args:
        has_replicas: every block is held twice; else what broke is mended while the trainers wait.
    """

    def __init__(self, model: Path, *, has_replicas: bool = True):
        spans = [*SPANS, (0, 4)] if has_replicas else ALONE
        super().__init__(model, spans=spans, server_options=OPTIONS)
        self.has_replicas = has_replicas
        self.threads = ThreadPoolExecutor(8)
        self._later: list[Any] = []
        self._ending: set[int] = set()
        self._starting = defaultdict(threading.Lock)

    def __enter__(self) -> Chaos:
        super().__enter__()
        if self.has_replicas:
            self.kill(NEWCOMER)
        return self

    def start(self, i: int) -> None:
        """Unless it runs."""
        with self._starting[i]:
            if not self.servers[i].running:
                super().start(i)

    def strike(self, kind: str, peer: Any) -> float:
        """Does something to the server with this peer id; when it was done, in time.monotonic seconds."""
        struck_at = KINDS[kind](self, self.index(peer)) or time.monotonic()
        if not self.has_replicas:
            self.later(MENDED_AFTER_S, self._repair)
        return struck_at

    def index(self, peer: Any) -> int:
        """Of the server with this peer id."""
        for i, server in enumerate(self.servers):
            if any(address.endswith(str(peer)) for address in server.addresses):
                return i
        raise LookupError(peer)

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        def run() -> None:
            time.sleep(seconds)
            action()

        self._later.append(self.threads.submit(run))

    def signal(self, i: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.servers[i].pid, number)

    def signal_all(self, i: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.servers[i].pid, number)

    def end(self, i: int, number: int) -> None:
        """A signal that ends a server sooner or later."""
        self.signal(i, number)
        self._will_end(i)

    def _will_end(self, i: int) -> None:
        self._ending.add(i)
        self.later(0, functools.partial(self.servers[i].process.wait, 60))

    def kill_part(self, i: int, which: str) -> None:
        """Kills the daemon, or one of the processes that answer requests."""
        children = psutil.Process(self.servers[i].pid).children()
        node = next(child for child in children if any(map(_is_daemon, child.children())))
        handlers = (child for child in children if child != node and child.name().startswith("python"))
        (next(handlers) if which == "handler" else node.children()[0]).kill()
        self._will_end(i)

    def with_replicas(self, i: int) -> tuple[int, ...]:
        """This server, and another without which some blocks are nobody's."""
        if not self.has_replicas:
            return (i,)
        return (0, 1) if i < 2 else (0, 2)

    def newcomer_takes_over(self, i: int) -> float:
        """A server joins, and then those leave that it can replace."""
        self.start(NEWCOMER)
        for lost in self.with_replicas(i):
            self.kill(lost)
        return time.monotonic()

    def replace(self, indices: Sequence[int]) -> None:
        """Kills servers and starts them again, as a supervisor would."""
        for i in indices:
            self.kill(i)
        self.later(0, lambda: self._start_all(indices))

    def _start_all(self, indices: Sequence[int]) -> None:
        """One after the other while nobody runs whom the next could join."""
        first, *others = indices
        if not self.initial_peers:
            self.start(first)
            indices = others
        list(self.threads.map(self.start, indices))

    def change_boundaries(self) -> None:
        spans, others = (SPANS, OTHER_SPANS) if self.has_replicas else (ALONE, OTHER_ALONE)
        assert self._spans is not None
        self._spans[: len(spans)] = others if self._spans[: len(spans)] == spans else spans
        self.replace(range(len(spans)))

    def mend(self) -> None:
        """Until everything is as it was."""
        self._thaw()
        for action in self._later:
            action.result(300)
        self._later.clear()
        self._repair()
        if self.has_replicas:
            self.kill(NEWCOMER)

    def _thaw(self) -> None:
        for link in self.links.values():
            link.say("heal")
        for i in range(len(self.servers)):
            self.signal_all(i, signal.SIGCONT)

    def _repair(self) -> None:
        self._thaw()
        for i in sorted(self._ending):
            self.servers[i].process.wait(60)
        self._ending.clear()
        broken = [i for i, server in enumerate(self.servers) if not server.running and i != NEWCOMER]
        if broken:
            self._start_all(broken)

    def close(self, leave_within_s: float = 0.0) -> None:
        super().close(leave_within_s)
        self.threads.shutdown(cancel_futures=True)


def _is_daemon(process: psutil.Process) -> bool:
    return bool(process.name() == "p2pd")


def _freeze_and_kill(swarm: Chaos, i: int) -> None:
    swarm.signal(i, signal.SIGSTOP)
    swarm.later(KILLED_AFTER_S, functools.partial(swarm.kill, i))


def _pause(swarm: Chaos, i: int) -> None:
    swarm.signal_all(i, signal.SIGSTOP)
    swarm.later(PAUSED_S, functools.partial(swarm.signal_all, i, signal.SIGCONT))


def _part_all(swarm: Chaos, i: int) -> None:
    for link in swarm.links.values():
        link.say("part")
        swarm.later(PARTED_S, functools.partial(link.say, "heal"))


NEW, FULL = "a newcomer takes over", "caches full of others"
# What is done to server i; returns when that was, where it was not at once.
KINDS: dict[str, Callable[[Chaos, int], Any]] = {
    "killed, all of it": lambda swarm, i: swarm.kill(i),
    "killed while it computes": _freeze_and_kill,
    "main process killed": lambda swarm, i: swarm.end(i, signal.SIGKILL),
    "daemon killed": lambda swarm, i: swarm.kill_part(i, "daemon"),
    "handler killed": lambda swarm, i: swarm.kill_part(i, "handler"),
    "SIGTERM": lambda swarm, i: swarm.end(i, signal.SIGTERM),
    "leaves (SIGINT)": lambda swarm, i: swarm.end(i, signal.SIGINT),
    "frozen, what computes": lambda swarm, i: swarm.signal(i, signal.SIGSTOP),
    "frozen, all of it": lambda swarm, i: swarm.signal_all(i, signal.SIGSTOP),
    f"frozen for {PAUSED_S:.0f} s": _pause,
    "connections reset": lambda swarm, i: swarm.links[i].say("cut"),
    "link carries nothing": lambda swarm, i: swarm.links[i].say("stall"),
    f"all links part for {PARTED_S:.0f} s": _part_all,
    "both replicas restart": lambda swarm, i: swarm.replace(swarm.with_replicas(i)),
    NEW: lambda swarm, i: swarm.newcomer_takes_over(i),
    "others with other boundaries": lambda swarm, i: swarm.change_boundaries(),
    FULL: lambda swarm, i: None,  # before the round, see `caches_taken`
}


# ------------------------------------------------------------------------------------- when it breaks


@dataclass(frozen=True)
class Moment:
    """Before, or while a server has, a round's call of a kind."""

    call: str
    number: int
    is_during: bool

    def __str__(self) -> str:
        return f"{'in' if self.is_during else 'before'} {self.call} {self.number}"


@dataclass
class Watch:
    """One trainer's calls: fires a fault at its moment. It is noticed with the first failure that the router
    is told of; work goes on with the first step, forward or backward that is done after that.
    """

    moment: Moment | None = None
    fire: Callable[[Any], float] = lambda peer: 0.0
    seen: Counter[str] = field(default_factory=Counter)
    fired_at: float | None = None
    noticed_at: float | None = None
    went_on_at: float | None = None

    def begin(self, moment: Moment | None = None, fire: Callable[[Any], float] = lambda peer: 0.0) -> None:
        self.moment, self.fire = moment, fire
        self.seen.clear()
        self.fired_at = self.noticed_at = self.went_on_at = None

    async def around(self, kind: str, peer: Any, call: Callable[[], Any]) -> Any:
        number = self.seen[kind]
        self.seen[kind] += 1
        moment = self.moment
        if moment is None or (moment.call, moment.number) != (kind, number):
            return await call()
        self.moment = None
        if not moment.is_during:
            await self._fire(peer)
            return await call()
        task = asyncio.ensure_future(call())
        await asyncio.sleep(0.005)
        await self._fire(peer)
        return await task

    async def _fire(self, peer: Any) -> None:
        self.fired_at = await asyncio.get_running_loop().run_in_executor(None, self.fire, peer)

    def noticed(self) -> None:
        if self.fired_at is not None and self.noticed_at is None:
            self.noticed_at = time.monotonic()

    def went_on(self) -> None:
        if self.noticed_at is not None and self.went_on_at is None:
            self.went_on_at = time.monotonic()


@contextlib.contextmanager
def watching(policy: Policy) -> Iterator[Watch]:
    """Hooks into the client code; other policies' calls pass by."""
    watch = Watch()
    client = policy._client

    def hooked(
        owner: type, name: str, kind: str, is_mine: Callable[[Any], bool], peer_of: Callable[..., Any]
    ):
        original = getattr(owner, name)

        async def call(self: Any, *args: Any, **options: Any) -> Any:
            if not is_mine(self):
                return await original(self, *args, **options)
            return await watch.around(kind, peer_of(self, *args), lambda: original(self, *args, **options))

        stack.enter_context(mock.patch.object(owner, name, call))

    def noting(owner: type, name: str, is_mine: Callable[[Any], bool]) -> None:
        original = getattr(owner, name)

        async def call(self: Any, *args: Any, **options: Any) -> Any:
            result = await original(self, *args, **options)
            if is_mine(self):
                watch.went_on()
            return result

        stack.enter_context(mock.patch.object(owner, name, call))

    report_failure = Router.report_failure

    def noticing(self: Router, peer: Any, error: Any = None) -> None:
        if self is client.router:
            watch.noticed()
        report_failure(self, peer, error)

    with contextlib.ExitStack() as stack:
        for kind in ("push", "forward", "backward"):
            hooked(
                ServerCalls, kind, kind, lambda calls: calls is client._calls, lambda calls, peer, *_: peer
            )
        hooked(GenerationStream, "send", "step", lambda s: s._calls is client._calls, lambda s, *_: s.peer)
        noting(GenerationSession, "_run", lambda session: session._chain is client.chain)
        noting(Passes, "forward", lambda passes: passes is client.chain.passes)
        noting(Passes, "backward", lambda passes: passes is client.chain.passes)
        stack.enter_context(mock.patch.object(Router, "report_failure", noticing))
        yield watch


# ---------------------------------------------------------------------------------------------- rounds


class Trainer:
    """A policy that learns from made-up rewards, a round after the other."""

    def __init__(self, swarm: LocalSwarm, seed: int):
        self.policy = load_policy(
            swarm.model, initial_peers=swarm.initial_peers, lora=LoraSettings(r=4), timeouts=TIMEOUTS
        )
        self.policy._client.chain.hand_overs.least_round_trip_s = 0.0
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(self.policy.trainable_parameters().items()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        self._ppo = PPO(self.policy, PPOConfig(epochs=2, minibatch_size=6, kl_coef=0.05, lr=1e-2))
        self._seed = seed

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.policy.close()

    def round(self, number: int) -> str:
        """A digest of what was sampled, and of all parameters afterwards."""
        sampling = SamplingConfig(**{**vars(SAMPLING), "seed": 1000 * self._seed + number})
        rollout = self.policy.generate(PROMPTS, sampling)
        rewards = torch.zeros(rollout.response_mask.shape)
        rewards[:, -1] = (rollout.tokens % 7).float().mean(1)
        self._ppo.update(rollout, rewards)
        digest = hashlib.sha256()
        for tensor in (rollout.tokens, rollout.old_logprobs, rollout.values, *self._parameters()):
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for _, parameter in sorted(self.policy.trainable_parameters().items())]


@contextlib.contextmanager
def caches_taken(rival: Policy, policy: Policy) -> Iterator[None]:
    """A rival's generations have all caches of the servers that a policy uses, and do nothing."""
    client, calls = policy._client, rival._client._calls
    streams: list[GenerationStream] = []

    async def take_all(span: Any) -> None:
        uids = client.router.uids[span.start : span.stop]
        stream = await calls.open_generation(span.peer, uids, rows=1, max_length=CACHE_TOKENS, key="")
        streams.append(stream)
        hidden = torch.zeros(1, 1, client.fingerprint.hidden_size)
        await stream.send(hidden, Chunk(past=0), step=0, last_only=False)
        await stream.receive(hidden, last_only=False)

    async def take() -> None:
        taken: set[Any] = set()
        for left in reversed(range(20)):
            spans = await client.router.route(0, client.fingerprint.num_blocks, timeout_s=60)
            try:
                for span in spans:
                    if span.peer not in taken:
                        await take_all(span)
                        taken.add(span.peer)
                return
            except ServerFailed as error:  # it has left, or is dialled again after a while
                if left == 0:
                    raise
                client.router.report_failure(span.peer, error)
                await rival._client.router._refresh()
                await asyncio.sleep(1)

    async def leave() -> None:
        for stream in streams:
            await stream.close()

    run_in_background(take())
    try:
        yield
    finally:
        run_in_background(leave())


@dataclass
class Fault:
    kind: str
    moment: Moment
    is_equal: bool
    noticed_s: float | None
    went_on_s: float | None
    longer_s: float


def undisturbed(swarm: Chaos, rounds: int) -> tuple[list[list[str]], Counter[str], float]:
    """Digests of both trainers' rounds, one server's calls in a round, and a round's median seconds."""
    digests: list[list[str]] = []
    seconds = []
    for seed in (0, 1):
        trainer = Trainer(swarm, seed)
        with trainer, watching(trainer.policy) as watch:
            digests.append([])
            for number in range(rounds if seed == 0 else -(-rounds // 4)):
                watch.begin()
                started = time.monotonic()
                digests[-1].append(trainer.round(number))
                seconds.append(time.monotonic() - started)
            counts = Counter(watch.seen)
    return digests, counts, statistics.median(seconds)


def disturbed(
    swarm: Chaos, kinds: Sequence[str], seed: int, say: Callable[[str], object] = lambda line: None
) -> list[Fault]:
    """One fault of each of these kinds, one after the other."""
    rng = random.Random(seed)
    expected, counts, usual_s = undisturbed(swarm, len(kinds))
    found: list[Fault] = []
    first, second, rival = (Trainer(swarm, seed) for seed in (0, 1, 2))
    with contextlib.ExitStack() as stack:
        for trainer in (first, second, rival):
            stack.enter_context(trainer)
        watch = stack.enter_context(watching(first.policy))
        beside = stack.enter_context(ThreadPoolExecutor(1))
        for number, kind in enumerate(kinds):
            call = rng.choice(CALLS)
            moment = Moment(call, rng.randrange(counts[call]), rng.random() < 0.5)
            watch.begin(moment, functools.partial(swarm.strike, kind))
            with contextlib.ExitStack() as during:
                if kind == FULL:
                    during.enter_context(caches_taken(rival.policy, first.policy))
                    watch.begin()
                    watch.fired_at = time.monotonic()
                started = time.monotonic()
                both = beside.submit(second.round, number // 4) if number % 4 == 0 else None
                digest = first.round(number)
            took_s = time.monotonic() - started
            is_equal = digest == expected[0][number]
            if both is not None:
                is_equal &= both.result() == expected[1][number // 4]
            assert watch.fired_at is not None, f"{moment} never came"
            noticed_s = None if watch.noticed_at is None else watch.noticed_at - watch.fired_at
            went_on_s = None if watch.went_on_at is None else watch.went_on_at - watch.fired_at
            found.append(Fault(kind, moment, is_equal, noticed_s, went_on_s, took_s - usual_s))
            say(
                f"{number + 1}/{len(kinds)} {kind}, {moment}: {'equal' if is_equal else 'NOT EQUAL'}, "
                f"noticed after {_text(noticed_s)} s, went on after {_text(went_on_s)} s"
            )
            swarm.mend()
    return found


def _text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


def _spread(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{statistics.median(known):.1f} ({max(known):.1f})" if known else "-"


# --------------------------------------------------------------------------- servers that move, trainers


class Rebalancing(LocalSwarm):
    """A server that loads its blocks anew all the time, as when it finds others that are needed more."""

    def __init__(self, model: Path):
        often = "--num_blocks", "4", "--mean_balance_check_period", "2", "--balance_quality", "2"
        super().__init__(model, num_servers=1, server_options=often)
        self._spans = None  # petals chooses

    @property
    def times(self) -> int:
        return self.servers[0].log_path.read_text().count("server will load other blocks")


def rebalanced(model: Path, seconds: float) -> tuple[int, bool]:
    """How often a server loaded its blocks anew while a trainer worked, and whether that learned the same."""
    digests: list[list[str]] = []
    with LocalSwarm(model, num_servers=1) as swarm, Trainer(swarm, 0) as trainer:
        until = time.monotonic() + seconds
        digests.append([])
        while time.monotonic() < until:
            digests[0].append(trainer.round(len(digests[0])))
    with Rebalancing(model) as swarm:
        with Trainer(swarm, 0) as trainer:
            digests.append([trainer.round(number) for number in range(len(digests[0]))])
        return swarm.times, digests[0] == digests[1]


class Runs:
    """Runs of `textrl-swarm train` in directories of their own.

    Args:
        work: an empty directory.
    """

    def __init__(self, swarm: LocalSwarm, work: Path):
        self._work = work
        (work / "reward.py").write_text(
            "def score(items, texts):\n    return [len(t) / 100 for t in texts]\n"
        )
        config = {
            "model": str(swarm.model),
            "swarm": {"initial_peers": swarm.initial_peers},
            "prompts": ["the cat", "a dog"],
            "reward": {"function": "reward.py:score"},
            "sampling": {"max_new_tokens": 8, "num_samples": 2},
            "train": {"iterations": 8, "prompts_per_iteration": 2},
            "output": "out",
        }
        (work / "run.yaml").write_text(json.dumps(config))  # which is YAML too

    def start(self, output: str) -> subprocess.Popen[str]:
        """In the background."""
        return subprocess.Popen(
            ["textrl-swarm", "train", "run.yaml", "--set", f"output={output}"],
            cwd=self._work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until_iteration(self, run: subprocess.Popen[str], number: int) -> None:
        """Waits for a line about it."""
        assert run.stdout is not None
        for line in run.stdout:
            if f"iteration {number}/" in line:
                return
        raise RuntimeError(f"the run ended before iteration {number}")

    def finish(self, output: str) -> bytes:
        """Runs it to its end; the adapter."""
        run = self.start(output)
        text, _ = run.communicate(timeout=300)
        if run.returncode:
            raise RuntimeError(text)
        return (self._work / output / "adapter" / "adapter_model.safetensors").read_bytes()


def _stop(runs: Runs, output: str, number: int, signal_number: int) -> None:
    run = runs.start(output)
    runs.until_iteration(run, number)
    time.sleep(random.Random(number).random())
    run.send_signal(signal_number)
    run.communicate(timeout=60)


def _run_out_of_disk(runs: Runs, output: str, number: int) -> None:
    run = runs.start(output)
    runs.until_iteration(run, number)
    psutil.Process(run.pid).rlimit(psutil.RLIMIT_FSIZE, (1000, 1000))
    text, _ = run.communicate(timeout=60)
    if run.returncode != 1 or "cannot be written" not in text:
        raise RuntimeError(f"the run did not end with an error about a file: {text}")


def _start_twice(runs: Runs, output: str, number: int) -> None:
    run = runs.start(output)
    runs.until_iteration(run, number)
    run.send_signal(signal.SIGSTOP)  # it shall not end before
    second = runs.start(output)
    text, _ = second.communicate(timeout=60)
    run.send_signal(signal.SIGCONT)
    if second.returncode != 1:
        raise RuntimeError(f"a second run in one directory was not refused: {text}")
    run.communicate(timeout=300)


TRAINERS: dict[str, Callable[[Runs, str, int], None]] = {
    "trainer killed, resumed": lambda *where: _stop(*where, signal.SIGKILL),
    "trainer told to end, resumed": lambda *where: _stop(*where, signal.SIGTERM),
    "no room for a checkpoint": _run_out_of_disk,
    "two runs in one directory": _start_twice,
}


def trainers_disturbed(swarm: LocalSwarm, times: int) -> dict[str, list[bool]]:
    """Whether runs that were disturbed, so many of each kind, end with the adapter of one that was not."""
    found: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as directory:
        runs = Runs(swarm, Path(directory))
        expected = runs.finish("undisturbed")
        for kind, disturb in TRAINERS.items():
            for i in range(times):
                output = f"{kind.replace(' ', '-').replace(',', '')}-{i}"
                disturb(runs, output, 2 + 2 * i)
                found.setdefault(kind, []).append(runs.finish(output) == expected)
    return found


# --------------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=7 * len(KINDS))
    parser.add_argument("--alone", type=int, default=2 * len(KINDS) - 2, help="faults without replicas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only these")
    parser.add_argument("--trainers", type=int, default=2, help="faults of a kind that befall a trainer")
    parser.add_argument("--log", default="ERROR", metavar="LEVEL", help="of what textrl_swarm says")
    parser.add_argument("--rebalancing-s", type=float, default=20.0, help="of work with a server that moves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.getLogger("textrl_swarm").setLevel(options.log)
    chosen = options.kind or list(KINDS)
    alone = [kind for kind in chosen if kind != NEW]
    say = functools.partial(print, file=sys.stderr, flush=True)
    trainers: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = random_bloom(directory + "/bloom", seed=4)
        with Chaos(model) as swarm:
            faults = disturbed(swarm, _shuffled(chosen, options.faults, options.seed), options.seed, say)
            if options.trainers:
                trainers = trainers_disturbed(swarm, options.trainers)
        moves, is_equal = rebalanced(model, options.rebalancing_s) if options.rebalancing_s else (0, True)
        rows = _rows(chosen, faults)
        for kind, outcomes in trainers.items():
            rows.append([kind, len(outcomes), sum(outcomes), "", "", ""])
        if moves:
            rows.append(["server loads its blocks anew", moves, moves if is_equal else 0, "", "", ""])
        _report(f"{len(faults)} faults", options.seed, rows)
        if options.alone and alone:
            with Chaos(model, has_replicas=False) as swarm:
                faults = disturbed(swarm, _shuffled(alone, options.alone, options.seed), options.seed, say)
            rows = _rows(alone, faults)
            title = f"{len(faults)} faults without replicas, mended after {MENDED_AFTER_S:.0f} s"
            _report(title, options.seed, rows)


def _shuffled(kinds: Sequence[str], count: int, seed: int) -> list[str]:
    chosen = (list(kinds) * -(-count // len(kinds)))[:count]
    random.Random(seed).shuffle(chosen)
    return chosen


def _rows(kinds: Sequence[str], faults: Sequence[Fault]) -> list[list[object]]:
    rows: list[list[object]] = []
    for kind in [*kinds, None]:
        own = [fault for fault in faults if kind in (None, fault.kind)]
        times = [[getattr(fault, name) for fault in own] for name in ("noticed_s", "went_on_s", "longer_s")]
        rows.append([kind or "all", len(own), sum(fault.is_equal for fault in own), *map(_spread, times)])
    return rows


def _report(what: str, seed: int, rows: Sequence[Sequence[object]]) -> None:
    headings = ["fault", "injected", "bit-equal", "noticed after", "went on after", "round longer by"]
    report(f"{what}, seed {seed}; seconds: median (worst)", headings, rows)


if __name__ == "__main__":
    main()
