import pytest
import torch

from textrl_swarm.models.value_head import ValueHead


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_value_by_hand():
    head = ValueHead(3)
    head.load_state_dict({"weight": torch.tensor([[1.0, -2.0, 0.5]]), "bias": torch.tensor([0.25])})
    assert head(torch.tensor([[1.0, 1.0, 2.0], [0.0, 3.0, 0.0]])).tolist() == [0.25, -5.75]


def test_parameter_names_shapes_and_type():
    assert {name: (tuple(p.shape), p.dtype) for name, p in ValueHead(5).named_parameters()} == {
        "weight": ((1, 5), torch.float32),
        "bias": ((1,), torch.float32),
    }


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_shape_and_float_type_gives_fp32(shape, dtype):
    hidden, head = randn(*shape, 7).to(dtype), ValueHead(7)
    values = head(hidden)
    assert values.shape == shape and values.dtype == torch.float32
    expected = (hidden.double() * head.weight[0].double()).sum(-1)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)


def test_first_values_are_small_even_for_wide_models():
    """For unit variance, the sum of H terms with weights 1 / (H + 1) has a deviation of about 1 / sqrt(H)."""
    values = ValueHead(4096)(randn(1000, 4096, seed=1))
    assert 0 < values.std().item() < 2 / 4096**0.5


def test_initial_weights_have_the_stated_deviation_and_no_bias():
    head = ValueHead(10_000)
    assert head.weight.std().item() == pytest.approx(1 / 10_001, rel=0.03)
    assert head.bias.tolist() == [0.0]


def test_the_deviation_of_a_narrow_head_is_the_stated_one_too():
    first_weights = torch.cat([ValueHead(1, seed=seed).weight.flatten() for seed in range(2000)])
    assert first_weights.std().item() == pytest.approx(1 / 2, rel=0.06)


def test_same_seed_same_weights():
    assert torch.equal(ValueHead(16, seed=3).weight, ValueHead(16, seed=3).weight)
    assert not torch.equal(ValueHead(16, seed=3).weight, ValueHead(16, seed=4).weight)


def test_building_one_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    weight = ValueHead(16).weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    assert torch.equal(ValueHead(16).weight, weight)


def test_gradient_reaches_the_hidden_states_at_the_start():
    head, hidden = ValueHead(4), randn(3, 4).bfloat16().requires_grad_()
    head(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, head.weight.detach().expand(3, 4).bfloat16())
    torch.testing.assert_close(head.weight.grad, hidden.detach().float().sum(0, keepdim=True))
    assert head.bias.grad.tolist() == [3.0]


def test_saving_and_loading_gives_the_same_values():
    head, other, hidden = ValueHead(8, seed=1), ValueHead(8, seed=2), randn(5, 8)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(hidden), head(hidden))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ValueHead(0), "hidden_size must be >= 1, got 0"),
        (lambda: ValueHead(4)(torch.zeros(2, 5)), r"hidden has shape \(2, 5\), expected \(\.\.\., 4\)"),
        (lambda: ValueHead(4)(torch.tensor(1.0)), r"hidden has shape \(\), expected \(\.\.\., 4\)"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
