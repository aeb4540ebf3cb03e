"""One file describes a training run: model, swarm, adapter, sampling, PPO, prompts, reward, output.

Reads and checks the file; starts nothing. YAML through PyYAML, types through pydantic on plain frozen
dataclasses; every complaint names the key.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from textrl_swarm.config import (
    ALGORITHMS,
    Codec,
    LoraSettings,
    PPOConfig,
    SamplingConfig,
    ServerChecks,
    SwarmAccess,
    Timeouts,
    checked_local_blocks,
    document_fields,
)
from textrl_swarm.errors import ConfigError, closest
from textrl_swarm.runs.digest import content_digest

# A user's own file begins otherwise.
HEADER = "# A run's configuration as `textrl-swarm train` resolved it.\n"
_ONE_SEED = ("ppo.seed", "sampling.seed")  # a run has one seed


@document_fields
@dataclass(frozen=True)
class SwarmConfig:
    """Where the blocks are; without this section the model is on this machine."""

    initial_peers: tuple[str, ...]
    """Addresses as `textrl-swarm serve` prints them."""

    dht_prefix: str | None = None
    """Name under which the swarm announces the model; null = made from `model`."""

    timeouts: Timeouts = field(default_factory=Timeouts)
    """How long to wait for the swarm."""

    codec: Codec | str | None = None
    """In how many bits hidden states travel: "fp16", "int8", or a section with `kind` and limits; null = in
    the servers' dtype, which changes nothing."""

    checks: ServerChecks | None = None
    """How much of what servers compute is computed again by others; null = servers are believed."""

    access: SwarmAccess | None = None
    """Which servers are used, and what lets this machine in; null = all servers, of a swarm that is open."""

    local_blocks: tuple[int, int] = (0, 0)
    """How many of the first blocks, and of the last, this machine computes instead of the swarm, which gets
    to see less of the prompts then."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "local_blocks", checked_local_blocks(self.local_blocks))
        if isinstance(self.codec, str):
            object.__setattr__(self, "codec", Codec(self.codec))  # type: ignore[arg-type]  # it checks that


@document_fields
@dataclass(frozen=True)
class RewardConfig:
    """One part of the reward: a function of yours or a classifier."""

    function: str | None = None
    """"module:name" or "path/to/file.py:name"."""

    model: str | None = None
    """Directory or hub id of a sequence-classification model."""

    label: str | int | None = None
    """The label whose probability is the reward; null for models with one output."""

    with_prompt: bool = True
    """True = the classifier reads prompt and response; false = the response alone."""

    weight: float = 1.0
    """Weight of this part in the sum."""

    def __post_init__(self) -> None:
        if (self.function is None) == (self.model is None):
            raise ConfigError('give each reward either function: "module:name" or model: NAME')
        if self.function is not None and (self.label is not None or not self.with_prompt):
            raise ConfigError(
                "label and with_prompt belong to a reward with model:, not to one with function:"
            )


@document_fields
@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to write on the way."""

    iterations: int = 100
    """Rollouts, each followed by an update."""

    prompts_per_iteration: int = 16
    """Prompts per rollout; each gets sampling.num_samples responses."""

    resample: int = 0
    """How often at most prompts whose responses all score the same, which teach nothing, are replaced by
    others in each rollout."""

    samples_every: int = 10
    """Iterations between tables of samples; 0 = none."""

    reward_timeout_s: float | None = None
    """A reward that takes longer than these seconds is an error; null = wait for ever."""

    skip_special_tokens: bool = False
    """True = rewards of either form see no special tokens. False = they see them (<think>, where that is
    one); markers such as the end token are tokens of a step reward, and no text."""

    keep_checkpoints: int = 2
    """The newest n checkpoints stay on disk."""

    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where to report besides metrics.jsonl."""

    def __post_init__(self) -> None:
        least = {"iterations": 1, "prompts_per_iteration": 1, "resample": 0, "samples_every": 0}
        least["keep_checkpoints"] = 1
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} must be a whole number >= {lowest}, got {getattr(self, name)}")
        if self.reward_timeout_s is not None and not self.reward_timeout_s > 0:
            raise ConfigError(f"reward_timeout_s must be > 0 seconds or null, got {self.reward_timeout_s}")


@document_fields
@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out prompts whose responses are scored every so often; the best adapter is kept in `best/`."""

    prompts: Any
    """In the forms of `prompts`; none of them should be there."""

    every: int = 10
    """Iterations between evaluations; the untrained policy and the last one are evaluated, too."""

    samples: int = 4
    """Responses that are sampled to each prompt, with the same random numbers each time, beside the most
    likely one; 0 = none."""

    by: Literal["sampled", "greedy"] = "sampled"
    """Which score tells the best adapter."""

    patience: int | None = None
    """The run ends after so many evaluations without a better score; null = it does not."""

    def __post_init__(self) -> None:
        _require_prompts("evaluation.prompts", self.prompts)
        for name, lowest in (("every", 1), ("samples", 0), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name} must be a whole number >= {lowest}, got {value}")
        if self.by == "sampled" and self.samples == 0:
            raise ConfigError("by: sampled needs samples; set samples to 1 or more, or by: greedy")


def _require_prompts(key: str, prompts: Any) -> None:
    if not isinstance(prompts, (list, str, dict)) or not prompts:
        raise ConfigError(f"{key} must be a list, a file, or a mapping with the key dataset; got {prompts!r}")


@document_fields
@dataclass(frozen=True)
class RunConfig:
    """A training run. Relative paths count from the directory in which the command is typed; `~` is the home
    directory.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # for the sections too

    model: str
    """Directory or hub id."""

    prompts: Any
    """A list of texts or dicts; a .txt, .jsonl or .json file; or {dataset: NAME, split: train, column: text,
    limit: 100}."""

    reward: tuple[RewardConfig, ...]
    """The rewards whose weighted sum is maximised; in a file also a single section, or just "module:name"."""

    output: str
    """Directory of the run; a run that is found there is continued."""

    seed: int = 0
    """Seed of everything random."""

    quantization: Literal["8bit", "4bit"] | None = None
    """Of the model on this machine."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights on this machine; null = the checkpoint's."""

    device: str | None = None
    """Of the model on this machine, e.g. "cuda:0" or "cpu"; null = CUDA when there is one."""

    gradient_checkpointing: bool = False
    """Of the model on this machine: keep only the blocks' inputs for backward, which computes each block once
    more. The same gradients with less memory and about a third more time."""

    ref_adapter: str | None = None
    """Directory of a PEFT adapter to start from, which is then also the ref policy; null = the base model."""

    swarm: SwarmConfig | None = None
    """The swarm that holds the blocks; null = the model is on this machine."""

    lora: LoraSettings | None = None
    """Which weights are trained; null = the defaults, or the settings of ref_adapter."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_samples=4))
    """How responses are drawn. `seed` is the run's, and num_samples is 4 by default."""

    ppo: PPOConfig = field(default_factory=PPOConfig)
    """The update. `seed` is the run's."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, and what is written."""

    evaluation: EvaluationConfig | None = None
    """Held-out prompts; null = there are none."""

    def __post_init__(self) -> None:
        _require_prompts("prompts", self.prompts)
        if not self.output.strip():
            raise ConfigError("output is empty; name a directory")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in 0..{2**32 - 1}, got {self.seed}")
        if not self.reward:
            raise ConfigError('reward is empty; give "module:function", or a model and a label')
        if self.ppo.baseline in ("group", "leave_one_out") and self.sampling.num_samples < 2:
            raise ConfigError(
                f"{self.ppo.algorithm} compares the responses to a prompt (baseline: {self.ppo.baseline}); "
                f"sampling.num_samples must be at least 2, got {self.sampling.num_samples}"
            )
        if self.train.resample and self.sampling.num_samples < 2:
            raise ConfigError(
                "train.resample replaces prompts whose responses score the same; sampling.num_samples must "
                f"be at least 2, got {self.sampling.num_samples}"
            )
        if self.swarm is not None and self.gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing is for a model on this machine; servers always compute blocks again "
                "in backward: leave it out"
            )
        if self.swarm is not None and self.quantization is not None:
            raise ConfigError(
                f"quantization={self.quantization} is for a model on this machine; servers of a swarm choose "
                "their own (textrl-swarm serve MODEL --quant_type int8 or nf4)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every default filled in; `load_config` reads them back to an equal
        configuration.
        """
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        for key in _ONE_SEED:
            section, name = key.split(".")
            del plain[section][name]
        return plain

    def to_yaml(self) -> str:
        """The file that `load_config` reads back to an equal configuration."""
        return HEADER + yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_config(source: Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a configuration file (or takes its contents), applies `key=value` overrides such as
    "ppo.lr=3e-4", and checks all of it.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (with the closest known one), a wrong type, an
            impossible value, or one that config.yaml cannot hold, such as a set or an array.
    """
    values = _plain(source if isinstance(source, Mapping) else _read_yaml(Path(os.path.expanduser(source))))
    for override in sorted(overrides, key=lambda text: not text.startswith("ppo.algorithm=")):
        before = _algorithm(values)
        _apply(values, override)
        _forget_settings_of(before, values)
    _spell_out(values)
    for key in _ONE_SEED:
        section, name = key.split(".")
        if isinstance(values.get(section), dict) and name in values[section]:
            raise ConfigError(f"{key}: a run has one seed; set the key `seed` instead")
    config = _validated(values)
    return dataclasses.replace(
        config,
        sampling=dataclasses.replace(config.sampling, seed=config.seed),
        ppo=dataclasses.replace(config.ppo, seed=config.seed),
    )


def _algorithm(values: Mapping[str, Any]) -> Any:
    section = values.get("ppo")
    return section.get("algorithm", "ppo") if isinstance(section, dict) else "ppo"


def _forget_settings_of(algorithm: Any, values: dict[str, Any]) -> None:
    """Of a former algorithm, which a run's config.yaml spells out."""
    if algorithm != _algorithm(values) and isinstance(algorithm, str):
        for name, value in ALGORITHMS.get(algorithm, {}).items():
            if name in values["ppo"] and values["ppo"][name] == value:
                del values["ppo"][name]


def _plain(value: Any, key: str = "") -> Any:
    """A copy in values that config.yaml holds exactly: texts, numbers, booleans, null, lists, and mappings
    with such keys. Dates and paths become texts.

    Raises:
        ConfigError: any other value, named by its key.
    """
    try:
        if isinstance(value, Mapping):
            return {
                _plain_constant(k, key): _plain(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [_plain(entry, f"{key}.{i}") for i, entry in enumerate(value)]
    except RecursionError as error:
        raise ConfigError(f"{key.split('.')[0]}: lists and mappings are nested too deep") from error
    return _plain_constant(value, key)


def _plain_constant(value: Any, key: str) -> str | float | bool | None:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (datetime.date, datetime.time)):
        return str(value)
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, str):
        return str.__str__(value)  # of an enumeration, too
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if hasattr(value, "tolist"):
        instead = "give its .tolist()"
    elif isinstance(value, (set, frozenset)):
        instead = "give sorted(...)"
    else:
        instead = "give texts, numbers, lists or mappings"
    raise ConfigError(f"{key}: config.yaml cannot hold a {type(value).__name__}; {instead}")


def _spell_out(values: dict[str, Any]) -> None:
    """Replaces short forms: an empty section, one thing instead of a list of one, a reward's name alone."""
    for section in ("sampling", "ppo", "train"):
        if section in values and values[section] is None:
            values[section] = {}
    if isinstance(values.get("sampling"), dict):
        values["sampling"].setdefault("num_samples", 4)
    for section, name in (("lora", "targets"), ("train", "report_to"), ("swarm", "initial_peers")):
        if isinstance(values.get(section), dict) and isinstance(values[section].get(name), str):
            values[section][name] = [values[section][name]]
    if isinstance(values.get("reward"), (str, dict)):
        values["reward"] = [values["reward"]]
    if isinstance(values.get("reward"), list):
        parts = [{"function": part} if isinstance(part, str) else part for part in values["reward"]]
        values["reward"] = parts
        for i, part in enumerate(parts):
            if isinstance(part, dict) and isinstance(part.get("label"), bool):  # yes, no, on and off in YAML
                raise ConfigError(
                    f"reward.{i}.label: YAML reads {part['label']}; put a label such as yes or no in quotes"
                )
    _expand_home(values)


def _expand_home(values: dict[str, Any]) -> None:
    """Replaces `~` wherever a path may stand."""
    places: list[tuple[Any, str]] = [(values, key) for key in ("model", "ref_adapter", "prompts", "output")]
    places.append((values.get("prompts"), "dataset"))
    held_out = values.get("evaluation")
    if isinstance(held_out, dict):
        places += [(held_out, "prompts"), (held_out.get("prompts"), "dataset")]
    rewards = values.get("reward")
    for part in rewards if isinstance(rewards, list) else []:
        places += [(part, "function"), (part, "model")]
    for section, key in places:
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = os.path.expanduser(section[key])
    if isinstance(values.get("output"), str) and values["output"].strip():
        values["output"] = str(Path(values["output"]))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two plain configurations, a line per key: "ppo.lr: 0.0001 -> 0.001"."""
    lines: list[str] = []
    for key in dict.fromkeys((*old, *new)):
        before = old.get(key)
        after = new.get(key)
        name = f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{name}.")
        elif before != after and content_digest(before) != content_digest(after):  # NaN differs from itself
            lines.append(f"{name}: {_short(before)} -> {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """Refuses a duplicate key, of which YAML would drop one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {name!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"there is no configuration file {path}"
            + (f"; {path.parent} has {', '.join(near)}" if near else "")
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must be a mapping with keys such as model, prompts, reward and output; "
            f"it holds {_short(values)}"
        )
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
    values[name] = _plain(value, key)


def _validated(values: dict[str, Any]) -> RunConfig:
    try:
        return TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        complaints = [_complaint(one) for one in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(complaints))) from error


def _complaint(error: Mapping[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    key, kind = ".".join(path), error["type"]
    if kind == "unexpected_keyword_argument":
        if len(path) == 1:
            for section in _fields(RunConfig):
                if key in _section_of([section]):
                    return f"unknown key {key!r}; did you mean {f'{section}.{key}'!r}?"
        return f"unknown key {key!r}; {closest(path[-1], _section_of(path[:-1]))}"
    if kind in ("missing", "missing_argument"):
        return f"the key {key!r} is missing"
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    message = error["msg"][:1].lower() + error["msg"][1:].replace("a valid tuple", "a list")
    return f"{key}: {message}, got {_short(error['input'])}"


def _section_of(path: Sequence[str]) -> list[str]:
    """Field names of the section that a path of keys leads to, [] when it leads to no section.

    An index into a list does not count as a step of the path.
    """
    kind: Any = RunConfig
    for name in path:
        if not name.isdecimal():
            hint = typing.get_type_hints(kind).get(name)
            members = (hint, *_members(hint))
            kind = next((member for member in members if dataclasses.is_dataclass(member)), None)
        if kind is None:
            return []
    return _fields(kind)


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _members(hint: Any) -> list[Any]:
    """All types inside a hint such as `A | tuple[B, ...] | None`."""
    return [found for member in typing.get_args(hint) for found in (member, *_members(member))]
