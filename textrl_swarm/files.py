"""Writing files so that a crash leaves the old or the new version, never half of one. Knows nothing about
contents.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The names of unfinished and replaced files: .NAME.12345678.part and .NAME.12345678.old
_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>part|old)")


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


@contextmanager
def published(directory: str | Path) -> Iterator[Path]:
    """Yields a sibling directory to write to, and renames it to `directory` at the end, replacing what stood
    there.

    `directory` is always complete, after a power cut too. When the body raises, nothing has changed.
    """
    directory = Path(directory).resolve()
    staging, replaced = _temporary(directory, "part"), _temporary(directory, "old")
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in (*filter(Path.is_file, staging.rglob("*")), staging):
            _to_disk(path)
        if directory.exists():
            os.replace(directory, replaced)
        os.replace(staging, directory)
        _to_disk(directory.parent)
    finally:
        if replaced.exists() and not directory.exists():  # interrupted between the two renames
            os.replace(replaced, directory)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields the name of a sibling file to write, and renames it to `path` at the end, in one step."""
    path = Path(path)
    part = _temporary(path, "part")
    try:
        yield part
        _to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replaces a file's contents in one step."""
    with replaced_file(path) as part:
        part.write_text(text, encoding="utf-8")


def tidy(directory: str | Path) -> None:
    """Removes what killed processes left unfinished in a directory, and restores what they were about to
    replace.

    Only names that `published` and `replaced_file` make are touched.
    """
    for path in list(Path(directory).glob(".*")):
        match = _LEFT_BEHIND.fullmatch(path.name)
        if match is None:
            continue
        if match["kind"] == "old" and not path.with_name(match["name"]).exists():
            os.replace(path, path.with_name(match["name"]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
