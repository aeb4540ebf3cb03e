"""The floors of the package: an import goes to the same floor or to one below it, and each foreign package has one door.

A new file needs a line in FLOORS: where it stands is a decision, not an accident. Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "textrl_swarm"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# Floor: (its modules, the floors right below it). Modules without the package name; files that do not exist yet are fine.
# The client side of the swarm stands on the handler and on nothing else of the server side: hivemind makes a client's stub from the
# handler's class. The server side does not see the client side.
FLOORS: dict[str, tuple[str, list[str]]] = {
    "words": ("errors types config files display time_limit", []),
    "parts": ("sampling texts returns losses value_head adapters base_model estimate", ["words"]),
    "swarm.common": ("swarm.__init__ swarm.compat swarm.protocol", ["parts"]),
    "swarm.adapter_store": ("swarm.adapter_store", ["swarm.common"]),
    "swarm.backend": ("swarm.backend", ["swarm.adapter_store"]),
    "swarm.handler": ("swarm.handler", ["swarm.backend"]),
    "swarm.server": ("swarm.server", ["swarm.handler"]),
    "swarm.rpc": ("swarm.rpc", ["swarm.handler"]),
    "swarm.routing": ("swarm.routing", ["swarm.rpc"]),
    "swarm.chain": ("swarm.chain swarm.autograd", ["swarm.routing"]),
    "swarm.session": ("swarm.session", ["swarm.chain"]),
    "swarm.client": ("swarm.client swarm.survey", ["swarm.session"]),
    "swarm.local": ("swarm.local", ["swarm.server", "swarm.client"]),
    "policies": ("policy local_policy swarm_policy generation tiny", ["swarm.local"]),
    "rollouts": ("rewards reward_files reward_models prompts env rollout", ["policies"]),
    "agents": ("ppo agent actor", ["rollouts"]),
    "training": ("checkpoint training trackers", ["agents"]),
    "runs": ("run_config run plain_check export export_source", ["training"]),
    "faces": ("demo serving status train_command cli __init__ __main__", ["runs"]),
}
FLOOR_OF = {module: floor for floor, (modules, _) in FLOORS.items() for module in modules.split()}

# Foreign package: the modules that may import it; a trailing dot stands for a whole folder.
DOORS: dict[str, tuple[str, ...]] = {
    "petals": ("swarm.",),
    "hivemind": ("swarm.",),
    "tensor_parallel": ("swarm.",),
    "peft": (
        "adapters",
        "local_policy",
        "policy",
        "plain_check",
        "swarm.compat",
    ),  # compat only puts back a name that petals looks for in peft
    "pfrl": ("agent", "actor", "env", "training"),
    "gym": ("agent", "actor", "env", "training"),
    "bitsandbytes": ("local_policy",),
}


def floors_within_reach(floor: str) -> set[str]:
    """The floor itself and everything below it."""
    return {floor}.union(*(floors_within_reach(below) for below in FLOORS[floor][1]))


def modules_on_disk() -> dict[str, Path]:
    """Module name without the package name ("swarm.__init__", "errors") -> file."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def imported_names(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each thing imported; `from a import b` gives a.b, whether b is a module or not.

    `importlib.import_module` and `__import__` count when their argument is written out.
    """
    package = [PACKAGE, *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from ((node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value


def own_module(name: str) -> str:
    """The module of the package that a dotted name leads to: textrl_swarm.errors.ConfigError -> errors, textrl_swarm.x -> __init__."""
    known = FLOOR_OF.keys() | modules_on_disk().keys()
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        for candidate in (".".join(parts[:length]), ".".join([*parts[:length], "__init__"])):
            if candidate in known:
                return candidate
    return "__init__"


def violations(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one file, a sentence each."""
    if module not in FLOOR_OF:
        return [f"{module} has no floor: add it to FLOORS in tests/test_floors.py, where it belongs"]
    reach, found = floors_within_reach(FLOOR_OF[module]), []
    for line, name in imported_names(ast.parse(source), module):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if top == PACKAGE:
            target = own_module(name)
            if target == "__init__":
                found.append(f"{where}: name the module it lives in, not the package root")
            elif target in FLOOR_OF and FLOOR_OF[target] not in reach:
                found.append(f"{where}: {FLOOR_OF[module]} must not know {FLOOR_OF[target]}, which is not below it")
        elif top in DOORS and not any(module == door or (door.endswith(".") and module.startswith(door)) for door in DOORS[top]):
            found.append(f"{where}: only {', '.join(DOORS[top])} may")
    return found


def test_every_import_goes_down():
    modules = modules_on_disk()
    assert "errors" in modules, f"no package found under {ROOT}"
    found = [text for module, path in modules.items() for text in violations(path.read_text(encoding="utf-8"), module)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("losses", "from textrl_swarm.agent import PPO", "parts must not know agents"),
        ("losses", "import textrl_swarm.training", "parts must not know training"),
        ("losses", "from textrl_swarm import rollout", "parts must not know rollouts"),
        ("losses", "from .policy import load_policy", "parts must not know policies"),
        ("errors", "def f():\n    from textrl_swarm.losses import ppo_loss", "errors:2 imports"),
        ("config", "from importlib import import_module\nimport_module('textrl_swarm.cli')", "words must not know faces"),
        ("swarm.routing", "from textrl_swarm.swarm.session import Session", "swarm.routing must not know swarm.session"),
        ("swarm.routing", "from . import client", "swarm.routing must not know swarm.client"),
        ("swarm.session", "from textrl_swarm.swarm.server import X", "swarm.session must not know swarm.server"),
        ("swarm.server", "from textrl_swarm.swarm.rpc import X", "swarm.server must not know swarm.rpc"),
        ("swarm.server", "from ..local_policy import X", "swarm.server must not know policies"),
        ("swarm.__init__", "from textrl_swarm.swarm.local import LocalSwarm", "swarm.common must not know swarm.local"),
        ("cli", "import textrl_swarm", "not the package root"),
        ("cli", "from textrl_swarm import load_policy", "not the package root"),
        ("swarm.compat", "from .. import __version__", "not the package root"),
        ("policy", "import petals", "only swarm. may"),
        ("swarm_policy", "from hivemind.p2p import PeerID", "only swarm. may"),
        ("training", "import peft.utils as u", "only adapters, local_policy, policy, plain_check, swarm.compat may"),
        ("rollout", "from pfrl.agents import PPO", "only agent, actor, env, training may"),
        ("adapters", "import bitsandbytes as bnb", "only local_policy may"),
        ("swarm.telepathy", "", "swarm.telepathy has no floor"),
    ],
)
def test_a_wrong_import_is_caught(module, source, expected):
    found = violations(source, module)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses", "import torch\nfrom textrl_swarm.returns import whiten\nfrom textrl_swarm.config import PPOConfig"),
        ("swarm.local", "from textrl_swarm.swarm.server import main\nfrom textrl_swarm.swarm.client import Client"),
        ("swarm.session", "from textrl_swarm.swarm import compat, protocol\nfrom .chain import f\nfrom ..errors import ConfigError"),
        ("__init__", "from textrl_swarm.training import train_agent_with_evaluation\nfrom .cli import main"),
        ("agent", "import pfrl\nfrom textrl_swarm.tiny import make"),
        ("swarm.backend", "import petals.server.backend, hivemind"),
    ],
)
def test_a_right_import_passes(module, source):
    assert violations(source, module) == []


def test_the_table_makes_sense():
    listed = [module for modules, _ in FLOORS.values() for module in modules.split()]
    assert len(listed) == len(set(listed)), "a module stands on two floors"
    order = list(FLOORS)
    assert all(order.index(below) < order.index(floor) for floor, (_, belows) in FLOORS.items() for below in belows), "low to high"
    assert floors_within_reach(order[-1]) == set(order), "the top floor reaches every floor"
