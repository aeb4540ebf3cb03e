"""What the benchmarks share: contenders that take turns, tables, and servers behind slow links.

Tables go to the terminal, and as Markdown to the file that TEXTRL_SWARM_RESULTS names (`make bench` does so).
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from lying_server import SOLD
from rich.console import Console
from rich.table import Table

from textrl_swarm import LocalSwarm
from textrl_swarm.swarm import launch

if TYPE_CHECKING:
    from typing_extensions import Self

RESULTS = "TEXTRL_SWARM_RESULTS"


@dataclass(frozen=True)
class Times:
    """Seconds of one contender, one number per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{min(self.seconds):.2f} to {max(self.seconds):.2f}"

    def ratio(self, other: Times) -> float:
        """Median of the ratios of each round, in which both met the same machine."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def in_turn(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Runs all contenders once unmeasured, for connections and caches, and then `repeats` times in turn."""
    for action in contenders.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, action in contenders.items():
            started = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - started)
    return {name: Times(tuple(one)) for name, one in seconds.items()}


def report(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table whose first column is text, and adds it to the results."""
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    path = os.environ.get(RESULTS)
    if path:
        lines = [f"### {title}", ""]
        for row in (headings, ["---", *["---:"] * (len(headings) - 1)], *rows):
            lines.append("| " + " | ".join(map(str, row)) + " |")
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")


# --------------------------------------------------------------------------------------- slow links


class SlowLink:
    """The way to one server, see slow_link.py."""

    def __init__(self, round_trip_ms: float, mbit: float | None):
        self.real, self.seen = _free_port(), _free_port()
        script = Path(__file__).with_name("slow_link.py")
        numbers = [self.seen, self.real, round_trip_ms / 2, mbit or 0]
        self._process = subprocess.Popen(
            [sys.executable, str(script), *map(str, numbers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == b"listening\n"

    def say(self, word: str) -> None:
        """`cut`, `part`, `stall` or `heal`."""
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class DistantSwarm(LocalSwarm):
    """A LocalSwarm each of whose servers is reached through a slow link.

    Args:
        round_trip_ms: of every connection to a server, the clients' and the other servers'.
        mbit: per second, to each server and back; None = as fast as loopback is.
        options: of LocalSwarm.
    """

    def __init__(
        self,
        model: str | Path,
        num_servers: int | None = None,
        round_trip_ms: float = 0.0,
        mbit: float | None = None,
        **options: Any,
    ):
        super().__init__(model, *([] if num_servers is None else [num_servers]), **options)
        self._link = round_trip_ms, mbit
        self.links: dict[int, SlowLink] = {}

    def _launch(self, i: int, peers: Sequence[str], addresses: Sequence[str] = ()) -> Any:
        if i not in self.links:
            self.links[i] = SlowLink(*self._link)
        common = self._options
        for option, port in (("--host_maddrs", "real"), ("--announce_maddrs", "seen")):
            address = f"/ip4/127.0.0.1/tcp/{getattr(self.links[i], port)}"
            self._options = [*self._options, option, address]
        try:
            return super()._launch(i, peers)
        finally:
            self._options = common

    def close(self, leave_within_s: float = 0.0) -> None:
        super().close(leave_within_s)
        for link in self.links.values():
            link.close()
        self.links.clear()


class LyingSwarm(LocalSwarm):
    """A LocalSwarm whose first server lies, and attracts clients.

    Args:
        spans: of the servers.
        lie: from its start on; see lying_server.py.
    """

    def __init__(self, model: str | Path, spans: Sequence[tuple[int, int]], lie: str = ""):
        super().__init__(model, spans=spans)
        self._first_lie = lie

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory()
        self._lie = Path(self._directory.name) / "lie"
        self.tell(self._first_lie)
        return super().__enter__()

    def tell(self, lie: str) -> None:
        """From now on it lies so; "" = it is honest."""
        self._lie.write_text(lie)

    def _launch(self, i: int, peers: Sequence[str], addresses: Sequence[str] = ()) -> Any:
        if i > 0:
            return super()._launch(i, peers, addresses)
        common, self._options = self._options, [*self._options, "--throughput", "10"]
        if self._first_lie == SOLD:
            self._options += ["--quant_type", "nf4"]
        path = os.pathsep.join(
            [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        )
        changes = {"LIE": str(self._lie), "PYTHONPATH": path}
        try:
            with (
                mock.patch.dict(os.environ, changes),
                mock.patch.object(launch, "_SERVER_MODULE", "lying_server"),
            ):
                return super()._launch(i, peers, addresses)
        finally:
            self._options = common

    def close(self, leave_within_s: float = 0.0) -> None:
        super().close(leave_within_s)
        self._directory.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
