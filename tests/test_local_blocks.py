"""Blocks of a local model that are entered from the middle, and those that are computed again in backward."""

import pytest
import torch
from architectures import perturb, random_tokens, tiny_model
from families import FAMILIES, random_checkpoint

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.errors import ConfigError
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.layers import find_blocks
from textrl_swarm.policies.loading import load_policy

# The first blocks' output is not as wide as the embeddings; or blocks hand on more than hidden states.
RUN_ALL_BLOCKS = {"opt", "glm_moe_dsa"}
USUAL = {"bloom", "gemma3_text", "opt"}


def gradients(policy, features):
    for parameter in policy.adapter_parameters().values():
        parameter.grad = None
    policy.project(policy.hidden_states(features)).square().mean().backward()
    return [parameter.grad for parameter in policy.adapter_parameters().values()]


@pytest.mark.parametrize(
    "family", [f if f in USUAL else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_any_decoder_entered_at_its_adapted_blocks_computes_the_same(family, tmp_path):
    random_checkpoint(family, tmp_path)
    tokens = random_tokens(2, 9)
    plain: list = []
    for checkpointing in (False, True):
        settings = {"lora": LoraSettings(r=2, layers=2), "gradient_checkpointing": checkpointing}
        with load_policy(tmp_path, **settings) as policy:
            perturb(policy)
            features = policy.features(tokens)
            assert features.is_floating_point() == (family not in RUN_ALL_BLOCKS)
            found, expected = gradients(policy, features), gradients(policy, tokens)
            plain = plain or expected
            assert same(found, expected) and same(expected, plain)
            with policy.adapter_disabled():  # the ref policy shares the features
                assert torch.equal(policy.hidden_states(features), policy.hidden_states(tokens))


def same(found, expected):
    pairs = list(zip(found, expected, strict=True))
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("layers", [1, None])
@pytest.mark.parametrize("architecture", ["bloom", "gpt2", "llama"])
def test_gradient_checkpointing_keeps_numbers_and_gradients(architecture, layers):
    """And takes its hands off the model at the end."""
    tokens, found = random_tokens(3, 7), []
    for checkpointing in (False, True):
        model = tiny_model(architecture)
        settings = {"lora": LoraSettings(r=2, layers=layers), "gradient_checkpointing": checkpointing}
        with load_policy(model, **settings) as policy:
            perturb(policy)
            output = policy(tokens)
            output.logits.square().mean().backward()
            with policy.adapter_disabled():
                base = policy(tokens).logits.detach()
            found.append(
                (output.logits.detach(), base, *(p.grad for p in policy.adapter_parameters().values()))
            )
        assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))


def test_blocks_below_the_adapted_ones_run_once_per_update(monkeypatch):
    model = tiny_model("llama")
    runs = []
    blocks = find_blocks(model)[1]
    blocks[0].mlp.register_forward_hook(lambda *_: runs.append("below"))
    blocks[-1].mlp.register_forward_hook(lambda *_: runs.append("adapted"))
    with load_policy(model, lora=LoraSettings(r=2, layers=1)) as policy:
        policy._shares_prefixes = False
        rollout = policy.generate([[5, 6, 7]], SamplingConfig(max_new_tokens=5, num_samples=4, seed=0))
        rewards = torch.rand(rollout.response_mask.shape) * rollout.response_mask
        counts = []
        for limit in (1 << 30, 0):
            monkeypatch.setattr("textrl_swarm.policies.base.MAX_FEATURE_BYTES", limit)
            runs.clear()
            PPO(policy, PPOConfig(epochs=2)).update(rollout, rewards)
            counts.append((runs.count("below"), runs.count("adapted")))
    assert counts == [(1, 3), (3, 3)]  # the first pass is also the old policy's; ref; the second


def test_servers_compute_again_anyway():
    with pytest.raises(ConfigError, match="servers always compute blocks again"):
        load_policy("somewhere", initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/x"], gradient_checkpointing=True)
