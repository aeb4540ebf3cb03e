#!/usr/bin/env python
"""Take what was trained elsewhere: a PEFT adapter or one full model, checked by loading it back.

What it does    finds the adapter in a run's directory, writes it with a model card (base model, LoRA
                settings, reward, metrics, how to load it), loads it in a fresh process with plain
                transformers + peft, compares logits, and says how far apart they are.
What it needs   the base model within reach (a directory, or a hub id). The check, and merging, hold it in
                memory; for a base model that this machine cannot hold (BLOOM-176B) say --no-verify, and do
                not merge here.

    python launchers/export_adapter.py runs/mine my-adapter                    # the finished adapter of a run
    python launchers/export_adapter.py runs/mine my-adapter --checkpoint 40    # an earlier one
    python launchers/export_adapter.py runs/mine my-adapter --no-verify        # its model does not fit here
    python launchers/export_adapter.py runs/mine my-adapter --push-to-hub me/my-adapter
    python launchers/export_adapter.py runs/mine my-model --merge              # one model of both
    python launchers/export_adapter.py --tiny runs/tiny_export                 # all of it, on a toy model

It is `textrl-swarm export` with --tiny. Afterwards:

    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, "my-adapter")
"""

from __future__ import annotations

import sys
from pathlib import Path

from textrl_swarm import LoraSettings, load_policy
from textrl_swarm.cli import main as command_line
from textrl_swarm.models.tiny import random_bloom


def make_tiny(directory: Path) -> Path:
    """A random BLOOM and an adapter with numbers in it."""
    with load_policy(random_bloom(directory / "model"), lora=LoraSettings(r=4)) as policy:
        for parameter in policy.adapter_parameters().values():
            parameter.data.normal_(std=0.1)
        policy.save_adapter(directory / "trained")
    return directory / "trained"


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] != ["--tiny"]:
        sys.argv[1:] = ["export", *arguments]
        return command_line()
    if len(arguments) != 2:
        sys.exit(
            "--tiny takes one directory to work in: "
            "python launchers/export_adapter.py --tiny runs/tiny_export"
        )
    directory = Path(arguments[1])
    adapter = make_tiny(directory)
    for options in ([str(directory / "adapter")], [str(directory / "merged"), "--merge"]):
        sys.argv[1:] = ["export", str(adapter), *options]
        try:
            command_line()
        except SystemExit as ended:
            if ended.code:
                raise


if __name__ == "__main__":
    main()
