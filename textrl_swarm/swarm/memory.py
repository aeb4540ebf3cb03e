"""Memory that a process of a server does not need any more, and its C library keeps."""

from __future__ import annotations

import ctypes
import gc

TRIM_S = 10.0  # how often it is given back


def trim_memory() -> None:
    """Gives it back to the system, where the C library can (glibc). A forked process should have called
    `gc.freeze` at its start: looking through all that it inherited takes 0.2 s, and copies it.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    trim(0)
