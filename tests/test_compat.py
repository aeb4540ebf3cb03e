"""PyPI's petals on today's libraries: it imports, leaves no trace elsewhere, names what libraries changed.

Everything here happens in processes of its own: what is tested is the state of an interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import pytest


def python(script: str, *arguments: str) -> str:
    """Runs a script; returns its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_leaves_no_trace():
    """Nothing of petals until somebody asks for it; never an environment variable or a root handler."""
    out = python(
        """
        import logging, os, sys
        environment, handlers, level = dict(os.environ), list(logging.root.handlers), logging.root.level

        def changes():
            now = dict(os.environ)
            allowed = {"BITSANDBYTES_NOWELCOME"}  # petals itself sets this one, for good
            known = now.keys() | environment.keys()
            names = {name for name in known if now.get(name) != environment.get(name)} - allowed
            return sorted(names), logging.root.handlers == handlers and logging.root.level == level

        import textrl_swarm
        assert not {"petals", "hivemind"} & sys.modules.keys(), "loaded before anybody asked"
        assert changes() == ([], True), changes()
        from petals import AutoDistributedModelForCausalLM
        from petals import DistributedBloomForCausalLM, DistributedLlamaForCausalLM
        from petals.server.server import Server
        assert changes() == ([], True), changes()
        import hivemind
        assert hivemind.PeerID and hivemind.MSGPackSerializer
        assert not hasattr(hivemind, "no_such_name")
        print("fine")
        """
    )
    assert out.endswith("fine\n")


@pytest.mark.slow  # a fresh process
def test_the_users_own_settings_win():
    out = python(
        """
        import os
        os.environ["PETALS_LOGGING"] = "False"
        os.environ["PETALS_IGNORE_DEPENDENCY_VERSION"] = "yes"
        import textrl_swarm, petals
        print(os.environ["PETALS_LOGGING"], os.environ["PETALS_IGNORE_DEPENDENCY_VERSION"])
        """
    )
    assert out == "False yes\n"


@pytest.mark.slow  # a fresh process
def test_the_hook_may_be_installed_twice():
    out = python(
        """
        import sys
        import textrl_swarm
        from textrl_swarm.swarm.compat import install_import_hook, require_petals
        before = len(sys.meta_path)
        install_import_hook()
        assert len(sys.meta_path) == before
        assert require_petals() is require_petals()
        import importlib.resources, petals.cli
        print(importlib.resources.files("petals").joinpath("__init__.py").is_file())
        """
    )
    assert out == "True\n"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformers.core_model_loading", "rename_source_key"),
        pytest.param("transformers.integrations.moe", "_grouped_linear", marks=pytest.mark.slow),
        pytest.param("peft.tuners.lora.layer", "ParamWrapper", marks=pytest.mark.slow),
    ],
)
def test_a_name_that_another_version_lacks_is_explained(module, name):
    """Decoders are cut with names of transformers that are not public."""
    out = python(
        f"""
        import importlib
        delattr(importlib.import_module("{module}"), "{name}")
        import textrl_swarm
        from textrl_swarm.errors import IncompatibleLibrary
        try:
            textrl_swarm.load_policy
        except IncompatibleLibrary as error:
            print(error)
        """
    )
    package = module.split(".")[0]
    assert re.search(rf"{package} \S+ changed: cannot import name '{name}' .* pip install '{package}==", out)


# What changes in a library -> what the message must say. Each runs in a fork of one process that loaded all.
CHANGES = {
    "petals 2.3": (
        "versions['petals'] = '2.3.0'",
        r"petals 2\.3\.0 is not the release that the mends were written for; "
        r".* pip install 'petals==2\.2\.0\.post1'",
    ),
    "hivemind without PeerID": (
        "import hivemind.p2p; del hivemind.p2p.PeerID",
        r"hivemind 1\.1\.12 has no hivemind\.p2p\.PeerID any more; .* tested with hivemind 1\.1\.12",
    ),
    "hivemind without nested_pack": (
        "import hivemind.utils.nested; del hivemind.utils.nested.nested_pack",
        r"hivemind 1\.1\.12 has no hivemind\.utils\.nested\.nested_pack any more",
    ),
    "transformers without build_alibi_tensor": (
        "import transformers.models.bloom.modeling_bloom as bloom; del bloom.build_alibi_tensor",
        r"transformers \S+ changed: cannot import name 'build_alibi_tensor' "
        "from 'transformers.models.bloom.modeling_bloom'",
    ),
    "transformers without _prepare_cache_for_generation": (
        """
        from transformers.generation.utils import GenerationMixin
        del GenerationMixin._prepare_cache_for_generation
        """,
        r"transformers \S+ has no GenerationMixin\._prepare_cache_for_generation any more",
    ),
}


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """What importing petals says after each change."""
    out = python(
        """
        import importlib.metadata, json, os, sys, textwrap
        import hivemind, peft, torch, transformers
        import transformers.generation.utils, transformers.models.bloom.modeling_bloom
        import textrl_swarm
        from textrl_swarm.errors import IncompatibleLibrary
        from textrl_swarm.swarm import compat

        for name, change in json.loads(sys.argv[1]).items():
            if os.fork() == 0:
                versions, version = {}, compat._version
                compat._version = lambda package: versions.get(package) or version(package)
                exec(textwrap.dedent(change))
                try:
                    import petals
                    message = "no error"
                except IncompatibleLibrary as error:
                    message = str(error)
                except BaseException as error:
                    message = f"another error: {error!r}"
                print(json.dumps({name: message}), flush=True)
                os._exit(0)
            os.wait()
        """,
        json.dumps({name: change for name, (change, _) in CHANGES.items()}),
    )
    return _collected(out)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_library_is_named(messages, name):
    assert re.search(CHANGES[name][1], messages[name]), messages[name]


@pytest.mark.parametrize("missing", ["petals", "hivemind", "dijkstar"])
def test_what_is_not_installed_is_named_with_the_command(without, missing):
    assert f"the swarm parts need {missing}, which is not installed; type: pip install" in without[missing]
    assert "pip install --no-deps petals==2.2.0.post1" in without[missing]


@pytest.fixture(scope="module")
def without() -> dict[str, str]:
    """What making a swarm policy says when a library is not there; what is local must work all the same."""
    out = python(
        """
        import json, os, sys, tempfile
        import textrl_swarm
        from textrl_swarm.errors import PetalsMissing
        from textrl_swarm.policies.loading import load_policy
        from textrl_swarm.models.tiny import random_bloom

        def hide(library):
            class Hidden:
                @staticmethod
                def find_spec(name, path=None, target=None):
                    if name.split(".")[0] == library:
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            sys.meta_path.insert(0, Hidden)

        peer = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEjGpdZERBm1ua8EKtKtU1UQzHqe7vY22kCjuXqdUBbCr"
        with tempfile.TemporaryDirectory() as directory:
            model = random_bloom(directory + "/model")
            for library in ("petals", "hivemind", "dijkstar"):
                if os.fork() == 0:
                    hide(library)
                    load_policy(model).close()
                    try:
                        load_policy(model, initial_peers=[peer])
                    except PetalsMissing as error:
                        print(json.dumps({library: str(error)}), flush=True)
                    os._exit(0)
                os.wait()
        """
    )
    return _collected(out)


def _collected(lines: str) -> dict[str, str]:
    return {
        name: text
        for line in lines.splitlines()
        if line.startswith("{")
        for name, text in json.loads(line).items()
    }


def test_servers_are_not_started_without_petals(monkeypatch, tmp_path):
    from textrl_swarm.errors import PetalsMissing
    from textrl_swarm.models.tiny import random_bloom
    from textrl_swarm.swarm import compat
    from textrl_swarm.swarm.local import LocalSwarm

    model = random_bloom(tmp_path / "model")
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        PetalsMissing, match="the swarm parts need petals, which is not installed; type: pip install"
    ):
        LocalSwarm(model)
