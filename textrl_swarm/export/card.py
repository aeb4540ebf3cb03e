"""The model card of an export: base model, LoRA settings, reward, metrics, how to load it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from textrl_swarm.export.source import Source, settings_of_run
from textrl_swarm.models.adapter_files import read_settings
from textrl_swarm.models.base_model import hub_name

CARD_FILE = "README.md"
TAG = "textrl_swarm"  # tells our exports from other model directories

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
    """The card of an adapter, or of the base model with the adapter merged into it."""
    base = hub_name(source.base_model)
    on_hub = not Path(source.base_model).is_dir()
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["ppo", "reinforcement-learning", TAG, *([] if merged else ["lora"])],
    )
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
    stabilized = " (rank-stabilised)" if lora.rank_stabilized else ""
    targets = ", ".join(lora.targets or ())
    lines = [f"LoRA: r={lora.r}, alpha={lora.alpha:g}{stabilized}, targets {targets}, in {blocks}"]
    if source.config is not None:
        lines += settings_of_run(source.config)
    shown = []
    for name in ("iteration", "score", "kl"):
        if source.metrics.get(name) is not None:
            shown.append(f"{name} {source.metrics[name]:g}")
    return [*lines, "last iteration: " + ", ".join(shown)] if shown else lines
