"""No call in the package runs code that comes from a file or from another machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("textrl_swarm", "launchers", "examples")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# What reads objects with their code, or runs text.
FORBIDDEN = {
    "eval", "exec", "compile",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
    "dill.load", "dill.loads",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "shelve.open", "pandas.read_pickle",
    "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "jsonpickle.decode",
    "multiprocessing.connection.Listener", "multiprocessing.connection.Client",
}  # fmt: skip


def forbidden(text: str) -> Iterator[str]:
    """What a source does that it must not."""
    tree = ast.parse(text)
    names: dict[str, str] = {}  # as it is called here -> what it is
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            called = f"{names.get(head, head)}{dot}{rest}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in FORBIDDEN:
                yield f"line {node.lineno}: {called}"
            if called == "torch.load" and given.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if called in ("numpy.load", "np.load") and given.get("allow_pickle", "False") != "False":
                yield f"line {node.lineno}: numpy.load with allow_pickle"
            if called == "yaml.load" and not _is_safe(tree, node, given):
                yield f"line {node.lineno}: yaml.load with an unsafe loader"
            if given.get("trust_remote_code", "False") != "False":
                yield f"line {node.lineno}: trust_remote_code"
            if given.get("shell", "False") != "False":
                yield f"line {node.lineno}: shell"


def _is_safe(tree: ast.Module, call: ast.Call, given: dict[str | None, str]) -> bool:
    """Whether the loader is yaml's safe one, or a class of this file that is made from it."""
    loader = given.get("Loader") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "")
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    made = {one.name for one in classes if [ast.unparse(base) for base in one.bases] == ["yaml.SafeLoader"]}
    return loader == "yaml.SafeLoader" or loader in made


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert not list(forbidden(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.loads(data)",
        "from pickle import loads as read\nread(data)",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "from torch import load\nload(path, weights_only=choice)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=asked)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "eval(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
    ],
)
def test_a_forbidden_call_is_found(text):
    assert list(forbidden(text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "model.eval()",
        "import re\nre.compile(pattern)",
        "import yaml\nclass Mine(yaml.SafeLoader): pass\nyaml.load(text, Mine)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_others_are_not(text):
    assert not list(forbidden(text))
