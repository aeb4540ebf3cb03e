"""`textrl-swarm train`: one file in, a trained adapter out, with progress and samples on the screen."""

from __future__ import annotations

import contextlib
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from textrl_swarm.config import Codec, LoraSettings
from textrl_swarm.display import bit_rate, spinner
from textrl_swarm.errors import RewardError, TextRLSwarmError
from textrl_swarm.learning.loop import Iteration
from textrl_swarm.models.adapter_files import read_settings
from textrl_swarm.models.blocks import blocks_text, inner_blocks
from textrl_swarm.models.pretrained import load_tokenizer
from textrl_swarm.models.quantization import saved_quantization
from textrl_swarm.models.texts import encode_prompt
from textrl_swarm.runs.config import RunConfig, SwarmConfig
from textrl_swarm.runs.estimate import RunEstimate, estimate_run
from textrl_swarm.runs.evaluation import BEST
from textrl_swarm.runs.run import (
    REFUTED,
    Ingredients,
    Run,
    locked,
    open_policy,
    read_ingredients,
    require_unchanged,
    samples,
)
from textrl_swarm.swarm import compat

if TYPE_CHECKING:
    from textrl_swarm.swarm.client.survey import Links

_MAX_TEXT = 240  # characters of a prompt or response in a table of samples
_SURVEY_S = 30.0
_SAMPLED_PROMPTS = 1000  # prompts whose lengths an estimate looks at


def train_command(
    config: RunConfig, console: Console, *, dry_run: bool = False, accept_changes: bool = False
) -> dict[str, Any] | None:
    """Starts or continues the run in `config.output`.

    Args:
        dry_run: only show the configuration and what the run will need.
        accept_changes: continue a run although its configuration or prompts changed.

    Returns:
        The run's summary; None for a dry run or when Ctrl-C ended the run before its last iteration.
    """
    if not accept_changes:
        require_unchanged(config)
    with spinner(console, "reading prompts and reward"):
        ingredients = read_ingredients(config)
    if dry_run:
        _show_plan(config, ingredients, console)
        return None
    with contextlib.ExitStack() as stack:
        ctrl_c = stack.enter_context(_CtrlC())
        stack.enter_context(locked(Path(config.output)))
        if config.swarm is None:
            _print(console, f"loading {config.model} ...")  # transformers shows a bar of its own
        with spinner(console, "joining the swarm") if config.swarm else contextlib.nullcontext():
            policy = stack.enter_context(open_policy(config, ingredients.model))
        with spinner(console, "looking for a run to continue"):
            run = Run(config, ingredients, policy, accept_changes=accept_changes)
        ctrl_c.check()
        _introduce(run, len(ingredients.prompts), console)
        try:
            _show(run, console, ctrl_c)
        except KeyboardInterrupt:
            console.print(
                f"[yellow]Stopped.[/] {run.done} of {config.train.iterations} iterations are saved in "
                f"{escape(config.output)}; rerun the command to resume.",
                soft_wrap=True,
            )
            return None
        except RewardError as error:
            raise RewardError(
                f"{error}\nThe responses of iteration {run.done + 1} are kept in {config.output}: fix the "
                "reward and "
                "rerun the command to score them again."
            ) from error
        summary = run.finish()
    _print(
        console, f"adapter in {summary['adapter']} (PEFT format); numbers in {config.output}/metrics.jsonl"
    )
    if "best" in summary:
        best = summary["best"]
        _print(
            console,
            f"best on held-out prompts: {best['score']:.3f} after iteration {best['iteration']}, kept in "
            f"{config.output}/{BEST}"
            + (
                f" ({config.evaluation.patience} evaluations without a better one ended the run)"
                if config.evaluation and run.is_over
                else ""
            ),
        )
    _print(console, f"use it elsewhere: textrl-swarm export {shlex.quote(config.output)} OUT")
    return summary


def _print(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _introduce(run: Run, num_prompts: int, console: Console) -> None:
    config = run.config
    policy = run.policy
    if config.swarm:
        where = f"on {policy.num_servers} server(s) of a swarm"
    else:
        where = f"on this machine ({policy.device})"
    quantized = f" in {policy.quantization}" if policy.quantization else ""
    trainable = sum(parameter.numel() for parameter in run.learner.ppo.parameters)
    model = f"{config.model}{quantized} {where}"
    _print(console, f"{model}; {trainable:,} trainable parameters; {num_prompts} prompts")
    loss = policy.codec_loss
    if loss is not None:
        _print(
            console,
            f"hidden states travel in fewer bits: logprobs differ by {loss.nats:.4f} nats, gradients by a "
            f"cosine of {loss.cosine:.4f} (on random tokens)",
        )
    checks = config.swarm.checks if config.swarm else None
    if checks is not None and checks.rate > 0:
        record = checks.record or f"{config.output}/{REFUTED}"
        _print(
            console,
            f"{checks.rate:.1%} of the servers' work is done again by others; {record} names who is refuted",
        )
    if run.start:
        _print(
            console, f"continuing {config.output} after iteration {run.start} of {config.train.iterations}"
        )


class _CtrlC:
    """Remembers Ctrl-C: raised in a finalizer or a callback, KeyboardInterrupt is printed and lost."""

    def __init__(self) -> None:
        self._is_pressed = False

    def __enter__(self) -> _CtrlC:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # else it is ignored, or somebody else's
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, signum: int, frame: object) -> None:
        self._is_pressed = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt when it was pressed."""
        if self._is_pressed:
            raise KeyboardInterrupt


def _show(run: Run, console: Console, ctrl_c: _CtrlC) -> None:
    """Runs the remaining iterations, with a bar, and every so often a table of samples."""
    total = run.config.train.iterations
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("[dim]{task.fields[phase]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(compact=True),
    )

    def phase_after(done: int) -> str:
        return "sampling" if done < total else "done"

    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(
            "", total=total, completed=run.start, numbers="", phase=phase_after(run.start)
        )
        iterations = run.iterations(
            on_sampled=lambda: progress.update(bar, phase="learning"),
            on_evaluation=lambda: progress.update(bar, phase="evaluating"),
        )
        for iteration in iterations:
            done = iteration.index + 1
            numbers = _numbers(iteration) + _evaluated(run, done)
            progress.update(bar, completed=done, numbers=numbers, phase=phase_after(done))
            if not console.is_terminal:
                console.print(f"iteration {done}/{total}  {numbers}", soft_wrap=True)
            if run.shows_samples(iteration.index):
                progress.console.print(_table(iteration))
            ctrl_c.check()


def _evaluated(run: Run, done: int) -> str:
    line = run.evaluations.lines[-1] if run.evaluations and run.evaluations.lines else {}
    if line.get("iteration") != done:
        return ""
    scores = [f"{line[name]:.3f} {name}" for name in ("sampled", "greedy") if name in line]
    return f"  held out {', '.join(scores)}"


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
        response = row["response"].strip()
        table.add_row(escape(_shortened(row["prompt"])), escape(_shortened(response)), f"{row['score']:.2f}")
    return table


def _shortened(text: str) -> str:
    """For a table; samples.jsonl has the whole text."""
    if len(text) <= _MAX_TEXT:
        return text
    half = _MAX_TEXT // 2
    return f"{text[: half - 2]} ... {text[3 - half :]}"


def _show_plan(config: RunConfig, ingredients: Ingredients, console: Console) -> None:
    """The configuration with every default, and what an iteration will need."""
    console.print(escape(config.to_yaml()), end="", soft_wrap=True)
    lora = config.lora or (read_settings(config.ref_adapter) if config.ref_adapter else LoraSettings())
    model = ingredients.model.config
    tokens = _mean_tokens(ingredients)
    responses = config.train.prompts_per_iteration * config.sampling.num_samples

    codec = config.swarm.codec if config.swarm else None
    local_blocks, inner = (0, 0), range(0)
    if config.swarm is not None:
        local_blocks = config.swarm.local_blocks
        inner = inner_blocks(model.get_text_config(decoder=True).num_hidden_layers, local_blocks)

    def estimate(servers: int) -> RunEstimate:
        return estimate_run(
            model,
            lora,
            quantization=config.quantization or saved_quantization(ingredients.model),
            swarm_servers=servers,
            responses=responses,
            prompt_tokens=tokens,
            response_tokens=config.sampling.max_new_tokens,
            epochs=config.ppo.epochs,
            minibatch_size=config.ppo.minibatch_size,
            micro_batch_tokens=config.ppo.micro_batch_tokens,
            gradient_checkpointing=config.gradient_checkpointing,
            samples=config.sampling.num_samples,
            codec=codec.kind if isinstance(codec, Codec) else None,
            local_blocks=local_blocks,
            has_critic=config.ppo.baseline == "critic",
            wire_bytes=4 if str(model.dtype or "float32").endswith("float32") else 2,
            dtype=config.dtype,
        )

    first = estimate(1 if config.swarm else 0)
    share = first.trainable_parameters / first.total_parameters
    held = blocks_text(inner) if any(local_blocks) else "the blocks"
    elsewhere = f"; the servers hold {held}" if config.swarm else ""
    rows = {
        "prompts": f"{len(ingredients.prompts):,}, of {tokens} tokens on average",
        "responses per iteration": f"{responses:,}, of at most {config.sampling.max_new_tokens} tokens",
        "trainable parameters": f"{first.trainable_parameters:,} of {first.total_parameters:,} ({share:.2%})",
        "memory on this machine": f"about {decimal(first.memory_bytes)}{elsewhere}",
    }
    if config.swarm is None:
        rows["bytes per iteration"] = "none: the model is on this machine"
    else:
        links, unknown = _measured_links(config.swarm, inner, ingredients, console)
        for servers in (1, 2, 4, 8) if links is None else (links.servers,):
            if servers <= len(inner):
                needs = estimate(servers)
                sent = decimal(needs.bytes_sent)
                received = decimal(needs.bytes_received)
                rows[f"bytes per iteration, {servers} server(s)"] = f"{sent} sent, {received} received"
        if links is None:
            rows["the swarm now"] = escape(unknown)
        else:
            least, most = estimate(links.servers).network_seconds(
                bits_per_second=links.bits_per_s, rtt_s=links.round_trip_s
            )
            rows["the network, measured now"] = (
                f"{1000 * links.round_trip_s:.0f} ms there and back, {bit_rate(links.bits_per_s)} in all"
            )
            rows["network time per iteration"] = f"{least:.3g} to {most:.3g} s, and the servers' computing"
    table = Table(title="estimates", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _measured_links(
    swarm: SwarmConfig, blocks: range, ingredients: Ingredients, console: Console
) -> tuple[Links | None, str]:
    """The way to the servers; or None, and why it is not known."""
    compat.require_petals()
    from textrl_swarm.swarm.client.survey import survey

    name = swarm.dht_prefix or ingredients.model.dht_prefix
    try:
        with spinner(console, "asking the swarm"):
            (report,) = survey(swarm.initial_peers, name, timeout_s=_SURVEY_S, access=swarm.access)
    except TextRLSwarmError as error:
        return None, str(error)
    links = report.links(blocks)
    missing = f"not all of {blocks_text(blocks)} have a server that can train: see `textrl-swarm status`"
    return links, "" if links else missing


def _mean_tokens(ingredients: Ingredients) -> int:
    """Over the first prompts, which are enough for an estimate."""
    tokenizer = load_tokenizer(ingredients.model.name)
    texts = [item["input"] for item in ingredients.prompts[:_SAMPLED_PROMPTS]]
    lengths = [len(encode_prompt(tokenizer, text)) for text in texts]
    return round(sum(lengths) / len(lengths))
