"""Digests depend on contents only: not on the process, and on every part of a value."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import many_values
import pytest

from textrl_swarm.errors import PromptError
from textrl_swarm.runs.digest import content_digest


def test_other_processes_find_the_same_digests():
    script = "from many_values import VALUES\nfrom textrl_swarm.runs.digest import content_digest\n"
    script += "print(*map(content_digest, VALUES))"
    found = []
    for seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        found.append(answer.stdout.split())
    assert found[0] == found[1] == [content_digest(value) for value in many_values.VALUES]
    assert len(set(found[0])) == len(found[0])


DIFFERENT = """
1 | True | 1.0 | "1" | b"1" | None | [1] | {1} | {1: 1} | {"1": 1} | [[1]] | [] | {} | set() | "" | b""
-1 | 0.0 | -0.0
["ab", "c"] | ["a", "bc"] | ["abc"] | [["a"], "bc"] | {"ab": "c"} | {"a": "bc"} | {"a": "b", "c": "d"}
{"a": "d", "c": "b"}
np.zeros(4) | np.zeros((2, 2)) | np.zeros(4, dtype="f4") | np.ones(4) | torch.zeros(4) | torch.ones(4)
torch.zeros(2, 2)
Row({"a"}) | Row({"b"}) | {"words": {"a"}} | Color.RED | Color.BLUE | decimal.Decimal("1.1")
decimal.Decimal("1.10")
Image.new("RGB", (2, 2)) | Image.new("RGB", (1, 4)) | Image.new("L", (2, 6)) | Image.new("RGB", (2, 2), "red")
datetime.date(2020, 1, 1) | datetime.datetime(2020, 1, 1)
datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
"""


@pytest.mark.parametrize("line", DIFFERENT.strip().split("\n"))
def test_other_contents_have_other_digests(line):
    values = [eval(code, vars(many_values)) for code in line.split(" | ")]
    assert len({content_digest(value) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ((1, [2]), [1, (2,)]),
        (float("nan"), -float("nan")),
        ({"x": {"b", "a"}}, {"x": {"a", "b"}}),
        (frozenset("ab"), set("ba")),
    ],
)
def test_equal_contents_have_equal_digests(one, other):
    assert content_digest(one) == content_digest(other)


def test_an_image_counts_by_its_pixels(tmp_path):
    image = many_values.Image.new("RGB", (2, 2), "red")
    image.save(tmp_path / "a.png")
    with many_values.Image.open(tmp_path / "a.png") as read:
        assert content_digest(read) == content_digest(image)


def test_nesting_without_end_is_told():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(PromptError, match="nested too deep"):
        content_digest(deep)
    while deep:
        deep = deep.pop()
