"""One account per client, over all processes of a server: what was computed for it, and the caches it has.

Whoever has a lot waiting must not keep others waiting: tasks are computed in the order of start-time fair
queueing, and generations of a client that has more than its part of the caches give way. Knows nothing about
what is computed.
"""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import secrets
from collections.abc import Iterator
from concurrent.futures._base import PENDING
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from hivemind.utils.mpfuture import ALL_STATES, MPFuture
from petals.server.task_pool import PrioritizedTaskPool, Task

# Peer id of the client for whom this process is working, in each asyncio task.
CLIENT: ContextVar[str] = ContextVar("client", default="")

_SLOTS = 4096  # clients in one slot share its account
_LEAST_COST = 16  # tokens that a task counts for beside its own, so that empty ones are not free
_BACKWARD_COST = 3  # forwards


class Accounts:
    """Of all clients; made before the processes that share it are forked."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)  # nobody can choose an id that falls into another's slot
        self._lock: Any = multiprocessing.Lock()
        self._now: Any = multiprocessing.RawValue(ctypes.c_double, 0.0)
        self._finish: Any = multiprocessing.RawArray(ctypes.c_double, _SLOTS)
        self._held: Any = multiprocessing.RawArray(ctypes.c_longlong, _SLOTS)
        self._wanted: Any = multiprocessing.RawArray(ctypes.c_longlong, _SLOTS)

    def _slot(self, client: str) -> int:
        name = hashlib.blake2b(client.encode(), digest_size=8, key=self._salt).digest()
        return int.from_bytes(name, "big") % _SLOTS

    def charge(self, client: str, cost: float) -> float:
        """The time of virtual clocks at which a new task of this client starts.

        Source: Goyal, Vin and Cheng 1996, "Start-time fair queueing", equations 4 and 5.
        """
        slot = self._slot(client)
        with self._lock:
            start = max(self._now.value, self._finish[slot])
            self._finish[slot] = start + cost
        return start

    def begin(self, start: float) -> None:
        """A task that starts at this time is being computed now."""
        with self._lock:
            self._now.value = max(self._now.value, start)

    @contextmanager
    def wanting(self, client: str, size_bytes: int) -> Iterator[None]:
        """Inside, the client waits for caches."""
        with self._counted(self._wanted, client, size_bytes):
            yield

    @contextmanager
    def holding(self, client: str, size_bytes: int) -> Iterator[None]:
        """Inside, it has them."""
        with self._counted(self._held, client, size_bytes):
            yield

    @contextmanager
    def _counted(self, what: Any, client: str, size_bytes: int) -> Iterator[None]:
        slot = self._slot(client)
        with self._lock:
            what[slot] += size_bytes
        try:
            yield
        finally:
            with self._lock:
                what[slot] -= size_bytes

    @property
    def wanted_bytes(self) -> int:
        """Of all clients that wait."""
        return sum(self._wanted)

    def has_too_much(self, client: str, all_bytes: int) -> bool:
        """Whether others wait for caches, and this client has more than its part of all."""
        slot = self._slot(client)
        with self._lock:
            held, wanted = list(self._held), list(self._wanted)
        others_want = any(count and other != slot for other, count in enumerate(wanted))
        clients = sum(1 for pair in zip(held, wanted, strict=True) if any(pair))
        return others_want and held[slot] * clients > all_bytes


class FairTaskPool(PrioritizedTaskPool):
    """Petals' queue for the process that computes, whose tasks are ordered by the accounts of their clients;
    priorities mean nothing.

    All pools of a server share the accounts, so that the order holds between them as well.
    """

    accounts: Accounts

    def submit_task(self, *args: Any, priority: float = 0.0) -> MPFuture:
        """As petals' own."""
        future = MPFuture()
        # As petals: shared memory of futures would have to outlive the blocks.
        future._shared_state_code = torch.tensor([ALL_STATES.index(PENDING)], dtype=torch.uint8)
        start = self.accounts.charge(CLIENT.get(), self._cost(args))
        task = Task(0.0, start, future, args)
        if self.get_task_size(task) > self.max_batch_size:
            future.set_exception(
                ValueError(f"Task size greater than max_batch_size ({self.max_batch_size} tokens)")
            )
            return future
        self.submitted_tasks.put(task)
        self.batch_sender.send(None)
        return future

    def _cost(self, args: Any) -> float:
        """In tokens through one block."""
        tokens = self.get_task_size(Task(0.0, 0.0, None, args))
        blocks = [len(arg) for arg in args if isinstance(arg, (list, tuple))]  # the last names them
        passes = _BACKWARD_COST if "backward" in self.name else 1
        return (_LEAST_COST + tokens) * (blocks[-1] if blocks else 1) * passes

    def load_batch_to_runtime(self, *args: Any, **options: Any) -> Any:
        """As petals' own; in the process that computes."""
        uid, batch = super().load_batch_to_runtime(*args, **options)
        self.accounts.begin(self._dispatched_tasks[uid].time_submitted)
        return uid, batch

    @property
    def priority(self) -> tuple[float, float]:
        """Of the first task, as that process sees it: petals' own keeps that of tasks that are gone."""
        try:
            first: Task = self._ordered_tasks.queue[0]
        except IndexError:  # it is on its way
            return float("inf"), float("inf")
        return first.priority, first.time_submitted

    @priority.setter
    def priority(self, value: tuple[float, float]) -> None:
        """Nothing: there is nothing to keep."""
