"""Prompts from lists, files and datasets; whatever is wrong is named with its file and line."""

from __future__ import annotations

import json

import pytest

from textrl_swarm.errors import PromptError
from textrl_swarm.prompts import load_prompts


def test_lists():
    assert load_prompts(["a", {"input": "b", "target": 3}]) == [{"input": "a"}, {"input": "b", "target": 3}]


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("p.txt", "one\n\n two \r\nthree", [{"input": "one"}, {"input": " two "}, {"input": "three"}]),
        ("p.md", "ein ü\u2028zwei", [{"input": "ein ü\u2028zwei"}]),
        ("p.jsonl", '{"input": "one", "target": [1]}\n\n"two"\n', [{"input": "one", "target": [1]}, {"input": "two"}]),
        ("p.ndjson", '"ü"', [{"input": "ü"}]),
        ("p.json", '["one", {"input": "two"}]', [{"input": "one"}, {"input": "two"}]),
        ("p.txt", "\ufeffone", [{"input": "one"}]),
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
    assert found == [{"input": "review 0", "text": "review 0", "label": 0}, {"input": "review 1", "text": "review 1", "label": 1}]
    assert len(load_prompts({"dataset": dataset, "column": "text", "limit": 99})) == 5


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"column": "txt"}, "has no column 'txt'; did you mean 'text'?"),
        ({"split": "test", "column": "text"}, "(split 'test') cannot be loaded"),
        ({"colum": "text"}, "unknown key 'colum' of prompts; did you mean 'column'?"),
        ({"column": "text", "limit": 0}, "limit must be a whole number >= 1, got 0"),
        ({"column": "label"}, "the input must be a text"),
        ({"dataset": "nobody/nothing-like-this"}, "'nobody/nothing-like-this' (split 'train') cannot be loaded"),
    ],
)
def test_datasets_that_are_refused(dataset, source, told):
    with pytest.raises(PromptError) as caught:
        load_prompts({"dataset": dataset, **source})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("source", "told"), [([], "is empty"), ([""], "prompt 0"), (["a", 3], "prompt 1"), ({"split": "train"}, "need the key")]
)
def test_lists_that_are_refused(source, told):
    with pytest.raises(PromptError, match=told):
        load_prompts(source)
