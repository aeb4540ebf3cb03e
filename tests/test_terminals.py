"""Users' text on terminals that cannot show it: replaced characters, never an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TERMINALS = [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, C_LOCALE]
NAME = "no/such/модель 模型 é"


def in_terminal(terminal: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    return subprocess.run(
        [sys.executable, *arguments], env={**environment, **terminal}, capture_output=True, timeout=120
    )


# What `train` prints, on a run that is over in no time.
SHOW = """
import sys
from textrl_swarm import cli
from rich.table import Table
@cli.app.command()
def show():
    table = Table(title="samples")
    table.add_column("prompt")
    table.add_row("модель 模型 é")
    with cli.console.status("模型 ..."):
        cli.console.print(table, "модель 模型 é \\ud800")
        print("модель 模型 é")
sys.argv = ["textrl-swarm", "show"]
cli.main()
"""


@pytest.mark.parametrize(
    "terminal",
    [*(pytest.param(terminal, marks=pytest.mark.slow) for terminal in TERMINALS[:2]), *TERMINALS[2:]],
    ids=["ascii", "latin-1", "C"],
)
def test_text_that_a_terminal_cannot_show_is_replaced(terminal):
    done = in_terminal(terminal, "-X", "utf8=0", "-c", SHOW.encode("ascii", "backslashreplace").decode())
    assert done.returncode == 0, done.stderr.decode("latin-1")
    assert b"?????? ??" in done.stdout and b"samples" in done.stdout
    failed = in_terminal(terminal, "-m", "textrl_swarm.cli", "export", NAME, "out")
    assert failed.returncode == 1
    assert failed.stderr.startswith(b"error: ") and b"Traceback" not in failed.stderr
