"""Where a run's numbers and samples are written: metrics.jsonl and samples.jsonl always, TensorBoard, W&B and
trackio when asked.

Knows nothing about what the numbers mean.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from textrl_swarm.errors import ConfigError
from textrl_swarm.files import write_text

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RUN_ID = ".run_id"
_LIKE_WANDB = ("wandb", "trackio")  # trackio has wandb's init, log, Table and finish


class Trackers:
    """Open files and reporters of one run. Context manager.

    Args:
        run: the run's directory.
        report_to: any of "tensorboard", "wandb", "trackio".
        start: iterations that are already done; lines of later ones, which will be done again, are dropped.
        config: plain values, for those that show them.

    Raises:
        ConfigError: a reporter that is not installed, with the command that installs it.
    """

    def __init__(self, run: Path, report_to: Sequence[str], start: int, config: Mapping[str, Any]):
        self._reporters = [(name, _imported(name)) for name in report_to if name in _LIKE_WANDB]
        for name in (METRICS, SAMPLES):
            _keep_up_to(run / name, start)
        self._metrics = (run / METRICS).open("a", encoding="utf-8")
        self._samples = (run / SAMPLES).open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        for name, module in self._reporters:
            run_id = _run_id(run)
            named = {"id": run_id} if name == "wandb" else {}  # trackio knows a run by its name
            options = {"name": f"{run.name}-{run_id}", "config": dict(config), "resume": "allow", **named}
            try:
                module.init(project="textrl-swarm", **options)
            except Exception as error:  # not logged in, no network
                raise ConfigError(f"{name} (train.report_to) could not be started: {error}") from error

    def metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """One line of numbers per iteration (counted from 1)."""
        _write(self._metrics, {"iteration": iteration, **values})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, iteration)
            self._tensorboard.flush()
        for _, module in self._reporters:
            module.log(dict(values), step=iteration)

    def samples(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Responses with their prompts and scores; at least one row, all with the same keys."""
        for row in rows:
            _write(self._samples, {"iteration": iteration, **row})
        columns = list(rows[0])
        data = [list(row.values()) for row in rows]
        for _, module in self._reporters:
            module.log({"samples": module.Table(columns=columns, data=data)}, step=iteration)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._metrics.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for _, module in self._reporters:
            module.finish()


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"train.report_to has {name!r}, which is not installed; type: pip install {name}"
        ) from error


def _run_id(run: Path) -> str:
    """Kept in the run's directory: a continued run stays one run there, and another run of the same name is
    another.
    """
    path = run / RUN_ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


def _write(file: TextIO, values: Mapping[str, Any]) -> None:
    plain = {}
    for name, value in values.items():
        is_missing = isinstance(value, float) and not math.isfinite(value)  # JSON has no NaN
        plain[name] = None if is_missing else value
    file.write(json.dumps(plain, ensure_ascii=False) + "\n")
    file.flush()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one per iteration; foreign lines and lines that a crash cut short are
    skipped.
    """
    return [entry for _, entry in _entries(run / METRICS)]


def _keep_up_to(path: Path, start: int) -> None:
    """Drops lines of iterations after `start`."""
    if path.is_file():
        kept = [line + "\n" for line, entry in _entries(path) if entry["iteration"] <= start]
        write_text(path, "".join(kept))


def _entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            entry["iteration"] + 0
            found.append((line, entry))
    return found
