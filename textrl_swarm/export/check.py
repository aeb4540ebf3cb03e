"""Compares an export, in plain transformers + peft and a fresh process, with the policy that was trained."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from textrl_swarm.config import SamplingConfig
from textrl_swarm.errors import ExportError
from textrl_swarm.export import plain_check
from textrl_swarm.export.source import Source
from textrl_swarm.models.adapter_files import read_settings
from textrl_swarm.models.base_model import BaseModel, hub_name
from textrl_swarm.models.quantization import load_plain_weights, saved_quantization
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.loading import load_policy

_TOLERANCE = 1e-3  # of a logit, relative to the largest: sums of products in another order, in fp32
_HALF_TOLERANCE = 0.05  # for models in 16 or 8 bits
_PROBE_ROWS = 4
_PROBE_TOKENS = 8

# What the fresh process gives per row: {"logits": after its last token, "tokens": greedy continuation}.
Answer = dict[str, Any]


@dataclass(frozen=True)
class Agreement:
    """How far what was written is from what was trained."""

    rows: int
    same_continuations: int

    largest_difference: float
    """Of a logit."""

    largest_logit: float

    def __str__(self) -> str:
        return (
            f"{self.same_continuations} of {self.rows} greedy continuations are the same; "
            f"largest difference of a logit: {self.largest_difference:.1e}"
        )


@dataclass(frozen=True)
class Verified:
    """A check that succeeded, and what is needed to compare the same answers with another policy."""

    agreement: Agreement
    probes: list[list[int]]
    answers: list[Answer]


def verify(source: Source, base: BaseModel, model: str | Path, adapter: Path | None) -> Verified:
    """Loads an export in a fresh process and compares its logits with the policy's.

    Args:
        base: the base model of `source`, found.
        model, adapter: what to load; adapter None = a merged model.

    Raises:
        ExportError: the export does not load, or a logit differs by more than rounding.
        AdapterError: the adapter does not fit the base model.
    """
    # Before the fresh process, whose errors are less plain when the adapter does not fit.
    saved = saved_quantization(base)
    is_dequantized = saved is not None and adapter is None  # as merging does
    with trained_policy(source, load_plain_weights(base) if is_dequantized else base) as policy:
        generator = torch.Generator().manual_seed(0)
        shape = (_PROBE_ROWS, _PROBE_TOKENS)
        probes = torch.randint(0, policy.vocab_size, shape, generator=generator).tolist()
        answers = answers_of_fresh_process(model, adapter, probes)
        agreement = compare(policy, probes, answers)
    # 8-bit layers round by batch, and the fresh process computes row by row.
    is_coarse = "16" in str(base.config.dtype) or (saved == "8bit" and not is_dequantized)
    allowed = (_HALF_TOLERANCE if is_coarse else _TOLERANCE) * max(1.0, agreement.largest_logit)
    if agreement.largest_difference > allowed:
        raise ExportError(
            "what was written is not what was trained: "
            f"a logit differs by {agreement.largest_difference:.3g} (at most {allowed:.3g} is rounding). "
            f"Is {source.base_model} the model it was trained on?"
        )
    return Verified(agreement, probes, answers)


@contextlib.contextmanager
def trained_policy(
    source: Source, base: BaseModel | PreTrainedModel, quantization: str | None = None
) -> Iterator[Policy]:
    """The policy with the source's adapter, on this machine."""
    with load_policy(base, quantization=quantization, lora=read_settings(source.adapter)) as policy:
        policy.load_adapter(source.adapter)
        yield policy


def answers_of_fresh_process(
    model: str | Path, adapter: str | Path | None, probes: Sequence[Sequence[int]], max_new_tokens: int = 8
) -> list[Answer]:
    """What plain transformers (+ peft) in another process computes for rows of token ids.

    Args:
        model, adapter: what the other process loads; adapter None = the model alone.

    Returns:
        Per row {"logits": after its last token, "tokens": ids of the greedy continuation}.

    Raises:
        ExportError: the other process could not load it; has its error.
    """
    request = {
        "model": hub_name(model),
        "adapter": None if adapter is None else str(adapter),
        "tokens": [list(row) for row in probes],
        "max_new_tokens": max_new_tokens,
    }
    with tempfile.TemporaryDirectory(prefix="textrl-swarm-") as directory:
        path = Path(directory) / "request.json"
        script = Path(directory) / "plain_check.py"
        path.write_text(json.dumps(request), encoding="utf-8")
        # A copy: a script's directory comes first in its sys.path, and ours has names that others may use.
        shutil.copyfile(plain_check.__file__, script)
        # The fresh process finds packages wherever this one looks for them.
        searched = os.pathsep.join(map(os.path.abspath, sys.path))
        answer = subprocess.run(
            [sys.executable, script, str(path)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONPATH": searched},
        )
    if answer.returncode != 0:
        raise ExportError(
            f"plain transformers + peft could not load {adapter or model}:\n{answer.stderr.strip()[-2000:]}"
        )
    return json.loads(answer.stdout.strip().splitlines()[-1])


def compare(policy: Policy, probes: Sequence[Sequence[int]], answers: Sequence[Answer]) -> Agreement:
    """A policy's logits and greedy continuations against those of `answers_of_fresh_process`."""
    longest = max(len(answer["tokens"]) for answer in answers)
    sampling = SamplingConfig(max_new_tokens=longest, do_sample=False)
    trajectories = policy.generate([list(row) for row in probes], sampling).trajectories()
    same = 0
    difference = largest = 0.0
    for trajectory, answer in zip(trajectories, answers, strict=True):
        response = trajectory.response.tolist()
        same += response == answer["tokens"][: len(response)]
        with torch.no_grad():
            logits = policy(trajectory.prompt[None]).logits[0, -1].float().cpu()
        difference = max(difference, float((logits - torch.tensor(answer["logits"])).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    return Agreement(len(answers), same, difference, largest)
