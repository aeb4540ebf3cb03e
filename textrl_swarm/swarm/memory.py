"""Memory: what is free, and what a process does not need any more and its C library keeps."""

from __future__ import annotations

import ctypes
import gc

import psutil
import torch

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


def free_bytes(device: torch.device) -> int:
    """Of a device's memory, as far as others leave it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available
