"""This machine's node of a swarm: hivemind's DHT process and its libp2p daemon, as one unit with their owner.

hivemind ends both only when it is asked to. Those of an owner that was killed would go on for ever: a
client's hold memory, a server's accept requests that nobody computes any more. And hivemind forgets every
peer that once did not answer: nodes that were parted for a while are brought together again. Knows nothing
about models.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
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
from hivemind.dht import DHT, DHTNode
from hivemind.p2p import PeerID

from textrl_swarm.swarm.memory import TRIM_S, trim_memory

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_STARTS = 3
_FAREWELL_S = 10.0  # in which a server that leaves in good order ends by itself
_GREETING_S = 10.0  # how often a server looks for peers that it lost
_REMEMBERED_S = 3600.0  # how long they are looked for
_MAX_REMEMBERED = 64


class _Node(DHT):
    """A DHT process that looks after its owner and its daemon.

    Attributes:
        met: peers that it knew -> when it last did, in time.monotonic seconds; in its process only.
    """

    def __init__(self, *args: Any, ends_group: bool, **options: Any):
        self._ends_group = ends_group
        self.met: dict[PeerID, float] = {}
        super().__init__(*args, **options)

    def run(self) -> None:
        gc.freeze()
        threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True, name="watch owner").start()
        try:
            super().run()
        finally:
            _kill(psutil.Process().children())  # of a node that could not join

    def _watch(self, owner: int) -> None:
        daemons: list[psutil.Process] = []
        trimmed_at = time.monotonic()
        while os.getppid() == owner:
            time.sleep(_TICK_S)
            if not hasattr(self, "_node"):
                continue  # while it joins, a daemon that asks who else has its identity comes and goes
            if self._ends_group and time.monotonic() > trimmed_at + TRIM_S:
                trim_memory()
                trimmed_at = time.monotonic()
            daemons = daemons or psutil.Process().children()
            if self._ends_group and not any(map(_runs, daemons)):
                end_group(_FAREWELL_S)
        if self._ends_group:
            end_group()
        _kill(psutil.Process().children())
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

    def look_after_node() -> None:
        while not connection.wait([node.sentinel], _GREETING_S):
            greet_lost_peers(node)
        end_group(_FAREWELL_S)

    threading.Thread(target=look_after_node, daemon=True, name="look after node").start()
    return node


def is_cut_off(node: DHT) -> bool:
    """Whether this machine's node or its daemon has ended, so that nobody can be reached."""
    try:
        return not any(map(_runs, psutil.Process(node.pid).children()))
    except psutil.Error:
        return True


def greet_lost_peers(node: DHT) -> None:
    """Has this node look for its initial peers and others that it knew, as far as it knows them no longer.
    Does not wait for answers.
    """
    node.run_coroutine(_greet_lost_peers, return_future=True)


async def _greet_lost_peers(dht: _Node, node: DHTNode) -> None:
    """Runs in the DHT's process."""
    known = node.protocol.routing_table.peer_id_to_uid
    now = time.monotonic()
    dht.met.update(dict.fromkeys(known, now))
    recent = {peer: when for peer, when in dht.met.items() if when > now - _REMEMBERED_S}
    dht.met = dict(sorted(recent.items(), key=lambda item: -item[1])[:_MAX_REMEMBERED])
    initial = (str(address).rsplit("/p2p/", 1)[-1] for address in dht.initial_peers or ())
    lost = {*dht.met, *map(PeerID.from_base58, initial)} - {*known, node.peer_id}

    async def greet(peer: PeerID) -> None:
        if await node.protocol.call_ping(peer) is not None:
            node.blacklist.register_success(peer)

    await asyncio.gather(*map(greet, lost))


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
