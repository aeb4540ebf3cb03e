"""What fewer bits per hidden state save on a slow link, and what they change.

    python benchmarks/codec_speed.py [--mbit 10] [--round-trip-ms 50] [--repeats 3]

The updates with each codec take turns through the same two servers, each behind a link of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import DistantSwarm, in_turn, report
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import Codec, LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.layers import find_blocks
from textrl_swarm.models.tiny import make_tiny_bloom

ROWS, NEW_TOKENS, EPOCHS = 32, 24, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--round-trip-ms", type=float, default=50.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        model = make_tiny_bloom(directory + "/bloom")
        swarm = stack.enter_context(DistantSwarm(model, 2, options.round_trip_ms, options.mbit))
        policies, updates = {}, {}
        for kind in (None, "fp16", "int8"):
            codec: Any = None if kind is None else Codec(kind, max_nats=100, min_cosine=0.01)  # type: ignore[arg-type]
            lora = LoraSettings(r=4)
            policy: Any = load_policy(model, initial_peers=swarm.initial_peers, lora=lora, codec=codec)
            policies[str(kind)] = stack.enter_context(policy)
            updates[str(kind)] = update(policy)
        before = {name: policy.traffic.total_sent for name, policy in policies.items()}
        times = in_turn(updates, options.repeats)
        rows = []
        for name, seconds in times.items():
            policy = policies[name]
            sent = (policy.traffic.total_sent - before[name]) / (options.repeats + 1)  # one warms up
            loss = policy.codec_loss
            rows.append(
                [
                    name,
                    f"{seconds.median:.2f}",
                    seconds.spread,
                    f"{seconds.ratio(times['None']):.2f}",
                    f"{sent / 1e6:.2f}",
                    "" if loss is None else f"{loss.nats:.4f}",
                    "" if loss is None else f"{loss.cosine:.5f}",
                ]
            )
        differences(model)
    report(
        f"update of {ROWS} responses, {EPOCHS} epochs, the demo's tiny BLOOM, 2 servers "
        f"{options.round_trip_ms:g} ms away at {options.mbit:g} Mbit/s; medians of {options.repeats}",
        ["codec", "seconds", "spread", "ratio to none", "MB sent", "nats", "cosine"],
        rows,
    )


def differences(model: Path) -> None:
    """AQ-SGD (arXiv 2206.01299): both ends keep a token's hidden state, and only its change since the last
    epoch is sent. Here for the state in the middle of the model: its change relative to itself, and the error
    of 8 and 4 bits for the state and for the change, relative to the state.
    """
    with load_policy(model, lora=LoraSettings(r=4)) as policy:
        step = update(policy, epochs=4, lr=1e-3)
        blocks = find_blocks(policy._model)[1]  # type: ignore[attr-defined]
        inputs: dict[int, list[torch.Tensor]] = {0: [], len(blocks) // 2: []}
        hooks = []
        for index, seen in inputs.items():

            def keep(module: object, args: tuple[torch.Tensor], seen: list[torch.Tensor] = seen) -> None:
                if torch.is_grad_enabled():
                    seen.append(args[0].detach())

            hooks.append(blocks[index].register_forward_pre_hook(keep))
        step()
        for hook in hooks:
            hook.remove()
    embedded, middle = inputs.values()  # each epoch has an order of rows of its own
    states = [state[first.sum((1, 2)).argsort()] for first, state in zip(embedded, middle, strict=True)]
    rows = []
    for epoch, (before, now) in enumerate(itertools.pairwise(states), start=2):
        size = now.norm()
        errors = []
        for bits in (8, 4):
            errors.append(float((rounded(now, bits) - now).norm() / size))
            errors.append(float((before + rounded(now - before, bits) - now).norm() / size))
        rows.append([f"{epoch}", f"{float((now - before).norm() / size):.4f}", *(f"{e:.5f}" for e in errors)])
    report(
        "hidden states in the middle of the demo's tiny BLOOM against the last epoch's, lr 1e-3",
        ["epoch", "change", "state, 8 bits", "change, 8 bits", "state, 4 bits", "change, 4 bits"],
        rows,
    )


def rounded(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """In steps of the largest of each 64 numbers over 2^(bits - 1) - 1."""
    blocks = numbers.unflatten(-1, (-1, 64))
    steps = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return ((blocks / steps).round() * steps).flatten(-2)


def update(policy: Any, epochs: int = EPOCHS, lr: float = 1e-4) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 100, (ROWS, 8), generator=generator).tolist()
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, stop_token_ids=(), seed=0)
    rollout = policy.generate(prompts, sampling)
    rewards = torch.rand(rollout.response_mask.shape, generator=generator)
    ppo = PPO(policy, PPOConfig(epochs=epochs, minibatch_size=ROWS, lr=lr))
    return lambda: ppo.update(rollout, rewards)


if __name__ == "__main__":
    main()
