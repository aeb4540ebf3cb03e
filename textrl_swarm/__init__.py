"""Reinforcement learning (PPO) of language models too large for one machine: LoRA adapters trained inside a Petals swarm, or locally.

    from textrl_swarm import TextRLEnv, TextRLActor, train_agent_with_evaluation

Importing this package opens no socket, writes no log line and loads no model library; names are fetched when first used. It also lets
`from petals import DistributedBloomForCausalLM` work on today's libraries (see swarm/compat.py).
"""

from __future__ import annotations

import importlib
import logging

from textrl_swarm.swarm.compat import install_import_hook

__version__ = "0.1.0"

_HOMES = {
    "TextRLEnv": "env",
    "TextRLActor": "actor",
    "PPOAgent": "agent",
    "train": "training",
    "train_agent_with_evaluation": "training",
    "Evaluator": "training",
    "save_agent": "training",
    "load_policy": "policy",
    "Policy": "policy",
    "LoraSettings": "config",
    "SamplingConfig": "config",
    "PPOConfig": "config",
    "PPO": "ppo",
    "RolloutBatch": "types",
    "LocalSwarm": "swarm.local",
    "reward_model": "reward_models",
    "CombinedReward": "rewards",
    "rank_rewards": "rewards",
    "group_baseline": "rewards",
    "load_prompts": "prompts",
    "load_config": "run_config",
    "TextRLSwarmError": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'textrl_swarm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"textrl_swarm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


install_import_hook()
# bitsandbytes, which peft imports, says on some processors that an optional kernel of the hub is not installed: no news to a user.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
