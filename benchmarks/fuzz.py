"""A server among hostile clients: does it serve on, does an honest client get the same numbers, and does its
memory stay where it was?

    python benchmarks/fuzz.py [--requests 10000] [--megabytes 1500] [--seed 0]

Meanwhile an honest client learns; what it samples and learns is compared, bit for bit, with what it learned
before. Memory is the proportional set size of all processes of the server together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from harness import report
from hostile_client import CALLS, RECORDS, STREAMS
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.swarm.local import LocalSwarm

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
SAMPLING = SamplingConfig(max_new_tokens=8, num_samples=2, stop_token_ids=(), seed=0)
ATTACKERS = 4
SETTLES_S = 40  # servers keep a refused stream open for half a minute
OPTIONS = ("--attn_cache_tokens", "512", "--max_batch_size", "256")


class Memory:
    """Of a server's process group, in MiB, read again and again."""

    def __init__(self, pid: int):
        self._group = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        self.peak = 0.0

    def now(self) -> float:
        found = 0.0
        for process in self._group:
            found += process.memory_full_info().pss / 2**20
        self.peak = max(self.peak, found)
        return found

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, `peak` is kept up to date."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                self.now()

        self.peak = 0.0
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class Honest:
    """A client whose rounds are all the same."""

    def __init__(self, swarm: LocalSwarm):
        self._policy = load_policy(swarm.model, initial_peers=swarm.initial_peers, lora=LoraSettings(r=4))
        self._parameters = [parameter for _, parameter in sorted(self._policy.trainable_parameters().items())]
        self._start = [parameter.detach().clone() for parameter in self._parameters]
        self.seconds: list[float] = []
        self.wrong = 0
        self._expected = self._round()
        self.seconds.clear()

    def _round(self) -> str:
        started = time.perf_counter()
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._start, strict=True):
                parameter.copy_(value)
        ppo = PPO(self._policy, PPOConfig(epochs=2, minibatch_size=3, kl_coef=0.05, lr=1e-2))
        rollout = self._policy.generate(PROMPTS, SAMPLING)
        rewards = torch.zeros(rollout.response_mask.shape)
        rewards[:, -1] = (rollout.tokens % 7).float().mean(1)
        ppo.update(rollout, rewards)
        digest = hashlib.sha256(rollout.tokens.numpy().tobytes() + rollout.old_logprobs.numpy().tobytes())
        for parameter in self._parameters:
            digest.update(parameter.detach().numpy().tobytes())
        self.seconds.append(time.perf_counter() - started)
        return digest.hexdigest()

    def learn(self) -> None:
        """One round, compared with the first."""
        self.wrong += self._round() != self._expected

    def close(self) -> None:
        self._policy.close()


def start_attack(address: str, uid: str, *arguments: object) -> subprocess.Popen[bytes]:
    script = str(Path(__file__).with_name("hostile_client.py"))
    return subprocess.Popen(
        [sys.executable, script, address, uid, *map(str, arguments)], stdout=subprocess.PIPE
    )


def attackers(address: str, uid: str, requests: int, seed: int) -> list[subprocess.Popen[bytes]]:
    """Each of them sends so many."""
    numbers = range(seed, seed + ATTACKERS)
    return [start_attack(address, uid, "--requests", requests, "--seed", number) for number in numbers]


def during(honest: Honest, attacks: list[subprocess.Popen[bytes]]) -> list[dict]:
    """What the attackers report; meanwhile the honest client learns."""
    while any(attack.poll() is None for attack in attacks):
        honest.learn()
    found = []
    for attack in attacks:
        assert attack.stdout is not None
        found.append(json.loads(attack.stdout.read() or b"{}"))
    return found


def settled(memory: Memory, seconds: int = 10) -> float:
    """Least of so many: what clients leave open is closed after a while."""
    return min(memory.now() for _ in range(2 * seconds) if time.sleep(0.5) is None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        model = random_bloom(Path(directory) / "model", seed=1)
        with LocalSwarm(model, num_servers=1, server_options=OPTIONS) as swarm:
            run(swarm, options)


def run(swarm: LocalSwarm, options: argparse.Namespace) -> None:
    (server,) = swarm.servers
    address, uid = swarm.initial_peers[0], f"{swarm.dht_prefix}.0"
    memory = Memory(server.pid)
    honest = Honest(swarm)
    # What a server takes once, and keeps: buffers of its processes, code that is loaded when it is needed.
    during(honest, attackers(address, uid, 500, 1000))
    honest.seconds.clear()
    for _ in range(10):
        honest.learn()
    calm_s, before = statistics.median(honest.seconds), settled(memory)
    print(f"undisturbed: a round takes {calm_s:.2f} s, memory {before:.0f} MiB", flush=True)

    honest.seconds.clear()
    started = time.monotonic()
    with memory.watched():
        found = during(honest, attackers(address, uid, options.requests // ATTACKERS, options.seed))
    took_s, rounds, wrong = time.monotonic() - started, len(honest.seconds), honest.wrong
    busy_s, after = statistics.median(honest.seconds), settled(memory, SETTLES_S)
    totals: dict[str, Counter[str]] = {}
    for ends in found:
        for method, counts in ends.items():
            totals.setdefault(method, Counter()).update(counts)
    kinds = sorted({kind for counts in totals.values() for kind in counts})
    rows = [
        (method, sum(totals[method].values()), *(totals[method][kind] for kind in kinds))
        for method in (*STREAMS, *CALLS, *RECORDS)
        if method in totals
    ]
    sent = sum(row[1] for row in rows)
    report(f"{sent} hostile requests in {took_s:.0f} s", ["RPC", "sent", *kinds], rows)
    rows = [
        ("honest rounds meanwhile", f"{rounds}, {wrong} of them with other numbers"),
        ("a round, undisturbed and meanwhile", f"{calm_s:.2f} and {busy_s:.2f} s"),
        ("memory before", f"{before:.0f} MiB"),
        ("largest meanwhile", f"{memory.peak:.0f} MiB"),
        ("memory after", f"{after:.0f} MiB ({after / before - 1:+.1%})"),
        ("the server runs", "yes" if server.running else "no"),
    ]
    report("An honest client, and the server's memory", ["", "seen"], rows)

    rows = []
    for method in STREAMS:
        honest.wrong = 0
        before = settled(memory)
        with memory.watched():
            (end,) = during(
                honest, [start_attack(address, uid, "--flood", method, "--megabytes", options.megabytes)]
            )
        after = settled(memory)
        figures = f"{before:.0f}", f"{memory.peak:.0f}", f"{after:.0f}"
        rows.append((method, *end.values(), *figures, honest.wrong))
    title = f"Streams of {options.megabytes} MB that never complete a tensor"
    report(title, ["RPC", "end", "MiB before", "largest", "after", "honest rounds with other numbers"], rows)
    honest.close()


if __name__ == "__main__":
    main()
