"""Bytes of an iteration by kind, beside the arithmetic that --dry-run shows.

    python benchmarks/traffic.py

Two servers on this machine; the second iteration counts, since servers have the first one's adapter by then.
Responses have full length, as the arithmetic assumes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import report
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import Codec, LocalSwarm, LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.runs.estimate import estimate_run

SERVERS, NEW_TOKENS, EPOCHS = 2, 16, 2
# Prompts, tokens of each, samples, responses per minibatch, adapted blocks, codec.
CASES: dict[str, tuple[int, int, int, int, int | None, str | None]] = {
    "all blocks": (32, 24, 1, 32, None, None),
    "the last 2 blocks": (32, 24, 1, 32, 2, None),
    "8 samples per prompt": (4, 24, 8, 32, None, None),
    "8 samples, minibatches of 8": (4, 24, 8, 8, None, None),
    "fp16": (32, 24, 1, 32, None, "fp16"),
    "int8": (32, 24, 1, 32, None, "int8"),
}


def main() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = random_bloom(directory + "/bloom", hidden=256, layers=6)
        with LocalSwarm(model, num_servers=SERVERS) as swarm:
            for name, case in CASES.items():
                rows += [[name, *row] for row in iteration(model, swarm.initial_peers, *case)]
    report(
        f"bytes of an iteration, {SERVERS} servers, {EPOCHS} epochs, hidden 256, 6 blocks",
        ["case", "direction, kind", "counted", "by arithmetic", "counted / arithmetic"],
        rows,
    )


def iteration(
    model: Path,
    peers: list[str],
    prompts: int,
    length: int,
    samples: int,
    minibatch: int,
    layers: int | None,
    kind: str | None,
) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 100, (prompts, length), generator=generator).tolist()
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, num_samples=samples, stop_token_ids=(), seed=0)
    lora = LoraSettings(r=8, layers=layers)
    codec: Any = None if kind is None else Codec(kind, max_nats=100, min_cosine=0.01)  # type: ignore[arg-type]
    with load_policy(model, initial_peers=peers, lora=lora, codec=codec) as policy:
        policy._client.chain.hand_overs.least_round_trip_s = 0.0  # as if they were far away
        ppo = PPO(policy, PPOConfig(epochs=EPOCHS, minibatch_size=minibatch))
        traffic = policy.traffic
        assert traffic is not None, "the policy is in a swarm"
        for _ in range(2):
            before = {"sent": traffic.sent.copy(), "received": traffic.received.copy()}
            rollout = policy.generate(tokens, sampling)
            ppo.update(rollout, torch.rand(rollout.response_mask.shape, generator=generator))
        counted = {"sent": traffic.sent - before["sent"], "received": traffic.received - before["received"]}
    needs = estimate_run(
        AutoConfig.from_pretrained(model), lora, quantization=None, swarm_servers=SERVERS,
        responses=prompts * samples, prompt_tokens=length, response_tokens=NEW_TOKENS, epochs=EPOCHS,
        minibatch_size=minibatch, samples=samples, codec=kind,
    )  # fmt: skip
    rows = []
    for direction, expected in (("sent", needs.sent), ("received", needs.received)):
        for what, size in expected.items():
            found = counted[direction][what]
            rows.append([f"{direction}, {what}", f"{found:,}", f"{size:,}", f"{found / size:.3f}"])
    return rows


if __name__ == "__main__":
    main()
