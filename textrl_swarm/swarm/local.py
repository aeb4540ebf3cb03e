"""Real servers as child processes of this machine: `LocalSwarm` for demos and tests, and what `textrl-swarm serve` runs.

Each server has its own process group; the whole group is ended, because a server's handlers, its DHT process and its libp2p daemon would
outlive it and keep its port. Servers also end themselves when this process goes away. Knows nothing about policies or training.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from textrl_swarm.base_model import default_dht_prefix, read_config
from textrl_swarm.config import QUANTIZATIONS
from textrl_swarm.errors import ConfigError, LaunchError, ModelError
from textrl_swarm.swarm.compat import check_installed

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from typing_extensions import Self

QUANT_TYPES = {"8bit": "int8", "4bit": "nf4"}  # our name -> petals'
_PEERS_LATER = "-"
_PR_SET_CHILD_SUBREAPER = 36
_HELPERS_END_S = 10.0


def split_evenly(num_blocks: int, num_servers: int) -> list[tuple[int, int]]:
    """Half-open block spans, one per server, sizes differing by at most one."""
    if not 1 <= num_servers <= num_blocks:
        raise ConfigError(f"{num_blocks} blocks can be split over 1 to {num_blocks} servers, not {num_servers}")
    edges = [round(i * num_blocks / num_servers) for i in range(num_servers + 1)]
    return list(itertools.pairwise(edges))


class ServerProcess:
    """One server: its process group, what it said, and its log."""

    def __init__(self, model: str, options: Sequence[str], log_path: Path, threads: int):
        self.log_path = log_path
        self.addresses: list[str] = []
        self.dht_prefix: str | None = None
        self.span: tuple[int, int] | None = None
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "BITSANDBYTES_NOWELCOME": "1", **os.environ}
        _adopt_orphans()
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "textrl_swarm.swarm.server", model, *options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        self._events: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read_events, daemon=True, name=f"events of server {self.pid}").start()
        self._helpers: set[psutil.Process] = set()
        _alive.add(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def _read_events(self) -> None:
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self._events.put(json.loads(line))
        self._events.put(None)

    def wait_for(self, name: str, deadline: float) -> dict:
        """The facts of the next event called `name`.

        Raises:
            LaunchError: the server ended, or said nothing until the deadline (time.monotonic seconds); has the end of its log.
        """
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise LaunchError(f"a server (pid {self.pid}) was not {name} in time; its log ends with:\n{self.log_tail()}") from None
            if event is None:
                self._events.put(None)
                self.process.wait()
                raise LaunchError(
                    f"a server (pid {self.pid}) ended with exit code {self.process.returncode} before it was {name}; "
                    f"its log ends with:\n{self.log_tail()}"
                )
            if event["event"] == "listening":
                self._note_helpers()
                self.addresses, self.dht_prefix = event["addresses"], event["dht_prefix"]
            elif event["event"] == "online":
                self.span = tuple(event["span"])
            if event["event"] == name:
                return event

    def send_peers(self, addresses: Sequence[str]) -> None:
        with contextlib.suppress(BrokenPipeError):  # then the next wait_for tells
            self.process.stdin.write((" ".join(addresses) + "\n").encode())
            self.process.stdin.flush()

    def log_tail(self, lines: int = 12) -> str:
        text = self.log_path.read_text(errors="replace").strip().splitlines()
        return "\n".join("    " + line for line in text[-lines:])

    def interrupt(self) -> None:
        """Asks the server to leave the swarm and end; `kill` afterwards ends what is left."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to the whole process group; returns when all of it is gone. Safe to call twice."""
        if self not in _alive:
            return
        self._note_helpers()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:  # the server's own children, which came to us when it died
                os.waitpid(-self.pid, 0)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        _alive.discard(self)

    def _note_helpers(self) -> None:
        """Remembers what left the process group: torch's shared-memory manager, which frees the server's shared memory after its end."""
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            children = psutil.Process(self.pid).children(recursive=True)
            self._helpers.update(child for child in children if os.getpgid(child.pid) != self.pid)

    def wait_for_helpers(self) -> None:
        """After `kill`: returns when the helpers, which end by themselves two seconds later, are gone as well."""
        psutil.wait_procs(self._helpers, timeout=_HELPERS_END_S)
        self._helpers.clear()


_alive: set[ServerProcess] = set()


def _adopt_orphans() -> None:
    """Makes the handlers and libp2p daemons of a killed server children of this process, so that it can wait for their end.

    Without it they become zombies wherever process 1 does not collect them (in most containers). See prctl(2), Linux only.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@atexit.register
def _kill_all() -> None:
    for server in list(_alive):
        server.kill()


class ServerGroup:
    """Servers of one model, started side by side and ended together. Context manager.

    Args:
        model: directory or hub id of a BLOOM model.
        spans: half-open block spans, one per server; None = one server that chooses its blocks itself, as petals' options say.
        options: petals' run_server options for all of them.
        initial_peers: addresses to join; None or empty = start a new swarm.
        start_timeout_s: until all blocks are online.

    Raises:
        ModelError, PetalsMissing: before anything is started.
        LaunchError: on entering, when a server does not come online; all others are ended.
    """

    def __init__(
        self,
        model: str | Path,
        spans: Sequence[tuple[int, int]] | None,
        options: Sequence[str],
        *,
        initial_peers: Sequence[str] | None = None,
        start_timeout_s: float = 180.0,
    ):
        check_installed()
        self.model, self._spans, self._options = str(model), spans, list(options)
        self._joined = list(initial_peers or [])
        self._start_timeout_s = start_timeout_s
        self.servers: list[ServerProcess] = []
        self._logs: tempfile.TemporaryDirectory | None = None

    @property
    def initial_peers(self) -> list[str]:
        """Addresses of the servers that are running, for clients."""
        return [address for server in self.servers if server.running for address in server.addresses]

    def __enter__(self) -> Self:
        self._logs = tempfile.TemporaryDirectory(prefix="textrl-swarm-")
        deadline = time.monotonic() + self._start_timeout_s
        later = self._joined or [_PEERS_LATER]
        try:
            self.servers = [self._launch(i, self._joined if i == 0 else later) for i in range(len(self._spans or [None]))]
            self.servers[0].wait_for("listening", deadline)
            for server in self.servers[1:]:
                server.send_peers(self.servers[0].addresses)
            for server in self.servers:
                server.wait_for("online", deadline)
        except BaseException:
            self.close()
            raise
        return self

    def _launch(self, i: int, peers: Sequence[str], addresses: Sequence[str] = ()) -> ServerProcess:
        options = list(self._options)
        if "--identity_path" not in options:
            options += ["--identity_path", f"{self._logs.name}/server{i}.id"]
        if addresses:
            options += ["--host_maddrs", *(address.split("/p2p/")[0] for address in addresses)]
        if self._spans is not None:
            options += ["--block_indices", f"{self._spans[i][0]}:{self._spans[i][1]}"]
        options += ["--initial_peers", *peers] if peers else ["--new_swarm"]
        threads = max(1, (os.cpu_count() or 1) // (len(self._spans or [None]) + 1))
        return ServerProcess(self.model, options, Path(self._logs.name) / f"server{i}.log", threads)

    def kill(self, i: int) -> None:
        """SIGKILL of the whole process group of server i, as a crash or a power cut would."""
        self.servers[i].kill()

    def start(self, i: int) -> None:
        """Starts server i again, under the address it had; returns when its blocks are online. Raises LaunchError."""
        lost = self.servers[i]
        lost.kill()
        self.servers[i] = self._launch(i, self.initial_peers or self._joined, lost.addresses)
        self.servers[i].wait_for("online", time.monotonic() + self._start_timeout_s)
        lost.wait_for_helpers()

    def close(self, leave_within_s: float = 0.0) -> None:
        """Ends every process; first lets them tell the swarm that they leave, for at most `leave_within_s`. Safe to call twice."""
        if leave_within_s > 0:
            deadline = time.monotonic() + leave_within_s
            for server in self.servers:
                server.interrupt()
            while time.monotonic() < deadline and any(server.running for server in self.servers):
                time.sleep(0.05)
        for server in self.servers:
            server.kill()
        for server in self.servers:
            server.wait_for_helpers()
        if self._logs is not None:
            self._logs.cleanup()
            self._logs = None

    def __exit__(self, *exc_info) -> None:
        self.close()


class LocalSwarm(ServerGroup):
    """A new swarm of fp32 CPU servers on loopback, with the blocks split evenly: for demos and tests.

    Args:
        model: directory or hub id of a BLOOM model.
        num_servers: 1 to the number of blocks.
        quantization: None, "8bit" or "4bit" (the servers hold quantised blocks).
        dht_prefix: name under which the blocks are announced; None = made from `model`.
        spans: half-open block spans, one per server, instead of the even split (overlaps make replicas).
        server_options: more options of petals' run_server, e.g. ("--attn_cache_tokens", "512").
        start_timeout_s: until all blocks are online.

    Raises:
        ModelError, ConfigError: before anything is started. LaunchError: on entering.
    """

    def __init__(
        self,
        model: str | Path,
        num_servers: int = 2,
        quantization: str | None = None,
        *,
        dht_prefix: str | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        server_options: Sequence[str] = (),
        start_timeout_s: float = 180.0,
    ):
        if quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantization must be None, '8bit' or '4bit', got {quantization!r}")
        num_blocks = check_servable(model).num_hidden_layers
        self.dht_prefix = dht_prefix or default_dht_prefix(model)
        options = [
            *("--dht_prefix", self.dht_prefix, "--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--no_auto_relay", "--throughput", "1"),
            *("--torch_dtype", "float32", "--device", "cpu", "--quant_type", QUANT_TYPES.get(quantization, "none")),
            *("--num_handlers", "2", "--update_period", "5", *server_options),
        ]
        spans = _checked_spans(spans, num_blocks) if spans is not None else split_evenly(num_blocks, num_servers)
        super().__init__(model, spans, options, start_timeout_s=start_timeout_s)


def _checked_spans(spans: Sequence[tuple[int, int]], num_blocks: int) -> list[tuple[int, int]]:
    if not spans:
        raise ConfigError("spans is empty; give one span of blocks per server, e.g. [(0, 2), (2, 4)]")
    for start, stop in spans:
        if not 0 <= start < stop <= num_blocks:
            raise ConfigError(f"span ({start}, {stop}) is not within blocks 0..{num_blocks}")
    return list(spans)


def check_servable(model: str | Path) -> PretrainedConfig:
    """The configuration of a model whose blocks can be served with LoRA. Raises ModelError."""
    config = read_config(model)
    if config.model_type != "bloom":
        raise ModelError(f"{model} is a {config.model_type} model; the swarm parts train BLOOM models (use it locally: no initial_peers)")
    return config
