"""Taking what was trained elsewhere: an adapter in PEFT's format with a model card, a merged model, a repository on the hub.

Every export is loaded back in a fresh process by plain transformers + peft, and its logits are compared with the policy's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from textrl_swarm import plain_check
from textrl_swarm.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, VALUE_HEAD_WEIGHTS, merged_model, read_settings
from textrl_swarm.base_model import hub_name, read_config
from textrl_swarm.config import SamplingConfig
from textrl_swarm.display import status
from textrl_swarm.errors import ConfigError, ExportError, ModelError
from textrl_swarm.export_source import Source, adapter_config, settings_of_run
from textrl_swarm.files import published
from textrl_swarm.policy import Policy, load_policy

logger = logging.getLogger(__name__)

_CARD_FILE, _TAG = "README.md", "textrl_swarm"
# All that an export writes, in this version of transformers or another; tokenizers differ most.
_WRITTEN = (_CARD_FILE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, VALUE_HEAD_WEIGHTS, "config.json", "generation_config.json", "model*.safetensors",
            "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
            "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja")  # fmt: skip
_TOLERANCE = 1e-3  # of a logit, relative to the largest: sums of products in another order, in fp32
_HALF_TOLERANCE = 0.05  # for models in 16 bits
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Agreement:
    """How far what was written is from what was trained."""

    rows: int
    same_continuations: int
    largest_difference: float  # of a logit
    largest_logit: float

    def __str__(self) -> str:
        return (
            f"{self.same_continuations} of {self.rows} greedy continuations are the same; "
            f"largest difference of a logit: {self.largest_difference:.1e}"
        )


# ------------------------------------------------------------------------------------------ exporting


def export_adapter(source: Source, out: str | Path, console: Console, *, verify: bool = True) -> Path:
    """Writes the adapter with a model card; returns its directory.

    Raises:
        ExportError: `out` holds something else or cannot be written, or what was written does not load as what was trained.
        ModelError: the base model, which the check needs, is not there.
    """
    out = _target(source, out)
    if verify:
        _require_base_model(source)
    with _disk_errors(out), published(out) as staging:
        for name in (ADAPTER_WEIGHTS, VALUE_HEAD_WEIGHTS):
            if (source.adapter / name).is_file():
                shutil.copyfile(source.adapter / name, staging / name)
        settings = {**adapter_config(source.adapter), "base_model_name_or_path": hub_name(source.base_model)}
        (staging / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        model_card(source, merged=False).save(staging / _CARD_FILE)
    _say(console, f"adapter with a model card in {out}")
    if verify:
        _verify(source, source.base_model, out, console)
    return out


def export_merged(source: Source, out: str | Path, console: Console, *, verify: bool = True) -> Path:
    """Writes the base model with the adapter added to its weights, and the tokenizer; returns its directory. Raises as `export_adapter`."""
    out = _target(source, out)
    _require_base_model(source)
    quantization = (source.config or {}).get("quantization")
    if quantization:
        _note(
            console,
            f"the adapter was trained on weights in {quantization}; it is merged into the weights as they were before "
            "(8 or 4 bits would round it away), so the merged model answers a little differently from the trained policy",
        )
    with status(console, escape(f"merging the adapter into {source.base_model}")):
        model, tokenizer = merged_model(hub_name(source.base_model), source.adapter), _tokenizer(source, console)
        dtype = model.dtype
        with _disk_errors(out), published(out) as staging:
            model.save_pretrained(staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            model_card(source, merged=True).save(staging / _CARD_FILE)
        del model
    if dtype != torch.float32:
        _note(console, f"the weights are {dtype}: merging rounds the adapter's part to that")
    _say(console, f"merged model in {out}")
    if verify:
        _verify(source, str(out), None, console)
    return out


def _tokenizer(source: Source, console: Console):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(hub_name(source.base_model))
    except (OSError, ValueError) as error:
        _note(console, f"{source.base_model} has no tokenizer that could be copied: {error}")
        return None


def _target(source: Source, out: str | Path) -> Path:
    """Where to write: an earlier export of ours may be replaced; nothing else may, least of all what this export is made from."""
    out = Path(out)
    with _disk_errors(out):
        if out.exists() and not out.is_dir():
            raise ExportError(f"{out} is a file; name a directory")
        for what, needed in (("base model", source.base_model), ("adapter", source.adapter), ("run", source.directory)):
            if Path(needed).is_dir() and Path(needed).resolve().is_relative_to(out.resolve()):
                raise ExportError(f"{out} holds the {what} that is to be exported ({needed}); name another directory")
        foreign = _foreign(out) if out.is_dir() else []
    if foreign:
        raise ExportError(
            f"{out} is no earlier export, or more than that: it holds {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}; "
            "move that away or name another directory"
        )
    return out


def _foreign(out: Path) -> list[str]:
    """What no export of ours wrote; without a model card of ours that is all there is."""
    try:
        ours = _TAG in (ModelCard.load(out / _CARD_FILE).data.tags or ())
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        ours = False
    return sorted(
        path.name for path in out.iterdir() if not (ours and path.is_file() and any(fnmatch(path.name, name) for name in _WRITTEN))
    )


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """A full disk, a mount point, no permission: one line that says where and why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out} cannot be written: {error}; make room or name another directory") from error


def _require_base_model(source: Source) -> None:
    """Before anything is written, and before minutes of merging."""
    try:
        read_config(source.base_model)
    except ModelError as error:
        raise ModelError(
            f"base model: {error}\nlooked for from {Path.cwd()}; say where it is with --model, which takes a directory or a hub id"
        ) from error


def _say(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True)  # a directory may be called [/b]


def _note(console: Console, text: str) -> None:
    console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)


def _verify(source: Source, model: str, adapter: Path | None, console: Console) -> None:
    what = f"loading it back in a fresh process, with plain transformers{'' if adapter is None else ' + peft'}"
    with status(console, what), _policy(source) as policy:  # first, because it says more plainly when the adapter does not fit
        generator = torch.Generator().manual_seed(0)
        probes = torch.randint(0, policy.vocab_size, (4, _PROBE_TOKENS), generator=generator).tolist()
        answers = answers_of_fresh_process(model, adapter, probes)
        agreement = compare(policy, probes, answers)
    half = "16" in str(read_config(source.base_model).dtype)
    allowed = (_HALF_TOLERANCE if half else _TOLERANCE) * max(1.0, agreement.largest_logit)
    if agreement.largest_difference > allowed:
        raise ExportError(
            f"what was written is not what was trained: a logit differs by {agreement.largest_difference:.3g} (at most {allowed:.3g} is "
            f"rounding). Is {source.base_model} the model it was trained on?"
        )
    _say(console, f"loaded back: {agreement}")
    quantization = (source.config or {}).get("quantization")
    if quantization:
        try:
            with status(console, escape(f"comparing it with the policy in {quantization}")), _policy(source, quantization) as policy:
                trained = compare(policy, probes, answers)
        except (ConfigError, ModelError) as error:
            _note(console, f"the policy in {quantization} cannot be loaded here to be compared: {error}")
        else:
            _say(console, f"beside the policy in {quantization}: {trained} (of at most {trained.largest_logit:.1f})")


@contextlib.contextmanager
def _policy(source: Source, quantization: str | None = None) -> Iterator[Policy]:
    with load_policy(source.base_model, quantization=quantization, lora=read_settings(source.adapter)) as policy:
        policy.load_adapter(source.adapter)
        yield policy


def answers_of_fresh_process(
    model: str | Path, adapter: str | Path | None, probes: Sequence[Sequence[int]], max_new_tokens: int = 8
) -> list[dict]:
    """What plain transformers (+ peft) in another process makes of rows of token ids.

    Args:
        model, adapter: what the other process loads; adapter None = the model alone.

    Returns:
        per row {"logits": after its last token, "tokens": ids of the greedy continuation}.

    Raises:
        ExportError: the other process could not load it; has its error.
    """
    request = {
        "model": hub_name(model), "adapter": None if adapter is None else str(adapter), "tokens": [list(row) for row in probes],
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="textrl-swarm-") as directory:
        path, script = Path(directory) / "request.json", Path(directory) / "plain_check.py"
        path.write_text(json.dumps(request), encoding="utf-8")
        # A script's directory comes first in its sys.path, and ours has a types.py: a copy alone shadows nothing of Python's.
        shutil.copyfile(plain_check.__file__, script)
        searched = os.pathsep.join(map(os.path.abspath, sys.path))  # the packages may come from anywhere that this process looks
        answer = subprocess.run(
            [sys.executable, script, str(path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": searched}
        )
    if answer.returncode != 0:
        raise ExportError(f"plain transformers + peft could not load {adapter or model}:\n{answer.stderr.strip()[-2000:]}")
    return json.loads(answer.stdout.strip().splitlines()[-1])


def compare(policy: Policy, probes: Sequence[Sequence[int]], answers: Sequence[dict]) -> Agreement:
    """A policy's logits and greedy continuations against those of `answers_of_fresh_process`."""
    longest = max(len(answer["tokens"]) for answer in answers)
    ours = policy.generate([list(row) for row in probes], SamplingConfig(max_new_tokens=longest, do_sample=False))
    same, difference, largest = 0, 0.0, 0.0
    for i, their in enumerate(answers):
        start, count = int(ours.prompt_lengths[i]), int(ours.response_lengths[i])
        same += ours.tokens[i, start : start + count].tolist() == their["tokens"][:count]
        with torch.no_grad():
            logits = policy(ours.tokens[i : i + 1, :start]).logits[0, -1].float().cpu()
        difference = max(difference, float((logits - torch.tensor(their["logits"])).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    return Agreement(len(answers), same, difference, largest)


# ------------------------------------------------------------------------------------------ the model card, the hub

_CARD = """---
{data}
---

# {title}

{what} of {base}, trained with reinforcement learning (PPO) by textrl_swarm: the base
model stayed frozen, low-rank updates inside its transformer blocks were trained.

## How it was trained

{training}

## How to use it

```python
{usage}
```
"""
_USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")  # model.merge_and_unload() makes one model of both
tokenizer = AutoTokenizer.from_pretrained("{base}")"""
_USE_MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")"""


def model_card(source: Source, *, merged: bool) -> ModelCard:
    """What somebody who finds the files wants to know: base model, LoRA settings, reward, metrics, how to load it."""
    base, on_hub = hub_name(source.base_model), not Path(source.base_model).is_dir()
    data = ModelCardData(
        base_model=base if on_hub else None, library_name="transformers" if merged else "peft", pipeline_tag="text-generation",
        tags=["ppo", "reinforcement-learning", _TAG, *([] if merged else ["lora"])],
    )  # fmt: skip
    text = _CARD.format(
        data=data.to_yaml(),
        title=Path(base).name + (" with a merged adapter" if merged else " adapter"),
        what="A version" if merged else "A LoRA adapter",
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
        training="\n".join(f"- {line}" for line in _training(source)),
        usage=(_USE_MERGED if merged else _USE_ADAPTER).format(base=base),
    )
    return ModelCard(text)


def _training(source: Source) -> list[str]:
    lora = read_settings(source.adapter)
    blocks = "all blocks" if lora.layers is None else f"the last {lora.layers} blocks"
    lines = [f"LoRA: r={lora.r}, alpha={lora.alpha:g}, targets {', '.join(lora.targets or ())}, in {blocks}"]
    if source.config is not None:
        lines += settings_of_run(source.config)
    shown = {name: source.metrics[name] for name in ("iteration", "score", "kl") if source.metrics.get(name) is not None}
    return [*lines, "last iteration: " + ", ".join(f"{name} {value:g}" for name, value in shown.items())] if shown else lines


def push_to_hub(directory: Path, repo_id: str, console: Console, *, private: bool = False) -> str:
    """Uploads an export; returns its address. Raises ExportError when the hub cannot be reached or says no."""
    api = HfApi()
    try:
        with status(console, escape(f"uploading {directory} to {repo_id}")):
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(folder_path=str(directory), repo_id=repo_id, commit_message="Adapter trained with textrl_swarm")
    except Exception as error:  # huggingface_hub and its HTTP library raise many kinds
        raise ExportError(
            f"{directory} is written, but {repo_id} could not be uploaded: {error}\n"
            "log in with `hf auth login` (or set HF_TOKEN), look at the network, and type the command again"
        ) from error
    _say(console, f"uploaded to {address}")
    return str(address)
