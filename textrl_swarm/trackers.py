"""Where a run's numbers and samples are written: metrics.jsonl and samples.jsonl always, TensorBoard, W&B and trackio when asked.

Knows nothing about what the numbers mean.
"""

from __future__ import annotations

import importlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textrl_swarm.errors import ConfigError

METRICS, SAMPLES, RUN_ID = "metrics.jsonl", "samples.jsonl", ".run_id"
_LIKE_WANDB = ("wandb", "trackio")  # trackio has wandb's init, log, Table and finish


class Trackers:
    """Open files and reporters of one run. Context manager.

    Args:
        run: the run's directory.
        report_to: any of "tensorboard", "wandb", "trackio".
        start: iterations that are already done; what an ended run wrote beyond them is dropped, they are done again.
        config: plain values, for those that show them.

    Raises:
        ConfigError: a reporter that is not installed, with the command that installs it.
    """

    def __init__(self, run: Path, report_to: Sequence[str], start: int, config: Mapping[str, Any]):
        self._reporters = [(name, _imported(name)) for name in report_to if name in _LIKE_WANDB]
        for name in (METRICS, SAMPLES):
            _keep_up_to(run / name, start)
        self._metrics, self._samples = ((run / name).open("a", encoding="utf-8") for name in (METRICS, SAMPLES))
        self._tensorboard = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        for name, module in self._reporters:
            run_id = _run_id(run)
            named = {"id": run_id} if name == "wandb" else {}  # trackio knows a run by its name
            module.init(project="textrl-swarm", name=f"{run.name}-{run_id}", config=dict(config), resume="allow", **named)

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
        for _, module in self._reporters:
            module.log({"samples": module.Table(columns=columns, data=[list(row.values()) for row in rows])}, step=iteration)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exc_info) -> None:
        self._metrics.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for _, module in self._reporters:
            module.finish()


def _imported(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"train.report_to has {name!r}, which is not installed; type: pip install {name}") from error


def _run_id(run: Path) -> str:
    """Kept in the run's directory: a run that is continued goes on where it was, and another of the same name is another."""
    path = run / RUN_ID
    if not path.is_file():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _write(file, values: Mapping[str, Any]) -> None:
    plain = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
    file.write(json.dumps(plain, ensure_ascii=False) + "\n")
    file.flush()


def _keep_up_to(path: Path, start: int) -> None:
    """Drops lines of iterations after `start`, and a line that a crash cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["iteration"] <= start:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
