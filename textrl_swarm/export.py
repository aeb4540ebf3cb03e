"""Taking what was trained elsewhere: an adapter in PEFT's format with a model card, a merged model, a repository on the hub.

Every export is loaded back in a fresh process by plain transformers + peft, and its logits are compared with the policy's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from rich.console import Console

from textrl_swarm import plain_check
from textrl_swarm.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, merged_model, read_settings
from textrl_swarm.base_model import hub_name, read_config
from textrl_swarm.checkpoint import checkpoints
from textrl_swarm.config import SamplingConfig
from textrl_swarm.display import status
from textrl_swarm.errors import AdapterError, CheckpointError, ConfigError, ExportError, ModelError
from textrl_swarm.files import published
from textrl_swarm.policy import Policy, load_policy
from textrl_swarm.run import ADAPTER, CONFIG
from textrl_swarm.trackers import METRICS

_TOLERANCE = 1e-3  # of a logit, relative to the largest: sums of products in another order, in fp32
_HALF_TOLERANCE = 0.05  # for models in 16 bits
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Source:
    """An adapter on disk and what is known about how it came about."""

    adapter: Path
    base_model: str
    config: dict[str, Any] | None  # of the run, if it was one
    metrics: dict[str, float]  # of the last iteration the adapter has seen


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


def find_source(path: str | Path, checkpoint: str | None = None, base_model: str | None = None) -> Source:
    """The adapter in a run's directory, in one of pfrl's (`best`), or in an adapter's own.

    Args:
        checkpoint: of a run: "last", or the number of an iteration; None = the finished adapter, or else the last checkpoint.
        base_model: instead of the one that the adapter names.

    Raises:
        CheckpointError: a run without a finished iteration, or no such checkpoint. AdapterError: nothing of the kind there.
    """
    path = Path(path)
    if not path.is_dir():
        near = sorted(p.parent.name for p in path.parent.glob(f"*/{ADAPTER_CONFIG}")) if path.parent.is_dir() else []
        raise AdapterError(f"there is no directory {path}" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    adapter, config, iteration = path, None, None
    if (path / CONFIG).is_file():
        config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        adapter, iteration = _of_run(path, checkpoint)
    elif checkpoint is not None:
        raise CheckpointError(f"{path} is no run of `textrl-swarm train`, so it has no checkpoint {checkpoint!r}; leave --checkpoint out")
    if not (adapter / ADAPTER_CONFIG).is_file() or not (adapter / ADAPTER_WEIGHTS).is_file():
        raise _no_adapter(adapter)
    named = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = base_model or named or (config or {}).get("model")
    if not base:
        raise AdapterError(f"{adapter / ADAPTER_CONFIG} names no base model; give it with --model")
    metrics = _metrics(path / METRICS, iteration) if config is not None else {}
    return Source(adapter, str(base), config, metrics)


def _of_run(run: Path, checkpoint: str | None) -> tuple[Path, int | None]:
    saved = {int(path.name.rsplit("_", 1)[1]): path for path in checkpoints(run)}
    if checkpoint is None and (run / ADAPTER / ADAPTER_CONFIG).is_file():
        return run / ADAPTER, None
    if not saved:
        raise CheckpointError(
            f"the run in {run} never finished an iteration, so there is nothing to export; continue it with textrl-swarm train"
        )
    if checkpoint in (None, "last"):
        return saved[max(saved)], max(saved)
    if not str(checkpoint).isdecimal() or int(checkpoint) not in saved:
        kept = ", ".join(map(str, sorted(saved)))
        raise CheckpointError(
            f"the run in {run} has no checkpoint {checkpoint!r}; give last or one of {kept} (train.keep_checkpoints keeps more)"
        )
    return saved[int(checkpoint)], int(checkpoint)


def _no_adapter(path: Path) -> AdapterError:
    if (path / "model.pt").is_file():
        return AdapterError(
            f"{path} was saved by TextRL itself (model.pt holds an output layer, no adapter); train again with this package"
        )
    near = sorted(str(p.parent.relative_to(path)) for p in path.glob(f"*/{ADAPTER_CONFIG}"))
    hint = f"; did you mean {path / near[0]}? there are {', '.join(near)}" if near else ""
    return AdapterError(f"{path} holds no adapter: there is no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}{hint}")


def _metrics(path: Path, iteration: int | None) -> dict[str, float]:
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    known = [line for line in lines if iteration is None or line["iteration"] <= iteration]
    return known[-1] if known else {}


# ------------------------------------------------------------------------------------------ exporting


def export_adapter(source: Source, out: str | Path, console: Console, *, verify: bool = True) -> Path:
    """Writes the adapter with a model card; returns its directory.

    Raises:
        ExportError: `out` holds something else, or what was written does not load as what was trained.
    """
    out = _target(out, ADAPTER_CONFIG)
    with published(out) as staging:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "value_head.safetensors"):
            if (source.adapter / name).is_file():
                shutil.copyfile(source.adapter / name, staging / name)
        model_card(source, merged=False).save(staging / "README.md")
    console.print(f"adapter with a model card in {out}", soft_wrap=True)
    if verify:
        _verify(source, source.base_model, out, console)
    return out


def export_merged(source: Source, out: str | Path, console: Console, *, verify: bool = True) -> Path:
    """Writes the base model with the adapter added to its weights, and the tokenizer; returns its directory."""
    from transformers import AutoTokenizer

    out = _target(out, "config.json")
    quantization = (source.config or {}).get("quantization")
    if quantization:
        console.print(
            f"[yellow]note:[/] the adapter was trained on weights in {quantization}; it is merged into the weights as they were before "
            "(8 or 4 bits would round it away), so the merged model answers a little differently from the trained policy",
            soft_wrap=True,
        )
    read_config(source.base_model)
    with status(console, f"merging the adapter into {source.base_model}"):
        model = merged_model(hub_name(source.base_model), source.adapter)
        dtype = model.dtype
        with published(out) as staging:
            model.save_pretrained(staging)
            try:
                AutoTokenizer.from_pretrained(hub_name(source.base_model)).save_pretrained(staging)
            except (OSError, ValueError) as error:
                console.print(f"[yellow]note:[/] {source.base_model} has no tokenizer that could be copied: {error}", soft_wrap=True)
            model_card(source, merged=True).save(staging / "README.md")
        del model
    if dtype != torch.float32:
        console.print(f"[yellow]note:[/] the weights are {dtype}: merging rounds the adapter's part to that", soft_wrap=True)
    console.print(f"merged model in {out}", soft_wrap=True)
    if verify:
        _verify(source, str(out), None, console)
    return out


def _target(out: str | Path, marker: str) -> Path:
    """An export of ours may be replaced, anything else may not."""
    out = Path(out)
    if out.is_file():
        raise ExportError(f"{out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise ExportError(f"{out} holds something else; name an empty or a new directory")
    if (out / CONFIG).is_file() or (out / "learner.pt").is_file():
        raise ExportError(f"{out} holds a training run; export to another directory")
    return out


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
    console.print(f"loaded back: {agreement}", soft_wrap=True)
    quantization = (source.config or {}).get("quantization")
    if quantization:
        try:
            with status(console, f"comparing it with the policy in {quantization}"), _policy(source, quantization) as policy:
                trained = compare(policy, probes, answers)
        except (ConfigError, ModelError) as error:
            console.print(f"[yellow]note:[/] the policy in {quantization} cannot be loaded here to be compared: {error}", soft_wrap=True)
        else:
            console.print(f"beside the policy in {quantization}: {trained} (of at most {trained.largest_logit:.1f})", soft_wrap=True)


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
        path = Path(directory) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        answer = subprocess.run([sys.executable, "-I", plain_check.__file__, str(path)], capture_output=True, text=True)
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
{{{{ card_data }}}}
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
        tags=["ppo", "reinforcement-learning", "textrl_swarm", *([] if merged else ["lora"])],
    )  # fmt: skip
    text = _CARD.format(
        title=Path(base).name + (" with a merged adapter" if merged else " adapter"),
        what="A version" if merged else "A LoRA adapter",
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
        training="\n".join(f"- {line}" for line in _training(source)),
        usage=(_USE_MERGED if merged else _USE_ADAPTER).format(base=base),
    )
    return ModelCard.from_template(data, template_str=text)


def _training(source: Source) -> list[str]:
    lora = read_settings(source.adapter)
    blocks = "all blocks" if lora.layers is None else f"the last {lora.layers} blocks"
    lines = [f"LoRA: r={lora.r}, alpha={lora.alpha:g}, targets {', '.join(lora.targets or ())}, in {blocks}"]
    if source.config is not None:
        rewards = [part["function"] or f"{part['model']} (label {part['label']})" for part in source.config["reward"]]
        ppo, temperature = source.config["ppo"], source.config["sampling"]["temperature"]
        lines.append(f"reward: {', '.join(f'`{reward}`' for reward in rewards)}")
        lines.append(f"PPO: lr {ppo['lr']:g}, {ppo['epochs']} epochs, KL coefficient {ppo['kl_coef']:g}; temperature {temperature:g}")
    shown = {name: source.metrics[name] for name in ("iteration", "score", "kl") if source.metrics.get(name) is not None}
    return [*lines, "last iteration: " + ", ".join(f"{name} {value:g}" for name, value in shown.items())] if shown else lines


def push_to_hub(directory: Path, repo_id: str, console: Console, *, private: bool = False) -> str:
    """Uploads an export; returns its address. Raises ExportError when the hub cannot be reached or says no."""
    api = HfApi()
    try:
        with status(console, f"uploading {directory} to {repo_id}"):
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(folder_path=str(directory), repo_id=repo_id, commit_message="Adapter trained with textrl_swarm")
    except Exception as error:  # huggingface_hub and its HTTP library raise many kinds
        raise ExportError(
            f"{directory} is written, but {repo_id} could not be uploaded: {error}\n"
            "log in with `hf auth login` (or set HF_TOKEN), look at the network, and type the command again"
        ) from error
    console.print(f"uploaded to {address}", soft_wrap=True)
    return str(address)
