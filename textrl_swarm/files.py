"""Writing so that a crash leaves either the old or the new, never half of one. Knows nothing about what is written."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LEFT = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>part|old)")  # names that are made below


@contextmanager
def published(directory: str | Path) -> Iterator[Path]:
    """A sibling directory to write to, on the disk and renamed to `directory` at the end; what stood there is replaced.

    Whoever finds `directory` finds all of it, also after a power cut. When the body raises, nothing has changed.
    """
    directory = Path(directory).resolve()
    unique = f"{directory.name}.{uuid.uuid4().hex[:8]}"
    staging, replaced = directory.with_name(f".{unique}.part"), directory.with_name(f".{unique}.old")
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
        if replaced.exists() and not directory.exists():  # interrupted between the two
            os.replace(replaced, directory)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def tidy(directory: str | Path) -> None:
    """Removes what processes that were killed inside `published` or `write_text` left in a directory; what they were about to replace is
    put back. Files of others, however similar their names, stay."""
    for path in list(Path(directory).glob(".*")):
        match = _LEFT.fullmatch(path.name)
        if match is None:
            continue
        if match["kind"] == "old" and not path.with_name(match["name"]).exists():
            os.replace(path, path.with_name(match["name"]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replaces a file's contents in one step."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_text(text, encoding="utf-8")
        _to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
