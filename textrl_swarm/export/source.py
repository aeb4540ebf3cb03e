"""What there is to export: the adapter of a run, of pfrl's directories or its own, and where it came from.

Knows nothing about what is written.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from textrl_swarm.errors import AdapterError, CheckpointError
from textrl_swarm.models.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    conversion_hint,
    require_no_textrl_model,
)
from textrl_swarm.runs.checkpoint import CHECKPOINTS, STATE, checkpoints, damage_of
from textrl_swarm.runs.run import ADAPTER, CONFIG, SUMMARY
from textrl_swarm.runs.trackers import read_metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An adapter on disk and what is known about its training."""

    directory: Path
    """The directory that was named: a run's, or the adapter's own."""

    adapter: Path

    base_model: str
    """Directory or hub id; it need not exist here."""

    config: dict[str, Any] | None
    """Of the run, if the adapter came from one."""

    metrics: dict[str, float]
    """Of the last iteration that the adapter has seen."""

    @property
    def quantization(self) -> str | None:
        """Of the weights that the adapter was trained on."""
        return (self.config or {}).get("quantization")


def find_source(path: str | Path, checkpoint: str | None = None, base_model: str | None = None) -> Source:
    """The adapter in a run's directory, in one of pfrl's (`best`), or in an adapter's own.

    Args:
        checkpoint: of a run: "last", or the number of an iteration; None = the finished adapter, or the last
            checkpoint if that is newer.
        base_model: instead of the one that the adapter names.

    Raises:
        CheckpointError: a run without a finished iteration, no such checkpoint, or a damaged one.
        AdapterError: no adapter there.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        near = (
            sorted(p.parent.name for p in path.parent.glob(f"*/{ADAPTER_CONFIG}"))
            if path.parent.is_dir()
            else []
        )
        hint = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise AdapterError(f"there is no directory {path}{hint}")
    adapter = path
    iteration: int | None = None
    config = _run_config(path / CONFIG)
    if config is not None:
        adapter, iteration = _of_run(path, checkpoint)
    elif checkpoint is not None:
        raise CheckpointError(
            f"{path} is no run of `textrl-swarm train`, so it has no checkpoint {checkpoint!r}; leave "
            "--checkpoint out"
        )
    _require_adapter(adapter)
    damage = damage_of(adapter) if (adapter / STATE).is_file() else None
    if damage is not None:
        raise CheckpointError(f"the checkpoint {adapter} is damaged ({damage}); export another one")
    base = base_model or adapter_config(adapter).get("base_model_name_or_path") or (config or {}).get("model")
    if not base:
        raise AdapterError(f"{adapter / ADAPTER_CONFIG} names no base model; give it with --model")
    return Source(path, adapter, str(base), config, _metrics(path, iteration))


def _run_config(path: Path) -> dict[str, Any] | None:
    """The configuration of a run of ours; None when there is none, or another program's (the name is
    common).
    """
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not {"model", "reward", "sampling", "ppo"} <= config.keys():
            return None
        settings_of_run(config)  # the card must not fail on it when the weights are already merged
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the configuration of a run ({type(error).__name__}: {error}); "
            f"restore it, or export an adapter below it, such as {path.parent / ADAPTER}"
        ) from error
    return config


def _of_run(run: Path, checkpoint: str | None) -> tuple[Path, int | None]:
    """An adapter of a run, and the iterations it has behind it if that is known."""
    numbered = {path.name.removeprefix("iteration_"): path for path in checkpoints(run)}
    saved = {int(number): path for number, path in numbered.items() if number.isdecimal()}
    if checkpoint is None and (run / ADAPTER / ADAPTER_CONFIG).is_file():
        finished = _finished(run / SUMMARY)
        if not saved or (finished is not None and finished >= max(saved)):  # else the run went on afterwards
            return run / ADAPTER, finished
    if not saved:
        raise CheckpointError(
            f"the run in {run} never finished an iteration, so there is nothing to export; "
            "continue it with textrl-swarm train"
        )
    if checkpoint in (None, "last"):
        return _newest_undamaged(run, saved)
    if not str(checkpoint).isdecimal() or int(str(checkpoint)) not in saved:
        kept = ", ".join(map(str, sorted(saved)))
        raise CheckpointError(
            f"the run in {run} has no checkpoint {checkpoint!r}; give last or one of {kept} "
            "(train.keep_checkpoints keeps more)"
        )
    return saved[int(str(checkpoint))], int(str(checkpoint))


def _finished(summary: Path) -> int | None:
    """The iterations that `adapter/` has behind it; None when the summary is missing or damaged."""
    try:
        return int(json.loads(summary.read_text(encoding="utf-8"))["iterations"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _newest_undamaged(run: Path, saved: dict[int, Path]) -> tuple[Path, int]:
    for iteration in sorted(saved, reverse=True):
        damage = damage_of(saved[iteration])
        if damage is None:
            return saved[iteration], iteration
        logger.warning("%s is damaged (%s); exporting an older one", saved[iteration], damage)
    is_finished = (run / ADAPTER / ADAPTER_CONFIG).is_file()
    hint = f"; an older adapter is in {run / ADAPTER}, export that" if is_finished else ""
    raise CheckpointError(f"all checkpoints in {run / CHECKPOINTS} are damaged{hint}")


def adapter_config(adapter: Path) -> dict[str, Any]:
    """The contents of an adapter's adapter_config.json. Raises AdapterError."""
    path = adapter / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}; copy it again from where it was trained"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{path} holds a {type(config).__name__} instead of an adapter's settings; "
            "copy it again from where it was trained"
        )
    return config


def _require_adapter(path: Path) -> None:
    if (path / ADAPTER_CONFIG).is_file() and (path / ADAPTER_WEIGHTS).is_file():
        return
    require_no_textrl_model(path)
    near = sorted(str(p.parent.relative_to(path)) for p in path.glob(f"*/{ADAPTER_CONFIG}"))
    hint = f"; did you mean {path / near[0]}? there are {', '.join(near)}" if near else ""
    raise AdapterError(
        f"{path} holds no adapter: there is no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}{hint}"
        f"{conversion_hint(path)}"
    )


def _metrics(run: Path, iteration: int | None) -> dict[str, float]:
    """Of that iteration; {} when it is unknown or was not written."""
    for line in reversed(read_metrics(run)):
        if line["iteration"] == iteration:
            return line
    return {}


def settings_of_run(config: dict[str, Any]) -> list[str]:
    """A run's settings as a model card lists them, a line each."""
    rewards = []
    for part in config["reward"]:
        name = part["function"] or f"{part['model']} (label {part['label']})"
        rewards.append(f"`{name}`" if part["weight"] == 1 else f"`{part['weight']:g} * {name}`")
    ppo = config["ppo"]
    temperature = config["sampling"]["temperature"]
    return [
        f"reward: {' + '.join(rewards)}",
        f"PPO: lr {ppo['lr']:g}, {ppo['epochs']} epochs, KL coefficient {ppo['kl_coef']:g}; "
        f"temperature {temperature:g}",
    ]
