"""Objectives against TRL 1.16's own code, and by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from textrl_swarm.errors import ShapeError
from textrl_swarm.maths.objectives import (
    Surrogate,
    group_advantages,
    groups_of,
    kl_per_token,
    next_entropy_coef,
    sampler_weights,
    surrogate_loss,
    token_weights,
)

LENGTHS = (5, 1, 7, 3, 7, 2)
WIDTH, LIMIT = 7, 9


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]


def case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New, old and ref logprobs far enough apart that many ratios are clipped, and advantages (B,)."""
    old = -3 * randn(6, WIDTH, seed=seed).abs()
    new = old + 0.3 * randn(6, WIDTH, seed=seed + 1)
    return new, old, old + 0.5 * randn(6, WIDTH, seed=seed + 2), randn(6, seed=seed + 3)


def trl(trainer: type, logprobs: Tensor, inputs: dict[str, Tensor], **settings) -> Tensor:
    """The loss as the method of TRL's trainer computes it, on a trainer that has nothing else."""
    corrects = settings.pop("corrects", False)
    args = SimpleNamespace(
        use_bias_correction_kl=settings.pop("unbiased", False), delta=settings.pop("delta", None),
        steps_per_generation=1,
    )  # fmt: skip
    this = SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, gather_for_metrics=lambda x: x
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros(MASK.shape), None),
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=corrects,
        vllm_importance_sampling_correction=corrects,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LIMIT,
        **settings,
    )
    nothing = torch.zeros(6, 2, dtype=torch.int64)
    common = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": MASK.long(),
        "completion_mask": MASK.long(),
        "num_items_in_batch": MASK.sum(),
    }
    return trainer._compute_loss(this, None, {**common, **inputs})


def ours(
    logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, surrogate: Surrogate, mean: str,
    *, kl_coef: float = 0.0, unbiased: bool = False,
) -> Tensor:  # fmt: skip
    found = surrogate_loss(logprobs, old, advantages[:, None].expand_as(old), MASK, surrogate)
    kl = kl_per_token(logprobs, ref, MASK, "k3")
    kl = kl * found.ratio if unbiased else kl
    return ((found.per_token + kl_coef * kl) * token_weights(MASK, mean, length=LIMIT)).sum()


def assert_same_loss_and_gradient(found_of, expected_of, logprobs: Tensor) -> None:
    leaves = [logprobs.clone().requires_grad_() for _ in range(2)]
    found, expected = found_of(leaves[0]), expected_of(leaves[1])
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(leaves[0].grad, torch.where(MASK, leaves[1].grad, 0), rtol=1e-5, atol=1e-7)
    assert (leaves[0].grad != 0).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("delta", [None, 1.3])
@pytest.mark.parametrize("ratio", ["token", "response_mean"])
@pytest.mark.parametrize(
    ("loss_type", "mean"),
    [("grpo", "responses"), ("bnpo", "tokens"), ("dapo", "tokens"), ("dr_grpo", "length")],
)
def test_grpo_and_its_kin_are_trls(loss_type, mean, ratio, delta, kl_coef, unbiased, seed):
    new, old, ref, advantages = case(10 * seed)
    assert_same_loss_and_gradient(
        lambda leaf: ours(
            leaf, old, ref, advantages, Surrogate(ratio, "ppo", 0.1, 0.14, delta), mean,
            kl_coef=kl_coef, unbiased=unbiased,
        ),
        lambda leaf: trl(
            GRPOTrainer, leaf,
            {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref},
            loss_type=loss_type, importance_sampling_level="token" if ratio == "token" else "sequence",
            epsilon_low=0.1, epsilon_high=0.14, beta=kl_coef, unbiased=unbiased, delta=delta,
        ),
        new,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_cispo_is_trls(seed):
    new, old, ref, advantages = case(10 * seed)
    assert_same_loss_and_gradient(
        lambda leaf: ours(leaf, old, ref, advantages, Surrogate("token", "cispo", 0.2, 1.2), "tokens"),
        lambda leaf: trl(
            GRPOTrainer, leaf, {"advantages": advantages, "old_per_token_logps": old},
            loss_type="cispo", importance_sampling_level="token", epsilon_low=0.2, epsilon_high=1.2, beta=0.0,
        ),
        new,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_rloo_is_trls(seed):
    new, old, ref, advantages = case(10 * seed)
    old_logps = torch.where(MASK, old, 0).sum(1)
    assert_same_loss_and_gradient(
        lambda leaf: ours(leaf, old, ref, advantages, Surrogate("response", "ppo", 0.2, 0.3), "responses"),
        lambda leaf: trl(
            RLOOTrainer, leaf, {"advantages": advantages, "old_logps": old_logps},
            epsilon_low=0.2, epsilon_high=0.3,
        ),
        new,
    )  # fmt: skip


@pytest.mark.parametrize("of", ["token", "response"])
def test_the_correction_for_samplers_is_trls(of):
    new, old, ref, advantages = case(0)
    sampled = old + 0.4 * randn(6, WIDTH, seed=9)
    difference = torch.where(MASK, old - sampled, 0)  # as in TRL's _generate_and_score_completions
    difference = difference if of == "token" else difference.sum(-1, keepdim=True)
    for kind in ("truncate", "mask"):
        theirs = difference.exp()
        theirs = theirs.clamp(max=1.2) if kind == "truncate" else theirs.masked_fill(theirs > 1.2, 0.0)
        weights = sampler_weights(old, sampled, MASK, kind=kind, of=of, most=1.2)
        assert 0 < (theirs.expand_as(MASK)[MASK] == 1.2 * (kind == "truncate")).sum() < MASK.sum()

        def corrected(leaf, weights=weights):
            rows = advantages[:, None].expand_as(old)
            losses = surrogate_loss(leaf, old, rows, MASK, Surrogate()).per_token * weights
            kl = 0.04 * kl_per_token(leaf, ref, MASK, "k3")
            return ((losses + kl) * token_weights(MASK, "tokens", length=LIMIT)).sum()

        def expected(leaf, theirs=theirs):
            inputs = {
                "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
                "importance_sampling_ratio": theirs,
            }  # fmt: skip
            return trl(
                GRPOTrainer, leaf, inputs, loss_type="bnpo", importance_sampling_level="token",
                epsilon_low=0.2, epsilon_high=0.2, beta=0.04, corrects=True,
            )  # fmt: skip

        assert_same_loss_and_gradient(corrected, expected, new)


# ------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("group", "none", [-2, 0, 2, 1, -1]),
        ("leave_one_out", "none", [-3, 0, 3, 2, -2]),
        # std of (1, 3, 5) is 2, of (4, 2) sqrt(2): divided by n - 1, as TRL does
        ("group", "group", [-1, 0, 1, math.sqrt(0.5), -math.sqrt(0.5)]),
        ("group", "batch", [x / math.sqrt(2.5) for x in (-2, 0, 2, 1, -1)]),
    ],
)
def test_advantages_among_the_responses_to_a_prompt(baseline, scale, expected):
    scores, groups = torch.tensor([1.0, 3, 5, 4, 2]), torch.tensor([0, 0, 0, 1, 1])
    found = group_advantages(scores, groups, baseline=baseline, scale=scale)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=2e-4, atol=1e-6)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = group_advantages(scores[order], groups[order], baseline=baseline, scale=scale)
    torch.testing.assert_close(shuffled, found[order])


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_scores_are_no_signal(scale):
    scores = torch.tensor([0.1, 0.1, 0.1, 1e6, 1e6 + 1])
    found = group_advantages(scores, torch.tensor([0, 0, 0, 1, 1]), baseline="group", scale=scale)
    assert found[:3].tolist() == [0, 0, 0] and found[3] < 0 < found[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": torch.tensor([0, 0, 1])}, "a group has one response"),
        ({"groups": torch.tensor([0, 0])}, r"must be \(B,\), got \(3,\) and \(2,\)"),
        ({"baseline": "critic"}, "there is no baseline 'critic' with scale 'none'"),
        ({"scale": "tokens"}, "there is no baseline 'group' with scale 'tokens'"),
    ],
)
def test_impossible_groups_are_refused(arguments, message):
    usual = {"groups": torch.zeros(3, dtype=torch.int64), "baseline": "group", "scale": "none"}
    with pytest.raises(ShapeError, match=message):
        group_advantages(torch.ones(3), **{**usual, **arguments})


def test_rows_with_one_prompt_are_a_group():
    tokens = torch.tensor([[5, 6, 1, 2], [5, 6, 3, 4], [5, 6, 1, 2], [7, 6, 1, 2]])
    assert groups_of(tokens, torch.tensor([2, 2, 3, 2])).tolist() == [0, 0, 1, 2]


def test_estimates_of_the_kl_by_hand():
    logprobs, ref = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-1.5, -1.0, math.inf]])
    mask = torch.tensor([[True, True, False]])
    assert kl_per_token(logprobs, ref, mask, "k1").tolist() == [[0.5, -1.0, 0]]
    assert kl_per_token(logprobs, ref, mask, "k2").tolist() == [[0.125, 0.5, 0]]
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(1) - 1 - 1, 0]
    torch.testing.assert_close(kl_per_token(logprobs, ref, mask, "k3"), torch.tensor([k3]))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_estimates_have_the_right_mean_and_k2_the_right_gradient(kind):
    logits, ref = randn(8).requires_grad_(), (randn(8) + 0.3 * randn(8, seed=1)).log_softmax(0)
    exact = torch.nn.functional.kl_div(ref, logits.log_softmax(0), reduction="sum", log_target=True)
    (gradient,) = torch.autograd.grad(exact, logits)
    probabilities = logits.softmax(0).detach()  # a mean over all tokens that may be sampled
    mask = torch.ones(1, 8, dtype=torch.bool)
    found = kl_per_token(logits.log_softmax(0)[None], ref[None], mask, kind)[0]
    assert (probabilities * found).sum().item() == pytest.approx(exact.item(), rel=1e-4)
    k2 = kl_per_token(logits.log_softmax(0)[None], ref[None], mask, "k2")[0]
    (found_gradient,) = torch.autograd.grad((probabilities * k2).sum(), logits)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_the_unbiased_estimate_has_the_gradient_of_the_kl():
    """Sampled by an older policy: k3 times the ratio of new to old."""
    logits, old = randn(8).requires_grad_(), (randn(8) + 0.3 * randn(8, seed=2)).log_softmax(0)
    ref = (randn(8) + 0.3 * randn(8, seed=1)).log_softmax(0)
    exact = torch.nn.functional.kl_div(ref, logits.log_softmax(0), reduction="sum", log_target=True)
    (expected,) = torch.autograd.grad(exact, logits)
    logprobs, mask = logits.log_softmax(0)[None], torch.ones(1, 8, dtype=torch.bool)
    ratio = surrogate_loss(logprobs, old[None], torch.ones(1, 8), mask, Surrogate()).ratio
    found = (old.exp() * (kl_per_token(logprobs, ref[None], mask, "k3") * ratio)[0]).sum()
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        ("tokens", [[1 / 4] * 3, [1 / 4, 0, 0]]),
        ("responses", [[1 / 6] * 3, [1 / 2, 0, 0]]),
        ("length", [[1 / 20] * 3, [1 / 20, 0, 0]]),
    ],
)
def test_weights_of_tokens_by_hand(mean, expected):
    mask = MASK.new_tensor([[1, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(token_weights(mask, mean, length=10), torch.tensor(expected))
    assert token_weights(torch.zeros_like(mask), mean, length=10).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("ratio", ["token", "response", "response_mean"])
@pytest.mark.parametrize("clip", ["ppo", "cispo"])
@pytest.mark.parametrize("garbage", [1e4, math.nan, math.inf])
def test_padding_reaches_neither_loss_nor_gradient(ratio, clip, garbage):
    new, old, _, advantages = case(0)
    surrogate, rows = Surrogate(ratio, clip, 0.2, 1.2), advantages[:, None].expand_as(old)
    clean = [torch.where(MASK, x, 0) for x in (new, old, rows)]
    dirty = [torch.where(MASK, x, garbage) for x in (new, old, rows)]
    expected = surrogate_loss(*clean, MASK, surrogate)
    leaf = dirty[0].clone().requires_grad_()
    found = surrogate_loss(leaf, *dirty[1:], MASK, surrogate)
    torch.testing.assert_close(found.per_token, expected.per_token)
    assert torch.equal(found.is_clipped, expected.is_clipped)
    found.per_token.sum().backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[~MASK] == 0).all() and (leaf.grad[MASK] != 0).any()


def test_a_response_has_one_ratio_and_one_advantage():
    """The product of its tokens' ratios; advantages of its tokens are averaged."""
    old, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    new = torch.tensor([[0.1, -0.3, 5.0]])
    found = surrogate_loss(
        new, old, torch.tensor([[1.0, 3.0, 9.0]]), mask, Surrogate("response", "ppo", 0.5, 0.5)
    )
    assert found.per_token[0].tolist() == pytest.approx([-2 * math.exp(-0.2)] * 2 + [0])
    mean = surrogate_loss(new, old, torch.ones(1, 3), mask, Surrogate("response_mean", "ppo", 0.5, 0.5))
    assert mean.per_token[0].tolist() == pytest.approx([-math.exp(-0.1)] * 2 + [0])


def test_the_weight_of_the_entropy_bonus_follows_the_entropy():
    coef = 0.01
    for entropy, expected in (
        (0.1, 0.015),
        (0.2, 0.02),
        (0.3, 0.015),
        (0.3, 0.01),
        (9, 0.005),
        (9, 0.0),
        (9, 0.0),
    ):
        coef = next_entropy_coef(coef, entropy, target=0.2, step=0.005)
        assert coef == pytest.approx(expected, abs=1e-12)
    assert next_entropy_coef(1.0, 0.0, target=0.2, step=0.005) == 1.0
