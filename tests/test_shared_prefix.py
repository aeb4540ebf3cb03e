"""Prompts that rows share: which prefix is chosen; computing it once changes nothing but the time."""

import pytest
import torch
from architectures import perturb, tiny_model
from families import FAMILIES, random_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.policies.shared_prefix import shared_prefix

# Recurrent states of transformers keep no gradients.
RECURRENT = {"qwen3_next", "qwen3_5_text", "bamba", "mamba2", "mamba", "jamba"}
USUAL = {"bloom", "gpt2", "llama", "gemma3_text", "deepseek_v3", "qwen3_next"}


def samples(prompts: int, each: int, prompt_tokens: int, width: int) -> torch.Tensor:
    """(prompts * each, width) tokens, rows in another order than prompts."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 90, (prompts * each, width), generator=generator)
    shared = torch.randint(3, 90, (prompts, prompt_tokens), generator=generator)
    tokens[:, :prompt_tokens] = shared.repeat(each, 1)
    return tokens


def test_the_prompts_of_samples_are_the_prefix():
    prefix = shared_prefix(samples(3, 4, 13, 20))
    assert prefix is not None
    assert prefix.length == 13 and len(prefix.rows) == 3
    assert prefix.index.reshape(4, 3).eq(prefix.index[:3]).all()


@pytest.mark.parametrize(
    "tokens",
    [[[5, 6, 7]], [[5], [5]], [[1, 2, 3, 4], [2, 2, 3, 4]], [[1] + [2] * 9, [1] + [3] * 9]],
    ids=["one row", "one column", "nothing shared", "too little shared"],
)
def test_rows_that_share_little_are_computed_whole(tokens):
    assert shared_prefix(torch.tensor(tokens)) is None


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=2)
    )
)
def test_no_other_prefix_leaves_less(rows):
    tokens = torch.tensor(rows)
    count, width = tokens.shape
    costs = [len(tokens[:, :n].unique(dim=0)) * n + count * (width - n) for n in range(1, width)]
    prefix = shared_prefix(tokens)
    if prefix is None:
        assert min(costs) > 0.8 * count * width
        return
    assert (
        costs[prefix.length - 1]
        == min(costs)
        == len(prefix.rows) * prefix.length + count * (width - prefix.length)
    )
    assert torch.equal(tokens[prefix.rows, : prefix.length][prefix.index], tokens[:, : prefix.length])


@pytest.mark.parametrize(
    "family", [f if f in USUAL else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_hidden_states_and_gradients_are_those_of_whole_rows(family, tmp_path):
    """Prompts are longer than windows and chunks."""
    random_checkpoint(family, tmp_path)
    tokens = samples(3, 4, 13, 20)
    with load_policy(tmp_path, lora=LoraSettings(r=2)) as policy:
        assert policy._shares_prefixes == (family not in RECURRENT)
        perturb(policy)
        found = []
        for shares in (policy._shares_prefixes, False):
            policy._shares_prefixes = shares
            hidden = policy.hidden_states(tokens)
            loss = policy.project(hidden).log_softmax(-1)[..., 5].mean()
            gradients = torch.autograd.grad(
                loss, list(policy.adapter_parameters().values()), allow_unused=True
            )
            found.append((hidden, torch.cat([g.flatten() for g in gradients if g is not None])))
    for ours, whole in zip(*found, strict=True):
        assert (ours - whole).norm() < 1e-5 * whole.norm()


def test_an_update_computes_a_prompt_once(monkeypatch):
    """And twice the same update is the same to the bit."""
    adapters = []
    for shares in (True, True, False):
        with load_policy(tiny_model("llama"), lora=LoraSettings(r=2)) as policy:
            perturb(policy)
            policy._shares_prefixes = shares
            sampling = SamplingConfig(max_new_tokens=6, num_samples=8, seed=0, stop_token_ids=())
            rollout = policy.generate([list(range(5, 25)), list(range(6, 26))], sampling)
            computed, original = [], policy._decoder.forward

            def counted(tokens, *, computed=computed, original=original, **options):
                computed.append(tuple(tokens.shape))
                return original(tokens, **options)

            monkeypatch.setattr(policy._decoder, "forward", counted)
            rewards = torch.rand(rollout.response_mask.shape, generator=torch.Generator().manual_seed(0))
            PPO(policy, PPOConfig(epochs=2, lr=1e-2)).update(rollout, rewards)
            assert computed == ([(2, 20), (16, 6)] if shares else [(16, 26)]) * 3
            adapters.append(
                [parameter.detach().clone() for parameter in policy.adapter_parameters().values()]
            )
    for first, again, whole in zip(*adapters, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, whole, rtol=1e-3, atol=1e-5)


def test_blocks_that_are_computed_again_share_nothing():
    with load_policy(tiny_model("llama"), gradient_checkpointing=True) as policy:
        assert not policy._shares_prefixes
