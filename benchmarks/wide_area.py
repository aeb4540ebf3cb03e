"""Training through servers that are far away: each behind a link with a delay and a rate.

    python benchmarks/wide_area.py [--link 2,50 --link 2,50,10 ...] [--repeats 3]

A link is the number of servers, and the milliseconds there and back and the Mbit/s of the way to each.

What is compared is measured in turn with the same servers. Nothing leaves this machine: a TCP proxy in front
of every server delays what goes through it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import DistantSwarm, Times, in_turn, report
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.policies.base import Policy

BLOCKS, HIDDEN, NEW_TOKENS, ROWS, EPOCHS = 6, 256, 24, 32, 2
SAMPLING = SamplingConfig(max_new_tokens=NEW_TOKENS, stop_token_ids=(), seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--link", type=Link.read, action="append", metavar="SERVERS,MS[,MBIT]")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = random_bloom(directory + "/bloom", hidden=HIDDEN, layers=BLOCKS)
        links = options.link or [Link(2, 0.05), Link(4, 0.05)]
        near_s = {}  # an update when the servers are on this machine
        for servers in {link.servers for link in links}:
            with connected(model, Link(servers)) as policy:
                near_s[servers] = update_time(policy, options.repeats)[0].median
        for link in links:
            with connected(model, link) as policy:
                rows += [[str(link), *row] for row in rollouts(policy, link.servers, options.repeats)]
                seconds, sent, received = update_time(policy, options.repeats)
            bound_s = link.bound_s(near_s[link.servers], sent, received)
            what = f"update, {EPOCHS} epochs; bound {bound_s:.2f} s"
            share = f"{bound_s / seconds.median:.2f} of the bound"
            rows.append([str(link), what, f"{seconds.median:.2f}", seconds.spread, "", "", share])
    report(
        f"{BLOCKS} blocks, hidden {HIDDEN}, {NEW_TOKENS} new tokens; medians of {options.repeats}",
        ["link", "what", "seconds", "spread", "ms/step", "tokens/s", "time over the first's"],
        rows,
    )


@contextlib.contextmanager
def connected(model: Path, link: Link) -> Iterator[Policy]:
    mbit = link.bits_per_s / 1e6
    with (
        DistantSwarm(model, link.servers, 1000 * link.round_trip_s, mbit) as swarm,
        load_policy(model, initial_peers=swarm.initial_peers, lora=LoraSettings(r=8)) as policy,
    ):
        yield policy


@dataclass(frozen=True)
class Link:
    servers: int
    round_trip_s: float = 0.0
    bits_per_s: float = 0.0  # 0 = as fast as loopback

    @staticmethod
    def read(text: str) -> Link:
        servers, *rest = text.split(",")
        milliseconds, mbit = [*map(float, rest), 0.0][:2]
        return Link(int(servers), milliseconds / 1000, mbit * 1e6)

    def __str__(self) -> str:
        rate = f", {self.bits_per_s / 1e6:g} Mbit/s" if self.bits_per_s else ""
        return f"S={self.servers}, {1000 * self.round_trip_s:g} ms{rate}"

    def bound_s(self, near_s: float, sent: int, received: int) -> float:
        """The least that an update could take: computing or, if that takes longer, each server's share of the
        bytes; and the round trips of its passes through the chain, of which none can begin before the one
        before has ended: a forward of policy and ref policy, and the backward and forward of each epoch.
        """
        passes = 1 + 2 * EPOCHS
        wire_s = 0.0
        if self.bits_per_s:
            wire_s = 8 * max(sent, received) / self.servers / self.bits_per_s
        return max(near_s, wire_s) + passes * self.servers * self.round_trip_s


def rollouts(policy: Policy, servers: int, repeats: int) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)

    def prompts(lengths: Sequence[int]) -> list[list[int]]:
        return [torch.randint(3, 100, (length,), generator=generator).tolist() for length in lengths]

    def rollout(batch: list[list[int]], at_once: int, hand_over: bool = True) -> Callable[[], object]:
        def run() -> object:
            policy._client.chain.hand_overs.least_round_trip_s = 0.0 if hand_over else math.inf
            policy.sessions_at_once = at_once
            return policy.generate(batch, SAMPLING)

        return run

    few, many = prompts([8] * ROWS), prompts([8] * ROWS * servers)
    equal, unequal = prompts([34] * 16), prompts([4 * i for i in range(1, 17)])
    table = []
    for contenders in (
        {
            f"{ROWS} rows, one group": (rollout(few, 1), ROWS),
            f"{ROWS} rows, one group, relayed": (rollout(few, 1, hand_over=False), ROWS),
            f"{ROWS} rows, {servers} groups": (rollout(few, servers), ROWS),
            f"{ROWS * servers} rows, {servers} groups": (rollout(many, servers), ROWS * servers),
            f"{ROWS * servers} rows, {servers} groups, relayed": (
                rollout(many, servers, hand_over=False),
                ROWS * servers,
            ),
        },
        {
            "16 prompts of 34 tokens": (rollout(equal, servers), 16),
            "16 prompts of 4 to 64": (rollout(unequal, servers), 16),
        },
    ):
        times = in_turn({name: action for name, (action, _) in contenders.items()}, repeats)
        first = next(iter(times.values()))
        for name, seconds in times.items():
            rate = contenders[name][1] * NEW_TOKENS / seconds.median
            step_ms = f"{1000 * seconds.median / NEW_TOKENS:.0f}"
            ratio = f"{seconds.ratio(first):.2f}"
            table.append([name, f"{seconds.median:.2f}", seconds.spread, step_ms, f"{rate:.0f}", ratio])
    return table


def update_time(policy: Policy, repeats: int) -> tuple[Times, int, int]:
    """Of 1024 tokens; and the bytes of one update, sent and received."""
    rollout = policy.generate([[5, 6, 7, 8, 9, 10, 11, 12]] * ROWS, SAMPLING)
    ppo = PPO(policy, PPOConfig(epochs=EPOCHS, minibatch_size=ROWS, kl_coef=0.05))
    rewards = torch.zeros(rollout.response_mask.shape)
    rewards[:, -1] = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    times = in_turn({"update": lambda: ppo.update(rollout, rewards)}, repeats)["update"]
    traffic = policy.traffic
    assert traffic is not None, "the policy is in a swarm"
    before = sum(traffic.sent.values()), sum(traffic.received.values())
    ppo.update(rollout, rewards)
    after = sum(traffic.sent.values()), sum(traffic.received.values())
    return times, after[0] - before[0], after[1] - before[1]


if __name__ == "__main__":
    main()
