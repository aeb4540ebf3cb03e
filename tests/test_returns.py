import math

import pytest
import torch
from pfrl.agents.ppo import _add_advantage_and_value_target_to_episode

from textrl_swarm.maths.returns import (
    estimate_advantages,
    explained_variance,
    masked_mean,
    next_kl_coef,
    place_scores,
    whiten,
)

LENGTHS = (1, 4, 7, 6)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefix_mask(lengths, width):
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def random_batch(width=7):
    """rewards, values, bootstrap_values, mask of responses: one token, truncated, full width, terminated."""
    return (
        randn(4, width, seed=1),
        randn(4, width, seed=2),
        torch.tensor([0.0, 1.5, -0.7, 0.0]),
        prefix_mask(LENGTHS, width),
    )


# --- rewards


def test_scores_sit_on_the_last_chosen_token():
    mask = prefix_mask([1, 3, 2], 3)
    placed = place_scores(torch.tensor([5, -1, 0.5]), mask)
    assert placed.tolist() == [[5.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.5, 0.0]]
    assert placed.dtype == torch.float32


def test_no_score_is_lost_or_shared():
    scores, mask = randn(4), prefix_mask(LENGTHS, 9)
    placed = place_scores(scores, mask)
    assert torch.equal(placed.sum(dim=1), scores)
    assert (placed != 0).sum() == 4


# --- advantages


def test_lambda_one_gives_return_minus_value():
    rewards = torch.tensor([[0.0, 1.0, 9.0]])  # third column is padding and must not leak
    values = torch.tensor([[0.5, 0.25, 7.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, _ = estimate_advantages(rewards, values, torch.zeros(1), mask, gamma=1.0, gae_lambda=1.0)
    assert advantages.tolist() == [[0.5, 0.75, 0.0]]


def test_advantages_by_hand():
    # delta = 1 + .5 * 2 - 4 = -2, then 3 + .5 * 8 - 2 = 5; A[1] = 5, A[0] = -2 + .25 * 5
    advantages, returns = estimate_advantages(
        torch.tensor([[1.0, 3.0]]),
        torch.tensor([[4.0, 2.0]]),
        torch.tensor([8.0]),
        prefix_mask([2], 2),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert advantages.tolist() == [[-0.75, 5.0]]
    assert returns.tolist() == [[3.25, 7.0]]


def weighted_n_step_advantage(rewards, values, bootstrap, t, gamma, gae_lambda):
    """The definition behind the recursion: (1 - lambda) sum of lambda^(n-1) times the n-step advantage.

    The longest takes the rest of the weight.
    """
    steps = len(rewards) - t
    total = 0.0
    for n in range(1, steps + 1):
        n_step = sum(gamma**i * rewards[t + i] for i in range(n))
        n_step += gamma**n * (values[t + n] if t + n < len(rewards) else bootstrap) - values[t]
        total += n_step * (gae_lambda ** (n - 1) * (1 - gae_lambda) if n < steps else gae_lambda ** (n - 1))
    return total


@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0), (0.0, 0.7), (1.0, 1.0)]
)
def test_advantages_are_the_weighted_n_step_advantages(gamma, gae_lambda):
    rewards, values, bootstrap, mask = random_batch()
    advantages, returns = estimate_advantages(
        rewards, values, bootstrap, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    for b, length in enumerate(LENGTHS):
        row = rewards[b, :length].tolist(), values[b, :length].tolist(), bootstrap[b].item()
        expected = [weighted_n_step_advantage(*row, t, gamma, gae_lambda) for t in range(length)]
        assert advantages[b, :length].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert returns[b, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, row[1], strict=True)], rel=1e-5, abs=1e-5
        )


def test_advantages_agree_with_pfrl():
    rewards, values, bootstrap, mask = random_batch()
    advantages, returns = estimate_advantages(rewards, values, bootstrap, mask, gamma=0.9, gae_lambda=0.8)
    for b, length in enumerate(LENGTHS):
        next_values = [*values[b, 1:length].tolist(), bootstrap[b].item()]
        episode = [
            {
                "reward": rewards[b, t].item(),
                "v_pred": values[b, t].item(),
                "next_v_pred": next_values[t],
                "nonterminal": 1.0,
            }
            for t in range(length)
        ]
        episode[-1]["nonterminal"] = float(b in (1, 2))  # rows 0 and 3 terminated
        _add_advantage_and_value_target_to_episode(episode, gamma=0.9, lambd=0.8)
        assert advantages[b, :length].tolist() == pytest.approx(
            [x["adv"] for x in episode], rel=1e-5, abs=1e-5
        )
        assert returns[b, :length].tolist() == pytest.approx(
            [x["v_teacher"] for x in episode], rel=1e-5, abs=1e-5
        )


def test_gamma_zero_looks_at_one_reward_only():
    rewards, values, bootstrap, mask = random_batch()
    _, returns = estimate_advantages(rewards, values, bootstrap, mask, gamma=0.0, gae_lambda=0.95)
    torch.testing.assert_close(returns, torch.where(mask, rewards, 0))


def test_lambda_zero_is_the_one_step_error():
    rewards, values, bootstrap, mask = random_batch()
    advantages, _ = estimate_advantages(rewards, values, bootstrap, mask, gamma=1.0, gae_lambda=0.0)
    assert advantages[1, 3] == rewards[1, 3] + bootstrap[1] - values[1, 3]
    assert advantages[1, 2] == rewards[1, 2] + values[1, 3] - values[1, 2]


def test_a_perfect_critic_leaves_no_advantage():
    rewards = place_scores(torch.tensor([2.0, -1.0]), prefix_mask([3, 2], 3))
    values = torch.tensor([[2.0, 2.0, 2.0], [-1.0, -1.0, 0.0]])
    advantages, _ = estimate_advantages(
        rewards, values, torch.zeros(2), prefix_mask([3, 2], 3), gamma=1.0, gae_lambda=0.95
    )
    assert advantages.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("garbage", [1e9, math.nan, math.inf])
def test_padding_changes_nothing(garbage):
    rewards, values, bootstrap, mask = random_batch()
    expected = estimate_advantages(rewards, values, bootstrap, mask, gamma=0.9, gae_lambda=0.8)
    wide = prefix_mask(LENGTHS, 10)
    pad = torch.full((4, 3), garbage)
    rewards, values = (torch.cat([torch.where(mask, x, garbage), pad], dim=1) for x in (rewards, values))
    results = estimate_advantages(rewards, values, bootstrap, wide, gamma=0.9, gae_lambda=0.8)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result[:, :7], wanted)
        assert (result[~wide] == 0).all()


def test_row_order_changes_nothing():
    batch, order = random_batch(), torch.tensor([2, 0, 3, 1])
    expected = estimate_advantages(*batch, gamma=0.9, gae_lambda=0.8)
    results = estimate_advantages(*(x[order] for x in batch), gamma=0.9, gae_lambda=0.8)
    assert all(torch.equal(result, wanted[order]) for result, wanted in zip(results, expected, strict=True))


def test_bf16_values_are_accumulated_in_fp32():
    width = 300
    rewards, values = (
        torch.full((1, width), 1.0, dtype=torch.bfloat16),
        torch.zeros(1, width, dtype=torch.bfloat16),
    )
    _, returns = estimate_advantages(
        rewards, values, torch.zeros(1), prefix_mask([width], width), gamma=1.0, gae_lambda=1.0
    )
    assert returns[0, 0].item() == 300.0  # bf16 stops counting at 256
    assert returns.dtype == torch.float32


def test_advantages_of_doubles_are_fp32():
    *numbers, mask = random_batch()
    expected = estimate_advantages(*numbers, mask, gamma=0.9, gae_lambda=0.8)
    results = estimate_advantages(*(x.double() for x in numbers), mask, gamma=0.9, gae_lambda=0.8)
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
    assert [x.dtype for x in results] == [torch.float32] * 2


# --- statistics


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean = masked_mean(x, mask)
    assert mean.item() == 3.0
    mean.backward()
    assert x.grad.tolist() == [
        [pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0],
        [pytest.approx(1 / 3), 0.0, 0.0],
    ]


def test_masked_mean_of_bf16_is_taken_in_fp32():
    # A bf16 sum would be 768.
    mean = masked_mean(torch.tensor([255.0, 256.0, 258.0]).bfloat16(), torch.ones(3, dtype=torch.bool))
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(769 / 3)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 12.6, -1e5])
def test_whitened_entries_have_mean_zero_and_variance_one(scale, offset):
    mask = prefix_mask(LENGTHS, 7)
    x = torch.where(mask, randn(4, 7) * scale + offset, 1e8)  # the padding would spoil both
    real = whiten(x, mask)[mask].double()
    assert real.mean().item() == pytest.approx(0.0, abs=1e-6)
    # The 1e-8 under the root is 1e-4 of the smallest variance.
    assert real.var(correction=0).item() == pytest.approx(1.0, rel=2e-4)


def test_whiten_keeps_the_mean_when_asked():
    mask = prefix_mask(LENGTHS, 7)
    x = randn(4, 7) * 5 + 3
    real = whiten(x, mask, shift_mean=False)[mask]
    assert real.mean().item() == pytest.approx(x[mask].mean().item(), rel=1e-5)
    assert real.var(correction=0).item() == pytest.approx(1.0, rel=1e-4)


def test_whiten_by_hand_ignores_and_zeroes_padding():
    x = torch.tensor([[1.0, 3.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    assert whiten(x, mask)[0].tolist() == pytest.approx([-1.0, 1.0, 0.0])
    assert whiten(x, mask, shift_mean=False)[0].tolist() == pytest.approx([1.0, 3.0, 0.0])


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, [0.0, 0.0, 0.0]), (False, [7.0, 0.0, 0.0])])
def test_a_single_entry_is_only_shifted(shift_mean, expected):
    assert (
        whiten(
            torch.tensor([7.0, 1.0, 2.0]), torch.tensor([True, False, False]), shift_mean=shift_mean
        ).tolist()
        == expected
    )


def test_equal_entries_do_not_become_noise():
    assert whiten(torch.full((3, 7), 1000.1), prefix_mask([7, 5, 3], 7)).abs().max() < 1e-4


def test_whiten_of_nothing_is_zero():
    assert whiten(torch.full((2, 2), math.nan), torch.zeros(2, 2, dtype=torch.bool)).tolist() == [
        [0.0, 0.0],
        [0.0, 0.0],
    ]


@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0),
        ([5.0, 6.0, 7.0], [1.0, 2.0, 3.0], 1.0),  # a constant offset is not variance
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -3.0),  # errors -2, 0, 2: four times the variance
        ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], 0.0),  # nothing to explain
        ([9.0, 9.0, 9.0], [2.0**20, 2.0**20, 2.0**20 + 0.125], 0.0),  # fp32 has no number for their mean
    ],
)
def test_explained_variance_by_hand(values, returns, expected):
    values, returns = torch.tensor([[*values, math.nan]]), torch.tensor([[*returns, math.nan]])
    result = explained_variance(values, returns, prefix_mask([3], 4))
    assert result.item() == pytest.approx(expected, abs=1e-6)
    assert result.shape == () and result.dtype == torch.float32


@pytest.mark.parametrize("count", [3, 7, 10, 49])
def test_equal_returns_leave_no_rounding_noise_to_divide_by(count):
    returns, mask = torch.full((count,), 0.1), torch.ones(count, dtype=torch.bool)
    assert explained_variance(randn(count), returns, mask).item() == 0.0


def test_explained_variance_of_a_single_token_is_zero():
    assert explained_variance(torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([True])).item() == 0.0


# --- adaptive KL


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.001), (5.4, 0.999), (60.0, 1.002), (0.0, 0.998), (-3.0, 0.998)],
)
def test_kl_coefficient_by_hand(kl, factor):
    """100 responses of a horizon of 10,000: the error, cut at 0.2 either way, counts for a hundredth."""
    assert next_kl_coef(0.15, kl, target=6.0, horizon=10_000, num_responses=100) == pytest.approx(
        0.15 * factor
    )


def test_kl_coefficient_settles_where_the_kl_meets_its_target():
    coef = 0.01
    for _ in range(3000):
        # A policy whose kl falls as the penalty grows.
        coef = next_kl_coef(coef, 1.0 / coef, target=5.0, horizon=1000, num_responses=64)
    assert coef == pytest.approx(0.2, rel=1e-3)


def test_kl_coefficient_by_hand_at_the_ends_of_its_ranges():
    # four responses of a horizon of one: an error of 0.2 counts four times
    assert next_kl_coef(0.1, 1.0, target=0.25, horizon=1, num_responses=4) == pytest.approx(0.18)
    assert next_kl_coef(0.0, 1.0, target=0.25, horizon=1, num_responses=4) == 0.0
    assert next_kl_coef(0.1, 1.0, target=0.25, horizon=1, num_responses=0) == 0.1


def test_kl_coefficient_stays_positive():
    assert next_kl_coef(0.1, 0.0, target=6.0, horizon=10, num_responses=49) > 0


# --- messages

MASK = torch.tensor([[True, True], [True, False]])
X = torch.zeros(2, 2)
KL = {"target": 6.0, "horizon": 100, "num_responses": 10}


def advantages_of(rewards=X, values=X, bootstrap=X[0], mask=MASK):
    return estimate_advantages(rewards, values, bootstrap, mask, gamma=1.0, gae_lambda=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: place_scores(X, MASK), r"scores has shape \(2, 2\), expected \(2,\)"),
        (lambda: place_scores(X[0], MASK[:1]), r"scores has shape \(2,\), expected \(1,\)"),
        (
            lambda: place_scores(X[0], MASK & MASK.new_tensor([[True], [False]])),
            r"rows \[1\] of response_mask hold no chosen token",
        ),
        (lambda: place_scores(X[0], ~MASK), r"rows \[1\] of response_mask have a True after a False"),
        (
            lambda: place_scores(X[0], torch.tensor([[True, False, True], [True, True, False]])),
            r"rows \[0\] of response_mask have a True after a False",
        ),
        (
            lambda: place_scores(X[0], MASK[0]),
            r"response_mask must be \(B, T\) bool with T >= 1, got shape \(2,\)",
        ),
        (lambda: place_scores(X[0], MASK[:, :0]), r"bool with T >= 1, got shape \(2, 0\)"),
        (lambda: advantages_of(rewards=X[:, :1]), r"rewards has shape \(2, 1\), expected \(2, 2\)"),
        (lambda: advantages_of(values=X[:1]), r"values has shape \(1, 2\), expected \(2, 2\)"),
        (lambda: advantages_of(bootstrap=X), r"bootstrap_values has shape \(2, 2\), expected \(2,\)"),
        (lambda: advantages_of(mask=MASK.flip(1)), r"rows \[1\] of response_mask have a True after a False"),
        (lambda: advantages_of(mask=MASK.int()), r"response_mask must be \(B, T\) bool .* torch.int32"),
        (lambda: masked_mean(X, MASK[0]), r"x has shape \(2, 2\), expected \(2,\) like mask"),
        (lambda: masked_mean(X, MASK & False), r"mask of shape \(2, 2\) has no True entry"),
        (lambda: whiten(X[0], MASK), r"x has shape \(2,\), expected \(2, 2\) like mask"),
        (lambda: explained_variance(X[0], X, MASK), r"values has shape \(2,\), expected \(2, 2\) like mask"),
        (lambda: explained_variance(X, X[0], MASK), r"returns has shape \(2,\), expected \(2, 2\) like mask"),
        (lambda: explained_variance(X, X, MASK & False), r"has no True entry"),
        (
            lambda: next_kl_coef(0.1, math.nan, **KL),
            "kl and kl_coef must be finite and kl_coef >= 0, got kl nan",
        ),
        (lambda: next_kl_coef(-0.1, 1.0, **KL), "kl_coef -0.1"),
        (lambda: next_kl_coef(math.inf, 1.0, **KL), "must be finite .* kl_coef inf"),
        (lambda: next_kl_coef(0.1, 1.0, **KL | {"target": 0.0}), "target and horizon must be > 0"),
        (lambda: next_kl_coef(0.1, 1.0, **KL | {"horizon": 0}), "target and horizon must be > 0"),
        (lambda: next_kl_coef(0.1, 1.0, **KL | {"num_responses": -1}), "num_responses >= 0, got .* and -1"),
        (
            lambda: next_kl_coef(0.1, 1.0, **KL | {"num_responses": 500}),
            "500 responses per update .* raise the horizon above 100",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
