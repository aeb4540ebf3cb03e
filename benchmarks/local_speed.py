"""PPO on this machine beside TRL's GRPO and RLOO and TextRL's loop; rollouts beside transformers' generate.

    python benchmarks/local_speed.py [--repeats 5] [--epochs 1 4]

The others live in virtual environments of their own that are made here (benchmarks/.venv-*). TRL borrows
torch and transformers from ours, so that both run on the same ones; TextRL 0.2.15 needs transformers of its
time. Ours has a critic and KL to the ref policy. TRL's objectives have no critic; TextRL trains the LM head,
without KL.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from harness import in_turn, report
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.tiny import random_bloom

TRL = ["trl==1.16.0"]
TEXTRL = ["textrl==0.2.15", "transformers==4.46.3", "tokenizers==0.20.3", "huggingface_hub==0.26.5"]
RESPONSES, NEW_TOKENS, SAMPLES, THREADS = 64, 32, 8, 2
PROMPT = "write a few words: "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        model = random_bloom(directory + "/bloom", hidden=256, layers=6, heads=8, vocab=2048)
        rollouts(model, options.repeats)
        early_ends(model, options.repeats)
        for epochs in options.epochs:
            iterations(model, epochs, options.repeats)


# ---------------------------------------------------------------------------------------- rollouts


def rollouts(model: Path, repeats: int) -> None:
    """Ours against transformers' generate with PEFT's adapter, both sampling."""
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=8, target_modules="all-linear")
    ).eval()
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, stop_token_ids=(), seed=0)
    rows = []
    with load_policy(model, lora=LoraSettings(r=8)) as policy:
        for name, lengths in {
            "64 prompts of 19 tokens": [19] * 64,
            "16 prompts of 16 to 466": [16 + 30 * i for i in range(16)],
        }.items():
            prompts = [torch.randint(3, 100, (n,), generator=generator).tolist() for n in lengths]
            width = max(lengths)
            ids = torch.tensor([[3] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])

            def theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
                with torch.no_grad():
                    plain.generate(
                        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS,
                        do_sample=True, top_k=0, eos_token_id=None, pad_token_id=3,
                    )  # fmt: skip

            def ours(prompts: list[list[int]] = prompts) -> None:
                policy.generate(prompts, sampling)

            times = in_turn({"transformers": theirs, "ours": ours}, repeats)
            rows.append(
                [
                    name,
                    f"{times['transformers'].median:.2f}",
                    f"{times['ours'].median:.2f}",
                    times["ours"].spread,
                    f"{times['ours'].ratio(times['transformers']):.2f}",
                ]
            )
    report(
        f"local rollout, {NEW_TOKENS} new tokens, {THREADS} threads: seconds, medians of {repeats}",
        ["prompts", "generate", "ours", "spread", "ours / generate"],
        rows,
    )


def early_ends(model: Path, repeats: int) -> None:
    """Responses that end early against what they should cost: a step of n rows takes a + b n seconds, with a
    and b from rollouts in which nothing ends.
    """
    steps, many, few = 96, 256, 32
    prompts = [[3, 4, 5, 6, 7, 8, 9, i % 90 + 3] for i in range(many)]
    never = SamplingConfig(max_new_tokens=steps, stop_token_ids=(), seed=0)
    often = SamplingConfig(max_new_tokens=steps, stop_token_ids=tuple(range(0, 2048, 16)), seed=0)
    with load_policy(model, lora=LoraSettings(r=8)) as policy:
        lengths = policy.generate(prompts, often).response_mask.sum(dim=1)
        times = in_turn(
            {
                f"{few} rows": lambda: policy.generate(prompts[:few], never),
                f"{many} rows": lambda: policy.generate(prompts, never),
                "ending": lambda: policy.generate(prompts, often),
            },
            repeats,
        )
    whole, part = times[f"{many} rows"].median / steps, times[f"{few} rows"].median / steps
    per_row = (whole - part) / (many - few)
    live = [int((lengths > step).sum()) for step in range(int(lengths.max()))]
    expected = sum(part - few * per_row + per_row * rows for rows in live)
    rows = []
    for name, seconds in times.items():
        note = f"{expected:.2f}" if name == "ending" else ""
        rows.append([name, f"{seconds.median:.2f}", seconds.spread, note])
    report(
        f"{many} responses of at most {steps} tokens, {float(lengths.float().mean()):.0f} in the mean where "
        f"they end; medians of {repeats}",
        ["rollout", "seconds", "spread", "by arithmetic"],
        rows,
    )


# -------------------------------------------------------------------------------------- iterations


def iterations(model: Path, epochs: int, repeats: int) -> None:
    """An iteration of ours (rollout, reward, update) against one of TRL's, KL to the ref policy included."""
    rows = []
    with contextlib.ExitStack() as stack:
        policy = stack.enter_context(load_policy(model, lora=LoraSettings(r=8)))
        ppo = PPO(policy, PPOConfig(epochs=epochs, minibatch_size=RESPONSES, kl_coef=0.05))
        sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, num_samples=SAMPLES, stop_token_ids=(), seed=0)

        def ours() -> None:
            rollout = policy.generate([PROMPT] * (RESPONSES // SAMPLES), sampling)
            rewards = torch.zeros(rollout.response_mask.shape)
            rewards[:, -1] = torch.tensor([reward(text) for text in rollout.texts])
            ppo.update(rollout, rewards)

        contenders: dict[str, Callable[[], Any]] = {"ours, PPO": ours}
        for objective in ("GRPO", "RLOO"):
            contenders[f"TRL {objective}"] = stack.enter_context(trl(objective, model, epochs))
        contenders["TextRL 0.2.15"] = stack.enter_context(textrl(model, epochs))
        times = in_turn(contenders, repeats)
    mine = times["ours, PPO"]
    for name, seconds in times.items():
        rows.append([name, f"{seconds.median:.2f}", seconds.spread, f"{seconds.ratio(mine):.2f}"])
    report(
        f"iteration of {RESPONSES} x {NEW_TOKENS} tokens, {epochs} epoch(s), {THREADS} threads: medians of "
        f"{repeats}",
        ["trainer", "seconds", "spread", "ratio to ours"],
        rows,
    )


def reward(text: str) -> float:
    return text.count("e") / max(1, len(text))


def trl(objective: str, model: Path, epochs: int) -> AbstractContextManager[Callable[[], None]]:
    """A TRL trainer that makes one iteration per call."""
    sizes = [RESPONSES, NEW_TOKENS, SAMPLES, THREADS, epochs]
    return worker("trl", TRL, [objective, model, PROMPT, *sizes])


def textrl(model: Path, epochs: int) -> AbstractContextManager[Callable[[], None]]:
    """TextRL's own loop over as many tokens."""
    return worker("textrl", TEXTRL, [model, PROMPT, RESPONSES, NEW_TOKENS, SAMPLES, THREADS, epochs])


@contextlib.contextmanager
def worker(name: str, packages: list[str], arguments: list[object]) -> Iterator[Callable[[], None]]:
    """A trainer in a process and an environment of its own, which makes one iteration per call."""
    script = Path(__file__).with_name(f"{name}_worker.py")
    command = [str(part) for part in (_python(name, packages), script, *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip

    def iterate() -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("go\n")
            process.stdin.flush()
        for line in process.stdout:
            if line == "done\n":
                return
        raise SystemExit(f"{script.name} ended:\n{process.stderr.read()}")

    try:
        yield iterate
    finally:
        process.kill()
        process.wait()


def _python(name: str, packages: list[str]) -> Path:
    directory = Path(__file__).with_name(f".venv-{name}")
    python = directory / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(directory), "platbase": str(directory)}))
    if not (site / name).is_dir():
        venv.create(directory, with_pip=True, clear=True)
        (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *packages], check=True)
    return python


if __name__ == "__main__":
    main()
