"""Everything a killed run needs to go on as if nothing had happened, written in one step and checked when read.

    checkpoints/iteration_000012/   adapter_config.json, adapter_model.safetensors, value_head.safetensors, learner.pt (optimizer, KL
                                    coefficient, counters), state.json (prompt order, random numbers, digests of these files)
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

import numpy as np
import torch
from safetensors import SafetensorError

from textrl_swarm.agent import PPOAgent
from textrl_swarm.env import TextRLEnv
from textrl_swarm.errors import CheckpointError
from textrl_swarm.files import published, sha256
from textrl_swarm.policy import Policy
from textrl_swarm.rollout import Sampled
from textrl_swarm.types import RolloutBatch

logger = logging.getLogger(__name__)

CHECKPOINTS, STATE, PENDING = "checkpoints", "state.json", "pending_rollout.pt"
_NAME = "iteration_{:06d}"


def save_checkpoint(run: Path, iteration: int, agent: PPOAgent, env: TextRLEnv, inputs: Mapping[str, str], *, keep: int) -> Path:
    """Writes the state after `iteration` iterations; the newest `keep` checkpoints stay, and the pending rollout goes.

    Args:
        inputs: name -> digest of what the run depends on and the configuration does not hold, compared on resuming.

    Raises:
        CheckpointError: it cannot be written.
    """
    directory = run / CHECKPOINTS / _NAME.format(iteration)
    with _writing(directory), published(directory) as staging:
        agent.save(str(staging))
        state = {
            "iteration": iteration,
            "base_model": base_fingerprint(agent.policy),
            "base_states": _base_states(agent.policy),
            "inputs": dict(inputs),
            "prompt_order": env.state_dict(),
            "random": _random_state(),
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


def load_newest(run: Path, agent: PPOAgent, env: TextRLEnv, inputs: Mapping[str, str], *, accept_changes: bool = False) -> int:
    """Takes over the newest undamaged checkpoint; returns the number of iterations it has behind it, 0 when there is none.

    Raises:
        CheckpointError: all are damaged, the newest is from another base model, or an input changed (unless `accept_changes`).
    """
    found = checkpoints(run)
    for directory in reversed(found):
        damage = damage_of(directory)
        if damage is None:
            return _load(directory, agent, env, inputs, accept_changes)
        logger.warning("%s is damaged (%s); trying the one before", directory, damage)
    if found:
        raise CheckpointError(f"all checkpoints in {run / CHECKPOINTS} are damaged; move {run} away to start anew")
    return 0


def _load(directory: Path, agent: PPOAgent, env: TextRLEnv, inputs: Mapping[str, str], accept_changes: bool) -> int:
    state = json.loads((directory / STATE).read_text(encoding="utf-8"))
    if state["base_model"] != base_fingerprint(agent.policy):
        raise CheckpointError(f"{directory} was trained on another base model than {agent.policy.base_model}; give the run another output")
    changed = [name for name in (*inputs, *state["inputs"].keys() - inputs.keys()) if state["inputs"].get(name) != inputs.get(name)]
    if not _alike(state.get("base_states"), _base_states(agent.policy)):
        changed.append("the base model's blocks")
    if changed and not accept_changes:
        raise CheckpointError(
            f"since {directory} was written, the contents of {', '.join(changed)} changed; "
            "restore them, give the run another output, or go on all the same with --accept-changes"
        )
    agent.load(str(directory))
    if "prompts" not in changed:
        env.load_state_dict(state["prompt_order"])
    _restore_random_state(state["random"])
    return state["iteration"]


def damage_of(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when they are as they were written."""
    try:
        files = json.loads((directory / STATE).read_text(encoding="utf-8"))["files"]
        return next((f"{name} is not what was written" for name, digest in files.items() if sha256(directory / name) != digest), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return repr(error)


def base_fingerprint(policy: Policy) -> str:
    """Tells base models of equal shapes apart: a digest of what the output embeddings make of four unit vectors (no rounding in that)."""
    probe = torch.eye(4, policy.hidden_size, device=policy.device)
    with torch.no_grad():
        columns = policy.project(probe).float().cpu().contiguous()
    return f"{policy.vocab_size}x{policy.hidden_size}:{hashlib.sha256(columns.numpy().tobytes()).hexdigest()[:16]}"


def _base_states(policy: Policy) -> list[float]:
    """Some numbers of what the base model's blocks, of which the fingerprint knows nothing, make of a few tokens."""
    tokens = torch.arange(4, device=policy.device)[None] % policy.vocab_size
    with torch.no_grad(), policy.adapter_disabled():
        return policy.hidden_states(policy.features(tokens))[0, -1, :16].float().cpu().tolist()


def _alike(before: Sequence[float] | None, now: Sequence[float]) -> bool:
    """Up to what other processors and servers round differently."""
    return before is None or max(abs(a - b) for a, b in zip(before, now, strict=True)) <= 0.05 * max(map(abs, before))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own for a full disk
        raise CheckpointError(
            f"{path} cannot be written ({error}); what was written before is whole: make room, and type the same command"
        ) from error


# ------------------------------------------------------------------------------------------ the rollout under way


def save_pending(run: Path, iteration: int, sampled: Sampled) -> None:
    """Keeps sampled responses until they were trained on: what a swarm said slowly need not be said again."""
    rollout = {field.name: getattr(sampled.rollout, field.name) for field in dataclasses.fields(RolloutBatch)}
    kept = {"iteration": iteration, "num_prompts": len(sampled.items), "seconds": sampled.seconds, "rollout": rollout}
    part = run / f".{PENDING}.part"
    with _writing(run / PENDING):
        torch.save(kept, part)
        part.replace(run / PENDING)


def load_pending(run: Path, iteration: int, env: TextRLEnv) -> Sampled | None:
    """The responses that were sampled for this iteration before the run ended, if any; their prompts then count as drawn."""
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
    items = env.draw(kept["num_prompts"])
    prompts = [ids for item in items for ids in [env.encode(item)] * env.compare_sample]
    if kept["iteration"] != iteration or prompts != _prompts(rollout):
        env.load_state_dict(order)
        return None
    return Sampled(tuple(items), rollout, kept["seconds"])


def _prompts(rollout: RolloutBatch) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(rollout.tokens, rollout.prompt_lengths.tolist(), strict=True)]


# ------------------------------------------------------------------------------------------ random numbers


def _random_state() -> dict:
    """Of the global generators, which rewards may use."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def _restore_random_state(state: Mapping[str, Sequence]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))
