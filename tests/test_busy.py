"""A server that is full is in order: clients wait for it in so many words, and nobody bans it."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hivemind.p2p import P2PHandlerError
from plain_peft import FAST, connect

from textrl_swarm.config import SamplingConfig
from textrl_swarm.errors import RemoteFailure
from textrl_swarm.models.base_model import resolve
from textrl_swarm.swarm import compat
from textrl_swarm.swarm.client.session import GenerationSession
from textrl_swarm.swarm.local import LocalSwarm

pytestmark = pytest.mark.swarm

PROMPTS = [[5, 6, 7], [8, 9]]
SAMPLING = SamplingConfig(
    max_new_tokens=100, seed=3
)  # of 400 tokens in small_server's caches these take half
LONG = SamplingConfig(max_new_tokens=180, seed=3)


@contextlib.contextmanager
def stopped_generation(swarm, monkeypatch):
    """The rollout of another client that stopped at its fifth step; it has all caches of its server."""
    original, go_on, has_stopped, calls = GenerationSession.run, threading.Event(), threading.Event(), []

    def run(self, steps):
        if threading.current_thread().name.startswith("stopped"):
            calls.append(self)
            if len(calls) == 5:
                has_stopped.set()
                go_on.wait(120)
        return original(self, steps)

    with ThreadPoolExecutor(1, "stopped") as threads, connect(swarm, filled=5) as policy:
        undisturbed = policy.generate(PROMPTS, LONG)
        monkeypatch.setattr(GenerationSession, "run", run)
        rollout = threads.submit(policy.generate, PROMPTS, LONG)
        assert has_stopped.wait(60)

        def finish():
            go_on.set()
            found = rollout.result(120)
            assert torch.equal(found.tokens, undisturbed.tokens)
            assert torch.equal(found.old_logprobs, undisturbed.old_logprobs)

        try:
            yield policy, finish
        finally:
            finish()


def test_a_generation_that_does_nothing_gives_way(small_server, monkeypatch, caplog):
    with (
        stopped_generation(small_server, monkeypatch) as (_, finish),
        connect(small_server, filled=6) as policy,
    ):
        rollout = policy.generate(PROMPTS, SAMPLING)
        assert "is busy: no room for caches of 2 x 10" in caplog.text
        assert "waiting for room, for another" in caplog.text
        assert torch.equal(policy.generate(PROMPTS, SAMPLING).tokens, rollout.tokens)
        assert not policy._client.router._failures
        finish()
    assert "others wait for the caches of this generation, which did nothing for" in caplog.text
    assert "no server holds" not in caplog.text


@pytest.mark.slow  # half a minute of waiting
def test_a_stock_client_that_does_nothing_gives_way(small_server, caplog):
    """It is told why. With more retries it would fail to take its generation up again: petals' issue 587."""
    compat.install_import_hook()
    from petals import DistributedBloomForCausalLM
    from stock_client import end

    model = DistributedBloomForCausalLM.from_pretrained(
        small_server.model,
        initial_peers=small_server.initial_peers,
        dht_prefix=resolve(small_server.model).dht_prefix,
        max_retries=1,
    )
    hidden = torch.zeros(1, 1, model.config.hidden_size)
    try:
        with torch.no_grad(), model.transformer.h.inference_session(max_length=350) as session:
            session.step(hidden)
            with connect(small_server, filled=6) as policy:
                policy.generate(PROMPTS, SAMPLING)
                assert "is busy: no room for caches of 2 x 10" in caplog.text
                assert not policy._client.router._failures
            with pytest.raises(P2PHandlerError, match="others wait for the caches of this generation"):
                session.step(hidden)
    finally:
        end(model)


def test_waiting_for_room_has_an_end(small_server, monkeypatch):
    hasty = replace(FAST, request_s=2, recovery_s=3)
    with (
        stopped_generation(small_server, monkeypatch) as (_, finish),
        connect(small_server, filled=6, timeouts=hasty) as policy,
    ):
        with pytest.raises(RemoteFailure, match=r"waited 3 s: server .* is busy: no room .*; run again when"):
            policy.generate(PROMPTS, SAMPLING)
        finish()
        policy.generate(PROMPTS, SAMPLING)


@pytest.mark.slow  # starts two servers
def test_who_has_room_is_asked(tiny_bloom, monkeypatch, caplog):
    options = "--attn_cache_tokens", "400"
    model = tiny_bloom(seed=2, layers=3)
    with (
        LocalSwarm(model, spans=[(0, 3), (0, 3)], server_options=options) as swarm,
        stopped_generation(swarm, monkeypatch) as (other, _),
        connect(swarm, filled=6) as policy,
    ):
        policy._client.router._salt = other._client.router._salt  # prefers the same server
        policy.generate(PROMPTS, SAMPLING)
        assert caplog.text.count("is busy") == 1
        policy.generate(PROMPTS, SAMPLING)
        assert caplog.text.count("is busy") == 1
