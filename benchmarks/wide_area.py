"""Training through servers that are far away: each behind a link with a delay and a rate.

    python benchmarks/wide_area.py [--round-trip-ms 50] [--mbit 10] [--servers 2 4] [--repeats 3]

What is compared is measured in turn with the same servers. Nothing leaves this machine: a TCP proxy in front
of every server delays what goes through it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence

import torch
from harness import DistantSwarm, in_turn, report
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.policies.base import Policy

BLOCKS, HIDDEN, NEW_TOKENS, ROWS = 6, 256, 24, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--round-trip-ms", type=float, nargs="+", default=[50.0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[0.0], help="0 = as fast as loopback")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = random_bloom(directory + "/bloom", hidden=HIDDEN, layers=BLOCKS)
        for servers in options.servers:
            for round_trip_ms in options.round_trip_ms:
                for mbit in options.mbit:
                    with (
                        DistantSwarm(model, servers, round_trip_ms, mbit) as swarm,
                        load_policy(
                            model, initial_peers=swarm.initial_peers, lora=LoraSettings(r=8)
                        ) as policy,
                    ):
                        link = f"S={servers}, {round_trip_ms:g} ms, " + (f"{mbit:g} Mbit/s" if mbit else "-")
                        rows += [[link, *row] for row in measure(policy, servers, options.repeats)]
    report(
        f"{BLOCKS} blocks, hidden {HIDDEN}, {NEW_TOKENS} new tokens; medians of {options.repeats}",
        ["link", "what", "seconds", "spread", "ms/step", "tokens/s", "ratio to the first"],
        rows,
    )


def measure(policy: Policy, servers: int, repeats: int) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)

    def prompts(lengths: Sequence[int]) -> list[list[int]]:
        return [torch.randint(3, 100, (length,), generator=generator).tolist() for length in lengths]

    def rollout(batch: list[list[int]], at_once: int) -> Callable[[], object]:
        sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, stop_token_ids=(), seed=0)

        def run() -> object:
            policy.sessions_at_once = at_once
            return policy.generate(batch, sampling)

        return run

    few = prompts([8] * ROWS)
    many = prompts([8] * ROWS * servers)
    equal = prompts([34] * 16)
    unequal = prompts([4 * i for i in range(1, 17)])
    trained = policy.generate(
        prompts([8] * ROWS), SamplingConfig(max_new_tokens=24, stop_token_ids=(), seed=0)
    )
    ppo = PPO(policy, PPOConfig(epochs=2, minibatch_size=ROWS, kl_coef=0.05))
    rewards = torch.zeros(trained.response_mask.shape)
    rewards[:, -1] = torch.randn(ROWS, generator=generator)
    table = []
    for contenders in (
        {
            f"{ROWS} rows, one group": (rollout(few, 1), ROWS),
            f"{ROWS} rows": (rollout(few, servers), ROWS),
            f"{ROWS * servers} rows": (rollout(many, servers), ROWS * servers),
        },
        {
            "16 prompts of 34 tokens": (rollout(equal, servers), 16),
            "16 prompts of 4 to 64": (rollout(unequal, servers), 16),
        },
        {"update, 2 epochs of 1024 tokens": (lambda: ppo.update(trained, rewards), ROWS)},
    ):
        times = in_turn({name: action for name, (action, _) in contenders.items()}, repeats)
        first = next(iter(times.values()))
        for name, seconds in times.items():
            tokens = contenders[name][1] * NEW_TOKENS
            table.append(
                [
                    name,
                    f"{seconds.median:.2f}",
                    seconds.spread,
                    f"{1000 * seconds.median / NEW_TOKENS:.0f}",
                    f"{tokens / seconds.median:.0f}",
                    f"{seconds.ratio(first):.2f}",
                ]
            )
    return table


if __name__ == "__main__":
    main()
