"""How time grows with each size of a run, beside the growth of its arithmetic.

    python benchmarks/scale.py [--repeats 3]

One size changes at a time, on this machine; servers change through swarms of one process each.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import in_turn, report
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LocalSwarm, LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.tiny import random_bloom

PROMPT_TOKENS, NEW_TOKENS = 8, 24


@dataclass(frozen=True)
class Sizes:
    responses: int = 16
    minibatch: int = 16
    vocabulary: int = 4096
    blocks: int = 4
    hidden: int = 128
    rank: int = 8
    servers: int = 0

    def update_flops(self) -> float:
        """Multiplications and additions of an epoch with its old and ref passes: per token and block 24 H^2
        forward (ref and trained), and as many backward for the gradient of the inputs; LoRA's two products
        forward once and backward twice; 2 V H per response token forward twice, in backward projected again
        and gone through.
        """
        tokens = self.responses * (PROMPT_TOKENS + NEW_TOKENS)
        passes = 3 if self.minibatch >= self.responses else 3 + 1 - self.minibatch / self.responses
        block = 24 * self.hidden**2 * passes + 2 * self.rank * 18 * self.hidden * (passes - 1)
        head = 2 * self.vocabulary * self.hidden * (passes + 1)
        return tokens * self.blocks * block + self.responses * NEW_TOKENS * head


STEPS: dict[str, tuple[int, ...]] = {
    "responses": (16, 64, 256),
    "minibatch": (16, 64),
    "vocabulary": (4096, 32_000, 250_880),
    "blocks": (4, 16, 70),
    "rank": (8, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 3, 6])
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, values in STEPS.items():
            base = Sizes(responses=64) if name == "minibatch" else Sizes()
            sizes = {value: dataclasses.replace(base, **{name: value}) for value in values}
            rows += grown(name, sizes, Path(directory), options.repeats)
        rows += through_servers(options.servers, Path(directory), options.repeats)
    report(
        f"an update of one epoch; hidden 128, responses of {NEW_TOKENS} tokens; medians of {options.repeats}",
        ["size", "seconds", "spread", "growth", "growth of the arithmetic"],
        rows,
    )


def grown(name: str, sizes: dict[int, Sizes], directory: Path, repeats: int) -> list[list[str]]:
    updates = {str(value): update(load(one, directory), one) for value, one in sizes.items()}
    times = in_turn(updates, repeats)
    first, first_sizes = times[str(min(sizes))], sizes[min(sizes)]
    rows = []
    for value, one in sizes.items():
        seconds = times[str(value)]
        flops = one.update_flops() / first_sizes.update_flops()
        growth = f"{seconds.ratio(first):.2f}"
        rows.append([f"{name} {value:,}", f"{seconds.median:.3f}", seconds.spread, growth, f"{flops:.2f}"])
    return rows


def through_servers(counts: list[int], directory: Path, repeats: int) -> list[list[str]]:
    """The computing stays the same; each server adds a hop, over which hidden states travel."""
    one, rows, first_s = Sizes(blocks=6), [], 0.0
    model = random_bloom(directory / "served", hidden=one.hidden, layers=one.blocks, vocab=one.vocabulary)
    for servers in counts:
        with (
            LocalSwarm(model, num_servers=servers) as swarm,
            load_policy(model, initial_peers=swarm.initial_peers, lora=LoraSettings(r=one.rank)) as policy,
        ):
            seconds = in_turn({"update": update(policy, one)}, repeats)["update"]
            first_s = first_s or seconds.median
            growth = f"{seconds.median / first_s:.2f}"
            rows.append([f"servers {servers}", f"{seconds.median:.3f}", seconds.spread, growth, "1.00"])
    return rows


def load(sizes: Sizes, directory: Path) -> Any:
    name = f"{sizes.blocks}-{sizes.vocabulary}"
    options = {"hidden": sizes.hidden, "layers": sizes.blocks, "vocab": sizes.vocabulary}
    model = random_bloom(directory / name, **options)
    return load_policy(model, lora=LoraSettings(r=sizes.rank))


def update(policy: Any, sizes: Sizes) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 100, (sizes.responses, PROMPT_TOKENS), generator=generator).tolist()
    rollout = policy.generate(prompts, SamplingConfig(max_new_tokens=NEW_TOKENS, stop_token_ids=(), seed=0))
    rewards = torch.rand(rollout.response_mask.shape, generator=generator)
    ppo = PPO(policy, PPOConfig(epochs=1, minibatch_size=sizes.minibatch))
    return lambda: ppo.update(rollout, rewards)


if __name__ == "__main__":
    main()
