"""Algorithms from a rollout to changed parameters; test_objectives.py has their formulas, test_ppo.py PPO."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from plain_peft import connect, difference, fill
from torch import Tensor

from textrl_swarm.config import ALGORITHMS, LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.errors import ConfigError
from textrl_swarm.learning.learner import Learner
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.maths.returns import place_scores
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.types import RolloutBatch

PROMPTS = [[5, 17, 60, 7], [40, 41]]
LENGTH, SAMPLES = 7, 4
WITHOUT_CRITIC = [name for name, settings in ALGORITHMS.items() if settings["baseline"] != "critic"]


@pytest.fixture
def policy(tiny_bloom) -> Policy:
    with load_policy(tiny_bloom(seed=1), lora=LoraSettings(r=4)) as policy:
        fill(policy, 3)
        yield policy


@pytest.fixture
def rollout(policy) -> RolloutBatch:
    """Some responses end early."""
    sampling = SamplingConfig(
        max_new_tokens=LENGTH, num_samples=SAMPLES, seed=2, stop_token_ids=tuple(range(0, 100, 7))
    )
    rollout = policy.generate(PROMPTS, sampling)
    assert 0 < rollout.terminated.sum() < len(rollout)
    return rollout


SCORES = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 0.0, 0.25, 0.5])


def scored(rollout: RolloutBatch, scores: Tensor = SCORES) -> Tensor:
    return place_scores(scores, rollout.response_mask)


def logprobs_of(policy: Policy, rollout: RolloutBatch) -> Tensor:
    """(B, T) of the chosen tokens, from whole sequences."""
    logprobs = policy(rollout.tokens).logits.log_softmax(-1)
    mask = rollout.response_mask
    found = torch.zeros(mask.shape)
    rows, steps = mask.nonzero(as_tuple=True)
    at = rollout.prompt_lengths[rows] + steps
    return found.index_put((rows, steps), logprobs[rows, at - 1, rollout.tokens[rows, at]])


def loss_by_hand(name: str, logprobs: Tensor, ref: Tensor, rollout: RolloutBatch) -> Tensor:
    """Of the first pass, in which the old policy is the new one."""
    mask, old = rollout.response_mask, logprobs.detach()
    lengths, scores = mask.sum(1), SCORES
    ratio = (logprobs - old).exp()
    whole = (logprobs - old).sum(1).exp()
    if name == "rloo":
        scores = scores - 0.05 * (old - ref).sum(1)
        groups = scores.view(2, SAMPLES)
        advantages = (groups - (groups.sum(1, keepdim=True) - groups) / (SAMPLES - 1)).flatten()
        return (-advantages * whole).mean()
    if name == "reinforce++":
        rewards = scored(rollout) - 0.05 * (old - ref)
        advantages = rewards.flip(1).cumsum(1).flip(1)
        chosen = advantages[mask]
        advantages = (advantages - chosen.mean()) / chosen.std(correction=0)
        return (-advantages * ratio)[mask].mean()
    groups = scores.view(2, SAMPLES)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()[:, None]
    if name == "dr_grpo":
        return (-centred.flatten()[:, None] * ratio)[mask].sum() / (len(rollout) * LENGTH)
    if name == "grpo":
        kl = (ref - logprobs).exp() - 1 - (ref - logprobs)
        return (((-advantages * ratio + 0.04 * kl) * mask).sum(1) / lengths).mean()
    if name == "dapo":
        return (-advantages * ratio)[mask & rollout.terminated[:, None]].mean()
    if name == "gspo":
        return (-advantages[:, 0] * ((logprobs - old).sum(1) / lengths).exp()).mean()
    assert name == "cispo"
    return (-advantages * logprobs)[mask].mean()


@pytest.mark.parametrize("parts", [None, 30], ids=["whole", "in parts"])
@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_the_gradient_is_that_of_the_loss_by_hand(policy, rollout, name, parts):
    with torch.no_grad(), policy.adapter_disabled():
        ref = logprobs_of(policy, rollout)
    parameters = policy.adapter_parameters()
    loss = loss_by_hand(name, logprobs_of(policy, rollout), ref, rollout)
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    before = {key: one.detach().clone() for key, one in policy.trainable_parameters().items()}
    config = PPOConfig(algorithm=name, epochs=1, max_grad_norm=1e9, micro_batch_tokens=parts)
    ppo = PPO(policy, config, lambda trained: torch.optim.SGD(trained, lr=1.0), LENGTH)
    metrics = ppo.update(rollout, scored(rollout))
    assert metrics["optimizer_steps"] == 1
    assert metrics["policy_loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert difference(before[key] - parameters[key].detach(), gradient) < 1e-4, key
    for key, one in policy.value_head.named_parameters():
        assert torch.equal(one, before[f"value_head.{key}"])


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_there_is_no_critic(policy, rollout, name, monkeypatch):
    def refuse(*_):
        raise AssertionError("the value head is asked")

    monkeypatch.setattr(policy.value_head, "forward", refuse)
    metrics = PPO(policy, PPOConfig(algorithm=name)).update(rollout, scored(rollout))
    assert not metrics.keys() & {"value", "value_loss", "explained_variance"}
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns(tiny_bloom, name):
    """To say even tokens."""
    with load_policy(tiny_bloom(seed=1), lora=LoraSettings(r=4)) as policy:
        lr = 1e-1 if name == "gspo" else 1e-2
        config = PPOConfig(algorithm=name, lr=lr, minibatch_size=16, mask_truncated=False)
        learner = Learner(policy, config, SamplingConfig(max_new_tokens=5, num_samples=16, seed=0))
        scores = []
        for _ in range(8):
            rollout = policy.generate(PROMPTS, learner.rollout_sampling())
            chosen = torch.stack([(row.response % 2 == 0).float().mean() for row in rollout.trajectories()])
            learner.learn(rollout, scored(rollout, chosen))
            scores.append(chosen.mean().item())
    assert sum(scores[-2:]) / 2 > scores[0] + 0.15, scores


@pytest.mark.swarm
@pytest.mark.parametrize("name", ALGORITHMS)
def test_through_a_swarm_the_numbers_are_the_same(two_servers, name):
    found = {}
    with (
        connect(two_servers, LoraSettings(r=4)) as remote,
        load_policy(two_servers.model, lora=LoraSettings(r=4)) as local,
    ):
        for policy in (remote, local):
            fill(policy, 3)
            sampling = SamplingConfig(max_new_tokens=LENGTH, num_samples=SAMPLES, seed=2)
            learner = Learner(
                policy, PPOConfig(algorithm=name, lr=1e-3, epochs=2, minibatch_size=4), sampling
            )
            rollout = policy.generate(PROMPTS, learner.rollout_sampling())
            learner.learn(rollout, scored(rollout))
            found[policy] = rollout.tokens, policy.trainable_parameters()
        assert torch.equal(found[remote][0], found[local][0])
        for key, parameter in found[local][1].items():
            assert difference(found[remote][1][key], parameter) < 1e-4, key


def test_a_run_may_go_on_without_a_critic(policy, rollout, caplog):
    before = PPO(policy, PPOConfig())
    before.update(rollout, scored(rollout))
    after = PPO(policy, PPOConfig(algorithm="rloo"))
    after.load_state_dict(before.state_dict())
    assert (
        "of other groups of parameters (a critic, or value_lr, came or went); AdamW begins afresh"
        in caplog.text
    )
    assert after.num_updates == 1
    after.update(rollout, scored(rollout))


def test_settings_that_are_given_stay():
    config = PPOConfig(algorithm="grpo", kl_coef=0.05, whiten_advantages=True)
    assert (config.kl_coef, config.whiten_advantages) == (0.05, True)  # PPO's, and not GRPO's
    assert (config.baseline, config.loss_mean, config.kl_in) == ("group", "responses", "loss")


def test_one_sample_to_a_prompt_is_refused(policy):
    rollout = policy.generate(PROMPTS, SamplingConfig(max_new_tokens=3, seed=0))
    before = {key: one.detach().clone() for key, one in policy.trainable_parameters().items()}
    with pytest.raises(
        ConfigError, match=r"rloo compares the responses .* 2 of 2 prompts have one: sample more"
    ):
        PPO(policy, PPOConfig(algorithm="rloo")).update(rollout, scored(rollout, torch.ones(2)))
    assert all(torch.equal(one, before[key]) for key, one in policy.trainable_parameters().items())


def test_what_was_cut_teaches_nothing(policy):
    sampling = SamplingConfig(max_new_tokens=3, num_samples=4, seed=0, stop_token_ids=())
    rollout = policy.generate(PROMPTS, sampling)
    before = {key: one.detach().clone() for key, one in policy.trainable_parameters().items()}
    metrics = PPO(policy, PPOConfig(algorithm="dapo")).update(rollout, scored(rollout))
    assert metrics["optimizer_steps"] == 0 and metrics["terminated"] == 0
    assert all(torch.equal(one, before[key]) for key, one in policy.trainable_parameters().items())


def test_groups_without_signal_are_counted_and_reported(policy, rollout, caplog):
    ppo = PPO(policy, PPOConfig(algorithm="grpo"))
    half = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 1])
    assert ppo.update(rollout, scored(rollout, half))["groups_without_signal"] == 0.5
    assert "nothing to learn" not in caplog.text
    assert ppo.update(rollout, scored(rollout, torch.ones(8)))["groups_without_signal"] == 1
    assert "all responses to each prompt scored the same" in caplog.text


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_a_sampler_that_differs_is_reckoned_with(policy, rollout, kind, caplog):
    """One token was sampled half as often as it is scored, one five times as seldom."""
    with torch.no_grad():
        scored_as = logprobs_of(policy, rollout)
    sampled = scored_as.clone()
    sampled[0, 0] -= math.log(2)
    sampled[4, 0] -= math.log(5)
    differing = replace(rollout, old_logprobs=sampled)
    before = {key: one.detach().clone() for key, one in policy.adapter_parameters().items()}

    def change(batch: RolloutBatch, **settings) -> dict[str, Tensor]:
        with torch.no_grad():
            for key, one in policy.adapter_parameters().items():
                one.copy_(before[key])
        config = PPOConfig(algorithm="dr_grpo", epochs=1, max_grad_norm=1e9, **settings)
        PPO(policy, config, lambda trained: torch.optim.SGD(trained, lr=1.0), LENGTH).update(
            batch, scored(batch)
        )
        return {key: (one - before[key]).detach() for key, one in policy.adapter_parameters().items()}

    with torch.no_grad():
        for key, one in policy.adapter_parameters().items():
            one.copy_(before[key])
    logprobs = logprobs_of(policy, rollout)
    centred = SCORES.view(2, SAMPLES) - SCORES.view(2, SAMPLES).mean(1, keepdim=True)
    weights = torch.ones(rollout.response_mask.shape)
    weights[0, 0], weights[4, 0] = 2, 3 if kind == "truncate" else 0
    loss = (-centred.flatten()[:, None] * weights * logprobs)[rollout.response_mask].sum()
    parameters = policy.adapter_parameters()
    gradients = torch.autograd.grad(loss / (len(rollout) * LENGTH), list(parameters.values()))
    found = change(differing, sampler_correction=kind)
    for key, gradient in zip(parameters, gradients, strict=True):
        assert difference(-found[key], gradient) < 1e-4, key
    assert "nats per token away from the one that is trained" in caplog.text
    caplog.clear()
    change(replace(rollout, old_logprobs=scored_as))
    assert "nats per token away" not in caplog.text


def test_the_entropy_bonus_acts_below_its_target(policy, rollout):
    entropy = PPO(policy, PPOConfig()).update(rollout, scored(rollout))["entropy"]
    high = PPO(policy, PPOConfig(entropy_coef=0.01, entropy_target=entropy / 2, entropy_step=0.004))
    assert high.update(rollout, scored(rollout))["entropy_coef"] == 0
    assert high.entropy_coef == pytest.approx(0.006)
    low = PPO(policy, PPOConfig(entropy_coef=0.01, entropy_target=2 * entropy, entropy_step=0.004))
    assert low.update(rollout, scored(rollout))["entropy_coef"] == 0.01
    assert low.entropy_coef == pytest.approx(0.014)
    high.load_state_dict(low.state_dict())
    assert high.entropy_coef == pytest.approx(0.014)
    other = PPO(policy, PPOConfig(entropy_coef=0.02))  # as the run was given now
    other.load_state_dict(low.state_dict())
    assert other.entropy_coef == 0.02


def test_the_head_has_a_rate_of_its_own_with_adamw_only(policy):
    with pytest.raises(ConfigError, match="value_lr is for AdamW"):
        PPO(policy, PPOConfig(value_lr=1e-3), lambda trained: torch.optim.SGD(trained, lr=1.0))
