"""Reading prompts: a list, a text file, JSON Lines, JSON, or a dataset.

Each becomes a dict with an "input"; other keys reach the reward. Knows nothing about models; errors name the
file and the line.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from textrl_swarm.errors import PromptError, closest
from textrl_swarm.learning.prompts import chat_hint, missing_input, require_no_rival, rows
from textrl_swarm.types import Item

# Where a dataset's row keeps a column "input" that is not the prompt: there, every item has its prompt.
ORIGINAL_INPUT = "original_input"

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
_COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")  # what save_to_disk writes for a Dataset, a DatasetDict


def load_prompts(source: Any) -> list[Item]:
    """Prompts as a list of dicts.

    Args:
        source: a list of texts or dicts with an "input"; a table of pandas, polars, pyarrow or datasets with
            a column "input"; a file (.jsonl: an object with an "input", or a text, per line; .json: a list of
            those; any other: one prompt per line); or {"dataset": NAME, "split": "train", "column": "text",
            "limit": 100}, read with `datasets`, whose rows keep all their columns. NAME is of the hub, a
            directory or a file with data (.csv, .jsonl ...), or a directory that `save_to_disk` wrote. A
            row's own "input" that is not the prompt becomes "original_input".

    Raises:
        PromptError: nothing there, an entry that is no prompt, or one that has several; names its place.
    """
    if isinstance(source, Mapping) and type(source).__name__ != "DatasetDict":
        return _from_dataset(source)
    if isinstance(source, (str, Path)):
        return _from_file(Path(os.path.expanduser(source)))
    where = "the list of prompts"
    items = _items(rows(source), where, "prompt")
    for i, item in enumerate(items):
        require_no_rival(item, f"{where}, prompt {i}")
    return items


def _items(entries: Iterable[Any], where: str, unit: str) -> list[Item]:
    items = [_item(entry, f"{where}, {unit} {i}") for i, entry in enumerate(entries)]
    if not items:
        raise PromptError(f"{where} is empty; give at least one prompt")
    return items


def _item(entry: Any, where: str) -> Item:
    item = {"input": entry} if isinstance(entry, str) else entry
    if not isinstance(item, dict):
        raise PromptError(
            f'{where}: {entry!r} is neither a text nor an object with an "input"{chat_hint(entry)}'
        )
    if "input" not in item:
        raise PromptError(f"{where} {missing_input(item)}")
    text = item["input"]
    if not isinstance(text, str) or not text.strip():
        raise PromptError(
            f"{where}: the input must be a text that is not empty, got {text!r}{chat_hint(item)}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON may have
        raise PromptError(f"{where}: the input is no valid text ({error.reason}): {text!r}") from error
    return item


# --------------------------------------------------------------------------------------------- files


def _from_file(path: Path) -> list[Item]:
    kind = path.suffix.lower()
    _require_prompts_file(path)
    text = _text(path)
    if kind == ".json":
        entries = _json(text, f"{path}")
        if not isinstance(entries, list):
            raise PromptError(f"{path} must hold a list of prompts, it holds a {type(entries).__name__}")
        places = [f"{path}, entry {i}" for i in range(len(entries))]
    else:
        # not splitlines(), which also ends lines where a text has U+2028 or a form feed
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [place for place, _ in lines]
        if kind in (".jsonl", ".ndjson"):
            entries = [_json(line, place) for place, line in lines]
        else:
            entries = [line for _, line in lines]
            _require_plain_text(path, text, entries)
    if not entries:
        raise PromptError(f"{path} is empty; give at least one prompt")
    items = []
    for entry, place in zip(entries, places, strict=True):
        if isinstance(entry, dict) and isinstance(entry.get("input"), str):
            dataset = f"{{{{dataset: {path}, column: "
            require_no_rival(
                entry, place, f"write prompts: {dataset}{{rival}}}}}} or prompts: {dataset}input}}}}"
            )
        items.append(_item(entry, place))
    return items


def _require_prompts_file(path: Path) -> None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    if last in _COMPRESSED:
        raise PromptError(f"{path} is compressed; unpack it first")
    if last in (".yaml", ".yml"):
        raise PromptError(f"{path} is YAML; put its list under the key prompts of run.yaml")
    for table in (".csv", ".tsv", ".parquet"):
        if last == table:
            raise PromptError(
                f"{path} is a table; name the column with the prompts: "
                f"prompts: {{dataset: {path}, column: text}}"
            )
        if table in suffixes and last == ".txt":
            raise PromptError(f"{path}: a table or a text? Let its name end with {table}, or without {table}")


def _require_plain_text(path: Path, text: str, lines: list[str]) -> None:
    """Raises PromptError for JSON and JSON Lines in a file whose name does not say so."""
    for part, suffix in ((lines[0] if lines else "", ".jsonl"), (text, ".json")):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) or (isinstance(value, list) and suffix == ".json"):
            raise PromptError(
                f"{path} holds JSON, but a file of this name is read as one prompt per line; let its name "
                f'end with {suffix} (there, a prompt that is JSON itself is the text of an "input")'
            )


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        raise PromptError(
            f"there is no prompts file {path}; for a dataset write prompts: {{dataset: {path}, column: text}}"
        ) from error
    except OSError as error:  # a text instead of a name can be too long for one
        raise PromptError(
            f"the prompts file {str(path)[:60]!r} cannot be read: {error.strerror}; "
            "put a single prompt in a list"
        ) from error
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        if b"\0" in data:  # valid in UTF-8, but a sign of UTF-16
            raise UnicodeDecodeError("utf-8", data, data.index(b"\0"), data.index(b"\0") + 1, "zero byte")
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PromptError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON ({error})") from error


# ------------------------------------------------------------------------------------------ datasets


def _from_dataset(source: Mapping[str, Any]) -> list[Item]:
    for key in source:
        if key not in _DATASET_KEYS:
            raise PromptError(f"unknown key {key!r} of prompts; {closest(str(key), _DATASET_KEYS)}")
    if not isinstance(source.get("dataset"), (str, Path)) or not str(source["dataset"]):
        raise PromptError(
            "prompts given as a mapping need the key dataset: a name, or a directory or file with data"
        )
    limit = source.get("limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise PromptError(f"limit must be a whole number >= 1, got {limit!r}")
    name = os.path.expanduser(source["dataset"])
    split = str(source.get("split", "train"))
    column = str(source.get("column", "input"))
    where = f"dataset {name!r}"
    try:
        table = _loaded(name, source.get("config"), split)
        if column not in table.column_names:
            raise PromptError(f"{where} has no column {column!r}; {closest(column, table.column_names)}")
        found = list(table if limit is None else table.select(range(min(limit, len(table)))))
    except PromptError:
        raise
    except Exception as error:  # datasets raises a dozen kinds of errors for what it cannot load or decode
        raise PromptError(f"{where} (split {split!r}) cannot be loaded: {error}") from error
    items = []
    for i, row in enumerate(found):
        if "column" not in source:
            require_no_rival(row, f"{where}, row {i}", "add column: {rival} or column: input")
        items.append(_with_prompt(row, column, f"{where}, row {i}"))
    return _items(items, where, "row")


def _with_prompt(row: Mapping[str, Any], column: str, where: str) -> Item:
    """The row with its prompt as "input"; no column is lost."""
    if column == "input" or "input" not in row:
        return {**row, "input": row[column]}
    if ORIGINAL_INPUT in row:
        raise PromptError(
            f'{where} has both "input" and {ORIGINAL_INPUT!r}, where its "input" goes; rename one of them'
        )
    return {**row, "input": row[column], ORIGINAL_INPUT: row["input"]}


def _loaded(name: str, config: str | None, split: str) -> Any:
    """A `datasets.Dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise PromptError("reading a dataset needs the package datasets: pip install datasets") from error
    path = Path(name)
    if any((path / written).is_file() for written in _SAVED_TO_DISK):
        return _saved_split(datasets.load_from_disk(name), name, split)
    if path.is_file():
        return datasets.load_dataset(**_table(path), split=split)
    if path.is_dir() and glob.has_magic(str(path.resolve())):  # datasets would read it as a pattern
        raise PromptError(
            f"the directory {str(path.resolve())!r} has one of *?[ in its name; "
            "name a file of it instead, or rename it"
        )
    return datasets.load_dataset(path=name, name=config, split=split)


def _saved_split(saved: Any, name: str, split: str) -> Any:
    """Of what `save_to_disk` wrote: a DatasetDict, or one split, which may not know its name."""
    if not isinstance(saved, dict):
        saved = {str(saved.split or split): saved}
    if split not in saved:
        raise PromptError(f"dataset {name!r} has no split {split!r}; {closest(split, saved)}")
    return saved[split]


def _table(path: Path) -> dict[str, Any]:
    """Arguments of `load_dataset` for one file."""
    kind = path.suffix.lower()
    if kind not in _TABLES:
        raise PromptError(f"{path} has none of the suffixes by which tables are known: {', '.join(_TABLES)}")
    literal = glob.escape(os.path.abspath(path))  # data_files are patterns
    return {"path": _TABLES[kind], "data_files": literal, **({"delimiter": "\t"} if kind == ".tsv" else {})}
