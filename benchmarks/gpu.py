"""bloomz-7b1 with random weights on a CUDA device: rollout and update, peak memory, share of the peak speed.

    python benchmarks/gpu.py [--precision bf16 8bit 4bit] [--responses 64] [--tiny]

Needs no network. Writes 14 GB of random weights into the temporary directory. Without a CUDA device it says
so and ends. `--tiny` runs the same lines with a toy model, on the CPU if there is nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import report
from transformers import BloomConfig, BloomForCausalLM
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.runs.estimate import estimate_run

PROMPT_TOKENS, NEW_TOKENS, MICRO_BATCH_TOKENS = 64, 64, 1024
BLOOMZ_7B1 = {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}
TINY = {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", nargs="+", default=["bf16", "8bit", "4bit"])
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print("no CUDA device here: nothing was measured (--tiny runs the same lines on the CPU)")
        return
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = BloomConfig(**(TINY if options.tiny else BLOOMZ_7B1))
    peak = peak_flops(device)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for precision in options.precision:
            rows.append([precision, *measured(config, precision, Path(directory), device, peak, options)])
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report(
        f"{options.responses} responses, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, one epoch, {name}; "
        f"a product of matrices reaches {peak / 1e12:.1f} TFLOP/s",
        ["precision", "rollout tokens/s", "update tokens/s", "peak GB", "estimated GB", "share of the peak"],
        rows,
    )


def measured(
    config: BloomConfig, precision: str, directory: Path, device: str, peak: float, options: Any
) -> list[str]:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    quantization = None if precision == "bf16" else precision
    if not (directory / "config.json").is_file():
        torch.manual_seed(0)
        with torch.device(device):
            model = BloomForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(directory)
        del model
    policy = load_policy(
        directory, quantization=quantization, device=device, lora=LoraSettings(r=8),
        gradient_checkpointing=True,
    )  # fmt: skip
    with policy:
        ppo = PPO(policy, PPOConfig(epochs=1, minibatch_size=64, micro_batch_tokens=MICRO_BATCH_TOKENS))
        generator = torch.Generator().manual_seed(0)
        shape = options.responses, PROMPT_TOKENS
        prompts = torch.randint(3, config.vocab_size, shape, generator=generator).tolist()
        sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, stop_token_ids=(), seed=0)
        policy.generate(prompts[:2], sampling)  # warms up
        rollout_s, rollout = timed(device, lambda: policy.generate(prompts, sampling))
        rewards = torch.rand(rollout.response_mask.shape, generator=generator)
        ppo.update(rollout, rewards)
        update_s, _ = timed(device, lambda: ppo.update(rollout, rewards))
    tokens = options.responses * (PROMPT_TOKENS + NEW_TOKENS)
    flops = tokens * 5 * 24 * config.n_layer * config.hidden_size**2  # old, ref, trained twice, backward
    needs = estimate_run(
        config, LoraSettings(r=8), quantization=quantization, swarm_servers=0, responses=options.responses,
        prompt_tokens=PROMPT_TOKENS, response_tokens=NEW_TOKENS, epochs=1, minibatch_size=64,
        micro_batch_tokens=MICRO_BATCH_TOKENS, gradient_checkpointing=True, dtype="bfloat16",
    )  # fmt: skip
    used = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else "not counted"
    return [
        f"{options.responses * NEW_TOKENS / rollout_s:,.0f}",
        f"{tokens / update_s:,.0f}",
        used,
        f"{needs.memory_bytes / 1e9:.1f}",
        f"{flops / update_s / peak:.2f}",
    ]


def timed(device: str, action: Any) -> tuple[float, Any]:
    synchronize(device)
    started = time.perf_counter()
    result = action()
    synchronize(device)
    return time.perf_counter() - started, result


def peak_flops(device: str) -> float:
    """What a large product of bf16 matrices reaches here."""
    size = 8192 if device == "cuda" else 512
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    seconds, _ = timed(device, lambda: [matrix @ matrix for _ in range(10)])
    return 10 * 2 * size**3 / seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
