"""Prompts from lists, files and datasets; whatever is wrong is named with its file and line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets as hf_datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from architectures import character_tokenizer

from textrl_swarm.errors import PromptError
from textrl_swarm.runs.prompts import load_prompts
from textrl_swarm.textrl.env import TextRLEnv


def test_lists():
    assert load_prompts(["a", {"input": "b", "target": 3}]) == [{"input": "a"}, {"input": "b", "target": 3}]


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("p.txt", "one\n\n two \r\nthree", [{"input": "one"}, {"input": " two "}, {"input": "three"}]),
        ("p.md", "ein ü\u2028zwei", [{"input": "ein ü\u2028zwei"}]),
        (
            "p.jsonl",
            '{"input": "one", "target": [1]}\n\n"two"\n',
            [{"input": "one", "target": [1]}, {"input": "two"}],
        ),
        ("p.ndjson", '"ü"', [{"input": "ü"}]),
        ("p.json", '["one", {"input": "two"}]', [{"input": "one"}, {"input": "two"}]),
        ("p.txt", "\ufeffone", [{"input": "one"}]),
        ("p.txt", "one\rtwo", [{"input": "one"}, {"input": "two"}]),
        ("p.JSONL", '{"input": "one"}', [{"input": "one"}]),
    ],
)
def test_files(tmp_path, name, contents, expected):
    path = tmp_path / name
    path.write_bytes(contents.encode())
    assert load_prompts(path) == load_prompts(str(path)) == expected


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("p.txt", None, "there is no prompts file"),
        ("p.txt", b"", "is empty"),
        ("p.txt", b" \n\n", "is empty"),
        ("p.txt", b"good\nbad \xff\xfe", "line 2: not UTF-8 text"),
        ("p.txt", b"\xef\xbb\xbfgood\n\xff", "line 2: not UTF-8 text"),
        ("p.txt", "one\ntwo".encode("utf-16-le"), "line 1: not UTF-8 text (zero byte)"),
        ("p.csv", b"text\none", "p.csv, column: text}"),
        ("p.json", b"[" * 100_000, "not JSON"),
        ("p.jsonl", b'{"input": "a"}\n{"input": ', "line 2: not JSON"),
        ("p.jsonl", b'"a"\n\n{"prompt": "b", "x": 1}', "line 3 has no \"input\"; it has 'prompt', 'x'"),
        ("p.jsonl", b'{"input": "  "}', "line 1: the input must be a text that is not empty"),
        ("p.jsonl", b'{"input": 5}', "line 1: the input must be a text"),
        ("p.jsonl", b"[1]", "line 1: [1] is neither a text nor an object"),
        ("p.json", b'{"input": "a"}', "must hold a list of prompts, it holds a dict"),
        ("p.json", b"[]", "is empty"),
        ("p.json", b'["a", 3]', "entry 1: 3 is neither"),
    ],
)
def test_files_that_are_refused(tmp_path, name, contents, told):
    path = tmp_path / name
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert told in str(caught.value) and name in str(caught.value)


@pytest.fixture
def dataset(tmp_path):
    directory = tmp_path / "reviews"
    directory.mkdir()
    rows = [{"text": f"review {i}", "label": i % 2} for i in range(5)]
    (directory / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(directory)


def test_datasets(dataset):
    found = load_prompts({"dataset": dataset, "column": "text", "limit": 2})
    assert found == [
        {"input": "review 0", "text": "review 0", "label": 0},
        {"input": "review 1", "text": "review 1", "label": 1},
    ]
    assert len(load_prompts({"dataset": dataset, "column": "text", "limit": 99})) == 5
    assert load_prompts({"dataset": f"{dataset}/train.jsonl", "column": "text", "limit": 2}) == found


@pytest.mark.parametrize(("name", "mark"), [("p.csv", ","), ("p.tsv", "\t")])
def test_a_column_of_a_table(tmp_path, name, mark):
    (tmp_path / name).write_text(f"text{mark}label\none{mark}1\ntwo{mark}0\n")
    found = load_prompts({"dataset": str(tmp_path / name), "column": "text"})
    assert found == [{"input": "one", "text": "one", "label": 1}, {"input": "two", "text": "two", "label": 0}]


def test_without_the_package_datasets(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match="pip install datasets"):
        load_prompts({"dataset": dataset, "column": "text"})


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"column": "txt"}, "has no column 'txt'; did you mean 'text'?"),
        ({"split": "test", "column": "text"}, "(split 'test') cannot be loaded"),
        ({"colum": "text"}, "unknown key 'colum' of prompts; did you mean 'column'?"),
        ({"column": "text", "limit": 0}, "limit must be a whole number >= 1, got 0"),
        ({"column": "text", "limit": True}, "limit must be a whole number >= 1, got True"),
        ({"column": "text", "split": None}, "(split 'None') cannot be loaded"),
        ({"column": "label"}, "the input must be a text"),
        (
            {"dataset": "nobody/nothing-like-this"},
            "'nobody/nothing-like-this' (split 'train') cannot be loaded",
        ),
    ],
)
def test_datasets_that_are_refused(dataset, source, told):
    with pytest.raises(PromptError) as caught:
        load_prompts({"dataset": dataset, **source})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ([], "is empty"),
        ([""], "prompt 0"),
        (["a", 3], "prompt 1"),
        ({"split": "train"}, "need the key"),
        ({"dataset": None}, "need the key"),
        (None, "got None"),
        (5, "got 5"),
        ("Tell me a story. " * 40, "put a single prompt in a list"),
    ],
)
def test_lists_that_are_refused(source, told):
    with pytest.raises(PromptError, match=told):
        load_prompts(source)


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"input": "good"}\n{"input": "\\ud800"}\n')
    with pytest.raises(PromptError, match=r"p\.jsonl, line 2: the input is no valid text"):
        load_prompts(path)


# ----------------------------------------------------------------------------- names of files and directories


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("p[1].csv", "p1.csv"), ("what?.csv", "whats.csv"), ("*.csv", "a.csv"), ("[!a].csv", "b.csv")],
)
def test_a_files_name_is_no_pattern(tmp_path, monkeypatch, name, wrong):
    for directory in (tmp_path, tmp_path / "in[1]"):
        directory.mkdir(exist_ok=True)
        (directory / name).write_text("text\nright\n")
        (directory / wrong).write_text("text\nwrong\n")
        monkeypatch.chdir(directory)
        for path in (name, str(directory / name)):
            assert load_prompts({"dataset": path, "column": "text"}) == [{"input": "right", "text": "right"}]
    with pytest.raises(PromptError, match="cannot be loaded"):
        load_prompts({"dataset": "whatever?.csv", "column": "text"})


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "txt", "tsv"])
def test_no_kind_of_table_is_a_pattern(tmp_path, suffix):
    for name, text in (("p[1]", "right"), ("p1", "wrong")):
        path = tmp_path / f"{name}.{suffix}"
        frame = pd.DataFrame({"text": [text]})
        if suffix == "parquet":
            frame.to_parquet(path)
        elif suffix.startswith("json"):
            frame.to_json(path, orient="records", lines=suffix == "jsonl")
        else:
            path.write_text(text if suffix == "txt" else f"text\n{text}\n")
    found = load_prompts({"dataset": str(tmp_path / f"p[1].{suffix}"), "column": "text"})
    assert found == [{"input": "right", "text": "right"}]


def test_a_directory_whose_name_would_be_a_pattern(tmp_path, monkeypatch):
    (tmp_path / "d[1]" / "data").mkdir(parents=True)
    (tmp_path / "d[1]" / "data" / "train.csv").write_text("text\nright\n")
    monkeypatch.chdir(tmp_path / "d[1]")
    for name in ("data", str(tmp_path / "d[1]" / "data")):
        with pytest.raises(PromptError, match=r"has one of \*\?\[ in its name; name a file of it instead"):
            load_prompts({"dataset": name, "column": "text"})


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text('{"input": "a"}')
    for source in ("~/p.jsonl", Path("~/p.jsonl"), {"dataset": "~/p.jsonl"}, {"dataset": "~/."}):
        assert load_prompts(source) == [{"input": "a"}]


def test_a_table_of_an_unknown_kind(tmp_path):
    (tmp_path / "p.dat").write_text("a")
    with pytest.raises(PromptError, match=r"none of the suffixes by which tables are known: \.csv"):
        load_prompts({"dataset": str(tmp_path / "p.dat")})


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("p.jsonl.txt", '{"input": "a"}\n', "let its name end with .jsonl"),
        ("p", '{"input": "a"}\n{"inp', "let its name end with .jsonl"),
        ("p.txt", '\n{"input": "a"}\n', "let its name end with .jsonl"),
        ("p.md", '[\n{"input": "a"}\n]', "let its name end with .json"),
        ("p.dat", '{\n"input": "a"}', "let its name end with .json"),
        ("p.csv.txt", "text,label\na,1", "a table or a text?"),
        ("p.jsonl.gz", "x", "is compressed; unpack it first"),
        ("p.yaml", "- a\n- b\n", "put its list under the key prompts"),
    ],
)
def test_what_a_files_name_does_not_say(tmp_path, name, contents, told):
    (tmp_path / name).write_text(contents)
    with pytest.raises(PromptError) as caught:
        load_prompts(tmp_path / name)
    assert told in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[INST] hi [/INST]", '{"name": ', "{name} says", "123", '"quoted"', "[link] {x}"]
)
def test_texts_that_only_begin_like_json(tmp_path, text):
    (tmp_path / "p.txt").write_text(text)
    assert load_prompts(tmp_path / "p.txt") == [{"input": text}]


# --------------------------------------------------------------------------------- which column is the prompt

ALPACA = [
    {"instruction": "sum up", "input": "a context", "output": "o"},
    {"instruction": "say", "input": "", "output": "p"},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_keep_a_column_that_is_called_input(tmp_path, suffix):
    path = tmp_path / f"alpaca.{suffix}"
    path.write_text(json.dumps(ALPACA) if suffix == "json" else "\n".join(map(json.dumps, ALPACA)))
    assert load_prompts({"dataset": str(path), "column": "instruction"}) == [
        {"input": "sum up", "instruction": "sum up", "output": "o", "original_input": "a context"},
        {"input": "say", "instruction": "say", "output": "p", "original_input": ""},
    ]
    assert load_prompts({"dataset": str(path), "column": "input", "limit": 1}) == ALPACA[:1]
    with pytest.raises(PromptError, match="add column: instruction or column: input"):
        load_prompts({"dataset": str(path)})
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    for column in ("instruction", "input"):
        assert f"{{dataset: {path}, column: {column}}}" in str(caught.value)


def test_a_row_with_both_names_taken():
    rows = [{"text": "a", "input": "b", "original_input": "c"}]
    with pytest.raises(PromptError, match="rename one of them"):
        load_prompts({"dataset": saved(hf_datasets.Dataset.from_list(rows)), "column": "text"})


@pytest.mark.parametrize(
    ("row", "is_refused"),
    [
        ({"input": "context", "instruction": "do"}, True),
        ({"input": "context", "prompt": "do"}, True),
        ({"input": "do: context", "instruction": " do "}, False),
        ({"input": "context", "instruction": ""}, False),
        ({"input": "context", "instruction": 5}, False),
        ({"input": "context", "question": "why", "answer": "because"}, False),
        ({"input": "<user>hi", "messages": [{"role": "user", "content": "hi"}]}, False),
    ],
)
def test_rows_of_a_list_with_two_prompts(row, is_refused):
    for read in (load_prompts, prompts_of_an_env):
        if is_refused:
            with pytest.raises(PromptError, match=r'has both .* and "input", .* rename'):
                read([row])
        else:
            assert read([row]) == [row]


def prompts_of_an_env(source) -> list[dict]:
    env = TextRLEnv(None, character_tokenizer(), source, reward=lambda items, texts: [0.0] * len(texts))
    return [prompt.item for prompt in env.prompts()]


def test_an_environment_that_knows_where_its_text_is_takes_any_row():
    class Alpaca(TextRLEnv):
        def get_obs_input(self, item):
            return f"{item['instruction']} {item['input']}"

    env = Alpaca(None, character_tokenizer(), ALPACA, reward=lambda items, texts: [0.0] * len(texts))
    assert [prompt.item for prompt in env.prompts()] == ALPACA


# ----------------------------------------------------------------------------------------------------- tables

ROWS = [{"input": "one", "label": 1}, {"input": "two", "label": 2}]


class Polars:
    """polars is not among the tested libraries; its DataFrame has this method."""

    def to_dicts(self):
        return ROWS


@pytest.mark.parametrize("read", [load_prompts, prompts_of_an_env])
@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame(ROWS),
        pa.Table.from_pylist(ROWS),
        hf_datasets.Dataset.from_list(ROWS),
        Polars(),
        np.array(ROWS),
    ],
    ids=["pandas", "pyarrow", "datasets", "polars", "numpy"],
)
def test_tables(table, read):
    assert read(table) == ROWS


@pytest.mark.parametrize("read", [load_prompts, prompts_of_an_env])
@pytest.mark.parametrize(
    "column",
    [
        pd.Series(["one", "two"]),
        np.array(["one", "two"]),
        pa.array(["one", "two"]),
        {"one": 1, "two": 2}.keys(),
    ],
    ids=["pandas", "numpy", "pyarrow", "keys"],
)
def test_columns_of_texts(column, read):
    found = read(column)
    assert found == [{"input": "one"}, {"input": "two"}] and all(type(item["input"]) is str for item in found)


LazyFrame = type("LazyFrame", (), {})
OtherFrame = type("OtherFrame", (), {"columns": ["input"]})


@pytest.mark.parametrize("read", [load_prompts, prompts_of_an_env])
@pytest.mark.parametrize(
    ("table", "told"),
    [
        (
            pd.DataFrame({"text": ["a"], "label": [1]}),
            "it has 'text', 'label'; rename the one with the prompt to",
        ),
        (pd.DataFrame([["a", "b"]], columns=["input", "input"]), "several columns are named input"),
        (
            hf_datasets.DatasetDict(train=hf_datasets.Dataset.from_list(ROWS)),
            "the splits 'train'; give one of them",
        ),
        (hf_datasets.Dataset.from_list(ROWS).to_iterable_dataset(), r"give list\(dataset.take"),
        ({"b", "a"}, r"the order of a set changes between processes; give sorted"),
        (LazyFrame(), r"give frame.collect\(\)"),
        (OtherFrame(), "the rows of a OtherFrame cannot be read"),
        (np.array("a"), "got"),
        (pd.DataFrame({"input": []}), "at least one prompt"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_tables_that_are_refused(table, told, read):
    with pytest.raises(PromptError, match=told):
        read(table)


def saved(dataset) -> str:
    """The directory that save_to_disk wrote."""
    import tempfile

    directory = tempfile.mkdtemp()
    dataset.save_to_disk(directory)
    return directory


def test_what_save_to_disk_wrote_is_read():
    one = hf_datasets.Dataset.from_list(ROWS)
    assert load_prompts({"dataset": saved(one)}) == ROWS
    several = {"dataset": saved(hf_datasets.DatasetDict(train=one, test=one.select([1])))}
    assert load_prompts(several) == ROWS
    assert load_prompts({**several, "split": "test"}) == ROWS[1:]
    assert load_prompts({**several, "column": "input", "limit": 1}) == ROWS[:1]
    with pytest.raises(PromptError, match="has no split 'tset'; did you mean 'test'"):
        load_prompts({**several, "split": "tset"})


# ---------------------------------------------------------------------------------------------- chat messages

CHAT = [{"role": "user", "content": "hi"}]
RENDERED = "tokenize=False, add_generation_prompt=True)"


@pytest.mark.parametrize("read", [load_prompts, prompts_of_an_env])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ([CHAT], f"[tokenizer.apply_chat_template(messages, {RENDERED} for messages in prompts]"),
        (CHAT, f"[tokenizer.apply_chat_template(messages, {RENDERED}]"),
        (
            [{"messages": CHAT}],
            f"{{**row, \"input\": tokenizer.apply_chat_template(row['messages'], {RENDERED}}}",
        ),
        ([{"id": 1, "prompt": CHAT}], f"apply_chat_template(row['prompt'], {RENDERED}"),
        ([{"input": CHAT}], f"apply_chat_template(row['input'], {RENDERED}"),
        ([{"messages": np.array(CHAT)}], f"apply_chat_template(row['messages'], {RENDERED}"),
    ],
)
def test_chat_messages_are_told_how_to_become_texts(source, told, read):
    with pytest.raises(PromptError) as caught:
        read(source)
    assert told in str(caught.value)


def test_chat_messages_of_files_and_datasets(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    for source in (path, {"dataset": str(path), "column": "messages"}):
        with pytest.raises(PromptError, match="apply_chat_template"):
            load_prompts(source)
