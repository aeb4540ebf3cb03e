"""Prompts from lists, files and datasets; whatever is wrong is named with its file and line."""

from __future__ import annotations

import json
import sys

import pytest

from textrl_swarm.errors import PromptError
from textrl_swarm.runs.prompts import load_prompts


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
