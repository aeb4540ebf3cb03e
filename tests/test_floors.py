"""The floors of the package: imports go down or stay on their floor, never in a circle.

Each foreign package has one door. A new folder or root file needs a line in FLOORS: where it stands is a
decision, not an accident. Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "textrl_swarm"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# Floor: (what stands on it, the floors right below it). A trailing dot stands for a whole folder; the longest
# match counts. The two sides of the swarm do not see each other: they share the floor below.
FLOORS: dict[str, tuple[str, list[str]]] = {
    "words": ("errors types config files display", []),
    "maths": ("maths.", ["words"]),
    "models": ("models.", ["maths"]),
    "decoders": ("decoders.", ["models"]),
    "swarm": ("swarm.", ["decoders"]),
    "swarm.server": ("swarm.server.", ["swarm"]),
    "swarm.client": ("swarm.client.", ["swarm"]),
    "policies": ("policies.", ["swarm.client"]),
    "rewards": ("rewards.", ["models"]),
    "learning": ("learning.", ["policies", "rewards"]),
    "textrl": ("textrl.", ["learning"]),
    "runs": ("runs.", ["learning"]),
    "export": ("export.", ["runs"]),
    "commands": ("commands.", ["swarm.server", "textrl", "export"]),
    "faces": ("cli __init__", ["commands"]),
}

# Foreign package: the files that may import it. compat only puts back a name that petals looks for in peft;
# plain_check runs alone, as a user's script would.
DOORS: dict[str, tuple[str, ...]] = {
    "petals": ("swarm.",),
    "hivemind": ("swarm.",),
    "tensor_parallel": ("swarm.",),
    "peft": ("models.adapters", "models.adapter_files", "export.plain_check", "swarm.compat"),
    "pfrl": ("textrl.door",),
    "gym": ("textrl.door",),
    "bitsandbytes": ("models.quantization",),
}


def matches(module: str, place: str) -> bool:
    """Whether a module ("swarm.compat") is a place ("swarm.compat") or lies in it ("swarm.")."""
    return module.startswith(place) if place.endswith(".") else module == place


def floor_of(module: str) -> str | None:
    places = [(place, floor) for floor, (listed, _) in FLOORS.items() for place in listed.split()]
    found = [(len(place), floor) for place, floor in places if matches(module, place)]
    return max(found)[1] if found else None


def floors_within_reach(floor: str) -> set[str]:
    """The floor itself and everything below it."""
    return {floor}.union(*(floors_within_reach(below) for below in FLOORS[floor][1]))


def modules_on_disk() -> dict[str, Path]:
    """Module name without the package name ("swarm.__init__", "errors") -> file."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))
    }


def imported_names(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import; `from a import b` gives a.b, whether b is a module or not.

    `importlib.import_module` and `__import__` count when their argument is written out.
    """
    package = [PACKAGE, *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = getattr(node.args[0], "value", None)
            if called in ("import_module", "__import__") and isinstance(argument, str):
                yield node.lineno, argument


def own_module(name: str, known: Iterable[str]) -> str:
    """Where a name leads: textrl_swarm.errors.ConfigError -> errors, textrl_swarm.x -> __init__."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        for candidate in (".".join(parts[:length]), ".".join([*parts[:length], "__init__"])):
            if candidate in known:
                return candidate
    return "__init__"


def violations(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one file, a sentence each."""
    floor = floor_of(module)
    if floor is None:
        return [f"{module} has no floor: add it to FLOORS in tests/test_floors.py, where it belongs"]
    known, reach, found = modules_on_disk(), floors_within_reach(floor), []
    for line, name in imported_names(ast.parse(source), module):
        top, where = name.split(".")[0], f"{module}:{line} imports {name}"
        if top == PACKAGE:
            target = own_module(name, known)
            if target == "__init__":
                found.append(f"{where}: name the module it lives in, not the package root")
            elif floor_of(target) not in reach:
                found.append(f"{where}: {floor} must not know {floor_of(target)}, which is not below it")
        elif top in DOORS and not any(matches(module, door) for door in DOORS[top]):
            found.append(f"{where}: only {', '.join(DOORS[top])} may")
    return found


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a loop, the first again at the end; empty when there are none."""
    graph = {}
    for module, source in sources.items():
        names = [
            name for _, name in imported_names(ast.parse(source), module) if name.split(".")[0] == PACKAGE
        ]
        graph[module] = {own_module(name, sources) for name in names} - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_import_goes_down():
    modules = modules_on_disk()
    assert "errors" in modules, f"no package found under {ROOT}"
    found = [text for module, path in modules.items() for text in violations(path.read_text("utf-8"), module)]
    assert not found, "\n" + "\n".join(found)


def test_no_circle():
    found = circle({module: path.read_text(encoding="utf-8") for module, path in modules_on_disk().items()})
    assert not found, " -> ".join(found)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("maths.losses", "from textrl_swarm.learning.ppo import PPO", "maths must not know learning"),
        ("maths.losses", "import textrl_swarm.runs.run", "maths must not know runs"),
        ("maths.losses", "from textrl_swarm.models import texts", "maths must not know models"),
        ("maths.losses", "from ..policies.base import Policy", "maths must not know policies"),
        ("errors", "def f():\n    from textrl_swarm.maths.losses import policy_loss", "errors:2 imports"),
        (
            "config",
            "from importlib import import_module\nimport_module('textrl_swarm.cli')",
            "must not know faces",
        ),
        ("swarm.protocol", "from textrl_swarm.swarm.client import chain", "swarm must not know swarm.client"),
        ("swarm.protocol", "from .server import backend", "swarm must not know swarm.server"),
        ("swarm.client.session", "from ..server.process import X", "swarm.client must not know swarm.server"),
        ("swarm.server.process", "from ..client.rpc import X", "swarm.server must not know swarm.client"),
        ("swarm.server.process", "from ...policies.local import X", "swarm.server must not know policies"),
        ("swarm.__init__", "from textrl_swarm.swarm.client.rpc import X", "swarm must not know swarm.client"),
        ("runs.run", "from textrl_swarm.textrl.agent import PPOAgent", "runs must not know textrl"),
        ("learning.ppo", "from textrl_swarm.textrl import agent", "learning must not know textrl"),
        ("textrl.agent", "from textrl_swarm.runs import run", "textrl must not know runs"),
        ("cli", "import textrl_swarm", "not the package root"),
        ("cli", "from textrl_swarm import load_policy", "not the package root"),
        ("swarm.compat", "from .. import __version__", "not the package root"),
        ("policies.base", "import petals", "only swarm. may"),
        ("policies.remote", "from hivemind.p2p import PeerID", "only swarm. may"),
        ("learning.rollout", "import peft.utils as u", "only models.adapters"),
        ("learning.rollout", "from pfrl.agents import PPO", "only textrl.door may"),
        ("textrl.agent", "import gym", "only textrl.door may"),
        ("models.texts", "import bitsandbytes as bnb", "only models.quantization may"),
        ("telepathy", "", "telepathy has no floor"),
    ],
)
def test_a_wrong_import_is_caught(module, source, expected):
    found = violations(source, module)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "maths.losses",
            "import torch\nfrom textrl_swarm.maths.returns import whiten\nfrom ..config import X",
        ),
        ("swarm.client.session", "from textrl_swarm.swarm import compat, protocol\nfrom ...errors import X"),
        ("swarm.client.session", "from .chain import f"),
        ("swarm.local", "import_module('textrl_swarm.swarm.compat')"),
        ("__init__", "from textrl_swarm.learning.loop import train\nfrom .cli import main"),
        ("textrl.door", "import pfrl\nfrom textrl_swarm.models.tiny import make"),
        ("swarm.server.backend", "import petals.server.backend, hivemind"),
    ],
)
def test_a_right_import_passes(module, source):
    assert violations(source, module) == []


def test_a_circle_is_caught():
    a, b = "from textrl_swarm.maths.b import x", "def f():\n    from textrl_swarm.maths import a"
    found = circle({"maths.a": a, "maths.b": b, "maths.c": "from .a import y"})
    assert set(found) == {"maths.a", "maths.b"}
    assert circle({"maths.a": a, "maths.b": "", "maths.c": "from .a import y"}) == []


def test_the_tables_make_sense():
    order = list(FLOORS)
    for floor, (_, belows) in FLOORS.items():
        assert all(order.index(below) < order.index(floor) for below in belows), "low to high"
    assert floors_within_reach(order[-1]) == set(order), "the top floor reaches every floor"


@pytest.mark.parametrize(
    "place", sorted({p for listed, _ in FLOORS.values() for p in listed.split()}.union(*DOORS.values()))
)
def test_every_name_in_the_tables_exists(place):
    assert any(matches(module, place) for module in modules_on_disk()), f"{place} is not in the package"
