"""This machine's node of a swarm: hivemind's DHT process and its libp2p daemon, as one unit with their owner.

hivemind ends both only when it is asked to. Those of an owner that was killed would go on for ever: a
client's hold memory, a server's accept requests that nobody computes any more. Knows nothing about models.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any

import psutil
import torch
from hivemind.dht import DHT

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_STARTS = 3
_FAREWELL_S = 10.0  # in which a server that leaves in good order ends by itself


class _Node(DHT):
    """A DHT process that looks after its owner and its daemon."""

    def __init__(self, *args: Any, ends_group: bool, **options: Any):
        self._ends_group = ends_group
        super().__init__(*args, **options)

    def run(self) -> None:
        threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True, name="watch owner").start()
        try:
            super().run()
        finally:
            _kill(psutil.Process().children())  # of a node that could not join

    def _watch(self, owner: int) -> None:
        daemons: list[psutil.Process] = []
        while os.getppid() == owner:
            time.sleep(_TICK_S)
            daemons = daemons or psutil.Process().children()
            if self._ends_group and daemons and not any(map(_runs, daemons)):
                end_group(_FAREWELL_S)
        if self._ends_group:
            end_group()
        _kill(daemons or psutil.Process().children())
        os._exit(1)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def end_group(after_s: float = 0.0) -> None:
    """Ends this process's group, which is a server's, this process included."""
    time.sleep(after_s)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def start_client_node(initial_peers: Sequence[str], **options: Any) -> DHT:
    """A node that ends, with its daemon, when this process does, however that happens.

    Args:
        options: of hivemind's DHT.

    Raises:
        As hivemind's DHT, when none of the initial peers answers.
    """
    return _start(initial_peers, start=True, ends_group=False, **options)


def start_server_node(initial_peers: Sequence[str], **options: Any) -> DHT:
    """The same for a server, whose whole process group ends when this process, the node or its daemon does.

    Args:
        options: of hivemind's DHT, in whose place petals calls this; `start` among them.
    """
    node = _start(initial_peers, ends_group=True, **options)

    def end_with_node() -> None:
        connection.wait([node.sentinel])
        end_group(_FAREWELL_S)

    threading.Thread(target=end_with_node, daemon=True, name="end with node").start()
    return node


def _start(initial_peers: Sequence[str], **options: Any) -> DHT:
    """A peer on a busy machine may not answer the first ping in time."""
    _start_shared_memory()
    left = _STARTS
    while True:
        left -= 1
        try:
            return _Node(initial_peers, **options)
        except RuntimeError as error:
            if left == 0 or "initial_peers responded" not in str(error):
                raise
            logger.warning("none of %s answered in time; asking again", ", ".join(map(str, initial_peers)))


def _start_shared_memory() -> None:
    """Lets torch start its manager of shared memory, which hivemind needs, undisturbed: a signal that
    interrupts torch's reading there, such as Ctrl-C, is followed by an endless loop (its libshm/core.cpp).
    """
    signals = signal.SIGINT, signal.SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        torch.zeros(1).share_memory_()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
