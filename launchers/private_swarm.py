r"""PPO of a model through a private swarm: LoRA inside blocks that no machine of yours could hold.

What it does    without --initial-peers: computes how many servers of which size are needed, which commands
                start them, and how long an iteration will take. With --initial-peers: trains, through
                `textrl-swarm train`'s own code; the same command continues.
What it needs   servers for all blocks (the table it prints; 3 GPUs of 24 GB for gpt-oss-120b in 4 bits, say)
                on Linux machines that can reach each other, and for the trainer any machine with a few GB of
                memory; no GPU. The first start of each server downloads its blocks.

    python launchers/private_swarm.py                           # the plan for gpt-oss-120b
    python launchers/private_swarm.py --model qwen3-235b        # for another

    # The first server; then the others, with the address that the first one prints.
    textrl-swarm serve openai/gpt-oss-120b --new-swarm \
        --quant_type nf4 --num_blocks 12 --throughput auto
    textrl-swarm serve openai/gpt-oss-120b --initial-peers ADDRESS \
        --quant_type nf4 --num_blocks 12 --throughput auto

    textrl-swarm status --initial-peers ADDRESS                 # until every block can be trained
    python launchers/private_swarm.py --initial-peers ADDRESS   # train
    textrl-swarm export runs/gpt-oss-120b adapter               # the adapter, for transformers + peft

All of it in two or three minutes, through the same lines: a toy of the model's kind, which first learns to
write short opinions, on two servers of this machine. Its opinions turn from mixed to good:

    python launchers/private_swarm.py --tiny
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# The trainer waits for the network; toy servers share this machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from transformers import BloomConfig, GptOssConfig, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from textrl_swarm.commands.train import train_command
from textrl_swarm.config import LoraSettings
from textrl_swarm.decoders.sizes import ModelSizes, model_sizes
from textrl_swarm.display import accept_any_text, spinner
from textrl_swarm.errors import TextRLSwarmError
from textrl_swarm.models.corpus import DEMO_PROMPTS, opinion
from textrl_swarm.models.tiny import make_tiny_model
from textrl_swarm.runs.config import load_config
from textrl_swarm.runs.estimate import GIB, blocks_that_fit, estimate_run
from textrl_swarm.swarm.local import LocalSwarm


@dataclass(frozen=True)
class Recipe:
    """One model."""

    hub_id: str
    config: PretrainedConfig
    toy: str
    """Family of the toy; see textrl_swarm.models.tiny."""


MODELS = {
    "gpt-oss-120b": Recipe("openai/gpt-oss-120b", GptOssConfig(dtype="bfloat16"), "mixtral"),
    "llama-3.3-70b": Recipe(
        "meta-llama/Llama-3.3-70B-Instruct",
        LlamaConfig(
            vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16",
        ),
        "llama",
    ),
    "qwen3-235b": Recipe(
        "Qwen/Qwen3-235B-A22B",
        Qwen3MoeConfig(
            vocab_size=151936, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=1536, dtype="bfloat16",
        ),
        "mixtral",
    ),
    "bloom-176b": Recipe(
        "bigscience/bloom",
        BloomConfig(vocab_size=250880, hidden_size=14336, n_layer=70, n_head=112, dtype="bfloat16"),
        "bloom",
    ),
}  # fmt: skip

PRECISIONS = {"bf16": "bfloat16", "int8": "8bit", "nf4": "4bit"}  # petals' name -> the estimate's
CARDS_GB = (24, 40, 80)
CUDA_GB = 1  # what CUDA itself takes of a card
ROUND_TRIP_S = 0.05
PROMPT_TOKENS = 8  # of the prompts below, for the plan
LORA_LAYERS = 10


def opinions(items: Sequence[dict], texts: Sequence[str]) -> list[float]:
    """The toy's reward: 1 for a text with good words only, 0 for one with bad words only."""
    return [opinion(text) for text in texts]


def arguments(default: str, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=default, help=f"default: {default}")
    where = parser.add_argument_group("where the blocks are")
    where.add_argument(
        "--initial-peers",
        nargs="+",
        metavar="ADDRESS",
        help="as `textrl-swarm serve` prints them; none: show the plan",
    )
    where.add_argument(
        "--tiny", action="store_true", help="a toy model on two servers that this program starts and ends"
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
    what.add_argument(
        "--lora-layers",
        type=int,
        default=LORA_LAYERS,
        metavar="K",
        help=f"adapt the last K blocks (default {LORA_LAYERS})",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--output",
        metavar="DIR",
        help="of the run; a run found there is continued (default: runs/ and the model's name)",
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
        help="anything else, e.g. ppo.lr=3e-4 sampling.num_samples=8",
    )
    how.add_argument("--dry-run", action="store_true", help="show the configuration and its needs, and stop")
    args = parser.parse_args()
    args.output = args.output or f"runs/{args.model}"
    return args


def configuration(args: argparse.Namespace, initial_peers: Sequence[str]) -> dict:
    """What `textrl-swarm train` would read from a file."""
    sentiment = {"model": "lvwerra/distilbert-imdb", "label": "POSITIVE"}
    return {
        "model": MODELS[args.model].hub_id,
        "swarm": {"initial_peers": list(initial_peers)},
        # With fewer adapted blocks there is less to send, and the others run once per rollout.
        "lora": {"r": 8, "alpha": 16, "layers": args.lora_layers},
        "sampling": {"max_new_tokens": 48, "num_samples": 4},
        # Every epoch goes through the network again.
        "ppo": {"lr": 1e-4, "epochs": 2, "minibatch_size": 32, "kl_coef": 0.05},
        "prompts": args.prompts or DEMO_PROMPTS,
        "reward": args.reward or sentiment,
        "train": {"iterations": args.iterations or (30 if args.tiny else 100), "prompts_per_iteration": 16},
        "output": args.output,
    }


@contextlib.contextmanager
def toy(args: argparse.Namespace, console: Console) -> Iterator[dict]:
    """The same configuration for a toy model on a swarm of this machine, which lasts as long as the block."""
    family = MODELS[args.model].toy
    what = f"pretraining a toy {family} model"
    with Progress(TextColumn(what), BarColumn(), console=console) as progress:
        task = progress.add_task("", total=1.0)
        model = make_tiny_model(
            Path(args.output) / "base_model",
            family=family,
            on_progress=lambda done, loss: progress.update(task, completed=done),
        )
    console.print("starting two servers on this machine ...")
    with LocalSwarm(model, num_servers=2) as swarm:
        values = configuration(args, swarm.initial_peers)
        values["model"] = str(model)
        values["reward"] = args.reward or f"{__file__}:opinions"
        values["lora"]["layers"] = min(args.lora_layers, 3)
        values["sampling"]["max_new_tokens"], values["ppo"]["lr"] = 16, 3e-3
        yield values


def estimate(recipe: Recipe, sizes: ModelSizes, servers: int, layers: int | None):
    return estimate_run(
        recipe.config, LoraSettings(layers=layers), quantization=None, swarm_servers=servers, sizes=sizes,
        responses=64, prompt_tokens=PROMPT_TOKENS, response_tokens=48,
        epochs=2, minibatch_size=32, wire_bytes=2,
    )  # fmt: skip


def show_plan(args: argparse.Namespace, console: Console) -> None:
    recipe = MODELS[args.model]
    with spinner(console, "counting its parameters"):
        sizes = model_sizes(recipe.config)
    fits = {
        gb: {name: blocks_that_fit(sizes, (gb - CUDA_GB) * GIB, key) for name, key in PRECISIONS.items()}
        for gb in CARDS_GB
    }
    console.print(
        f"{args.model}: {sizes.total:,} parameters in {sizes.num_blocks} blocks;\n"
        f"between two of them, a token is {2 * sizes.hidden_size:,} bytes\n"
    )
    table = Table(title="servers needed (blocks on each)", title_justify="left")
    table.add_column("GPU memory", justify="right")
    for name in PRECISIONS:
        table.add_column(name, justify="right")
    for gb, blocks in fits.items():
        table.add_row(
            f"{gb} GB", *(f"{math.ceil(sizes.num_blocks / held)} ({held})" for held in blocks.values())
        )
    console.print(table)
    console.print(
        "each with its attention cache (4096 tokens), 2 GiB for adapters and room for a backward\n",
        style="dim",
    )

    held = fits[24]["nf4"]
    serve = f"textrl-swarm serve {recipe.hub_id} {{}} --quant_type nf4 --num_blocks {held} --throughput auto"
    console.print(
        "1. first server (24 GB, nf4; for int8 or bf16: --quant_type int8 or none, "
        "and --num_blocks of the table):"
    )
    console.print("    " + serve.format("--new-swarm"), soft_wrap=True)
    console.print(
        f"2. {math.ceil(sizes.num_blocks / held) - 1} more, with the address that the first prints:"
    )
    console.print("    " + serve.format("--initial-peers ADDRESS"), soft_wrap=True)
    console.print("3. until every block can be trained:\n    textrl-swarm status --initial-peers ADDRESS")
    console.print(
        f"4. train, here:\n    {' '.join(['python', *sys.argv, '--initial-peers ADDRESS'])}\n", soft_wrap=True
    )

    table = Table(title="an iteration: 64 responses of 48 tokens, 2 epochs", title_justify="left")
    table.add_column("servers, adapted blocks")
    for heading in ("sent", "received", "100 Mbit/s", "1 Gbit/s"):
        table.add_column(heading, justify="right")
    for servers in sorted({math.ceil(sizes.num_blocks / fits[gb]["nf4"]) for gb in CARDS_GB}):
        for layers in (args.lora_layers, sizes.num_blocks):
            needs = estimate(recipe, sizes, servers, layers)
            times = [
                span(*needs.network_seconds(bits_per_second=speed, rtt_s=ROUND_TRIP_S))
                for speed in (1e8, 1e9)
            ]
            table.add_row(
                f"{servers}, the last {layers}",
                decimal(needs.bytes_sent),
                decimal(needs.bytes_received),
                *times,
            )
    console.print(table)
    console.print(
        "the network's share, both directions at once .. one after the other, "
        f"round trips of {ROUND_TRIP_S * 1000:.0f} ms; the servers' computing comes on top",
        style="dim",
    )
    here = estimate(recipe, sizes, 1, args.lora_layers)
    console.print(
        f"\nthe trainer itself needs about {decimal(here.memory_bytes)} of memory, "
        f"{decimal(here.weight_bytes)} of it embeddings"
    )


def span(least: float, most: float) -> str:
    return f"{least / 60:.1f} .. {most / 60:.1f} min"


def main(default: str = "gpt-oss-120b", description: str | None = __doc__) -> int:
    accept_any_text()
    args, console = arguments(default, description), Console(highlight=False)
    if not args.tiny and not args.initial_peers:
        show_plan(args, console)
        return 0
    with (
        toy(args, console)
        if args.tiny
        else contextlib.nullcontext(configuration(args, args.initial_peers or ())) as values
    ):
        summary = train_command(load_config(values, args.set), console, dry_run=args.dry_run)
    return 0 if summary is not None or args.dry_run else 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TextRLSwarmError as error:
        sys.exit(f"error: {error}")
