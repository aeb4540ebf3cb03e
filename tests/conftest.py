"""Shared by all tests: no network, tiny models, real Petals servers on loopback that end with the run.

Servers take seconds to start, so the swarms are started once, when the first test asks for them. A test that
kills servers makes its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before any library reads them; servers and other child processes inherit them.
_CACHES = tempfile.TemporaryDirectory(prefix="textrl-swarm-caches-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=f"{_CACHES.name}/hf",
    PETALS_CACHE=f"{_CACHES.name}/petals",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil  # noqa: E402
import pytest  # noqa: E402

from textrl_swarm.models.tiny import RECIPE, RECORD, make_tiny_bloom, random_bloom  # noqa: E402
from textrl_swarm.swarm import launch  # noqa: E402
from textrl_swarm.swarm.local import LocalSwarm  # noqa: E402


def left_over_processes() -> list[str]:
    """What this run started and did not end, zombies included.

    Not counted: multiprocessing's resource tracker and torch's shared-memory managers, which end with the
    processes that they serve, or seconds later.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            if "resource_tracker" not in command and not process.name().startswith("torch_shm_manag"):
                found.append(f"{process.pid} {process.status()} {process.name()} {command}")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start servers, which take longest, come first: no worker is left with one in the end."""
    with_servers = {item.path for item in items if item.get_closest_marker("swarm")}
    items.sort(key=lambda item: item.path not in with_servers)


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_tests() -> Iterator[None]:
    yield
    assert not left_over_processes()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows what the servers have to say."""
    report = yield
    if report.failed:
        report.sections += [
            (f"log of server {server.pid}, blocks {server.span}", server.log_tail(40))
            for server in launch._alive
        ]
    return report


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory) -> Callable[..., Path]:
    """random_bloom's arguments -> directory of such a model; made once."""
    made: dict[str, Path] = {}

    def get(**settings) -> Path:
        name = json.dumps(settings, sort_keys=True)
        if name not in made:
            made[name] = random_bloom(tmp_path_factory.mktemp("models") / f"bloom{len(made)}", **settings)
        return made[name]

    return get


@pytest.fixture(scope="session")
def hardly_pretrained(tmp_path_factory) -> Path:
    """A base model that the demo and the launcher take for finished."""
    directory = make_tiny_bloom(tmp_path_factory.mktemp("demo") / "base_model", time_limit_s=3)
    record = json.loads((directory / RECORD).read_text())
    (directory / RECORD).write_text(json.dumps({**record, "steps_done": RECIPE["steps"]}))
    return directory


@pytest.fixture(scope="session")
def two_servers(tiny_bloom) -> Iterator[LocalSwarm]:
    """Four blocks in two halves; room for an adapter of rank 1024 per client, not quite for two in all."""
    options = (
        "--adapter_bytes",
        "14000000",
        "--adapter_bytes_per_client",
        "10000000",
        "--adapter_idle_s",
        "0",
    )
    with LocalSwarm(tiny_bloom(seed=1), num_servers=2, server_options=options) as swarm:
        yield swarm


@pytest.fixture
def as_if_far_away(monkeypatch) -> None:
    """Servers hand over to each other in generation, too."""
    monkeypatch.setattr("textrl_swarm.swarm.client.hand_over._LEAST_ROUND_TRIP_S", 0.0)


@pytest.fixture(scope="session")
def small_server(tiny_bloom, tmp_path_factory) -> Iterator[LocalSwarm]:
    """Keys without `transformer.`, dropout in the configuration, 64 tokens at once and 400 in the caches; a
    backward of so many tokens goes through one or two of its three blocks at once.
    """
    directory = tmp_path_factory.mktemp("models") / "with.a dot"
    shutil.copytree(tiny_bloom(seed=2, layers=3, prefix="h"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({**config, "hidden_dropout": 0.3, "attention_dropout": 0.3})
    )
    options = ("--max_batch_size", "64", "--attn_cache_tokens", "400", "--max_chunk_size_bytes", "400000")
    with LocalSwarm(directory, num_servers=1, server_options=options) as swarm:
        yield swarm


@pytest.fixture(scope="session")
def hub_model(tiny_bloom) -> str:
    """A hub id whose sharded checkpoint lies in the hub's local cache, as after a download."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, revision = tiny_bloom(seed=3, layers=5, hidden=48), "0123456789abcdef0123456789abcdef01234567"
    repository = Path(os.environ["HF_HOME"], "hub", "models--tests--tiny-bloom.v1")
    snapshot = repository / "snapshots" / revision
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(snapshot, max_shard_size="150KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(snapshot)
    assert len(list(snapshot.glob("model-*.safetensors"))) > 3
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return "tests/tiny-bloom.v1"


@pytest.fixture(scope="session")
def three_servers(hub_model) -> Iterator[LocalSwarm]:
    """Five blocks in unequal spans."""
    with LocalSwarm(hub_model, spans=[(0, 1), (1, 4), (4, 5)]) as swarm:
        yield swarm
