"""Reinforcement learning (PPO) of language models too large for one machine.

LoRA adapters are trained inside a Petals swarm, or on this machine.

    from textrl_swarm import TextRLEnv, TextRLActor, train_agent_with_evaluation

Importing this package opens no socket, writes no log line and loads no model library: `__init__.pyi` lists
the names, and each is imported when first used. Importing it also lets `from petals import
DistributedBloomForCausalLM` work on today's libraries (see swarm/compat.py).
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

import lazy_loader

from textrl_swarm.swarm.compat import explained_changes, install_import_hook

_import_lazily, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    with explained_changes():  # names of transformers and peft that are not public may go
        return _import_lazily(name)


try:
    __version__ = version("textrl-swarm")
except PackageNotFoundError:  # the sources are on the path, but not installed
    __version__ = "unknown"

install_import_hook()
# When peft imports bitsandbytes, it warns on some processors about an optional kernel from the hub that
# nobody needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in str(record.msg)
)
