"""The package root: names for users, errors in one tree, documented settings; importing has no effects."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import textrl_swarm
from textrl_swarm import TextRLSwarmError, config, errors
from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig, ServerChecks, Timeouts, field_docs
from textrl_swarm.errors import ConfigError
from textrl_swarm.runs.config import RewardConfig, RunConfig, SwarmConfig, TrainConfig

ROOT = Path(textrl_swarm.__file__).parent
SETTINGS = [
    LoraSettings,
    SamplingConfig,
    PPOConfig,
    ServerChecks,
    Timeouts,
    SwarmConfig,
    RewardConfig,
    TrainConfig,
    RunConfig,
]
ERRORS = [
    value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__
]


@pytest.mark.parametrize("name", textrl_swarm.__all__)
def test_every_name_can_be_imported(name):
    assert getattr(textrl_swarm, name).__module__.startswith(("textrl_swarm", "pfrl"))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="TextRLEnvy"):
        textrl_swarm.TextRLEnvy  # noqa: B018


def test_every_error_is_exported_documented_and_in_the_tree():
    for error in ERRORS:
        assert getattr(textrl_swarm, error.__name__) is error
        assert issubclass(error, TextRLSwarmError) and error.__doc__
        assert f" {error.__name__} " in f" {errors.__doc__}".replace("\n", " \n"), (
            f"draw {error.__name__} in the tree"
        )


def test_every_error_raised_on_purpose_is_in_the_tree():
    """`raise X(...)` of a builtin class is a defect; asserts and re-raised errors are not looked at."""
    # Python's own protocols.
    allowed = {"AttributeError", "KeyError", "KeyboardInterrupt", "NotImplementedError"}
    # Caught by the caller on the same floor.
    allowed |= {
        "TookTooLong",
        "TimeoutError",
        "EOFError",
        "Silence",
        "P2PHandlerError",
        "SystemExit",
        "UnicodeDecodeError",
    }
    allowed |= {"ConstructorError", "BadParameter", "Exit"}  # of PyYAML and typer, whose callers expect them
    found = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                called = node.exc.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                ours = {error.__name__ for error in ERRORS}
                if name[:1].isupper() and name not in ours | allowed:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} raises {name}")
    assert not found, "\n".join(found)


def test_the_version_has_one_home():
    assert textrl_swarm.__version__ == importlib.metadata.version("textrl-swarm")


@pytest.mark.parametrize("cls", SETTINGS)
def test_every_field_of_the_settings_is_documented(cls):
    docs = field_docs(cls)
    assert list(docs) == [field.name for field in dataclasses.fields(cls)]
    for name, text in docs.items():
        assert text.endswith(".") and text in " ".join(inspect.getdoc(cls).split()), f"help() shows {name}"


def test_settings_without_their_source_still_work(monkeypatch):
    monkeypatch.setattr(config.inspect, "getsource", lambda module: (_ for _ in ()).throw(OSError()))
    config.field_docs.cache_clear()
    assert config.document_fields(Timeouts) is Timeouts
    config.field_docs.cache_clear()


def imported_by(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


def test_importing_the_root_loads_no_library():
    assert not imported_by("import textrl_swarm") & {
        "torch",
        "transformers",
        "peft",
        "petals",
        "hivemind",
        "pfrl",
    }


def test_the_engine_of_a_yaml_run_imports_neither_pfrl_nor_gym():
    modules = imported_by(
        "import textrl_swarm.commands.train, textrl_swarm.policies.local, textrl_swarm.policies.remote"
    )
    assert "textrl_swarm.learning.learner" in modules
    assert not modules & {"pfrl", "gym"}


def test_a_typo_in_load_policy_is_answered_with_the_closest_name():
    with pytest.raises(
        ConfigError, match="unknown argument 'initial_peer' of load_policy; did you mean 'initial_peers'"
    ):
        textrl_swarm.load_policy("x", initial_peer=[])
    with pytest.raises(ConfigError, match=r"timeouts=.* is for a model in a swarm"):
        textrl_swarm.load_policy("x", timeouts=Timeouts())
