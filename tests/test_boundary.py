"""What travels between two blocks beside hidden states, packed into one tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textrl_swarm.decoders.boundary import Boundary, join_tokens
from textrl_swarm.errors import ModelError

PLAIN, INDEXED = Boundary(4), Boundary(4, ("indices",))


def test_hidden_states_alone_are_what_they_are():
    hidden = torch.randn(2, 3, 4)
    assert PLAIN.pack(hidden, {}) is hidden
    assert INDEXED.pack(hidden, {"indices": None}) is hidden
    for boundary in (PLAIN, INDEXED):
        found, parts = boundary.unpack(hidden)
        assert torch.equal(found, hidden) and not any(one is not None for one in parts.values())


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.lists(st.integers(0, 2**21 - 1), min_size=5, max_size=5), min_size=2, max_size=2),
)
def test_whole_numbers_survive_every_dtype(dtype, numbers):
    indices = torch.tensor(numbers, dtype=torch.int32)[:, None]  # (2, 1, 5)
    hidden = torch.randn(2, 1, 4, dtype=dtype)
    packed = INDEXED.pack(hidden, {"indices": indices})
    assert packed.dtype == dtype and torch.isfinite(packed).all()
    found, parts = INDEXED.unpack(packed)
    assert torch.equal(found, hidden)
    assert torch.equal(parts["indices"], indices) and parts["indices"].dtype == torch.int32


def test_gradients_reach_the_hidden_states_and_nothing_else():
    packed = INDEXED.pack(torch.randn(2, 3, 4), {"indices": torch.ones(2, 3, 2, dtype=torch.int32)})
    leaf = packed.clone().requires_grad_()
    hidden, parts = INDEXED.unpack(leaf)
    again = INDEXED.pack(2 * hidden, parts)
    (grad,) = torch.autograd.grad(again.sum(), leaf)
    assert torch.equal(grad[..., :4], torch.full((2, 3, 4), 2.0)) and not grad[..., 4:].any()


def test_chunks_with_fewer_numbers_are_widened():
    chunks = [INDEXED.trial(torch.randn(2, 3, 4)), torch.randn(2, 1, 4)]
    joined = join_tokens(chunks)
    assert joined.shape == (2, 4, chunks[0].shape[-1])
    assert torch.equal(joined[:, 3:, :4], chunks[1])


@pytest.mark.parametrize("width", [5, 6, 9, 13])
def test_what_a_stranger_sends_is_checked(width):
    for boundary in (PLAIN, INDEXED):
        with pytest.raises(ModelError, match="no state between two blocks"):
            boundary.unpack(torch.full((1, 2, width), 3.0))
