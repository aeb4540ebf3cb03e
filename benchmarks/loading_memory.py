"""The memory that a server needs to load one block, beside the block's own size.

    python benchmarks/loading_memory.py [--hidden 1024]

Each case runs in a process of its own: the peak of its memory minus what it had before, in units of the block
that results. Checkpoints have one block per shard, or all blocks in one file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from harness import report
from transformers import AutoConfig, AutoModelForCausalLM

from textrl_swarm.models.base_model import resolve
from textrl_swarm.swarm import compat

compat.require_petals()

from petals.utils.convert_block import QuantType  # noqa: E402

from textrl_swarm.swarm.server.served_model import ServedModel  # noqa: E402

BLOCKS = 3


def write(directory: Path, family: str, hidden: int, files: str) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=128, hidden_size=hidden, num_hidden_layers=BLOCKS, num_attention_heads=16,
        **({} if family == "bloom" else {"num_key_value_heads": 4, "intermediate_size": 2 * hidden}),
        **({"num_local_experts": 8} if family == "mixtral" else {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if files == "one .bin":
        model.config.save_pretrained(directory)
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
        return
    whole = sum(parameter.nbytes for parameter in model.parameters())
    size = whole if files == "one file" else whole // BLOCKS + 2**20
    model.save_pretrained(directory, max_shard_size=size)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    sys.exit("this script reads /proc, which only Linux has")


def measure(directory: str, dtype: torch.dtype, quant_type: QuantType, answer: Any) -> None:
    torch.set_num_threads(1)
    model = ServedModel(resolve(directory), dtype, torch.device("cpu"))
    assert model.cache_specs
    before = peak = _status("RssAnon")  # without pages of files, which the system may drop at any time
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    block = model.make_ready(model.load(1), 1, quant_type)
    done.set()
    watcher.join()
    size = sum(parameter.nbytes for parameter in block.parameters())
    answer.put((size, peak - before))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    cases = [
        ("bloom", "shards", torch.float32, QuantType.NONE),
        ("bloom", "one file", torch.float32, QuantType.NONE),
        ("bloom", "one .bin", torch.float32, QuantType.NONE),
        ("bloom", "shards", torch.bfloat16, QuantType.NONE),
        ("mixtral", "shards", torch.float32, QuantType.NONE),
        ("mixtral", "one file", torch.bfloat16, QuantType.NONE),
        ("mixtral", "shards", torch.bfloat16, QuantType.NF4),
    ]
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for family, files, dtype, quant_type in cases:
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory), family, options.hidden, files)
            answer = spawn.Queue()
            child = spawn.Process(target=measure, args=(directory, dtype, quant_type, answer))
            child.start()
            size, peak = answer.get()
            child.join()
        kind = str(dtype).removeprefix("torch.") if quant_type == QuantType.NONE else "nf4"
        numbers = f"{size / 1e6:.1f}", f"{peak / 1e6:.1f}", f"{peak / size:.2f}"
        rows.append([f"{family}, {files}, as {kind}", *numbers])
    title = f"loading block 1 of {BLOCKS}, hidden {options.hidden}, from fp32 files"
    report(title, ["model, files, loaded as", "block, MB", "peak, MB", "peak / block"], rows)


if __name__ == "__main__":
    main()
