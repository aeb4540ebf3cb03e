"""`textrl-swarm compare`: runs beside each other, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from textrl_swarm.errors import ConfigError
from textrl_swarm.runs.config import differences
from textrl_swarm.runs.evaluation import read_evaluations
from textrl_swarm.runs.run import CONFIG
from textrl_swarm.runs.trackers import METRICS, read_metrics

_PICTURES = (".png", ".pdf", ".svg", ".jpg")
_SHOWN = 12  # settings that differ
_TAIL = 0.1  # share of the iterations at the end whose mean is shown


@dataclass(frozen=True)
class _Told:
    """What a run's directory says."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    def numbers(self, key: str) -> list[float]:
        """Of each iteration; NaN where there is none."""
        return [math.nan if line.get(key) is None else float(line[key]) for line in self.metrics]

    @property
    def by(self) -> str:
        """The kind of score by which evaluations are judged."""
        return str((self.config.get("evaluation") or {}).get("by", "sampled"))

    @property
    def held_out(self) -> str:
        """The best score, and when."""
        known = [line for line in self.evaluations if self.by in line]
        best = max(known, key=lambda line: float(line[self.by]), default=None)
        return "-" if best is None else f"{best[self.by]:.3f} at {best['iteration']}"

    @property
    def tokens(self) -> list[float]:
        """Sampled so far, after each iteration."""
        train, sampling = self.config.get("train", {}), self.config.get("sampling", {})
        responses = train.get("prompts_per_iteration", 1) * sampling.get("num_samples", 1)
        total, found = 0.0, []
        for length in self.numbers("response_tokens"):
            total += responses * length
            found.append(total)
        return found


def compare_command(runs: Sequence[Path], out: Path | None, console: Console) -> None:
    """Prints a table, and what differs between the configurations.

    Args:
        out: the picture's file; None = no picture.

    Raises:
        ConfigError: a directory that holds no run with a finished iteration.
    """
    if out is not None and out.suffix.lower() not in _PICTURES:
        raise ConfigError(f"--out {out}: a picture's name ends in {', '.join(_PICTURES)}")
    told = [_read(run) for run in runs]
    table = Table(title=f"means of the last {_TAIL:.0%} of the iterations", title_justify="left")
    table.add_column("run", overflow="fold")
    for heading in ("iterations", "tokens", "first score", "score", "KL", "entropy", "held out", "s"):
        table.add_column(heading, justify="right")
    for run in told:
        table.add_row(
            escape(run.name),
            str(len(run.metrics)),
            f"{run.tokens[-1]:,.0f}",
            f"{run.numbers('score')[0]:.3f}",
            *(f"{_tail(run.numbers(key)):.3f}" for key in ("score", "kl", "entropy")),
            run.held_out,
            f"{sum(run.numbers('seconds')):,.0f}",
        )
    console.print(table)
    _show_differences(told, console)
    if out is not None:
        _draw(told, out)
        console.print(f"picture in {escape(str(out))}", soft_wrap=True)


def _read(path: Path) -> _Told:
    metrics = read_metrics(path)
    if not metrics:
        raise ConfigError(
            f"{path} holds no run with a finished iteration (no {METRICS}); give directories that "
            "`textrl-swarm train` wrote"
        )
    config: dict[str, Any] = {}
    if (path / CONFIG).is_file():
        try:
            config = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path / CONFIG} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{path / CONFIG} is no run's configuration")
    return _Told(str(path), config, metrics, read_evaluations(path))


def _tail(numbers: Sequence[float]) -> float:
    known = [number for number in numbers if math.isfinite(number)]
    last = known[-max(1, math.ceil(_TAIL * len(numbers))) :]
    return sum(last) / len(last) if last else math.nan


def _show_differences(told: Sequence[_Told], console: Console) -> None:
    first, *others = told
    for run in others:
        lines = [line for line in differences(first.config, run.config) if not line.startswith("output:")]
        shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
        text = "\n  ".join(shown) if shown else "nothing"
        console.print(f"{escape(first.name)} -> {escape(run.name)}:\n  {escape(text)}", soft_wrap=True)


def _draw(told: Sequence[_Told], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for run in told:
        score, kl, tokens = run.numbers("score"), run.numbers("kl"), run.tokens
        (line,) = axes[0].plot(tokens, score, label=run.name)
        axes[1].plot(tokens, kl, color=line.get_color())
        axes[2].plot(kl, score, ".-", color=line.get_color(), linewidth=0.8)
        for each in run.evaluations:
            kind = run.by if run.by in each else "greedy"
            at = 0.0 if each["iteration"] == 0 else tokens[min(each["iteration"], len(tokens)) - 1]
            axes[0].plot(at, each[kind], "o", color=line.get_color(), fillstyle="none")
    axes[0].set(xlabel="sampled tokens", ylabel="score (circles: held out)")
    axes[1].set(xlabel="sampled tokens", ylabel="KL to the ref policy (nats per response)")
    axes[2].set(xlabel="KL to the ref policy (nats per response)", ylabel="score")
    axes[0].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
