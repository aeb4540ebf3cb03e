import math

import pytest
import torch

from textrl_swarm.errors import NumericsError, ShapeError
from textrl_swarm.maths.sampling import choose_tokens, token_logprobs
from textrl_swarm.policies.filters import filter_logits

NEG = -math.inf
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*tokens):
    return torch.tensor(tokens, dtype=torch.int64)


# --- filter_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_filters_off_returns_the_very_values(dtype):
    logits = (randn(3, 50) * 30).to(dtype)
    logits[1, 4] = NEG
    scores = filter_logits(logits, **OFF)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, logits.float())


def test_temperature_alone_is_a_plain_division():
    logits = randn(3, 50)
    assert torch.equal(filter_logits(logits, **OFF | {"temperature": 0.7}), logits / 0.7)


@pytest.mark.parametrize("number", [2, 2.0])
def test_whole_numbers_are_accepted_where_a_float_is_meant(number):
    scores = filter_logits(
        torch.tensor([[4.0, -4.0]]),
        **OFF | {"temperature": number, "repetition_penalty": number},
        seen_tokens=[ids(0, 1)],
    )
    assert scores.tolist() == [[1.0, -4.0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, [NEG, NEG, NEG, 3.0]),
        ({"top_k": 2}, [1.0, NEG, 1.0, 3.0]),  # a tie with the k-th stays
        ({"top_k": 99}, [1.0, 0.0, 1.0, 3.0]),
        ({"temperature": 0.5, "top_k": 1}, [NEG, NEG, NEG, 6.0]),
    ],
)
def test_top_k_by_hand(options, expected):
    assert filter_logits(torch.tensor([[1.0, 0.0, 1.0, 3.0]]), **OFF | options).tolist() == [expected]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.05, {1}),
        (0.45, {1}),
        (0.55, {1, 3}),
        (0.79, {1, 3}),
        (0.81, {1, 3, 0}),
        (0.94, {1, 3, 0}),
        (0.96, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    scores = filter_logits(probs.log(), **OFF | {"top_p": top_p})
    assert set(scores[0].isfinite().nonzero().flatten().tolist()) == kept


def test_top_p_sees_the_temperature_and_what_top_k_left():
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    # Squared probabilities (temperature 1/2): 0.0225, 0.25, 0.0025, 0.09; their sum is 0.365. The largest is
    # 0.68 of all, but 0.735 of the top two.
    by_k = filter_logits(probs.log(), **OFF | {"temperature": 0.5, "top_p": 0.7, "top_k": 2})
    assert by_k.isfinite().tolist() == [[False, True, False, False]]
    alone = filter_logits(probs.log(), **OFF | {"temperature": 0.5, "top_p": 0.7})
    assert alone.isfinite().tolist() == [[False, True, False, True]]


def test_repetition_penalty_touches_each_rows_own_tokens_once():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]])
    # Unequal lengths; token 0 must not be penalised in row 1 as if it were padding.
    seen = [ids(0, 1, 1, 1, 0), ids(3)]
    scores = filter_logits(logits, **OFF | {"repetition_penalty": 2.0}, seen_tokens=seen)
    assert scores.tolist() == [[1.0, -4.0, 2.0, -2.0], [2.0, -2.0, 2.0, -4.0]]


def test_nothing_seen_yet_penalises_nothing():
    logits = randn(2, 5)
    assert torch.equal(
        filter_logits(logits, **OFF | {"repetition_penalty": 2.0}, seen_tokens=[ids(), ids()]), logits
    )


def test_rows_do_not_influence_each_other():
    logits, seen = randn(3, 40) * 3, [ids(1, 2), ids(5), ids(9, 9, 9, 0)]
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}
    together = filter_logits(logits, **options, seen_tokens=seen)
    alone = [filter_logits(logits[b : b + 1], **options, seen_tokens=[seen[b]]) for b in (2, 0, 1)]
    assert torch.equal(together[[2, 0, 1]], torch.cat(alone))


def test_the_input_is_left_alone():
    logits = randn(2, 10)
    before = logits.clone()
    filter_logits(
        logits, temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=3.0, seen_tokens=[ids(1), ids(2)]
    )
    assert torch.equal(logits, before)


# --- choose_tokens


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-53, 4)],
)
def test_inverse_cdf_by_hand(uniform, token):
    # Impossible tokens at both ends and between.
    scores = torch.tensor([[NEG, 0.25, NEG, 0.5, 0.25, NEG]]).log().nan_to_num(nan=NEG)
    assert choose_tokens(scores, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, 1 - 2**-53])
def test_impossible_tokens_are_never_drawn(uniform):
    scores = randn(64, 5000, seed=3) * 5
    scores[:, :7] = scores[:, -7:] = NEG
    scores[randn(64, 5000, seed=4) > 0] = NEG
    scores[:, 2500] = 0.0  # at least one is possible
    tokens = choose_tokens(scores, torch.full((64,), uniform, dtype=torch.float64))
    assert scores.gather(1, tokens[:, None]).isfinite().all()


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.5, 3)])
def test_impossible_tokens_are_not_drawn_where_a_parallel_sum_rounds_them_up(monkeypatch, uniform, token):
    cumsum, rounding = torch.Tensor.cumsum, torch.tensor([2**-50, 0, 2**-50, 0], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda probs, dim: cumsum(probs, dim) + rounding)
    assert choose_tokens(torch.tensor([[NEG, 0.0, NEG, 0.0]]), torch.tensor([uniform])).tolist() == [token]


def test_a_single_possible_token_is_always_drawn():
    scores = torch.full((3, 9), NEG)
    scores[:, 5] = -1e4
    assert choose_tokens(scores, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [5, 5, 5]


def test_boundary_belongs_to_the_next_token():
    scores = torch.zeros(1, 4)  # cumulative 1/4, 2/4, 3/4, 1: exact in binary
    tokens = [choose_tokens(scores, torch.tensor([u])).item() for u in (0.25, 0.5, 0.75)]
    assert tokens == [1, 2, 3]


def test_frequencies_follow_the_softmax():
    scores = torch.tensor([1.0, -1.0, 0.5, NEG, 2.0, 0.0, -3.0]).expand(20_000, 7)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(choose_tokens(scores, uniforms), minlength=7)
    expected = torch.distributions.Categorical(logits=scores[0]).probs * 20_000
    assert counts[3] == 0
    possible = expected > 0
    chi_square = ((counts - expected).square() / expected)[possible].sum()
    assert chi_square < 15.09  # 99 % quantile for 5 degrees of freedom


def test_filtered_frequencies_follow_the_renormalised_softmax():
    probs = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    scores = filter_logits(probs.log(), **OFF | {"top_k": 3}).expand(20_000, 4)
    counts = torch.bincount(
        choose_tokens(scores, torch.rand(20_000, generator=torch.Generator().manual_seed(2))), minlength=4
    )
    expected = torch.tensor([0.4, 0.3, 0.2]) / 0.9 * 20_000
    assert counts[0] == 0
    # 99 % quantile for 2 degrees of freedom.
    assert ((counts[1:] - expected).square() / expected).sum() < 9.21


def test_a_draw_depends_on_its_own_row_only():
    scores, uniforms = randn(8, 1000) * 2, torch.rand(8, generator=torch.Generator().manual_seed(5))
    together = choose_tokens(scores, uniforms)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert torch.equal(choose_tokens(scores[order], uniforms[order]), together[order])
    assert [
        choose_tokens(scores[b : b + 1], uniforms[b : b + 1]).item() for b in range(8)
    ] == together.tolist()


def test_shifting_all_scores_changes_no_draw():
    scores = (randn(8, 1000) * 8).round() / 8  # multiples of 1/8, so that adding 4096 is exact
    uniforms = torch.rand(8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(choose_tokens(scores + 4096, uniforms), choose_tokens(scores, uniforms))


def test_without_uniforms_the_most_likely_token_is_taken():
    assert choose_tokens(torch.tensor([[NEG, 2.0, 3.0], [5.0, NEG, -5.0]]), None).tolist() == [2, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_large_vocabulary_is_reached_to_its_end(dtype):
    # A bf16 or fp32 cumulative sum would stall long before the end.
    scores = torch.zeros(2, 250_880, dtype=dtype)
    assert choose_tokens(scores, torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 250_879]
    assert choose_tokens(
        scores, (torch.tensor([100_000.5, 250_000.5], dtype=torch.float64) / 250_880)
    ).tolist() == [100_000, 250_000]


def test_rare_tokens_keep_their_share():
    scores = torch.tensor([[0.0, math.log(1e-9)]])  # in fp32 the first token's probability is already 1
    uniforms = torch.tensor([1 - 2e-9, 1 - 0.5e-9], dtype=torch.float64)
    assert choose_tokens(scores.expand(2, 2), uniforms).tolist() == [0, 1]


# --- token_logprobs


def test_logprobs_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert token_logprobs(logits, ids(1, 0), temperature=1.0).tolist() == pytest.approx(
        [math.log(0.75), math.log(0.5)]
    )
    # temperature 1/2 squares the odds: 9 to 1
    assert token_logprobs(logits, ids(1, 0), temperature=0.5).tolist() == pytest.approx(
        [math.log(0.9), math.log(0.5)]
    )


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4)])
def test_logprobs_agree_with_torch_distributions_in_any_shape(shape):
    logits, tokens = (
        randn(*shape, 11) * 4,
        torch.randint(11, shape, generator=torch.Generator().manual_seed(0)),
    )
    logprobs = token_logprobs(logits, tokens, temperature=0.7)
    assert logprobs.shape == shape and logprobs.dtype == torch.float32
    expected = torch.distributions.Categorical(logits=logits.double() / 0.7).log_prob(tokens)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=2e-6)


def test_logprobs_of_bf16_logits_are_computed_in_fp32():
    logits = (randn(4, 300) * 5).bfloat16()
    tokens = ids(0, 10, 200, 299)
    logprobs = token_logprobs(logits, tokens, temperature=0.9)
    assert logprobs.dtype == torch.float32
    expected = (logits.double() / 0.9).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=2e-6)


def test_logprobs_keep_their_digits_when_logits_are_huge():
    small = (randn(4, 300) * 5 * 64).round() / 64  # multiples of 1/64, so that adding 65536 is exact
    tokens = ids(0, 10, 200, 299)
    assert torch.equal(
        token_logprobs(small + 65536, tokens, temperature=1.0), token_logprobs(small, tokens, temperature=1.0)
    )


def test_logprobs_with_impossible_tokens():
    logits = torch.tensor([[NEG, 0.0, 0.0]], requires_grad=True)
    possible = token_logprobs(logits, ids(1), temperature=1.0)
    assert possible.item() == pytest.approx(-math.log(2))
    possible.sum().backward()
    assert logits.grad.tolist() == [[0.0, 0.5, -0.5]]
    assert token_logprobs(logits, ids(0), temperature=1.0).item() == NEG


def test_logprob_gradient_is_one_hot_minus_softmax_over_temperature():
    logits = randn(3, 6).requires_grad_()
    token_logprobs(logits, ids(0, 5, 2), temperature=0.5).sum().backward()
    expected = (torch.eye(6)[[0, 5, 2]] - torch.softmax(logits.detach() / 0.5, -1)) / 0.5
    torch.testing.assert_close(logits.grad, expected)


def test_filters_do_not_enter_the_score():
    """What a filtered policy draws is scored like any token, so old and new scores follow one rule."""
    logits = randn(4, 30)
    scores = filter_logits(logits, **OFF | {"top_k": 2})
    tokens = choose_tokens(scores, torch.full((4,), 0.3))
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.equal(token_logprobs(logits, tokens, temperature=1.0), expected)
    assert (token_logprobs(scores, tokens, temperature=1.0) > expected).all()


# --- messages


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: filter_logits(torch.zeros(3), **OFF), r"logits must be \(B, V\), got shape \(3,\)"),
        (
            lambda: filter_logits(torch.zeros(2, 3), **OFF | {"repetition_penalty": 2.0}),
            "needs seen_tokens with 2 rows, got None",
        ),
        (
            lambda: filter_logits(
                torch.zeros(2, 3), **OFF | {"repetition_penalty": 2.0}, seen_tokens=[ids(1)]
            ),
            "needs seen_tokens with 2 rows, got 1 rows",
        ),
        (
            lambda: filter_logits(
                torch.zeros(1, 3), **OFF | {"repetition_penalty": 2.0}, seen_tokens=[torch.zeros(2)]
            ),
            r"seen_tokens\[0\] must be 1-d int64, got shape \(2,\) torch.float32",
        ),
        (
            lambda: filter_logits(
                torch.zeros(1, 3), **OFF | {"repetition_penalty": 2.0}, seen_tokens=ids(1, 2)[None, None]
            ),
            r"seen_tokens\[0\] must be 1-d int64, got shape \(1, 2\)",
        ),
        (lambda: choose_tokens(torch.zeros(3), None), r"scores must be \(B, V\), got shape \(3,\)"),
        (
            lambda: choose_tokens(torch.zeros(2, 3), torch.zeros(3)),
            r"uniforms has shape \(3,\), expected \(2,\)",
        ),
        (
            lambda: choose_tokens(torch.zeros(2, 3), torch.tensor([0.0, 1.0])),
            r"uniforms must lie in \[0, 1\), got 0.0 to 1.0",
        ),
        (
            lambda: choose_tokens(torch.zeros(2, 3), torch.tensor([-0.5, 0.5])),
            r"uniforms must lie in \[0, 1\), got -0.5 to 0.5",
        ),
        (
            lambda: choose_tokens(torch.zeros(2, 3), torch.tensor([math.nan, 0.5])),
            r"uniforms must lie in \[0, 1\)",
        ),
        (
            lambda: choose_tokens(torch.tensor([[0.0, 1.0], [NEG, NEG]]), torch.zeros(2)),
            r"rows \[1\] of the model\'s logits hold NaN",
        ),
        (
            lambda: choose_tokens(torch.tensor([[0.0, math.nan], [0.0, math.inf]]), None),
            r"rows \[0, 1\] of the model\'s logits hold NaN",
        ),
        (
            lambda: token_logprobs(torch.zeros(2, 3), ids(1), temperature=1.0),
            r"logits \(2, 3\) must have the shape of tokens \(1,\)",
        ),
        (
            lambda: token_logprobs(torch.tensor(0.0), torch.tensor(0), temperature=1.0),
            r"logits \(\) must have the shape of tokens",
        ),
        (
            lambda: token_logprobs(torch.zeros(1, 3), ids(1), temperature=0.0),
            "temperature must be > 0, got 0.0",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises((ShapeError, NumericsError), match=message):
        call()
