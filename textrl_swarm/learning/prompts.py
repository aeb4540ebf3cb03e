"""The forms in which people hold prompts: lists, tables of several libraries, chat messages; and which of a
row's columns is the prompt. Knows nothing about files or tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from textrl_swarm.errors import PromptError

_RIVALS = ("instruction", "prompt")  # columns that hold the prompt in other projects' data


def rows(source: Any, what: str = "prompts") -> list[Any]:
    """The entries of a list of prompts, or a table's rows as dicts: of pandas, polars, pyarrow, NumPy and
    datasets.

    Args:
        what: the list's name in messages.

    Raises:
        PromptError: the source is no list of prompts, or reading it as one would lose or reorder something.
    """
    kind = type(source).__name__
    if isinstance(source, (set, frozenset)):
        raise PromptError(f"{what}: the order of a {kind} changes between processes; give sorted(...)")
    if kind in ("DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, source))
        raise PromptError(f"{what}: a {kind} with the splits {splits}; give one of them, as dataset['train']")
    if kind == "IterableDataset":
        raise PromptError(f"{what}: an IterableDataset may have no end; give list(dataset.take(1000))")
    if kind == "LazyFrame":
        raise PromptError(f"{what}: a LazyFrame has no rows yet; give frame.collect()")
    for method in ("to_pylist", "to_dicts"):  # pyarrow, polars
        if hasattr(source, method):
            return getattr(source, method)()
    if hasattr(source, "columns"):
        return _frame_rows(source, what)
    entries = source.tolist() if hasattr(source, "tolist") else source  # pandas.Series, NumPy, torch
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
        raise PromptError(f"{what} must be a list with at least one prompt, got {source!r}")
    return list(entries)


def _frame_rows(frame: Any, what: str) -> list[Any]:
    columns = [str(column) for column in frame.columns]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise PromptError(f"{what}: several columns are named {', '.join(twice)}; rename them")
    try:
        return frame.to_dict("records")
    except Exception as error:  # a table of a library that is not known here
        raise PromptError(
            f"{what}: the rows of a {type(frame).__name__} cannot be read ({error}); give a list of dicts"
        ) from error


def missing_input(item: Mapping[Any, Any]) -> str:
    """For a message: what a dict without an "input" has instead, and what to do."""
    keys = ", ".join(map(repr, item)) or "no keys"
    hint = chat_hint(item) or '; rename the one with the prompt to "input"'
    return f'has no "input"; it has {keys}{hint}'


def chat_hint(entry: Any) -> str:
    """For a message: how to render chat messages that stand where a text should, "" when there are none."""

    def render(messages: str) -> str:
        return f"tokenizer.apply_chat_template({messages}, tokenize=False, add_generation_prompt=True)"

    if _is_chat([entry]):
        code = f"[{render('messages')}]"
    elif _is_chat(entry):
        code = f"[{render('messages')} for messages in prompts]"
    elif isinstance(entry, Mapping) and any(_is_chat(value) for value in entry.values()):
        key = next(key for key, value in entry.items() if _is_chat(value))
        code = f'[{{**row, "input": {render(f"row[{key!r}]")}}} for row in rows]'
    else:
        return ""
    return f"; these are chat messages: make texts of them with {code}"


def _is_chat(value: Any) -> bool:
    is_list = hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping)) and len(value) > 0
    return is_list and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in value)


def rival_of_input(item: Mapping[Any, Any]) -> str | None:
    """The column that may be the prompt instead of "input", as in Alpaca's data, where "input" is a context.

    A text that is part of the input is no rival: somebody has put the two together.
    """
    for name in _RIVALS:
        text = item.get(name)
        if isinstance(text, str) and text.strip() not in str(item["input"]):
            return name
    return None


def require_no_rival(item: Mapping[Any, Any], where: str, what_to_do: str | None = None) -> None:
    """Raises PromptError when a dict has a rival of its "input".

    Args:
        what_to_do: for the message, with a `{rival}` in it; None = for a list in Python.
    """
    rival = rival_of_input(item)
    if rival is None:
        return
    what_to_do = what_to_do or (
        'put the whole prompt into "input" and rename {rival!r}: '
        '[{{"input": row[{rival!r}] + "\\n" + row["input"], "task": row[{rival!r}]}} for row in rows]'
    )
    told = what_to_do.format(rival=rival)
    raise PromptError(f'{where} has both {rival!r} and "input", and either may be the prompt: {told}')
