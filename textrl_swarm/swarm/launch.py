"""Real servers as child processes of this one: started side by side, told whom to join, and ended together.

Each server has its own process group. The whole group is ended, because a server's handlers, its DHT process
and its libp2p daemon would outlive it and keep its port. Servers also end themselves when this process goes
away. Knows nothing about what servers compute, policies or training.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
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
from typing import IO, TYPE_CHECKING, Any

import psutil

from textrl_swarm.errors import LaunchError
from textrl_swarm.models.blocks import BlockSpan
from textrl_swarm.swarm.compat import check_installed

if TYPE_CHECKING:
    from typing_extensions import Self

# As --initial_peers: this process writes the addresses to the server's standard input.
PEERS_FROM_PARENT = "-"
GROUP_DIRECTORY = "textrl-swarm-"  # what the name of a group's temporary directory begins with

_SERVER_MODULE = "textrl_swarm.swarm.server.process"
_PR_SET_CHILD_SUBREAPER = 36
_HELPERS_END_S = 10.0


class ServerProcess:
    """One server: its process group, the events it reported, and its log."""

    def __init__(self, model: str, options: Sequence[str], log_path: Path, threads: int):
        self.log_path = log_path
        self.addresses: list[str] = []
        self.dht_prefix: str | None = None
        self.span: BlockSpan | None = None
        defaults = {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "BITSANDBYTES_NOWELCOME": "1",
        }
        _adopt_orphans()
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _SERVER_MODULE, model, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Sockets and temporary files of a killed server disappear with the directory of its log.
                env={**defaults, **os.environ, "TMPDIR": str(log_path.parent)},
                start_new_session=True,
            )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read_events, daemon=True, name=f"events of server {self.pid}").start()
        self._helpers: set[psutil.Process] = set()
        _alive.add(self)

    @property
    def pid(self) -> int:
        """Of the server's main process, which is also the id of its process group."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the main process has not ended."""
        return self.process.poll() is None

    def _read_events(self) -> None:
        for line in _pipe(self.process.stdout):
            with contextlib.suppress(ValueError):
                self._events.put(json.loads(line))
        self._events.put(None)

    def wait_for(self, name: str, deadline: float) -> dict[str, Any]:
        """Waits for the next event called `name` and returns its facts.

        Args:
            deadline: in time.monotonic seconds.

        Raises:
            LaunchError: the server ended, or reported nothing until the deadline; has the end of its log.
        """
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise LaunchError(
                    f"a server (pid {self.pid}) was not {name} in time; its log ends with:\n{self.log_tail()}"
                ) from None
            if event is None:
                self._events.put(None)
                self.process.wait()
                raise LaunchError(
                    f"a server (pid {self.pid}) ended with exit code {self.process.returncode} before it was "
                    f"{name}; its log ends with:\n{self.log_tail()}"
                )
            if event["event"] == "listening":
                self._note_helpers()
                self.addresses = event["addresses"]
                self.dht_prefix = event["dht_prefix"]
            elif event["event"] == "online":
                start, stop = event["span"]
                self.span = (start, stop)
            if event["event"] == name:
                return event

    def send_peers(self, addresses: Sequence[str]) -> None:
        """Names the peers to join, for a server that was started with PEERS_FROM_PARENT."""
        stdin = _pipe(self.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # the server ended; the next wait_for reports why
            stdin.write((" ".join(addresses) + "\n").encode())
            stdin.flush()

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of the server's log, indented."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
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
            while True:  # the server's own children, which this process adopted when the server died
                os.waitpid(-self.pid, 0)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                _pipe(stream).close()
        _alive.discard(self)

    def _note_helpers(self) -> None:
        """Remembers what left the process group: torch's manager, which frees shared memory after the
        server's end.
        """
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            children = psutil.Process(self.pid).children(recursive=True)
            self._helpers.update(child for child in children if os.getpgid(child.pid) != self.pid)

    def wait_for_helpers(self) -> None:
        """After `kill`: returns when the helpers, which end by themselves two seconds later, are gone as
        well.
        """
        psutil.wait_procs(self._helpers, timeout=_HELPERS_END_S)
        self._helpers.clear()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "the process was started with pipes"
    return stream


_alive: set[ServerProcess] = set()


def _adopt_orphans() -> None:
    """Makes the handlers and libp2p daemons of a killed server children of this process, so that it can wait
    for their end.

    Without it they become zombies wherever process 1 does not collect them (in most containers). See
    prctl(2), Linux only.
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
        model: directory or hub id of a decoder-only model.
        spans: half-open block spans, one per server; None = one server that chooses its blocks itself, as
            petals' options say.
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
        spans: Sequence[BlockSpan] | None,
        options: Sequence[str],
        *,
        initial_peers: Sequence[str] | None = None,
        start_timeout_s: float = 180.0,
    ):
        check_installed()
        self.model = str(model)
        self._spans = spans
        self._options = list(options)
        self._joined = list(initial_peers or [])
        self._start_timeout_s = start_timeout_s
        self.servers: list[ServerProcess] = []
        self._logs: tempfile.TemporaryDirectory[str] | None = None

    @property
    def initial_peers(self) -> list[str]:
        """Addresses of the servers that are running, for clients."""
        return [address for server in self.servers if server.running for address in server.addresses]

    def __enter__(self) -> Self:
        self._logs = tempfile.TemporaryDirectory(prefix=GROUP_DIRECTORY, ignore_cleanup_errors=True)
        deadline = time.monotonic() + self._start_timeout_s
        later = self._joined or [PEERS_FROM_PARENT]
        self.servers = []
        try:
            for i in range(self._count):
                self.servers.append(self._launch(i, self._joined if i == 0 else later))
            self.servers[0].wait_for("listening", deadline)
            for server in self.servers[1:]:
                server.send_peers(self.servers[0].addresses)
            for server in self.servers:
                server.wait_for("online", deadline)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def _count(self) -> int:
        return 1 if self._spans is None else len(self._spans)

    def _launch(self, i: int, peers: Sequence[str], addresses: Sequence[str] = ()) -> ServerProcess:
        assert self._logs is not None, "servers are launched inside the context"
        options = list(self._options)
        if "--identity_path" not in options:
            options += ["--identity_path", f"{self._logs.name}/server{i}.id"]
        if addresses:
            options += ["--host_maddrs", *(address.split("/p2p/")[0] for address in addresses)]
        if self._spans is not None:
            start, stop = self._spans[i]
            options += ["--block_indices", f"{start}:{stop}"]
        options += ["--initial_peers", *peers] if peers else ["--new_swarm"]
        threads = max(1, (os.cpu_count() or 1) // (self._count + 1))
        return ServerProcess(self.model, options, Path(self._logs.name) / f"server{i}.log", threads)

    def kill(self, i: int) -> None:
        """SIGKILL of the whole process group of server i, as a crash or a power cut would."""
        self.servers[i].kill()

    def start(self, i: int) -> None:
        """Starts server i again, under the address it had; returns when its blocks are online. Raises
        LaunchError.
        """
        lost = self.servers[i]
        lost.kill()
        self.servers[i] = self._launch(i, self.initial_peers or self._joined, lost.addresses)
        self.servers[i].wait_for("online", time.monotonic() + self._start_timeout_s)
        lost.wait_for_helpers()

    def close(self, leave_within_s: float = 0.0) -> None:
        """Ends every process. Safe to call twice.

        Args:
            leave_within_s: seconds in which the servers may first announce that they leave.
        """
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

    def __exit__(self, *exc_info: object) -> None:
        self.close()
