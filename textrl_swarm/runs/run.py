"""A training run in a directory: built from a configuration, continued where it ended.

    config.yaml  metrics.jsonl  samples.jsonl  tensorboard/  checkpoints/  pending_rollout.pt
    evaluations.jsonl and best/ with held-out prompts
    adapter/ and summary.json at the end

Every iteration is on the disk before the next begins. Knows nothing about terminals.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from textrl_swarm.config import ServerChecks
from textrl_swarm.errors import AdapterError, CheckpointError, ConfigError, ModelError
from textrl_swarm.files import published, sha256, tidy, write_text
from textrl_swarm.learning.env import PromptEnv
from textrl_swarm.learning.learner import Learner
from textrl_swarm.learning.loop import Iteration, train
from textrl_swarm.learning.rollout import Sampled
from textrl_swarm.models.adapter_files import ADAPTER_WEIGHTS
from textrl_swarm.models.base_model import BaseModel, resolve
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.generation import check_lengths
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.rewards.classifiers import reward_model
from textrl_swarm.rewards.combine import CombinedReward
from textrl_swarm.rewards.files import load_reward
from textrl_swarm.rewards.functions import SentenceReward, StepReward
from textrl_swarm.runs.checkpoint import (
    CHECKPOINTS,
    checkpoints,
    load_newest,
    load_pending,
    save_checkpoint,
    save_pending,
)
from textrl_swarm.runs.config import HEADER, RewardConfig, RunConfig, differences, load_config
from textrl_swarm.runs.digest import content_digest
from textrl_swarm.runs.evaluation import Evaluations
from textrl_swarm.runs.prompts import load_prompts
from textrl_swarm.runs.trackers import Trackers, read_metrics
from textrl_swarm.types import Item

CONFIG = "config.yaml"
ADAPTER = "adapter"
SUMMARY = "summary.json"
LOCK = ".lock"
REFUTED = "refuted.jsonl"

# Keys that may differ when a run is continued: they do not change what is learned, or only for how long.
_FREE = (
    "output",
    "train.iterations",
    "train.samples_every",
    "train.keep_checkpoints",
    "train.report_to",
    "train.reward_timeout_s",
    "swarm.initial_peers",
    "swarm.timeouts",
    "swarm.checks",
    "swarm.access",
    "swarm.local_blocks",
    "evaluation",
)


# -------------------------------------------------------------------------------------- before a run


@dataclass(frozen=True)
class Ingredients:
    """What a configuration names, found and checked: cheap, and before any large model is loaded."""

    model: BaseModel
    prompts: list[Item]
    held_out: list[Item]
    """For evaluations."""

    reward: StepReward | SentenceReward


def read_ingredients(config: RunConfig) -> Ingredients:
    """Raises ConfigError, ModelError, PromptError, RewardError, AdapterError."""
    model = resolve(config.model)
    if config.ref_adapter is not None and not (Path(config.ref_adapter) / ADAPTER_WEIGHTS).is_file():
        raise AdapterError(
            f"ref_adapter: {config.ref_adapter} holds no adapter: there is no {ADAPTER_WEIGHTS}"
        )
    prompts = load_prompts(config.prompts)
    held_out = load_prompts(config.evaluation.prompts) if config.evaluation else []
    parts = [(_reward(part, config.device), part.weight) for part in config.reward]
    is_single = len(parts) == 1 and parts[0][1] == 1
    return Ingredients(model, prompts, held_out, parts[0][0] if is_single else CombinedReward(*parts))


def _reward(part: RewardConfig, device: str | None) -> Any:
    if part.function is not None:
        return load_reward(part.function)
    assert part.model is not None, "RewardConfig checks that there is a function or a model"
    return reward_model(part.model, part.label, with_prompt=part.with_prompt, device=device)


@contextlib.contextmanager
def open_policy(config: RunConfig, model: BaseModel) -> Iterator[Policy]:
    """The policy that a configuration describes, on the model that it names."""
    swarm: dict[str, Any] = {}
    if config.swarm is not None:
        swarm = {
            "initial_peers": list(config.swarm.initial_peers),
            "dht_prefix": config.swarm.dht_prefix,
            "timeouts": config.swarm.timeouts,
            "codec": config.swarm.codec,
            "checks": _checks(config),
            "access": config.swarm.access,
            "local_blocks": config.swarm.local_blocks,
        }
    with load_policy(
        model,
        **swarm,
        quantization=config.quantization,
        lora=config.lora,
        dtype=None if config.dtype is None else getattr(torch, config.dtype),
        device=config.device,
        seed=config.seed,
        ref_adapter=config.ref_adapter,
        gradient_checkpointing=config.gradient_checkpointing,
    ) as policy:
        yield policy


def _checks(config: RunConfig) -> ServerChecks | None:
    """Servers that a run refutes stay refuted when it is continued."""
    assert config.swarm is not None, "only servers are checked"
    checks = config.swarm.checks
    if checks is None or checks.record is not None:
        return checks
    return replace(checks, record=str(Path(config.output) / REFUTED))


# ------------------------------------------------------------------------------------------- the run


class Run:
    """One run: `iterations()` runs the remaining iterations, `finish()` writes the adapter and a summary.

    Args:
        config: of the run; `config.output` may hold the same run, which is then continued.
        policy: made by `open_policy`.
        accept_changes: continue although the configuration or the prompts changed.

    Raises:
        PromptError: a prompt that does not fit the model.
        CheckpointError: the directory holds something else, or a run that cannot be continued.
    """

    def __init__(
        self, config: RunConfig, ingredients: Ingredients, policy: Policy, *, accept_changes: bool = False
    ):
        if policy.tokenizer is None:
            raise ModelError(
                f"{config.model} has no tokenizer; save one in its directory with tokenizer.save_pretrained"
            )
        self.config = config
        self.policy = policy
        self.directory = Path(config.output).absolute()  # a reward may change the current directory
        self.env = PromptEnv(
            policy.tokenizer,
            ingredients.prompts,
            ingredients.reward,
            max_length=config.sampling.max_new_tokens,
            compare_sample=config.sampling.num_samples,
            reward_timeout_s=config.train.reward_timeout_s,
            skip_special_tokens=config.train.skip_special_tokens,
        )
        self.env.seed(config.seed)
        if config.sampling.stop_token_ids is None:
            self.env.stop_also_at(policy.stop_ids)  # an impossible stop token ends the command here
        prompts = [prompt.ids for prompt in self.env.prompts()]
        check_lengths(policy, prompts, config.sampling.max_new_tokens)
        longest = max(map(len, prompts)) + config.sampling.max_new_tokens
        if config.ppo.micro_batch_tokens is not None and config.ppo.micro_batch_tokens < longest:
            raise ConfigError(
                f"ppo.micro_batch_tokens is {config.ppo.micro_batch_tokens}, but the longest prompt and its "
                f"response may have {longest} tokens, which are computed at once: set it to {longest} or more"
            )
        self.learner = Learner(policy, config.ppo, config.sampling)
        self._reward = ingredients.reward
        self._inputs = _inputs(config, ingredients)
        changed = changes(config)
        for seed in (torch.manual_seed, random.seed, np.random.seed):  # rewards may use any of these
            seed(config.seed)
        self.start = load_newest(
            self.directory, self.learner, self.env, self._inputs, accept_changes=accept_changes
        )
        self.evaluations: Evaluations | None = None
        if config.evaluation is not None:
            self.evaluations = Evaluations(
                config, ingredients.held_out, ingredients.reward, policy, self.directory, self.start
            )
        self._pending = None if changed else load_pending(self.directory, self.start, self.env)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text(self.directory / CONFIG, config.to_yaml())
        self.done = self.start

    def iterations(
        self,
        on_sampled: Callable[[], None] = lambda: None,
        on_evaluation: Callable[[], None] = lambda: None,
    ) -> Iterator[Iteration]:
        """Runs the remaining iterations; yields after each, when it is on the disk.

        Args:
            on_sampled: called between sampling and update.
            on_evaluation: called before the policy is evaluated.
        """
        settings = self.config.train

        def evaluated(done: int) -> dict[str, float]:
            if self.evaluations is None or not self.evaluations.is_due(done):
                return {}
            on_evaluation()
            return self.evaluations.run(done)

        def keep(index: int, sampled: Sampled) -> None:
            save_pending(self.directory, index, sampled)
            on_sampled()

        evaluated(self.start)
        iterations = train(
            self.learner,
            self.env,
            iterations=self.start if self.is_over else settings.iterations,
            prompts_per_iteration=settings.prompts_per_iteration,
            resample=settings.resample,
            start=self.start,
            sampled=self._pending,
            on_sampled=keep,
        )
        with Trackers(self.directory, settings.report_to, self.start, self.config.to_dict()) as trackers:
            for iteration in iterations:
                reward_parts: dict[str, float] = getattr(self._reward, "parts", {})
                parts = {f"reward/{name}": mean for name, mean in reward_parts.items()}
                done = iteration.index + 1
                scores = evaluated(done)
                trackers.metrics(done, {**iteration.metrics, **parts, **scores, "seconds": iteration.seconds})
                if self.shows_samples(iteration.index):
                    trackers.samples(done, samples(iteration))
                save_checkpoint(
                    self.directory, done, self.learner, self.env, self._inputs, keep=settings.keep_checkpoints
                )
                self.done = done
                yield iteration
                if self.is_over:
                    return

    @property
    def is_over(self) -> bool:
        """Whether evaluations ended the run before its last iteration."""
        return self.evaluations is not None and self.evaluations.is_over

    def shows_samples(self, index: int) -> bool:
        """Whether this iteration's samples are kept: the first, every n-th and the last are."""
        every = self.config.train.samples_every
        return every > 0 and (index % every == 0 or index + 1 == self.config.train.iterations)

    def finish(self) -> dict[str, Any]:
        """Writes `adapter/` and `summary.json`; returns the summary."""
        with published(self.directory / ADAPTER) as staging:
            self.policy.save_adapter(staging)
        lines = read_metrics(self.directory)
        summary = {
            "iterations": self.done,
            "adapter": str(Path(self.config.output) / ADAPTER),
            "base_model": self.policy.base_model,
            "seconds": sum(line["seconds"] for line in lines),  # of all iterations, in all processes
            "last": lines[-1] if lines else {},
        }
        if self.evaluations is not None and self.evaluations.best is not None:
            best = self.evaluations.best
            summary["best"] = {"iteration": best["iteration"], "score": best[self.evaluations.settings.by]}
        write_text(self.directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary


def samples(iteration: Iteration, limit: int = 8) -> list[dict[str, Any]]:
    """Prompt, response and score of some responses of an iteration: the first of each of the first
    prompts.
    """
    collected = iteration.collected
    scores = collected.scores.tolist()
    per_prompt = len(collected.rollout) // len(collected.items)
    rows = []
    for p, item in enumerate(collected.items[:limit]):
        i = p * per_prompt
        rows.append({"prompt": item["input"], "response": collected.rollout.texts[i], "score": scores[i]})
    return rows


# ------------------------------------------------------------------------------------- its directory


def changes(config: RunConfig) -> list[str]:
    """What differs from the configuration of the run in the same directory, a line per key; none when there
    is no such run.

    Raises:
        CheckpointError: the directory holds a file instead, or a configuration that is not ours.
    """
    directory = Path(config.output)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"output: {directory} is a file; name a directory")
    path = directory / CONFIG
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        if not text.startswith(HEADER) and not checkpoints(directory):
            raise CheckpointError(
                f"{path} is a file of your own, which the run would replace; "
                "move it away or name another output"
            )
        before = yaml.safe_load(text)
        with contextlib.suppress(ConfigError):  # keys that the run's version did not have yet
            before = load_config(before).to_dict()
        lines = differences(before, config.to_dict())
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the configuration of a run ({error}); move it away or name another output"
        ) from error
    free = tuple(f"{name}{end}" for name in _FREE for end in ":.")
    return [line for line in lines if not line.startswith(free)]


def require_unchanged(config: RunConfig) -> None:
    """Raises CheckpointError with what changed since the run in the same directory began, if it finished an
    iteration.
    """
    changed = changes(config)
    if changed and checkpoints(Path(config.output)):
        raise CheckpointError(
            f"{config.output} holds a run with another configuration:\n  " + "\n  ".join(changed) + "\n"
            "Restore it, name another output, or continue from the last checkpoint anyway with "
            "--accept-changes."
        )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a second process from training in the same directory. Raises ConfigError."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ConfigError(
                f"another process ({file.read().strip() or '?'}) is training in {directory}; "
                "wait for it, or name another output"
            ) from error
        # Workers that a reward forked outlive a killed trainer, and must not hold its lock.
        os.register_at_fork(after_in_child=file.close)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for written in (directory, directory / CHECKPOINTS):
            tidy(written)
        yield


def _inputs(config: RunConfig, ingredients: Ingredients) -> dict[str, str]:
    """Digests of what the configuration only names, except the reward's code: a mended reward may continue
    the run.
    """
    inputs = {"prompts": content_digest(ingredients.prompts)}
    if config.ref_adapter is not None:
        inputs["ref_adapter"] = sha256(Path(config.ref_adapter) / ADAPTER_WEIGHTS)
    return inputs
