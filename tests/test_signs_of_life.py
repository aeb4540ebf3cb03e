"""What tells a server that computes for long from one that is lost."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from scripted import scripted

from textrl_swarm.swarm import streams
from textrl_swarm.swarm.protocol import ALIVE, CLOSING, ENDING
from textrl_swarm.swarm.server import pulse
from textrl_swarm.swarm.server.pulse import with_signs_of_life


def message(**told) -> runtime_pb2.ExpertResponse:
    return runtime_pb2.ExpertResponse(metadata=MSGPackSerializer.dumps(told))


async def answers(*items: str | float | Exception, ended: list[str] | None = None):
    """Messages of these names."""
    try:
        async with aclosing(scripted(items)) as script:
            async for name in script:
                yield message(name=name)
    finally:
        if ended is not None:
            ended.append("closed")


def told_by(server, *, beating: bool = True, leaving: bool = False, most: int = 100) -> list[dict]:
    async def run() -> list[dict]:
        found: list[dict] = []
        responses = with_signs_of_life(server, SimpleNamespace(is_beating=beating, is_leaving=leaving))
        async for response in responses:
            found.append(MSGPackSerializer.loads(response.metadata))
            if len(found) == most:
                break
        await responses.aclose()
        return found

    return asyncio.run(run())


def often(monkeypatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_S", 0.05)
    monkeypatch.setattr(pulse, "_TICK_S", 0.05)


def test_a_server_gives_a_sign_while_it_has_nothing_to_say(monkeypatch):
    often(monkeypatch)
    told = told_by(answers("a", "b", 0.18, "c"))
    assert told == [{"name": "a"}, {"name": "b"}, *3 * [{ALIVE: True}], {"name": "c"}]


def test_a_server_whose_computing_process_stops_says_so(monkeypatch):
    often(monkeypatch)
    ended: list[str] = []
    first, last = told_by(answers("a", 60.0, "b", ended=ended), beating=False)
    assert first == {"name": "a"} and last[CLOSING] and "has stopped" in last[ENDING]
    assert ended == ["closed"]


@pytest.mark.parametrize("wait_s", [0.0, 60.0], ids=["at work", "in silence"])
def test_a_server_that_leaves_says_so(monkeypatch, wait_s):
    often(monkeypatch)
    ended: list[str] = []
    (told,) = told_by(answers(wait_s, "a", "b", ended=ended), leaving=True)
    assert told[CLOSING] and "leaves the swarm" in told[ENDING]
    assert ended == ["closed"]


@pytest.mark.parametrize("most", [1, 2], ids=["after an answer", "while it computes"])
def test_what_the_client_leaves_is_closed(monkeypatch, most):
    often(monkeypatch)
    ended: list[str] = []
    told_by(answers("a", 60.0, "b", ended=ended), most=most)
    assert ended == ["closed"]


def test_an_error_comes_through():
    with pytest.raises(ValueError, match="broken"):
        told_by(answers("a", ValueError("broken")))


def heard(stream, connected: bool = True) -> list[str]:
    async def is_connected() -> bool:
        return connected

    async def run() -> list[str]:
        found = []
        async for response in streams._heard(stream, is_connected):
            found.append(MSGPackSerializer.loads(response.metadata)["name"])
        return found

    return asyncio.run(run())


def test_signs_of_life_are_not_answers(monkeypatch):
    often(monkeypatch)
    beating = SimpleNamespace(is_beating=True, is_leaving=False)
    assert heard(with_signs_of_life(answers("a", 0.2, "b"), beating)) == ["a", "b"]


@pytest.mark.parametrize(
    ("connected", "text"), [(True, "no sign of life for 1 s"), (False, "the connection is closed")]
)
def test_silence_is_noticed(monkeypatch, connected, text):
    monkeypatch.setattr(streams, "SILENCE_S", 1 if connected else 60)
    with pytest.raises(streams.Silence, match=text):
        heard(answers("a", 60.0), connected)
