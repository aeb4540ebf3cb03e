"""Values of many types that people put into prompts; no two hold the same."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import pathlib
import re
import threading
import uuid
import zoneinfo

import numpy as np
import torch
from PIL import Image


@dataclasses.dataclass
class Row:
    words: set


class Plain:
    def __init__(self):
        self.words = {"x", "y", "z"}


Color = enum.Enum("Color", "RED BLUE")
Pair = collections.namedtuple("Pair", "a b")
loop = [{"a", "b", "c"}]
loop.append(loop)
VALUES = [
    {"a", "b", "c", "d"},
    frozenset("abce"),
    {("a", frozenset("xyz")), ("b", frozenset("pq"))},
    {"k": {"s", "t", "u"}},
    b"x",
    bytearray(b"y"),
    {1: "a", None: "b", ("t", 1): "c"},
    float("nan"),
    10**6000,
    "\ud800",
    range(3),
    1 + 2j,
    np.arange(4),
    np.array([{"a", "b", "c"}, None], dtype=object),
    np.zeros(2, dtype=[("a", "i4"), ("b", "O")]),
    np.float32(0.1),
    np.datetime64("2020-01-01"),
    torch.ones(2, dtype=torch.bfloat16),
    torch.tensor(3),
    torch.ones(2, requires_grad=True) * 2,
    torch.eye(3).to_sparse(),
    torch.ones(2, device="meta"),
    Image.new("RGB", (2, 2), "red"),
    Image.new("P", (2, 2)),
    datetime.date(2020, 1, 1),
    datetime.timedelta(1),
    datetime.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
    decimal.Decimal("1.10"),
    fractions.Fraction(1, 3),
    uuid.UUID(int=5),
    pathlib.Path("/a"),
    re.compile("a+"),
    Row({"a", "b", "c"}),
    Plain(),
    Color.RED,
    Pair({"a", "b"}, 1),
    collections.deque([{"a", "b", "c"}]),
    collections.OrderedDict(b=1, a={"x", "y", "z"}),
    loop,
    threading.Lock(),
    object(),
    len,
    lambda: 1,
    Plain,
    (c for c in "ab"),
    io.BytesIO(b"x"),
    io.StringIO("x"),
    torch.nn.Linear(2, 2),
]
