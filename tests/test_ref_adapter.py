"""A reference other than the bare base model: start from an adapter and stay close to it.

In trl issue 495 the reference was the base model, so that the KL was above 0 from the start.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_peft import FAST, difference, random_tokens
from transformers import AutoModelForCausalLM

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.errors import AdapterError
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.maths.returns import place_scores
from textrl_swarm.policies.loading import load_policy

PROMPTS = [[9, 8, 7], [30, 31]]


@pytest.fixture(scope="module")
def sft_adapter(tiny_bloom, tmp_path_factory):
    """An adapter as somebody else's PEFT saves it: rank 3, two of four linear layers, the last two blocks."""
    base = AutoModelForCausalLM.from_pretrained(tiny_bloom(seed=1), dtype=torch.float32)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["query_key_value", "dense"],
        layers_to_transform=[2, 3],
        layers_pattern="h",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    directory = tmp_path_factory.mktemp("sft")
    model.save_pretrained(directory)
    return directory


def update(policy, lr: float = 1e-2) -> dict[str, float]:
    rollout = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=6, num_samples=4, seed=1))
    scores = (rollout.tokens[:, 3] % 2).float()
    if not hasattr(policy, "learner"):
        policy.learner = PPO(policy, PPOConfig(lr=lr, kl_coef=0.1))
    return policy.learner.update(rollout, place_scores(scores, rollout.response_mask))


@pytest.mark.parametrize("through", ["this machine", pytest.param("two_servers", marks=pytest.mark.swarm)])
def test_kl_begins_at_zero_and_is_measured_to_the_adapter(request, tiny_bloom, sft_adapter, through):
    swarm = {}
    if through == "two_servers":
        swarm = {"initial_peers": request.getfixturevalue(through).initial_peers, "timeouts": FAST}
    policy = load_policy(tiny_bloom(seed=1), ref_adapter=sft_adapter, **swarm)
    tokens = random_tokens(2, 9, seed=3)
    with policy, torch.no_grad():
        assert policy.lora == LoraSettings(r=3, alpha=6, targets=("dense", "query_key_value"), layers=2)
        started = policy(tokens).logits
        with policy.adapter_disabled():
            assert difference(policy(tokens).logits, started) > 0.05, (
                "the adapter changes nothing, so this test shows nothing"
            )
        with torch.enable_grad():
            assert update(policy)["kl"] == 0
            assert update(policy)["kl"] != 0
        assert difference(policy(tokens).logits, started) > 1e-3
        with policy.reference():
            assert torch.equal(policy(tokens).logits, started)
        assert difference(policy(tokens).logits, started) > 1e-3  # and the trained adapter is back


def test_without_one_the_ref_policy_is_the_base(tiny_bloom, sft_adapter):
    with load_policy(
        tiny_bloom(seed=1), lora=LoraSettings(r=3, alpha=6, targets=("dense", "query_key_value"), layers=2)
    ) as policy:
        policy.load_adapter(sft_adapter)
        tokens = random_tokens(2, 9, seed=3)
        with torch.no_grad(), policy.reference():
            found = policy(tokens).logits
        with torch.no_grad(), policy.adapter_disabled():
            assert torch.equal(found, policy(tokens).logits)
        assert abs(update(policy)["kl"]) > 1e-3


def test_an_error_inside_leaves_the_trained_adapter_in_place(tiny_bloom, sft_adapter):
    with load_policy(tiny_bloom(seed=1), ref_adapter=sft_adapter) as policy:
        update(policy)
        trained = {name: p.detach().clone() for name, p in policy.adapter_parameters().items()}
        with pytest.raises(KeyError), policy.reference():
            raise KeyError
        assert all(torch.equal(trained[name], p) for name, p in policy.adapter_parameters().items())


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (LoraSettings(r=4), "does not fit"),
        (LoraSettings(r=3, alpha=3, targets=("dense", "query_key_value"), layers=2), "alpha"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(tiny_bloom, sft_adapter, lora, expected):
    with pytest.raises(AdapterError, match=expected):
        load_policy(tiny_bloom(seed=1), lora=lora, ref_adapter=sft_adapter)


def test_no_adapter_there(tiny_bloom, tmp_path):
    with pytest.raises(AdapterError, match=r"holds no adapter: there is no adapter_config\.json"):
        load_policy(tiny_bloom(seed=1), ref_adapter=tmp_path)
