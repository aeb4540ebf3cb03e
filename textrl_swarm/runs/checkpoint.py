"""Everything that a killed run needs to continue as if it had not been killed, written in one step, checked
on reading.

    checkpoints/iteration_000012/   adapter_config.json, adapter_model.safetensors, value_head.safetensors,
                                    learner.pt (optimizer, KL coefficient, counters), state.json (prompt
                                    order, random numbers, digests of these files)
    pending_rollout.pt              responses of the iteration under way: sampled, not yet trained on

Knows nothing about configuration files or terminals.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from textrl_swarm.errors import CheckpointError
from textrl_swarm.files import published, replaced_file, sha256
from textrl_swarm.learning.env import PromptEnv
from textrl_swarm.learning.learner import Learner
from textrl_swarm.learning.rollout import Sampled
from textrl_swarm.policies.base import Policy
from textrl_swarm.types import RolloutBatch

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
STATE = "state.json"
PENDING = "pending_rollout.pt"
_NAME = "iteration_{:06d}"


def save_checkpoint(
    run: Path, iteration: int, learner: Learner, env: PromptEnv, inputs: Mapping[str, str], *, keep: int
) -> Path:
    """Writes the state after `iteration` iterations; keeps the newest `keep` checkpoints, removes the pending
    rollout.

    Args:
        inputs: name -> digest of what the run depends on and the configuration does not hold, compared on
            resuming.

    Raises:
        CheckpointError: it cannot be written.
    """
    directory = run / CHECKPOINTS / _NAME.format(iteration)
    with _writing(directory), published(directory) as staging:
        learner.save(staging)
        state = {
            "iteration": iteration,
            "base_model": base_fingerprint(learner.policy),
            "base_states": _base_states(learner.policy),
            "inputs": dict(inputs),
            "prompt_order": env.state_dict(),
            "random": random_state(),
            "files": {path.name: sha256(path) for path in sorted(staging.iterdir())},
        }
        (staging / STATE).write_text(json.dumps(state), encoding="utf-8")
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    (run / PENDING).unlink(missing_ok=True)
    return directory


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / CHECKPOINTS).glob("iteration_*") if (path / STATE).is_file())


def load_newest(
    run: Path, learner: Learner, env: PromptEnv, inputs: Mapping[str, str], *, accept_changes: bool = False
) -> int:
    """Loads the newest undamaged checkpoint; returns how many iterations it has behind it, 0 without a
    checkpoint.

    Raises:
        CheckpointError: all are damaged, the newest is from another base model, or an input changed (unless
            `accept_changes`).
    """
    found = checkpoints(run)
    for directory in reversed(found):
        damage = damage_of(directory)
        if damage is None:
            return _load(directory, learner, env, inputs, accept_changes)
        logger.warning("%s is damaged (%s); trying the one before", directory, damage)
    if found:
        raise CheckpointError(
            f"all checkpoints in {run / CHECKPOINTS} are damaged; move {run} away to start anew"
        )
    return 0


def _load(
    directory: Path, learner: Learner, env: PromptEnv, inputs: Mapping[str, str], accept_changes: bool
) -> int:
    state = json.loads((directory / STATE).read_text(encoding="utf-8"))
    policy = learner.policy
    if state["base_model"] != base_fingerprint(policy):
        raise CheckpointError(
            f"{directory} was trained on another base model than {policy.base_model}; "
            "give the run another output"
        )
    saved = state["inputs"]
    changed = [name for name in dict.fromkeys((*inputs, *saved)) if saved.get(name) != inputs.get(name)]
    if not _alike(state.get("base_states"), _base_states(policy)):
        changed.append("the base model's blocks")
    if changed and not accept_changes:
        raise CheckpointError(
            f"since {directory} was written, the contents of {', '.join(changed)} changed; "
            "restore them, give the run another output, or continue anyway with --accept-changes"
        )
    learner.load(directory)
    if "prompts" not in changed:
        env.load_state_dict(state["prompt_order"])
    restore_random_state(state["random"])
    return state["iteration"]


def damage_of(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when they are as they were written."""
    try:
        files = json.loads((directory / STATE).read_text(encoding="utf-8"))["files"]
        for name, digest in files.items():
            if sha256(directory / name) != digest:
                return f"{name} is not what was written"
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return repr(error)


def base_fingerprint(policy: Policy) -> str:
    """Tells base models of equal shapes apart: a digest of the output embeddings of four unit vectors,
    without rounding.
    """
    probe = torch.eye(4, policy.hidden_size, device=policy.device)
    with torch.no_grad():
        columns = policy.project(probe).float().cpu().contiguous()
    digest = hashlib.sha256(columns.numpy().tobytes()).hexdigest()[:16]
    return f"{policy.vocab_size}x{policy.hidden_size}:{digest}"


def _base_states(policy: Policy) -> list[float]:
    """Some hidden states of a few tokens, which depend on the blocks; `base_fingerprint` does not."""
    tokens = torch.arange(4, device=policy.device)[None] % policy.vocab_size
    with torch.no_grad(), policy.adapter_disabled():
        return policy.hidden_states(policy.features(tokens))[0, -1, :16].float().cpu().tolist()


def _alike(before: Sequence[float] | None, now: Sequence[float]) -> bool:
    """Whether they differ only by what other processors and servers round differently."""
    if before is None:
        return True
    largest_difference = max(abs(a - b) for a, b in zip(before, now, strict=True))
    return largest_difference <= 0.05 * max(map(abs, before))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    # torch and safetensors have errors of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}). Everything written before is intact: "
            "free some space and rerun the command to resume."
        ) from error


# ----------------------------------------------------------------------------- the rollout under way


def save_pending(run: Path, iteration: int, sampled: Sampled) -> None:
    """Keeps sampled responses until they are trained on, so that a restart does not repeat expensive
    sampling.
    """
    fields = dataclasses.fields(RolloutBatch)
    kept = {
        "iteration": iteration,
        "num_prompts": len(sampled.items),
        "seconds": sampled.seconds,
        "rollout": {field.name: getattr(sampled.rollout, field.name) for field in fields},
    }
    with _writing(run / PENDING), replaced_file(run / PENDING) as part:
        torch.save(kept, part)


def load_pending(run: Path, iteration: int, env: PromptEnv) -> Sampled | None:
    """The responses sampled for this iteration before the run ended, if any; their prompts then count as
    drawn.
    """
    path = run / PENDING
    if not path.is_file():
        return None
    try:
        kept = torch.load(path, weights_only=True)
        rollout = RolloutBatch(**kept["rollout"])
    except Exception as error:  # a torn file can fail in any way; the responses are sampled again then
        logger.warning("%s cannot be read (%r); its responses are sampled again", path, error)
        return None
    order = env.state_dict()
    prompts = env.draw(kept["num_prompts"])
    expected = [list(prompt.ids) for prompt in prompts for _ in range(env.compare_sample)]
    found = [one.prompt.tolist() for one in rollout.trajectories()]
    if kept["iteration"] != iteration or found != expected:
        env.load_state_dict(order)
        return None
    return Sampled(tuple(prompt.item for prompt in prompts), rollout, kept["seconds"])


# ------------------------------------------------------------------------------------ random numbers


def random_state() -> dict[str, Any]:
    """The states of the global generators, which rewards may use."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Puts them back."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
    torch_state = bytearray(base64.b64decode(state["torch"]))
    torch.set_rng_state(torch.frombuffer(torch_state, dtype=torch.uint8))
