"""Servers that answer wrong numbers are found and left, and nothing that they touched is kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from from_benchmarks import import_benchmark
from hypothesis import given
from hypothesis import strategies as st
from plain_peft import FAST, fill

from textrl_swarm.config import (
    Codec,
    LoraSettings,
    PPOConfig,
    SamplingConfig,
    ServerChecks,
    SwarmAccess,
)
from textrl_swarm.errors import AnswersRefuted, BlocksUnavailable, ConfigError
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.runs.config import load_config
from textrl_swarm.runs.run import _checks
from textrl_swarm.swarm.client.agreement import (
    comparable,
    difference_of_tokens,
    difference_of_vectors,
    limit,
)
from textrl_swarm.swarm.codec import decode, encode
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.swarm.protocol import ServedWeights

pytestmark = pytest.mark.swarm

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
SAMPLING = SamplingConfig(max_new_tokens=5, num_samples=2, stop_token_ids=(), seed=7)
LIES = import_benchmark("lying_server").LIES
SELDOM = {"noise, once in 100", "a constant, where one row is asked for"}
# The last begins to matter in the second optimizer step, when the first is taken.
OF_EACH_KIND = {"noise of 1e-2", "no adapter", "gradients of the adapter before"}


@pytest.fixture(scope="module")
def lying(tiny_bloom):
    """Three servers with all blocks, one of which lies when it is told to."""
    with import_benchmark("harness").LyingSwarm(tiny_bloom(seed=1), [(0, 4)] * 3) as swarm:
        yield swarm


def connect(swarm, checks, lora=None, **options):
    policy = load_policy(
        swarm.model, initial_peers=swarm.initial_peers, lora=lora or LoraSettings(r=4), timeouts=FAST,
        checks=checks, **options,
    )  # fmt: skip
    fill(policy, seed=3)
    return policy


def learned(policy, rounds=1) -> str:
    """A digest of all that was sampled and learned."""
    ppo = PPO(policy, PPOConfig(epochs=2, minibatch_size=3, kl_coef=0.05, lr=1e-2))
    digest = hashlib.sha256()
    for _ in range(rounds):
        rollout = policy.generate(PROMPTS, SAMPLING)
        rewards = torch.zeros(rollout.response_mask.shape)
        rewards[:, -1] = (rollout.tokens % 7).float().mean(1)
        ppo.update(rollout, rewards)
        for tensor in (rollout.tokens, rollout.old_logprobs, rollout.values):
            digest.update(tensor.numpy().tobytes())
    for _, parameter in sorted(policy.trainable_parameters().items()):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def honest(lying) -> str:
    lying.tell("")
    with connect(lying, None) as policy:
        return learned(policy)


def test_honest_servers_are_believed_and_checks_change_nothing(lying, honest, caplog):
    lying.tell("")
    with connect(lying, ServerChecks(rate=1.0)) as policy:
        assert learned(policy) == honest
        checks = policy._client.chain.checks
        kinds = {kind for _, kind in checks.examined}
        assert kinds == {"forward", "generation", "gradient"}  # nobody asks for the first inputs' gradient
        assert set(checks.worst) == kinds
        assert max(checks.worst.values()) < 0.1
    assert "refuted" not in caplog.text


@pytest.mark.parametrize("codec", [None, "fp16", "int8"])
@pytest.mark.parametrize("alone", [False, True], ids=["another judges", "this machine judges"])
def test_honest_servers_are_believed_whatever_travels(lying, codec, alone, caplog):
    """With blocks of this machine's own, servers return gradients of their inputs, too."""
    lying.tell("")
    settings = None if codec is None else Codec(codec, max_nats=100, min_cosine=0.01)
    allowed = [lying.servers[0].addresses[0].rsplit("/", 1)[-1]] if alone else []
    options = {"codec": settings, "access": SwarmAccess(allowed), "local_blocks": (1, 1)}
    with connect(lying, ServerChecks(rate=1.0, here=True), **options) as policy:
        learned(policy)
        worst = policy._client.chain.checks.worst
        assert worst.keys() == {"forward", "generation", "backward", "gradient"}
        assert max(worst.values()) < 0.1
    assert "refuted" not in caplog.text


@pytest.mark.slow  # three servers more
@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_what_is_encoded_in_other_places_is_no_lie(tiny_bloom, codec, caplog):
    """Between other blocks; seen: 0.2 and 0.3 of the limit."""
    settings = Codec(codec, max_nats=100, min_cosine=0.01)
    swarm = LocalSwarm(tiny_bloom(seed=1), spans=[(0, 4), (0, 2), (2, 4)])
    options = {"codec": settings, "local_blocks": (1, 1)}
    with swarm, connect(swarm, ServerChecks(rate=1.0), **options) as policy:
        learned(policy)
        worst = policy._client.chain.checks.worst
        assert worst.keys() == {"forward", "generation", "backward", "gradient"}
        assert max(worst.values()) < 0.6
    assert "refuted" not in caplog.text


def test_a_lie_about_the_gradient_of_inputs_is_found(lying, tmp_path):
    """Which only who has adapted blocks of its own in front asks the first server for."""
    record = tmp_path / "refuted.jsonl"
    with connect(lying, None, local_blocks=(1, 0)) as policy:
        lying.tell("")
        expected = learned(policy)
    lying.tell("gradients of the wrong sign")
    with connect(lying, ServerChecks(rate=1.0, record=str(record)), local_blocks=(1, 0)) as policy:
        assert learned(policy) == expected
    (entry,) = map(json.loads, record.read_text().splitlines())
    assert lying.servers[0].addresses[0].endswith(entry["peer"])


@pytest.mark.parametrize(
    "lie",
    [
        lie if lie in OF_EACH_KIND else pytest.param(lie, marks=pytest.mark.slow)
        for lie in LIES
        if lie not in SELDOM
    ],
)
def test_a_liar_is_left_and_what_it_touched_is_thrown_away(lying, honest, lie, tmp_path, caplog):
    record = tmp_path / "refuted.jsonl"
    lying.tell(lie)
    with connect(lying, ServerChecks(rate=1.0, record=str(record))) as policy:
        assert learned(policy) == honest
    (entry,) = map(json.loads, record.read_text().splitlines())
    (address,) = lying.servers[0].addresses
    assert address.endswith(entry["peer"])
    assert entry["reason"] in caplog.text
    assert "agree on another" in entry["reason"]
    with connect(lying, ServerChecks(rate=0.01, record=str(record))) as policy:
        assert learned(policy) == honest  # by others, from the first request on
        assert not any(peer == entry["peer"] for peer, _ in policy._client.chain.checks.seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spans", "kind"),
    [
        pytest.param([(2, 4), (0, 2), (2, 4), (2, 4)], "backward", id="behind another"),
        pytest.param([(0, 4), (0, 4), (0, 2), (2, 4)], "forward", id="checked by two in a row"),
    ],
)
def test_a_liar_is_found_in_a_chain(tiny_bloom, honest, spans, kind, tmp_path):
    record = tmp_path / "refuted.jsonl"
    with import_benchmark("harness").LyingSwarm(tiny_bloom(seed=1), spans) as swarm:
        for lie in ("", "noise of 1e-2", "gradients of the wrong sign"):
            swarm.tell(lie)
            with connect(swarm, ServerChecks(rate=1.0, record=str(record))) as policy:
                assert learned(policy) == honest
                (address,) = swarm.servers[0].addresses
                liar = address.rsplit("/", 1)[-1]
                assert lie or policy._client.chain.checks.examined[liar, kind] > 0
                assert policy._client.router._refuted.keys() == ({liar} if lie else set())
            record.unlink(missing_ok=True)


def test_without_checks_a_liar_is_believed(lying, honest):
    """Or the lies above would be none."""
    for lie in ("noise of 1e-2", "no adapter", "1 % of the gradients' entries"):
        lying.tell(lie)
        with connect(lying, None) as policy:
            assert learned(policy) != honest


def test_who_lies_about_others_is_refuted_itself(lying, honest, tmp_path):
    """It is honest in its own work, and lies where it looks as if others were checked."""
    record = tmp_path / "refuted.jsonl"
    lying.tell("a constant, where one row is asked for")
    with connect(lying, ServerChecks(rate=1.0, record=str(record))) as policy:
        liar = next(span for span in policy._client.router._spans if span.throughput > 1)
        policy._client.router._busy_until[liar.peer] = float("inf")  # others work
        assert learned(policy) == honest
    peers = [json.loads(line)["peer"] for line in record.read_text().splitlines()]
    assert peers == [str(liar.peer)]


def test_two_that_contradict_each_other_are_both_left(lying, tmp_path):
    record = tmp_path / "refuted.jsonl"
    lying.tell("a constant")
    with connect(lying, ServerChecks(rate=1.0, record=str(record))) as policy:
        router = policy._client.router
        router.refute(lying.servers[2].addresses[0].rsplit("/", 1)[-1], "it is not here")
        with pytest.raises(AnswersRefuted, match="contradict each other, and no third can tell") as raised:
            policy(torch.tensor([[5, 6, 7]]))
        assert str(raised.value).count("is not used any more") == 2
        policy._client._calls.timeouts = FAST.__class__(recovery_s=0.0)
        policy._client.chain.passes._recovery_s = 0.0
        with pytest.raises(BlocksUnavailable, match="contradict each other"):
            policy(torch.tensor([[5, 6, 7]]))
    assert not record.read_text()  # who of them it was is not known


@pytest.mark.parametrize("lie", ["noise of 1e-2", "no adapter", "gradients of the wrong sign"])
def test_this_machine_tells_who_of_two_lies(lying, honest, lie, tmp_path):
    record = tmp_path / "refuted.jsonl"
    lying.tell(lie)
    with connect(lying, ServerChecks(rate=1.0, record=str(record), here=True)) as policy:
        policy._client.router.refute(lying.servers[2].addresses[0].rsplit("/", 1)[-1], "it is not here")
        assert learned(policy) == honest
    (entry,) = map(json.loads, record.read_text().splitlines())
    assert lying.servers[0].addresses[0].endswith(entry["peer"])
    assert "this machine" in entry["reason"]


def test_this_machine_checks_servers_that_are_alone(two_servers, honest, caplog):
    with connect(two_servers, ServerChecks(rate=1.0, here=True)) as policy:
        assert learned(policy) == honest
        checks = policy._client.chain.checks
        assert set(checks.worst) == {"forward", "generation", "backward", "gradient"}
        assert max(checks.worst.values()) < 0.1
    assert "cannot be checked" not in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("own blocks")]


def test_where_nobody_else_holds_the_blocks_it_is_said(two_servers, caplog):
    with connect(two_servers, ServerChecks(rate=1.0)) as policy:
        learned(policy)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    cannot = [text for text in warnings if "cannot be checked" in text]
    assert len(cannot) == 2
    assert (
        "nobody else computes blocks 0..1 " in cannot[0] or "nobody else computes blocks 0..1 " in cannot[1]
    )


@pytest.mark.parametrize("text", ["no json", "[]", '{"peer": "x"}', "\xff"])
def test_a_damaged_record_is_refused_before_the_run(lying, tmp_path, text):
    (tmp_path / "record").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not a list of refuted servers"):
        connect(lying, ServerChecks(record=str(tmp_path / "record")))


def test_a_record_that_cannot_be_written_is_refused_before_the_run(lying, tmp_path):
    (tmp_path / "file").write_text("")
    for record in (tmp_path, tmp_path / "file" / "record"):
        with pytest.raises(ConfigError, match="cannot be written"):
            connect(lying, ServerChecks(record=str(record)))


def test_a_run_keeps_a_record_unless_it_has_another():
    swarm = {"initial_peers": ["/ip4/..."], "checks": {"rate": 0.1}}
    config = {"model": "m", "prompts": ["p"], "reward": "r:f", "output": "here"}
    assert _checks(load_config({**config, "swarm": swarm})) == ServerChecks(
        0.1, str(Path("here/refuted.jsonl"))
    )
    swarm["checks"]["record"] = "there"
    assert _checks(load_config({**config, "swarm": swarm})) == ServerChecks(0.1, "there")
    del swarm["checks"]
    assert _checks(load_config({**config, "swarm": swarm})) is None


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "much"])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ConfigError, match="rate"):
        ServerChecks(rate=rate)


FORMS = [
    ServedWeights("", dtype, q) for dtype in ("float32", "float16", "bfloat16") for q in (None, "int8", "nf4")
]


@given(st.sampled_from(FORMS), st.sampled_from(FORMS), st.integers(1, 100))
def test_limits(first, second, blocks):
    assert comparable(first, second) == comparable(second, first)
    assert comparable(first, first)
    assert limit(first, second, blocks) == limit(second, first, blocks) or not comparable(first, second)
    assert limit(first, second, blocks) >= limit(FORMS[0], FORMS[0], blocks)
    assert limit(first, second, blocks) <= limit(first, second, blocks + 1)
    # A gradient of the wrong sign is found whatever the arithmetic.
    assert limit(first, second, blocks) < limit(first, second, blocks, of_gradients=True) < 2


@pytest.mark.parametrize("codec", ["fp16", "int8"])
@pytest.mark.parametrize("width", [64, 1024, 4096])
def test_a_last_bit_that_turns_a_codecs_step_over_is_no_lie(codec, width):
    """States of unit scale, of which a block changes a tenth, computed with other last bits."""
    generator = torch.Generator().manual_seed(0)
    given_ = torch.randn(1, 50, width, generator=generator)
    found = given_ + 0.1 * torch.randn(1, 50, width, generator=generator)
    other = found + 1e-5 * torch.randn(1, 50, width, generator=generator)
    plain = limit(FORMS[0], FORMS[0], 1)
    assert difference_of_tokens(found, other, given_) < plain
    recoded = [decode(encode(tensor, codec), codec) for tensor in (found, other)]
    difference = difference_of_tokens(*recoded, given_)
    assert difference > plain or width == 64, "the codec's own part of the limit is needless"
    assert difference < limit(FORMS[0], FORMS[0], 1, codec=codec)


def test_servers_that_quantise_differently_are_not_compared():
    whole, half, in_8, in_4 = (
        ServedWeights("", dtype, quantization)
        for dtype, quantization in (
            ("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "nf4")
        )
    )  # fmt: skip
    assert comparable(whole, half)
    assert not any(comparable(one, other) for one, other in itertools.combinations((half, in_8, in_4), 2))
    assert not comparable(in_4, ServedWeights("", "bfloat16", "nf4"))


def test_differences():
    given_ = torch.zeros(1, 20, 4)
    found = torch.ones(1, 20, 4)
    claimed = found.clone()
    assert difference_of_tokens(claimed, found, given_) == 0
    claimed[0, 0] = 5  # one token of twenty
    assert difference_of_tokens(claimed, found, given_) == 0
    assert difference_of_tokens(found * 1.1, found, given_) == pytest.approx(0.1 / 1.1, rel=1e-4)
    # What the blocks leave as it was counts by a tenth.
    assert difference_of_tokens(found * 1.1, found, found) == pytest.approx(1.0, rel=1e-4)
    assert difference_of_vectors([found, -found], [found, found]) == pytest.approx(2.0)
    assert difference_of_vectors([given_], [given_]) == 0
    assert difference_of_vectors([found[0]], [found]) == float("inf")
