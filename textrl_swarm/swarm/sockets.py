"""A directory for the sockets between this process and its libp2p daemons, which hivemind would scatter over
/tmp.

hivemind removes a socket only when its daemon is shut down in good order. A directory of our own goes with
everything in it when the process ends, and what killed processes left behind goes when the next one starts.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "textrl-swarm-p2p-"
_LOCK = ".lock"
_SHORT_PARENT = "/tmp"  # instead of a temporary directory with a longer path
_LONGEST = 66  # characters: a socket's whole path may have 103, and hivemind's file names have up to 36


def socket_directory() -> Path:
    """Makes the directory, which is removed when this process ends; its forks share it."""
    remove_stale()
    parent = tempfile.gettempdir()
    if len(parent) + len(_PREFIX) + 10 > _LONGEST:
        parent = _SHORT_PARENT
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_SH)  # until this process and all its forks have ended, however they end
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def remove_stale() -> None:
    """Removes the directories of processes that ended without removing theirs."""
    parents = {Path(tempfile.gettempdir()), Path(_SHORT_PARENT)}
    for directory in itertools.chain.from_iterable(parent.glob(f"{_PREFIX}*") for parent in parents):
        with contextlib.suppress(OSError):  # somebody else's, in use, or removed by another process just now
            lock = os.open(directory / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(lock)
