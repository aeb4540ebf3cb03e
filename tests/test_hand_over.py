"""Steps of a generation that come from the client and from the server before, in any order."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from unittest.mock import MagicMock

import pytest
import torch
from scripted import scripted

from textrl_swarm.errors import ShapeError
from textrl_swarm.swarm.access import Membership
from textrl_swarm.swarm.protocol import Receiver
from textrl_swarm.swarm.server import hand_over
from textrl_swarm.swarm.server.hand_over import HandOvers, in_order


def ordered(from_client: list, from_server: list | None, timeout_s: float = 5.0) -> list[tuple[int, str]]:
    """Number and sender of each step that is computed; sources are lists of numbers (JSON for strange ones),
    pauses (floats) and errors.
    """

    async def source(items: list, sender: str, is_endless: bool):
        async with aclosing(scripted(items)) as script:
            async for item in script:
                step = json.loads(item) if isinstance(item, str) else item
                yield torch.zeros(1), {"sender": sender, **({} if step is None else {"step": step})}
        if is_endless:
            await asyncio.sleep(60)

    async def run() -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        handed = None if from_server is None else source(from_server, "server", True)
        steps = in_order(source(from_client, "client", False), handed, timeout_s)
        try:
            async for _, facts in steps:
                found.append((facts.get("step"), facts["sender"]))
        finally:
            await steps.aclose()
            assert len(asyncio.all_tasks()) == 1, "nothing may go on"
        return found

    return asyncio.run(run())


def test_each_step_is_computed_once_whoever_brings_it():
    found = ordered([0, 1, 0.1, 2, 0.1, 3, 0.1], [0.05, 1, 2, 0.1, 4, 0.1, 2])
    assert [step for step, _ in found] == [0, 1, 2, 3, 4]
    assert found[1] == (1, "client") and found[2] == (2, "server")


def test_steps_that_come_early_wait():
    assert [step for step, _ in ordered([0.1, 0, 0.1], [2, 1])] == [0, 1, 2]


def test_clients_that_do_not_number_their_steps():
    assert ordered([None, None, None], None) == [(None, "client")] * 3


def test_errors_of_the_client_end_a_generation_and_those_of_a_server_do_not():
    assert [step for step, _ in ordered([0, 0.1, 1], [ValueError("cut off")])] == [0, 1]
    with pytest.raises(ValueError, match="malformed"):
        ordered([0, ValueError("malformed")], [])


@pytest.mark.parametrize("step", ["1073741824", '"2"', "1.5", "[]"])
def test_impossible_numbers_are_refused(step):
    with pytest.raises(ShapeError, match="instead of step 1"):
        ordered([0, step], None)


def test_a_silent_client_is_not_waited_for():
    with pytest.raises(asyncio.TimeoutError):
        ordered([0, 5.0], [], timeout_s=0.1)


@pytest.mark.parametrize("raw", [[["peer"]], 7, [[1, 2, 3]], [["p", "u", "s", False]] * 300], ids=str)
def test_receivers_of_strangers(raw):
    with pytest.raises(ShapeError, match="receivers of an output"):
        Receiver.decode_all(raw)


def test_receivers_survive_the_wire():
    receiver = Receiver("peer", "uid.3", "session", True)
    assert Receiver.decode_all([["peer", "uid.3", "session", True]]) == [receiver]
    assert Receiver.decode_all(None) == []


@pytest.mark.parametrize(("number", "goes"), [(2.0, True), (float("nan"), False), (float("inf"), False)])
def test_numbers_that_are_not_finite_are_not_handed_over(monkeypatch, number, goes):
    """The client is to see which server computed them."""

    async def call(*args, **options) -> None:
        """The other server takes everything."""

    monkeypatch.setattr(hand_over.StreamPool, "call", call)
    monkeypatch.setattr(hand_over.ServerStub, "get_stub", MagicMock())
    receivers = [["QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "bloom.0", "session", False]]

    async def give(hand_overs: HandOvers) -> bool:
        output = torch.tensor([[[1.0, number]]])
        task = hand_overs.start(output, {"hand_over": receivers}, None)
        assert task is not None
        return await task

    assert asyncio.run(give(HandOvers(None, Membership(None, None)))) is goes
