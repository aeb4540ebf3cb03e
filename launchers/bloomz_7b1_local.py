"""PPO of bloomz-7b1 on one GPU: 8-bit weights, LoRA in every block, nothing but this machine.

What it does    asks how much memory there is, takes the best of a list of settings that fits (and says so
                when that is not bloomz-7b1 in 8 bits with 16 responses at once), and trains through
                `textrl-swarm train`'s own code. The same command continues a run.
What it needs   bitsandbytes (pip install bitsandbytes) and a CUDA GPU with 16 GB; with 24 GB more responses
                are computed at once, with 10 GB the weights are 4-bit. Without a GPU a smaller bloomz is
                trained on the CPU. The first start downloads the model (14 GB).

    python launchers/bloomz_7b1_local.py                        # sentiment of short opinions
    python launchers/bloomz_7b1_local.py --reward mine.py:score --prompts prompts.txt --output runs/mine
    python launchers/bloomz_7b1_local.py --dry-run              # what would be done, and what it needs
    textrl-swarm export runs/bloomz-7b1 bloomz-adapter          # the adapter, for transformers + peft

Half a minute, through the same lines, with a toy BLOOM in 8 bits on the CPU:

    python launchers/bloomz_7b1_local.py --tiny
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.filesize import decimal
from transformers import BloomConfig, PretrainedConfig

from textrl_swarm.commands.train import train_command
from textrl_swarm.config import LoraSettings
from textrl_swarm.display import accept_any_text
from textrl_swarm.errors import ConfigError, TextRLSwarmError
from textrl_swarm.models.base_model import resolve
from textrl_swarm.models.corpus import DEMO_PROMPTS
from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.runs.config import load_config
from textrl_swarm.runs.estimate import estimate_run

SPARE = 0.9  # share of the free memory that may be planned for: CUDA and fragmentation take the rest
PROMPT_TOKENS, RESPONSE_TOKENS, RESPONSES, MINIBATCH = 16, 48, 64, 16


@dataclass(frozen=True)
class Choice:
    """One way to train, best first in a list of them."""

    model: str  # directory or hub id
    config: PretrainedConfig  # written out, so that nothing is downloaded before the choice is made
    quantization: str | None
    at_once: int  # responses that are computed together; a minibatch's gradients add up in parts
    device: str  # "cuda" or "cpu"

    @property
    def micro_batch_tokens(self) -> int | None:
        return None if self.at_once >= MINIBATCH else self.at_once * (PROMPT_TOKENS + RESPONSE_TOKENS)

    @property
    def memory_bytes(self) -> int:
        return estimate_run(
            self.config, LoraSettings(), quantization=self.quantization, swarm_servers=0,
            responses=RESPONSES, prompt_tokens=PROMPT_TOKENS, response_tokens=RESPONSE_TOKENS,
            epochs=4, minibatch_size=MINIBATCH, micro_batch_tokens=self.micro_batch_tokens,
        ).memory_bytes  # fmt: skip

    def __str__(self) -> str:
        precision = self.quantization or str(self.config.dtype).removeprefix("torch.")
        return f"{self.model} ({precision}, {self.at_once} responses at once, {self.device})"


def bloomz(
    size: str,
    hidden: int,
    blocks: int,
    heads: int,
    quantization: str | None,
    at_once: int,
    device: str,
) -> Choice:
    dtype = "float16" if device == "cuda" else "float32"
    config = BloomConfig(vocab_size=250880, hidden_size=hidden, n_layer=blocks, n_head=heads, dtype=dtype)
    return Choice(f"bigscience/bloomz-{size}", config, quantization, at_once, device)


CHOICES = [
    *(bloomz("7b1-mt", 4096, 30, 32, "8bit", rows, "cuda") for rows in (16, 8, 4)),
    *(bloomz("7b1-mt", 4096, 30, 32, "4bit", rows, "cuda") for rows in (8, 4)),
    bloomz("3b", 2560, 30, 32, "8bit", 4, "cuda"),
    bloomz("1b1", 1536, 24, 16, "8bit", 4, "cuda"),
    *(bloomz("560m", 1024, 24, 16, None, rows, "cpu") for rows in (16, 4)),
]


def vowels(items: Sequence[dict], texts: Sequence[str]) -> list[float]:
    """The toy's reward: the share of vowels.

    An untrained model of single characters learns it in a few iterations.
    """
    return [sum(character in "aeiou" for character in text) / max(1, len(text)) for text in texts]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is learned")
    what.add_argument(
        "--prompts", metavar="FILE", help=".txt, .jsonl or .json; default: short beginnings of opinions"
    )
    what.add_argument(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="f(items, texts) -> a number per text; default: a sentiment classifier",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--output",
        default="runs/bloomz-7b1",
        metavar="DIR",
        help="of the run; a run found there is continued",
    )
    how.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="rollouts, each followed by an update (default 100; toy: 30)",
    )
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="anything else, e.g. ppo.lr=3e-4; may be repeated",
    )
    how.add_argument(
        "--no-fallback",
        action="store_true",
        help="stop when bloomz-7b1 in 8 bits does not fit, and say what is needed",
    )
    how.add_argument("--dry-run", action="store_true", help="show the configuration and its needs, and stop")
    how.add_argument("--tiny", action="store_true", help="a toy model in 8 bits on the CPU")
    return parser.parse_args()


def configuration(args: argparse.Namespace, choice: Choice) -> dict:
    """What `textrl-swarm train` would read from a file."""
    return {
        "model": choice.model,
        "quantization": choice.quantization,
        "device": choice.device,
        "lora": {"r": 8, "alpha": 16},
        "sampling": {"max_new_tokens": RESPONSE_TOKENS, "num_samples": 4},
        "ppo": {
            "lr": 1e-4,
            "epochs": 4,
            "kl_coef": 0.05,
            "minibatch_size": MINIBATCH,
            "micro_batch_tokens": choice.micro_batch_tokens,
        },
        "prompts": args.prompts or DEMO_PROMPTS,
        "reward": args.reward or {"model": "lvwerra/distilbert-imdb", "label": "POSITIVE"},
        "train": {
            "iterations": args.iterations or (30 if args.tiny else 100),
            "prompts_per_iteration": RESPONSES // 4,
        },
        "output": args.output,
    }


def free_bytes() -> dict[str, int]:
    """Memory that can be had now, by device."""
    free = {"cpu": psutil.virtual_memory().available}
    if torch.cuda.is_available():
        free["cuda"] = torch.cuda.mem_get_info()[0]
    return free


def choose(
    choices: Sequence[Choice], free: dict[str, int], *, quantizes: bool, fallback: bool = True
) -> tuple[Choice, str]:
    """The first choice that fits, and a sentence about it.

    Raises:
        ConfigError: none fits, or without `fallback`, the first does not.
    """
    wanted = choices[0]

    def obstacle(choice: Choice) -> str | None:
        if choice.device not in free:
            return "this machine has no CUDA GPU"
        if choice.quantization is not None and not quantizes:
            return "bitsandbytes is not installed (pip install bitsandbytes)"
        if choice.memory_bytes > SPARE * free[choice.device]:
            return f"only {decimal(free[choice.device])} of its memory are free"
        return None

    found = next((choice for choice in choices if obstacle(choice) is None), None)
    if found is wanted:
        return (
            found,
            f"{wanted} fits: about {decimal(wanted.memory_bytes)} of {decimal(free[wanted.device])} free",
        )
    why = f"{wanted} needs about {decimal(wanted.memory_bytes)}, but {obstacle(wanted)}"
    if found is None or not fallback:
        raise ConfigError(
            f"{why}; free some memory, use a larger machine, or a swarm (launchers/bloom_petals.py)"
        )
    return found, f"{why}; training {found} instead, which needs about {decimal(found.memory_bytes)}"


def toy(args: argparse.Namespace) -> Choice:
    torch.set_num_threads(1)  # more are slower for matrices this small
    model = random_bloom(Path(args.output) / "base_model", layers=2, hidden=32, vocab=64)
    args.reward = args.reward or f"{__file__}:vowels"
    args.set = ["sampling.max_new_tokens=12", "ppo.lr=1e-2", *args.set]
    return Choice(str(model), resolve(model).config, "8bit", 16, "cpu")


def main() -> int:
    accept_any_text()
    args, console = arguments(), Console(highlight=False)
    choices = [toy(args)] if args.tiny else CHOICES
    quantizes = importlib.util.find_spec("bitsandbytes") is not None
    choice, sentence = choose(choices, free_bytes(), quantizes=quantizes, fallback=not args.no_fallback)
    console.print(sentence, soft_wrap=True)
    summary = train_command(load_config(configuration(args, choice), args.set), console, dry_run=args.dry_run)
    return 0 if summary is not None or args.dry_run else 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TextRLSwarmError as error:
        sys.exit(f"error: {error}")
