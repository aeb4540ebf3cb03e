"""`textrl-swarm train`: one file in, a trained adapter out, with everything that happens in between on the screen."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from textrl_swarm.adapters import read_settings
from textrl_swarm.base_model import hub_name, read_config
from textrl_swarm.config import LoraSettings
from textrl_swarm.display import status
from textrl_swarm.errors import ModelError, RewardError
from textrl_swarm.estimate import RunEstimate, estimate_run
from textrl_swarm.run import Run, locked, open_policy, read_ingredients, require_unchanged, samples
from textrl_swarm.run_config import RunConfig
from textrl_swarm.training import Iteration

_SHOWN = 240  # characters of a prompt or response in a table of samples


def train_command(config: RunConfig, console: Console, *, dry_run: bool = False, accept_changes: bool = False) -> dict | None:
    """Starts or continues the run in `config.output`.

    Args:
        dry_run: only show the configuration and what the run will need.
        accept_changes: continue a run although its configuration or prompts changed.

    Returns:
        the run's summary; None for a dry run or when Ctrl-C ended it before its last iteration.
    """
    if not accept_changes:
        require_unchanged(config)
    with status(console, "reading prompts and reward"):
        ingredients = read_ingredients(config)
    if dry_run:
        _show_plan(config, ingredients.prompts, console)
        return None
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(Path(config.output)))
        if config.swarm is None:
            console.print(escape(f"loading {config.model} ..."), soft_wrap=True)  # transformers shows a bar of its own
        with status(console, "joining the swarm") if config.swarm else contextlib.nullcontext():
            policy = stack.enter_context(open_policy(config))
        with status(console, "looking for a run to continue"):
            run = Run(config, ingredients, policy, accept_changes=accept_changes)
        _introduce(run, len(ingredients.prompts), console)
        try:
            _show(run, console)
        except KeyboardInterrupt:
            console.print(
                f"[yellow]stopped[/]: {run.done} of {config.train.iterations} iterations are saved in {escape(config.output)}; "
                "the same command continues there",
                soft_wrap=True,
            )
            return None
        except RewardError as error:
            raise RewardError(
                f"{error}\nthe responses of iteration {run.done + 1} are kept in {config.output}: "
                "mend the reward, type the same command, and they are scored again"
            ) from error
        summary = run.finish()
    console.print(escape(f"adapter in {summary['adapter']} (PEFT format); numbers in {config.output}/metrics.jsonl"), soft_wrap=True)
    console.print(escape(f"use it elsewhere: textrl-swarm export {shlex.quote(config.output)} OUT"), soft_wrap=True)
    return summary


def _introduce(run: Run, num_prompts: int, console: Console) -> None:
    config, policy = run.config, run.policy
    where = f"on {policy.num_servers} server(s) of a swarm" if config.swarm else f"on this machine ({policy.device})"
    quantized = f" in {config.quantization}" if config.quantization else ""
    trainable = sum(parameter.numel() for parameter in policy.trainable_parameters().values())
    console.print(escape(f"{config.model}{quantized} {where}; {trainable:,} trainable parameters; {num_prompts} prompts"), soft_wrap=True)
    if run.start:
        console.print(escape(f"continuing {config.output} after iteration {run.start} of {config.train.iterations}"), soft_wrap=True)


def _show(run: Run, console: Console) -> None:
    """Runs what is left to do, with a bar, and now and then a table of samples."""
    total = run.config.train.iterations
    columns = (
        TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=12), TextColumn("{task.fields[numbers]}"),
        TextColumn("[dim]{task.fields[phase]}"), TimeElapsedColumn(), TextColumn("[dim]left"), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total, completed=run.start, numbers="", phase="sampling" if run.start < total else "done")
        for iteration in run.iterations(on_sampled=lambda: progress.update(bar, phase="learning")):
            numbers = _numbers(iteration)
            progress.update(
                bar, completed=iteration.index + 1, numbers=numbers, phase="sampling" if iteration.index + 1 < total else "done"
            )
            if not console.is_terminal:
                console.print(f"iteration {iteration.index + 1}/{total}  {numbers}", soft_wrap=True)
            if run.shows_samples(iteration.index):
                progress.console.print(_table(iteration))


def _numbers(iteration: Iteration) -> str:
    metrics = iteration.metrics
    speed = float(iteration.collected.rollout.response_mask.sum()) / iteration.seconds
    skipped = f"  [red]{metrics['skipped_steps']:.0f} steps skipped[/]" if metrics["skipped_steps"] else ""
    return f"score {metrics['score']:.3f}  KL {metrics['kl']:.2f}  {speed:.0f} tok/s{skipped}"


def _table(iteration: Iteration) -> Table:
    table = Table(title=f"samples of iteration {iteration.index + 1}", title_justify="left")
    table.add_column("prompt", overflow="fold", ratio=1)
    table.add_column("response", overflow="fold", ratio=2)
    table.add_column("score", justify="right")
    for row in samples(iteration):
        table.add_row(escape(_shortened(row["prompt"])), escape(_shortened(row["response"].strip())), f"{row['score']:.2f}")
    return table


def _shortened(text: str) -> str:
    """For a table; samples.jsonl has the whole text."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2 - 2]} ... {text[3 - _SHOWN // 2 :]}"


def _show_plan(config: RunConfig, prompts: list[dict], console: Console) -> None:
    """The configuration with every default, and what an iteration will need."""
    console.print(escape(config.to_yaml()), end="", soft_wrap=True)
    lora = config.lora or (read_settings(config.ref_adapter) if config.ref_adapter else LoraSettings())
    model, tokens = read_config(config.model), _mean_tokens(config.model, prompts)
    responses = config.train.prompts_per_iteration * config.sampling.num_samples

    def estimate(servers: int) -> RunEstimate:
        return estimate_run(
            model, lora, quantization=config.quantization, swarm_servers=servers, responses=responses, prompt_tokens=tokens,
            response_tokens=config.sampling.max_new_tokens, epochs=config.ppo.epochs, minibatch_size=config.ppo.minibatch_size,
            wire_bytes=4 if str(model.dtype or "float32").endswith("float32") else 2, dtype=config.dtype,
        )  # fmt: skip

    first = estimate(1 if config.swarm else 0)
    share = first.trainable_parameters / first.total_parameters
    rows = {
        "prompts": f"{len(prompts):,}, of {tokens} tokens on average",
        "responses per iteration": f"{responses:,}, of at most {config.sampling.max_new_tokens} tokens",
        "trainable parameters": f"{first.trainable_parameters:,} of {first.total_parameters:,} ({share:.2%})",
        "memory on this machine": f"about {decimal(first.memory_bytes)}" + (", the blocks are the servers'" if config.swarm else ""),
    }
    if config.swarm is None:
        rows["bytes per iteration"] = "none: the model is on this machine"
    for servers in (1, 2, 4, 8) if config.swarm else ():
        if servers <= model.num_hidden_layers:
            needs = estimate(servers)
            rows[f"bytes per iteration, {servers} server(s)"] = (
                f"{decimal(needs.bytes_sent)} sent, {decimal(needs.bytes_received)} received"
            )
    table = Table(title="estimates", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _mean_tokens(model: str, prompts: list[dict]) -> int:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(hub_name(model))
    except (OSError, ValueError) as error:
        raise ModelError(f"{model} has no tokenizer: {error}") from error
    lengths = [len(ids) for ids in tokenizer([item["input"] for item in prompts[:1000]])["input_ids"]]
    return round(sum(lengths) / len(lengths))
