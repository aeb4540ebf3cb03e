"""The example notebook runs from top to bottom at toy size."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    fewer = 0
    for cell in notebook.cells:
        cell.source, count = re.subn(r"^ITERATIONS = \d+", "ITERATIONS = 2", cell.source, flags=re.MULTILINE)
        fewer += count
    assert fewer == 1
    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()


def test_there_is_a_notebook():
    assert NOTEBOOKS
