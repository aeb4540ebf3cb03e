"""Reading prompts: a list, a text file, JSON Lines, JSON, or a dataset.

Each becomes a dict with an "input"; other keys reach the reward. Knows nothing about models; errors name the
file and the line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from textrl_swarm.errors import PromptError, closest
from textrl_swarm.types import Item

_DATASET_KEYS = {"dataset", "config", "split", "column", "limit"}
# Suffix of a file -> the loader that `datasets` has for it.
_TABLES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
}


def load_prompts(source: Sequence[str | Item] | str | Path | Mapping[str, Any]) -> list[Item]:
    """Prompts as a list of dicts.

    Args:
        source: a list of texts or dicts with an "input"; a file (.txt: one prompt per line; .jsonl: an object
            with an "input", or a text, per line; .json: a list of those); or {"dataset": NAME, "split":
            "train", "column": "text", "limit": 100}, read with `datasets.load_dataset`, whose rows keep all
            their columns. NAME is of the hub, or a directory or a file with data (.csv, .jsonl ...).

    Raises:
        PromptError: nothing there, or an entry that is no prompt; names its place.
    """
    if isinstance(source, Mapping):
        return _from_dataset(source)
    if isinstance(source, (str, Path)):
        return _from_file(Path(source))
    if not isinstance(source, Iterable):
        raise PromptError(f"prompts must be a list, a file, or a mapping with the key dataset; got {source!r}")
    return _items(source, "the list of prompts", "prompt")


def _items(entries: Iterable[Any], where: str, unit: str, start: int = 0) -> list[Item]:
    items = [_item(entry, f"{where}, {unit} {start + i}") for i, entry in enumerate(entries)]
    if not items:
        raise PromptError(f"{where} is empty; give at least one prompt")
    return items


def _item(entry: Any, where: str) -> Item:
    item = {"input": entry} if isinstance(entry, str) else entry
    if not isinstance(item, dict):
        raise PromptError(f'{where}: {entry!r} is neither a text nor an object with an "input"')
    if "input" not in item:
        keys = ", ".join(map(repr, item)) or "no keys"
        raise PromptError(f'{where} has no "input"; it has {keys}')
    if not isinstance(item["input"], str) or not item["input"].strip():
        raise PromptError(f"{where}: the input must be a text that is not empty, got {item['input']!r}")
    try:
        item["input"].encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON may have
        raise PromptError(f"{where}: the input is no valid text ({error.reason}): {item['input']!r}") from error
    return item


def _from_file(path: Path) -> list[Item]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv", ".parquet"):
        raise PromptError(
            f"{path} is a table; name the column with the prompts: prompts: {{dataset: {path}, column: text}}"
        )
    text = _text(path)
    if kind == ".json":
        entries = _json(text, f"{path}")
        if not isinstance(entries, list):
            raise PromptError(f"{path} must hold a list of prompts, it holds a {type(entries).__name__}")
        return _items(entries, str(path), "entry")
    # not splitlines(), which also ends lines where a text has U+2028 or a form feed
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise PromptError(f"{path} is empty; give at least one prompt")
    if kind in (".jsonl", ".ndjson"):
        items = []
        for number, line in lines:
            where = f"{path}, line {number}"
            items.append(_item(_json(line, where), where))
        return items
    return [{"input": line} for _, line in lines]


def _text(path: Path) -> str:
    try:
        data = path.expanduser().read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        raise PromptError(
            f"there is no prompts file {path}; for a dataset write prompts: {{dataset: {path}, column: text}}"
        ) from error
    except OSError as error:  # a text instead of a name can be too long for one
        raise PromptError(
            f"the prompts file {str(path)[:60]!r} cannot be read: {error.strerror}; put a single prompt in a list"
        ) from error
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        if b"\0" in data:  # valid in UTF-8, but a sign of UTF-16
            raise UnicodeDecodeError("utf-8", data, data.index(b"\0"), data.index(b"\0") + 1, "zero byte")
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PromptError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON ({error})") from error


def _from_dataset(source: Mapping[str, Any]) -> list[Item]:
    for key in source:
        if key not in _DATASET_KEYS:
            raise PromptError(f"unknown key {key!r} of prompts; {closest(str(key), _DATASET_KEYS)}")
    if not isinstance(source.get("dataset"), (str, Path)) or not str(source["dataset"]):
        raise PromptError("prompts given as a mapping need the key dataset: a name, or a directory or file with data")
    limit = source.get("limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise PromptError(f"limit must be a whole number >= 1, got {limit!r}")
    try:
        import datasets
    except ImportError as error:
        raise PromptError("reading a dataset needs the package datasets: pip install datasets") from error

    name = str(source["dataset"])
    split = str(source.get("split", "train"))
    column = str(source.get("column", "input"))
    try:
        rows = datasets.load_dataset(**_arguments(name, source.get("config")), split=split)
    except Exception as error:  # datasets raises a dozen kinds of errors for a name that it cannot load
        raise PromptError(f"dataset {name!r} (split {split!r}) cannot be loaded: {error}") from error
    if column not in rows.column_names:
        raise PromptError(f"dataset {name!r} has no column {column!r}; {closest(column, rows.column_names)}")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return _items(({**row, "input": row[column]} for row in rows), f"dataset {name!r}", "row")


def _arguments(name: str, config: str | None) -> dict[str, Any]:
    kind = Path(name).suffix.lower()
    if kind not in _TABLES or not Path(name).is_file():
        return {"path": name, "name": config}
    return {"path": _TABLES[kind], "data_files": name, **({"delimiter": "\t"} if kind == ".tsv" else {})}
