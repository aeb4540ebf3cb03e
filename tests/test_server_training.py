"""Blocks that a server runs together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plain_peft import connect, random_tokens

from textrl_swarm.swarm.client.chain import run_in_background
from textrl_swarm.swarm.server.adapter_store import AdapterStore
from textrl_swarm.swarm.server.gradient_sums import GradientSums
from textrl_swarm.swarm.server.training import Training


@pytest.mark.parametrize(
    ("most_bytes", "groups"),
    [(10**9, ["abcde"]), (2 * 60, ["a", "bc", "de"]), (100, list("abcde")), (1, list("abcde"))],
)
def test_the_last_blocks_of_a_backward_have_room_together(most_bytes, groups):
    """Those before run their forward twice."""
    training = Training(
        AdapterStore(1, 1), GradientSums(1), max_tokens=64, max_activation_bytes=most_bytes, device="cpu"
    )
    blocks = [
        SimpleNamespace(name=name, activation_bytes=lambda rows, length: rows * length) for name in "abcde"
    ]
    found = training._groups(blocks, torch.zeros(6, 10, 3))
    assert ["".join(block.name for block in group) for group in found] == groups


@pytest.mark.swarm
def test_a_server_computes_in_its_own_precision(two_servers):
    tokens = random_tokens(1, 4)
    with connect(two_servers, filled=1) as policy:
        calls, span = policy._client._calls, policy._client.spans[0]
        uids = policy._client.router.uids[span.start : span.stop]
        hidden = policy._parts.embed(tokens).detach()
        outputs = [
            run_in_background(calls.forward(span.peer, uids, one, ""))[0] for one in (hidden, hidden.double())
        ]
    assert outputs[1].dtype == torch.float32 and torch.equal(*outputs)
