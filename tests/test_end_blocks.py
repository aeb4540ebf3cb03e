"""`local_blocks`: the first and last blocks on the client's machine, the others on real Petals servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from plain_peft import (
    FAST,
    PlainPeft,
    assert_same,
    connect,
    difference,
    fill,
    greedy,
    is_used,
    random_tokens,
    run,
)

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.errors import BlocksUnavailable, ConfigError
from textrl_swarm.learning.learner import Learner
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.local import LocalSwarm

pytestmark = [pytest.mark.swarm, pytest.mark.filterwarnings("ignore::UserWarning")]

PROMPTS = [[5, 17, 60, 7, 8, 9, 30, 31, 32, 33, 34], [40, 41, 42]]


@pytest.fixture(scope="module")
def inner_servers(tiny_bloom) -> Iterator[LocalSwarm]:
    """Blocks 1 and 2 of four, twice; nobody holds the others."""
    with LocalSwarm(tiny_bloom(seed=1), spans=[(1, 3), (1, 3)]) as swarm:
        yield swarm


def connect_inner(swarm: LocalSwarm, lora: LoraSettings | None = None) -> Policy:
    policy = connect(swarm, lora, local_blocks=(1, 1))
    fill(policy, 3)
    return policy


@pytest.mark.parametrize("lora", [LoraSettings(r=4), LoraSettings(r=4, layers=3)], ids=str)
def test_the_ends_are_computed_here(inner_servers, lora, tmp_path):
    """No server holds them, and all numbers are those of plain transformers and PEFT."""
    tokens = random_tokens(4, 13, seed=7)
    with connect_inner(inner_servers, lora) as policy:
        plain = PlainPeft(policy, tmp_path)
        assert_same(run(policy, tokens), plain.run(tokens))
        assert greedy(policy, PROMPTS, 12) == [plain.greedy(prompt, 12) for prompt in PROMPTS]
        with policy.adapter_disabled(), plain.model.disable_adapter(), torch.no_grad():
            assert difference(policy(tokens).logits, plain.model(tokens).logits) < 1e-5
            assert greedy(policy, PROMPTS, 12) == [plain.greedy(prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("local_blocks", [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_any_number_of_blocks(two_servers, local_blocks, tmp_path):
    tokens = random_tokens(4, 13, seed=7)
    with connect(two_servers, filled=4, local_blocks=local_blocks) as policy:
        plain = PlainPeft(policy, tmp_path)
        assert_same(run(policy, tokens), plain.run(tokens))
        assert greedy(policy, PROMPTS, 12) == [plain.greedy(prompt, 12) for prompt in PROMPTS]


def test_an_update_is_the_same(inner_servers):
    """A rollout of several samples to each prompt, whose prefixes are computed once, and its PPO update."""
    with (
        connect_inner(inner_servers) as policy,
        load_policy(inner_servers.model, lora=LoraSettings(r=4)) as local,
    ):
        fill(local, 3)
        (found, parameters), (expected, expected_parameters) = _updated(policy), _updated(local)
    assert torch.equal(found, expected)
    for name, parameter in expected_parameters.items():
        assert difference(parameters[name], parameter) < 2e-5, name  # 4e-6 was measured


def _updated(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    sampling = SamplingConfig(max_new_tokens=6, num_samples=4, seed=5)
    learner = Learner(policy, PPOConfig(lr=1e-2, epochs=2), sampling)
    rollout = policy.generate([list(range(5, 45)), [40, 41, 42]], learner.rollout_sampling())
    rewards = torch.zeros(rollout.response_mask.shape)
    rewards[torch.arange(8), rollout.response_lengths - 1] = torch.linspace(-1, 1, 8)
    learner.learn(rollout, rewards)
    parameters = {name: one.detach().clone() for name, one in policy.trainable_parameters().items()}
    return rollout.tokens, parameters


def test_only_hidden_states_of_inner_blocks_travel(inner_servers):
    """With the adapter in blocks of this machine alone, an update asks servers for nothing."""
    tokens = random_tokens(3, 7)
    with connect_inner(inner_servers, LoraSettings(r=2, layers=1)) as policy:
        features = policy.features(tokens)
        before = policy.traffic.total_sent
        assert before >= features.numel() * 4
        policy.hidden_states(features).sum().backward()
        assert policy.traffic.total_sent == before
        assert policy.traffic.sent["adapters"] == 0
        assert all(parameter.grad is not None for parameter in policy.adapter_parameters().values())


def test_a_lost_server_goes_unnoticed(inner_servers):
    """Last in this file: one server is gone afterwards."""
    with connect_inner(inner_servers) as policy:
        calm = _states(policy, lambda step: None)
        used = next(i for i, server in enumerate(inner_servers.servers) if is_used(policy, server))
        assert len(calm) == 6
        disturbed = _states(policy, lambda step: inner_servers.kill(used) if step == 3 else None)
    assert all(map(torch.equal, disturbed, calm))


def _states(policy: Policy, disturb: Callable[[int], object]) -> list[torch.Tensor]:
    with policy.session(2, 40) as session:
        states = []
        for step, length in enumerate((6, 1, 1, 1, 1, 1)):
            disturb(step)
            states.append(session.step(random_tokens(2, length, seed=step)))
        return states


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("given", [(1,), (1, 2, 3), (-1, 0), (1.0, 1), (True, 1), "11", 1])
def test_local_blocks_are_two_counts(tiny_bloom, given):
    with pytest.raises(ConfigError, match=r"local_blocks must be two whole numbers >= 0, \[first, last\]"):
        load_policy(tiny_bloom(), initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/" + "1" * 46], local_blocks=given)


def test_something_is_left_to_the_swarm(two_servers):
    with pytest.raises(ConfigError, match=r"\[2, 2\] leaves nothing to the swarm: the model has 4"):
        connect(two_servers, local_blocks=(2, 2))


def test_blocks_that_do_not_fit_into_memory(two_servers, monkeypatch):
    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(ConfigError, match=r"local_blocks=\[1, 1\]: 2 block\(s\) need .* GiB .* keep fewer"):
        connect(two_servers, local_blocks=(1, 1))


def test_without_a_swarm_there_is_nothing_to_keep_from_it(tiny_bloom):
    with pytest.raises(ConfigError, match=r"local_blocks=\(1, 1\) is for a model in a swarm"):
        load_policy(tiny_bloom(), local_blocks=(1, 1))


def test_blocks_that_nobody_holds_are_still_missing(inner_servers):
    with pytest.raises(BlocksUnavailable, match="block 0"):
        load_policy(
            inner_servers.model,
            initial_peers=inner_servers.initial_peers,
            local_blocks=(0, 1),
            timeouts=type(FAST)(discovery_s=2),
        )
