"""What a terminal shows while something takes longer than two seconds. Knows nothing about what takes so
long.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from rich.console import Console


def spinner(console: Console, what: str) -> AbstractContextManager[object]:
    """A spinner with these words inside the block; where there is no terminal, one line."""
    if console.is_terminal:
        return console.status(f"{what} ...")
    console.print(f"{what} ...", soft_wrap=True)
    return contextlib.nullcontext()
