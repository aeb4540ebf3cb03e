import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from textrl_swarm.maths import losses
from textrl_swarm.maths.losses import chunked_logprobs, entropy, value_loss
from textrl_swarm.maths.objectives import Surrogate, ratio_stats, surrogate_loss, token_weights

NEG = -math.inf


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefix_mask(lengths, width):
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def finite_difference(function, x, eps=1e-3):
    """Central differences of a scalar function, entry by entry."""
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        bump = torch.zeros_like(x)
        bump.view(-1)[i] = eps
        grad.view(-1)[i] = (function(x + bump) - function(x - bump)) / (2 * eps)
    return grad


# --- policy loss


def policy_loss(logprobs, old_logprobs, advantages, mask, *, clip_range):
    """PPO's, as a mean over tokens; test_objectives.py has the others."""
    surrogate = Surrogate(clip_low=clip_range, clip_high=clip_range)
    found = surrogate_loss(logprobs, old_logprobs, advantages, mask, surrogate)
    stats = vars(ratio_stats(logprobs, old_logprobs, mask))
    clip_fraction = found.is_clipped.sum() / mask.sum()
    loss = (found.per_token * token_weights(mask, "tokens", length=1)).sum()
    return loss, SimpleNamespace(**stats, clip_fraction=clip_fraction)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected_loss", "expected_slope"),
    # the six cases of figure 1 of the PPO paper; slope of the loss by the ratio, at clip range 0.2
    [
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # clipped: already likelier than before, nothing to gain
        (0.5, 2.0, -1.0, -2.0),  # not clipped: a good token became less likely
        (0.9, -2.0, 1.8, 2.0),
        (0.5, -2.0, 1.6, 0.0),  # clipped
        (1.5, -2.0, 3.0, 2.0),  # not clipped: a bad token became likelier
    ],
)
def test_policy_loss_of_one_token_by_hand(ratio, advantage, expected_loss, expected_slope):
    logprobs = torch.tensor([[math.log(ratio) - 3.0]], requires_grad=True)
    loss, _ = policy_loss(
        logprobs, torch.tensor([[-3.0]]), torch.tensor([[advantage]]), torch.tensor([[True]]), clip_range=0.2
    )
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    loss.backward()
    # d ratio / d logprob = ratio
    assert logprobs.grad.item() == pytest.approx(expected_slope * ratio, rel=1e-6)


def test_first_pass_is_policy_gradient_with_ratio_one():
    mask = prefix_mask([3, 1], 3)
    old, advantages = -randn(2, 3).abs(), randn(2, 3, seed=1)
    logprobs = old.clone().requires_grad_()
    loss, stats = policy_loss(logprobs, old, advantages, mask, clip_range=0.2)
    assert (stats.clip_fraction, stats.approx_kl, stats.ratio_mean, stats.ratio_max_deviation) == (
        0.0,
        0.0,
        1.0,
        0.0,
    )
    assert loss.item() == pytest.approx(-advantages[mask].mean().item())
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / 4, 0))


def test_policy_stats_by_hand():
    ratios = torch.tensor([[1.5, 0.5, 1.1, 100.0]])
    _, stats = policy_loss(
        ratios.log(), torch.zeros(1, 4), torch.ones(1, 4), prefix_mask([3], 4), clip_range=0.2
    )
    assert stats.clip_fraction.item() == pytest.approx(2 / 3)
    assert stats.ratio_mean.item() == pytest.approx(3.1 / 3)
    assert stats.ratio_max_deviation.item() == pytest.approx(0.5)
    k3 = [0.5 - math.log(1.5), -0.5 - math.log(0.5), 0.1 - math.log(1.1)]
    assert stats.approx_kl.item() == pytest.approx(sum(k3) / 3, rel=1e-5)


def test_a_ratio_at_the_edge_of_the_clip_range_is_not_outside():
    logprobs = torch.tensor([[0.25, -0.25, 0.0]])
    edge = torch.expm1(logprobs[0, 0]).item()
    _, stats = policy_loss(
        logprobs, torch.zeros(1, 3), torch.ones(1, 3), prefix_mask([3], 3), clip_range=edge
    )
    assert stats.clip_fraction == 0


def test_approx_kl_estimates_the_kl_from_old_to_new():
    old = torch.distributions.Categorical(logits=randn(6))
    new = torch.distributions.Categorical(logits=old.logits + 0.3 * randn(6, seed=1))
    tokens = torch.multinomial(
        old.probs, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    _, stats = policy_loss(
        new.log_prob(tokens), old.log_prob(tokens), torch.ones(1, 200_000), mask, clip_range=0.2
    )
    exact, reverse = (
        torch.distributions.kl_divergence(old, new).item(),
        torch.distributions.kl_divergence(new, old).item(),
    )
    assert stats.approx_kl.item() == pytest.approx(exact, rel=0.01)
    assert abs(reverse / exact - 1) > 0.03  # else this could not tell the two directions apart


def test_stats_carry_no_gradient():
    logprobs = randn(2, 3).requires_grad_()
    _, stats = policy_loss(
        logprobs, randn(2, 3, seed=1), randn(2, 3, seed=2), prefix_mask([3, 2], 3), clip_range=0.2
    )
    assert not any(x.requires_grad for x in vars(stats).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ratio_is_computed_in_fp32(dtype):
    logprobs, old = torch.tensor([[-3.0078125]], dtype=dtype), torch.tensor([[-3.0]], dtype=torch.float32)
    loss, stats = policy_loss(
        logprobs, old, torch.ones(1, 1, dtype=dtype), torch.tensor([[True]]), clip_range=0.2
    )
    assert loss.dtype == torch.float32
    ratio = math.exp(float(logprobs.double()) + 3.0)
    assert loss.item() == pytest.approx(-ratio, rel=1e-6)  # bf16 would be off by up to 4e-3
    assert stats.ratio_max_deviation.item() == pytest.approx(1 - ratio, rel=1e-5, abs=1e-9)


def test_ratio_of_two_bf16_logprobs_is_not_rounded_to_bf16():
    logprobs, old = (
        torch.tensor([[-0.5078125]], dtype=torch.bfloat16),
        torch.tensor([[-20.125]], dtype=torch.bfloat16),
    )
    _, stats = policy_loss(logprobs, old, torch.ones(1, 1), torch.tensor([[True]]), clip_range=0.2)
    # As bf16 the difference would be 19.625.
    assert stats.ratio_mean.item() == pytest.approx(math.exp(19.6171875), rel=1e-5)


# --- value loss


@pytest.mark.parametrize(
    ("value", "old", "target", "clip_range", "expected_loss", "expected_slope"),
    [
        (1.0, 1.0, 3.0, 0.5, 2.0, -2.0),  # not moved: plain squared error
        (1.3, 1.0, 3.0, 0.5, 0.5 * 1.7**2, -1.7),  # within the range
        (2.0, 1.0, 3.0, 0.5, 0.5 * 1.5**2, 0.0),  # moved too far towards the target: no reward for the rest
        (0.0, 1.0, 3.0, 0.5, 0.5 * 3.0**2, -3.0),  # moved away: pulled back in full
        (0.0, 1.0, -1.0, 0.5, 0.5 * 1.5**2, 0.0),  # the same two below the old value
        (2.0, 1.0, -1.0, 0.5, 0.5 * 3.0**2, 3.0),
        (2.0, 1.0, 3.0, None, 0.5, -1.0),
    ],
)
def test_value_loss_of_one_token_by_hand(value, old, target, clip_range, expected_loss, expected_slope):
    values = torch.tensor([[value]], requires_grad=True)
    loss = value_loss(
        values, torch.tensor([[old]]), torch.tensor([[target]]), torch.tensor([[True]]), clip_range=clip_range
    )
    assert loss.item() == pytest.approx(expected_loss)
    loss.backward()
    assert values.grad.item() == pytest.approx(expected_slope)


def test_unclipped_value_loss_is_half_the_mse_of_the_real_tokens():
    mask = prefix_mask([3, 5], 5)
    values, returns = randn(2, 5), randn(2, 5, seed=1)
    expected = 0.5 * F.mse_loss(values[mask], returns[mask])
    for clip_range in (None, 1e6):
        torch.testing.assert_close(
            value_loss(values, randn(2, 5, seed=2), returns, mask, clip_range=clip_range), expected
        )


def test_value_loss_of_bf16_values_is_computed_in_fp32():
    values = torch.tensor([[1.0078125]], dtype=torch.bfloat16)  # its square has no bf16
    loss = value_loss(
        values, values, torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor([[True]]), clip_range=0.2
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * 1.0078125**2, rel=1e-6)


# --- what both losses share


def losses_of(new, old, target, mask):
    return policy_loss(new, old, target, mask, clip_range=0.2)[0], value_loss(
        new, old, target, mask, clip_range=0.2
    )


@pytest.mark.parametrize("which", [0, 1])
def test_loss_gradients_agree_with_finite_differences(which):
    mask = prefix_mask([3, 1], 3)
    new, old, target = randn(2, 3) * 0.3, randn(2, 3, seed=1) * 0.3, randn(2, 3, seed=2)
    leaf = new.clone().requires_grad_()
    losses_of(leaf, old, target, mask)[which].backward()
    expected = finite_difference(lambda x: losses_of(x, old, target, mask)[which], new)
    # fp32 differences of losses near 1: 1e-7 / 1e-3.
    torch.testing.assert_close(leaf.grad, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("garbage", [1e4, math.nan, math.inf, -math.inf])
def test_padding_reaches_neither_loss_nor_gradient(which, garbage):
    mask, wide = prefix_mask([3, 1], 3), prefix_mask([3, 1], 5)
    inputs = randn(2, 3) * 0.3, randn(2, 3, seed=1) * 0.3, randn(2, 3, seed=2)
    expected = losses_of(*inputs, mask)[which]
    new, old, target = (
        torch.cat([torch.where(mask, x, garbage), torch.full((2, 2), garbage)], dim=1) for x in inputs
    )
    leaf = new.clone().requires_grad_()
    loss = losses_of(leaf, old, target, wide)[which]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[~wide] == 0).all() and (leaf.grad[wide] != 0).any()


@pytest.mark.parametrize("garbage", [1e4, math.nan, math.inf])
def test_padding_does_not_reach_the_stats(garbage):
    mask = prefix_mask([2], 3)
    new, old = torch.tensor([[0.1, -0.3, garbage]]), torch.tensor([[0.0, 0.0, -garbage]])
    _, stats = policy_loss(new, old, torch.tensor([[1.0, 1.0, garbage]]), mask, clip_range=0.2)
    _, expected = policy_loss(new[:, :2], old[:, :2], torch.ones(1, 2), mask[:, :2], clip_range=0.2)
    torch.testing.assert_close(vars(stats), vars(expected))


@pytest.mark.parametrize("which", [0, 1])
def test_row_order_changes_nothing(which):
    mask = prefix_mask([3, 1, 2], 3)
    inputs, order = (
        (randn(3, 3) * 0.3, randn(3, 3, seed=1) * 0.3, randn(3, 3, seed=2), mask),
        torch.tensor([2, 0, 1]),
    )
    torch.testing.assert_close(losses_of(*(x[order] for x in inputs))[which], losses_of(*inputs)[which])


@pytest.mark.parametrize("which", [0, 1])
def test_every_token_weighs_the_same(which):
    """A mean over tokens, not over rows: two rows in one mask equal one long row."""
    inputs, mask = (randn(2, 3) * 0.3, randn(2, 3, seed=1) * 0.3, randn(2, 3, seed=2)), prefix_mask([3, 1], 3)
    flat = [x[mask][None] for x in inputs]
    torch.testing.assert_close(
        losses_of(*inputs, mask)[which], losses_of(*flat, torch.ones(1, 4, dtype=torch.bool))[which]
    )


def test_a_broken_logprob_is_not_hidden():
    loss, _ = policy_loss(
        torch.tensor([[math.nan]]),
        torch.zeros(1, 1),
        torch.ones(1, 1),
        torch.tensor([[True]]),
        clip_range=0.2,
    )
    assert loss.isnan()


# --- entropy


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], math.log(4)),
        ([NEG, 0.0, 0.0, NEG], math.log(2)),
        ([0.0, NEG, NEG, NEG], 0.0),
        ([math.log(3.0), 0.0, NEG, NEG], 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ([1e4, 1e4, 0.0, -1e4], math.log(2)),
        ([1e30, -1e30, 0.0, 0.0], 0.0),
    ],
)
def test_entropy_by_hand_and_its_gradient_is_finite(logits, expected):
    logits = torch.tensor(logits, requires_grad=True)
    result = entropy(logits)
    assert result.item() == pytest.approx(expected, abs=1e-6)
    result.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_agrees_with_torch_distributions(shape, dtype):
    logits = (randn(*shape, 300) * 4).to(dtype)
    result = entropy(logits)
    assert result.shape == shape and result.dtype == torch.float32
    torch.testing.assert_close(
        result.double(),
        torch.distributions.Categorical(logits=logits.double()).entropy(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_entropy_gradient_agrees_with_finite_differences():
    logits = randn(6)
    leaf = logits.clone().requires_grad_()
    entropy(leaf).backward()
    # fp32 differences.
    torch.testing.assert_close(leaf.grad, finite_difference(entropy, logits), rtol=2e-3, atol=5e-4)


# --- chunked logprobs


def whole_logprobs(hidden, weight, tokens, temperature):
    """The plain way: all logits at once, through torch's own cross entropy and distributions."""
    logits = hidden @ weight.T / temperature
    return -F.cross_entropy(logits, tokens, reduction="none"), torch.distributions.Categorical(
        logits=logits
    ).entropy()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 10, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_values_and_gradients_are_those_of_the_whole(chunk_tokens, temperature):
    tokens = torch.randint(30, (10,), generator=torch.Generator().manual_seed(0))
    hidden, weight = randn(10, 8).requires_grad_(), randn(30, 8, seed=1).requires_grad_()
    mix = randn(2, 10, seed=2)  # so that no gradient is there by symmetry
    expected = whole_logprobs(hidden, weight, tokens, temperature)
    wanted = torch.autograd.grad((mix[0] * expected[0] + mix[1] * expected[1]).sum(), (hidden, weight))
    results = chunked_logprobs(
        hidden,
        lambda h: h @ weight.T,
        tokens,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        with_entropy=True,
    )
    got = torch.autograd.grad((mix[0] * results[0] + mix[1] * results[1]).sum(), (hidden, weight))
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_weights_learn_even_when_the_hidden_states_are_constant():
    weight, tokens = randn(30, 8, seed=1).requires_grad_(), torch.arange(10)
    chunked_logprobs(randn(10, 8), lambda h: h @ weight.T, tokens, temperature=1.0, chunk_tokens=3)[
        0
    ].sum().backward()
    (wanted,) = torch.autograd.grad(whole_logprobs(randn(10, 8), weight, tokens, 1.0)[0].sum(), weight)
    torch.testing.assert_close(weight.grad, wanted)


@pytest.mark.parametrize("grad", [True, False])
def test_never_more_than_a_chunk_of_logits(grad):
    rows, weight = [], randn(30, 8).requires_grad_()

    def project(hidden):
        rows.append(hidden.shape[0])
        return hidden @ weight.T

    with torch.set_grad_enabled(grad):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
            logprobs, _ = chunked_logprobs(
                randn(10, 8), project, torch.arange(10), temperature=1.0, chunk_tokens=4
            )
    assert rows == [4, 4, 2]
    assert logprobs.requires_grad is grad
    assert not any(30 in shape[-1:] for shape in saved)  # no logits wait for backward
    if grad:
        logprobs.sum().backward()
        assert sorted(rows[3:]) == [2, 4, 4]  # projected once more


def test_chunking_without_entropy_gives_the_same_logprobs_alone():
    hidden, weight, tokens = randn(10, 8), randn(30, 8, seed=1), torch.arange(10)
    alone, nothing = chunked_logprobs(hidden, lambda h: h @ weight.T, tokens, temperature=0.7, chunk_tokens=4)
    both = chunked_logprobs(
        hidden, lambda h: h @ weight.T, tokens, temperature=0.7, chunk_tokens=4, with_entropy=True
    )
    assert nothing is None
    assert torch.equal(alone, both[0])


def test_entropies_of_bf16_logits_are_divided_by_the_temperature_in_fp32():
    logits = (randn(3, 30) * 5).bfloat16()
    _, entropies = chunked_logprobs(
        torch.zeros(3, 8), lambda h: logits, torch.arange(3), temperature=0.7, with_entropy=True
    )
    expected = torch.distributions.Categorical(logits=logits.double() / 0.7).entropy()
    torch.testing.assert_close(entropies.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_entropy_that_nobody_asks_for_is_not_computed(monkeypatch):
    original, calls = losses._entropy_of, []
    monkeypatch.setattr(losses, "_entropy_of", lambda log_probs: calls.append(1) or original(log_probs))
    hidden, tokens = randn(10, 8).requires_grad_(), torch.zeros(10, dtype=torch.int64)
    for options, expected in (
        ({}, 0),
        ({"with_entropy": True}, 2),  # once more in backward
        ({"with_entropy": True, "entropy_grad": False}, 1),
    ):
        calls.clear()
        logprobs, entropies = chunked_logprobs(hidden, lambda h: h, tokens, temperature=1.0, **options)
        logprobs.sum().backward()
        assert len(calls) == expected
    assert not entropies.requires_grad


def test_chunked_logprobs_of_bf16_are_fp32_and_of_nothing_are_empty():
    weight = randn(30, 8).bfloat16()
    logprobs, _ = chunked_logprobs(
        randn(3, 8).bfloat16(), lambda h: h @ weight.T, torch.arange(3), temperature=1.0
    )
    assert logprobs.dtype == torch.float32
    empty, _ = chunked_logprobs(
        torch.zeros(0, 8).bfloat16(),
        lambda h: h @ weight.T,
        torch.zeros(0, dtype=torch.int64),
        temperature=1.0,
    )
    assert empty.shape == (0,) and empty.dtype == torch.float32


# --- messages

MASK = torch.tensor([[True, False]])
X = torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: policy_loss(X, X[0], X, MASK, clip_range=0.2),
            r"old_logprobs has shape \(2,\), expected \(1, 2\) like mask",
        ),
        (lambda: policy_loss(X[0], X, X, MASK, clip_range=0.2), r"^logprobs has shape \(2,\), expected"),
        (lambda: policy_loss(X, X, X[0], MASK, clip_range=0.2), r"^advantages has shape \(2,\), expected"),
        (
            lambda: policy_loss(X, X, X, MASK.float(), clip_range=0.2),
            "mask must be bool .* got torch.float32",
        ),
        (lambda: policy_loss(X, X, X, MASK & False, clip_range=0.2), "has no True entry"),
        (lambda: value_loss(X[0], X, X, MASK, clip_range=0.2), r"^values has shape \(2,\), expected"),
        (lambda: value_loss(X, X[0], X, MASK, clip_range=0.2), r"^old_values has shape \(2,\), expected"),
        (
            lambda: value_loss(X, X, X.T, MASK, clip_range=0.2),
            r"returns has shape \(2, 1\), expected \(1, 2\) like mask",
        ),
        (lambda: value_loss(X, X, X, MASK & False, clip_range=None), "has no True entry"),
        (lambda: value_loss(X, X, X, MASK, clip_range=-1.0), "clip_range must be > 0 or None"),
        (lambda: value_loss(X, X, X, MASK, clip_range=0.0), "clip_range must be > 0 or None"),
        (lambda: entropy(torch.tensor(1.0)), "got a scalar"),
        (
            lambda: chunked_logprobs(X, torch.nn.Identity(), X[0].long(), temperature=1.0),
            r"got \(1, 2\) and \(2,\)",
        ),
        (
            lambda: chunked_logprobs(X[None], torch.nn.Identity(), X[:, 0].long(), temperature=1.0),
            r"got \(1, 1, 2\) and \(1,\)",
        ),
        (
            lambda: chunked_logprobs(X, torch.nn.Identity(), X[:, 0].long(), temperature=1.0, chunk_tokens=0),
            "chunk_tokens must be >= 1",
        ),
        (
            lambda: chunked_logprobs(X, torch.nn.Identity(), X[:, 0].long(), temperature=0.0),
            "temperature must be > 0",
        ),
        (
            lambda: chunked_logprobs(X, lambda h: h[0], X[:, 0].long(), temperature=1.0),
            r"logits \(2,\) must have the shape of tokens \(1,\)",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
