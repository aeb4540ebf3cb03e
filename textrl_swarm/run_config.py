"""One file describes a training run: model, swarm, adapter, sampling, PPO, prompts, reward, output. Reads and checks it; starts nothing.

YAML through PyYAML, types through pydantic on plain frozen dataclasses; every complaint names the key.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.errors import ConfigError, closest

HEADER = "# A run's configuration as `textrl-swarm train` resolved it.\n"  # tells it from a user's own file
_ONE_SEED = ("ppo.seed", "sampling.seed")  # a run has one seed


@dataclass(frozen=True)
class SwarmSection:
    """Where the blocks are; leave the section out to have the model on this machine."""

    initial_peers: tuple[str, ...]  # addresses as `textrl-swarm serve` prints them
    dht_prefix: str | None = None  # name under which the swarm announces the model; null = made from `model`


@dataclass(frozen=True)
class RewardSection:
    """One part of the reward: a function of yours or a classifier."""

    function: str | None = None  # "module:name" or "path/to/file.py:name"
    model: str | None = None  # directory or hub id of a sequence-classification model
    label: str | int | None = None  # whose probability is the reward; null for models with one output
    with_prompt: bool = True  # the classifier reads prompt and response, or the response alone
    weight: float = 1.0  # of this part in the sum

    def __post_init__(self):
        if (self.function is None) == (self.model is None):
            raise ConfigError('give each reward either function: "module:name" or model: NAME')
        if self.function is not None and (self.label is not None or not self.with_prompt):
            raise ConfigError("label and with_prompt belong to a reward with model:, not to one with function:")


@dataclass(frozen=True)
class TrainSection:
    """How long, and what is written on the way."""

    iterations: int = 100  # rollouts, each followed by an update
    prompts_per_iteration: int = 16  # each gets sampling.num_samples responses
    samples_every: int = 10  # iterations between tables of samples; 0 = none
    reward_timeout_s: float | None = None  # a reward that takes longer is an error; null = wait for ever
    keep_checkpoints: int = 2  # the newest n stay on disk
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)  # besides metrics.jsonl

    def __post_init__(self):
        for name, least in (("iterations", 1), ("prompts_per_iteration", 1), ("samples_every", 0), ("keep_checkpoints", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be a whole number >= {least}, got {getattr(self, name)}")
        if self.reward_timeout_s is not None and not self.reward_timeout_s > 0:
            raise ConfigError(f"reward_timeout_s must be > 0 seconds or null, got {self.reward_timeout_s}")


@dataclass(frozen=True)
class RunConfig:
    """A training run. Relative paths count from the directory the command is typed in."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # for the sections too

    model: str  # directory or hub id
    prompts: Any  # a list of texts or dicts; a .txt, .jsonl or .json file; or {dataset: NAME, split: train, column: text, limit: 100}
    reward: tuple[RewardSection, ...]  # their weighted sum; in a file also a single section, or just "module:name"
    output: str  # directory; a run that is found there is continued
    seed: int = 0  # of everything random
    quantization: Literal["8bit", "4bit"] | None = None  # of the model on this machine
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights on this machine; null = the checkpoint's
    device: str | None = None  # null = CUDA when there is one
    ref_adapter: str | None = None  # PEFT adapter to start from, which is then also the ref policy
    swarm: SwarmSection | None = None
    lora: LoraSettings | None = None  # null = LoraSettings(), or those of ref_adapter
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_samples=4))
    ppo: PPOConfig = field(default_factory=PPOConfig)
    train: TrainSection = field(default_factory=TrainSection)

    def __post_init__(self):
        if not isinstance(self.prompts, (list, str, dict)) or not self.prompts:
            raise ConfigError(f"prompts must be a list, a file, or a mapping with the key dataset; got {self.prompts!r}")
        if not self.output.strip():
            raise ConfigError("output is empty; name a directory")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in 0..{2**32 - 1}, got {self.seed}")
        if not self.reward:
            raise ConfigError('reward is empty; give "module:function", or a model and a label')
        if self.swarm is not None and self.quantization is not None:
            raise ConfigError(
                f"quantization={self.quantization} is for a model on this machine; servers of a swarm choose their own "
                "(textrl-swarm serve MODEL --quant_type int8 or nf4)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every default filled in; `load_config` reads them back to an equal configuration."""
        plain = json.loads(json.dumps(dataclasses.asdict(self), default=str))  # YAML has dates
        for key in _ONE_SEED:
            section, name = key.split(".")
            del plain[section][name]
        return plain

    def to_yaml(self) -> str:
        return HEADER + yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_config(source: Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a configuration file (or takes its contents), applies `key=value` overrides such as "ppo.lr=3e-4", and checks all of it.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (with the closest known one), a wrong type or an impossible value.
    """
    values = json.loads(json.dumps(dict(source), default=str)) if isinstance(source, Mapping) else _read_yaml(Path(source).expanduser())
    for override in overrides:
        _apply(values, override)
    _spell_out(values)
    for key in _ONE_SEED:
        section, name = key.split(".")
        if isinstance(values.get(section), dict) and name in values[section]:
            raise ConfigError(f"{key}: a run has one seed; set the key `seed` instead")
    config = _validated(values)
    seeded = {"sampling": dataclasses.replace(config.sampling, seed=config.seed), "ppo": dataclasses.replace(config.ppo, seed=config.seed)}
    return dataclasses.replace(config, **seeded)


def _spell_out(values: dict[str, Any]) -> None:
    """What may be written shorter: a section left empty, one thing instead of a list of one, a reward's name alone."""
    for section in ("sampling", "ppo", "train"):
        if section in values and values[section] is None:
            values[section] = {}
    if isinstance(values.get("sampling"), dict):
        values["sampling"].setdefault("num_samples", 4)
    for section, name in (("lora", "targets"), ("train", "report_to"), ("swarm", "initial_peers")):
        if isinstance(values.get(section), dict) and isinstance(values[section].get(name), str):
            values[section][name] = [values[section][name]]
    if isinstance(values.get("output"), str):
        values["output"] = str(Path(values["output"]).expanduser()) if values["output"].strip() else ""
    if isinstance(values.get("reward"), (str, dict)):
        values["reward"] = [values["reward"]]
    if isinstance(values.get("reward"), list):
        values["reward"] = [{"function": part} if isinstance(part, str) else part for part in values["reward"]]
        for i, part in enumerate(values["reward"]):
            if isinstance(part, dict) and isinstance(part.get("label"), bool):  # yes, no, on and off are these in YAML
                raise ConfigError(f"reward.{i}.label: YAML reads {part['label']}; put a label such as yes or no in quotes")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two plain configurations, a line per key: "ppo.lr: 0.0001 -> 0.001"."""
    lines: list[str] = []
    for key in dict.fromkeys((*old, *new)):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {_short(before)} -> {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would drop one without a word."""

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(problem=f"the key {name!r} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(f"there is no configuration file {path}" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping with keys such as model, prompts, reward and output; it holds {_short(values)}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, e.g. --set ppo.lr=3e-4, got {override!r}")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _validated(values: dict[str, Any]) -> RunConfig:
    try:
        return TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(map(_complaint, error.errors(include_url=False))))) from error


def _complaint(error: Mapping[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    key, kind = ".".join(path), error["type"]
    if kind == "unexpected_keyword_argument":
        elsewhere = [f"{section}.{key}" for section in _fields(RunConfig) if key in _section_of([section])] if len(path) == 1 else []
        hint = f"did you mean {elsewhere[0]!r}?" if elsewhere else closest(path[-1], _section_of(path[:-1]))
        return f"unknown key {key!r}; {hint}"
    if kind in ("missing", "missing_argument"):
        return f"the key {key!r} is missing"
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    message = error["msg"][:1].lower() + error["msg"][1:].replace("a valid tuple", "a list")
    return f"{key}: {message}, got {_short(error['input'])}"


def _section_of(path: Sequence[str]) -> list[str]:
    """Field names of the section that a path of keys leads to, none when it leads to no section; an index into a list is passed over."""
    kind: Any = RunConfig
    for name in path:
        if not name.isdecimal():
            hint = typing.get_type_hints(kind).get(name)
            kind = next((member for member in (hint, *_members(hint)) if dataclasses.is_dataclass(member)), None)
        if kind is None:
            return []
    return _fields(kind)


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _members(hint: Any) -> list[Any]:
    """All types inside a hint such as `A | tuple[B, ...] | None`."""
    return [found for member in typing.get_args(hint) for found in (member, *_members(member))]
