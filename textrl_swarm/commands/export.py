"""`textrl-swarm export` and `textrl-dump`: writes an adapter or a merged model, and checks it in a fresh
process.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from textrl_swarm.display import spinner
from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.export.check import Verified, compare, trained_policy, verify
from textrl_swarm.export.source import Source, find_source
from textrl_swarm.export.write import push_to_hub, require_target, write_adapter, write_merged
from textrl_swarm.models.base_model import BaseModel, resolve
from textrl_swarm.models.quantization import saved_quantization


def export_command(
    source: str,
    out: Path,
    console: Console,
    *,
    merge: bool = False,
    checkpoint: str | None = None,
    base_model: str | None = None,
    push_to: str | None = None,
    private: bool = False,
    check: bool = True,
) -> None:
    """Finds what is to be exported, writes it, checks it, and uploads it if `push_to` names a repository.

    Raises:
        CheckpointError, AdapterError: there is nothing to export.
        ExportError: `out` cannot be written, or what was written does not load as what was trained.
        ModelError: the base model, which merging and the check need, is not there.
    """
    found = find_source(source, checkpoint, base_model)
    if merge:
        export_merged(found, out, console, check=check)
    else:
        export_adapter(found, out, console, check=check)
    if not check:
        console.print("not checked: --no-verify")
    if push_to is not None:
        with spinner(console, escape(f"uploading {out} to {push_to}")):
            address = push_to_hub(out, push_to, private=private)
        _print(console, f"uploaded to {address}")


def export_adapter(source: Source, out: str | Path, console: Console, *, check: bool = True) -> Path:
    """Writes the adapter in PEFT's format; returns its directory. Raises as `export_command`."""
    out = Path(out).expanduser()
    require_target(source, out)
    base = _base_model(source) if check else None
    write_adapter(source, out)
    _print(console, f"adapter with a model card in {out}")
    if base is not None:
        _check(source, base, base.name, out, console)
    return out


def export_merged(source: Source, out: str | Path, console: Console, *, check: bool = True) -> Path:
    """Writes the base model with the adapter added to its weights; returns its directory.

    Raises as `export_command`.
    """
    out = Path(out).expanduser()
    require_target(source, out)
    base = _base_model(source)
    saved = saved_quantization(base)
    if source.quantization or saved:
        plain = "dequantised" if saved else "as they were before"
        _note(
            console,
            f"the adapter was trained on weights in {source.quantization or saved}; it is merged into the "
            f"weights {plain} (8 or 4 bits would round it away), so the merged model answers a little "
            "differently from the trained policy",
        )
    with spinner(console, escape(f"merging the adapter into {source.base_model}")):
        merged = write_merged(source, base, out)
    if merged.missing_tokenizer is not None:
        _note(
            console, f"{source.base_model} has no tokenizer that could be copied: {merged.missing_tokenizer}"
        )
    if merged.dtype != torch.float32:
        _note(console, f"the weights are {merged.dtype}: merging rounds the adapter's part to that")
    _print(console, f"merged model in {out}")
    if check:
        _check(source, base, str(out), None, console)
    return out


def _base_model(source: Source) -> BaseModel:
    """Found before anything is written, and before minutes of merging."""
    try:
        return resolve(source.base_model)
    except ModelError as error:
        raise ModelError(
            f"base model: {error}\n"
            f"Searched from {Path.cwd()}. Name the model with --model, which takes a directory or a hub id."
        ) from error


def _check(source: Source, base: BaseModel, model: str, adapter: Path | None, console: Console) -> None:
    with_peft = "" if adapter is None else " + peft"
    with spinner(console, f"loading it back in a fresh process, with plain transformers{with_peft}"):
        verified = verify(source, base, model, adapter)
    _print(console, f"loaded back: {verified.agreement}")
    quantization = source.quantization or (saved_quantization(base) if adapter is None else None)
    if quantization:
        _compare_quantized(source, base, quantization, verified, console)


def _compare_quantized(
    source: Source, base: BaseModel, quantization: str, verified: Verified, console: Console
) -> None:
    try:
        with (
            spinner(console, escape(f"comparing it with the policy in {quantization}")),
            trained_policy(source, base, quantization) as policy,
        ):
            trained = compare(policy, verified.probes, verified.answers)
    except (ConfigError, ModelError) as error:
        _note(console, f"the policy in {quantization} cannot be loaded here for a comparison: {error}")
    else:
        _print(
            console,
            f"beside the policy in {quantization}: {trained} (of at most {trained.largest_logit:.1f})",
        )


def _print(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True)  # a directory may be called [/b]


def _note(console: Console, text: str) -> None:
    console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)
