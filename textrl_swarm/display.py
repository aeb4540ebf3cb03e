"""What a terminal shows: any text, and a sign of life while something takes longer than two seconds. Knows
nothing about what takes so long.
"""

from __future__ import annotations

import contextlib
import io
import sys
from contextlib import AbstractContextManager

from rich.console import Console


def spinner(console: Console, what: str) -> AbstractContextManager[object]:
    """A spinner with these words inside the block; where there is no terminal, one line."""
    if console.is_terminal:
        return console.status(f"{what} ...")
    console.print(f"{what} ...", soft_wrap=True)
    return contextlib.nullcontext()


def bit_rate(bits_per_s: float) -> str:
    """For people: "12.5 Mbit/s", "1.2 Gbit/s"."""
    unit, per_unit = ("Gbit/s", 1e9) if bits_per_s >= 1e9 else ("Mbit/s", 1e6)
    return f"{bits_per_s / per_unit:.3g} {unit}"


def accept_any_text() -> None:
    """From here on, standard output and error replace characters that their encoding lacks.

    Python would raise UnicodeEncodeError, and end a run over a prompt in another script.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
