"""Properties of any input: round trips of headers, layouts and configurations; sampling; padding; order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_swarm.errors import ShapeError
from textrl_swarm.maths.returns import estimate_advantages
from textrl_swarm.maths.sampling import choose_tokens
from textrl_swarm.models.layers import LayerSizes
from textrl_swarm.runs.config import load_config
from textrl_swarm.swarm.protocol import AdapterHeader, AdapterLayout
from textrl_swarm.types import RolloutBatch, Trajectory

sizes = st.builds(LayerSizes, st.integers(1, 5), st.integers(1, 5), st.none() | st.integers(1, 4))
targets = st.dictionaries(st.text(min_size=1, max_size=8), sizes, min_size=1, max_size=4)


@given(
    st.integers(1, 64),
    st.floats(1e-3, 1e3),
    st.lists(targets, min_size=1, max_size=3),
    st.dictionaries(st.integers(0, 99), st.text(), min_size=1),
)
def test_a_header_survives_the_wire_and_keeps_its_key(r, alpha, kinds, digests):
    blocks = {block: (block % len(kinds), digest) for block, digest in digests.items()}
    header = AdapterHeader(r, alpha, tuple(kinds), blocks)
    read = AdapterHeader.decode(header.encode())
    assert read == header and read.key == header.key
    assert [list(kind) for kind in read.kinds] == [list(kind) for kind in kinds], "the order of the layout"


@given(st.binary(max_size=80))
def test_a_header_of_random_bytes_is_refused(data):
    with pytest.raises(ShapeError):
        AdapterHeader.decode(data)


@given(st.integers(1, 4), targets, st.integers(0, 99))
def test_a_layout_puts_together_what_it_took_apart(r, targets, seed):
    layout = AdapterLayout(r, targets)
    flat = torch.randn(layout.block_numel, generator=torch.Generator().manual_seed(seed))
    views = layout.views(flat)
    assert {path: (a.shape, b.shape) for path, (a, b) in views.items()} == {
        path: own.shapes(r) for path, own in targets.items()
    }
    assert torch.equal(layout.flatten(views), flat)


@given(
    st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=6),
    st.data(),
)
def test_a_row_draws_its_token_whatever_shares_its_batch(rows, data):
    scores = torch.tensor(rows, dtype=torch.float64)
    uniforms = torch.tensor([data.draw(st.floats(0, 1, exclude_max=True)) for _ in rows], dtype=torch.float64)
    together = choose_tokens(scores, uniforms)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    assert torch.equal(choose_tokens(scores[order], uniforms[order]), together[order])
    for i in range(len(rows)):
        assert choose_tokens(scores[i : i + 1], uniforms[i : i + 1]) == together[i]


@given(st.integers(2, 40), st.integers(0, 10_000))
def test_a_token_without_probability_is_never_drawn(vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn((8, vocab), generator=generator)
    hidden = torch.rand((8, vocab), generator=generator) < 0.5
    hidden[:, 0] = False
    scores = scores.masked_fill(hidden, -math.inf)
    chosen = choose_tokens(scores, torch.rand(8, generator=generator, dtype=torch.float64))
    assert not hidden[torch.arange(8), chosen].any()


trajectories = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.booleans()), min_size=1, max_size=5
)


@given(trajectories, st.integers(0, 9))
def test_a_batch_gives_back_the_trajectories_it_was_padded_from(shapes, pad_token):
    rows = []
    for i, (prompt, response, terminated) in enumerate(shapes):
        logprobs = -torch.rand(response, generator=torch.Generator().manual_seed(i))
        values = logprobs * 2
        rows.append(
            Trajectory(
                torch.arange(prompt), torch.arange(response) + 7, logprobs, values, terminated, f"text {i}"
            )
        )
    batch = RolloutBatch.from_trajectories(rows, temperature=0.5, pad_token=pad_token)
    assert batch.tokens.shape[1] == max(p + r for p, r, _ in shapes)
    assert batch.response_mask.sum(dim=1).tolist() == [r for _, r, _ in shapes]
    for before, after in zip(rows, batch.trajectories(), strict=True):
        assert torch.equal(before.prompt, after.prompt) and torch.equal(before.response, after.response)
        assert torch.equal(before.logprobs, after.logprobs) and torch.equal(before.values, after.values)
        assert (before.terminated, before.text) == (after.terminated, after.text)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 999), st.floats(0, 1), st.floats(0, 1)
)
def test_padding_and_row_order_change_no_advantage(lengths, seed, gamma, gae_lambda):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(mask.shape, generator=generator) for _ in range(2))
    bootstrap = torch.randn(len(lengths), generator=generator)
    numbers = {"gamma": gamma, "gae_lambda": gae_lambda}
    advantages, returns = estimate_advantages(rewards, values, bootstrap, mask, **numbers)
    wide = [
        torch.nn.functional.pad(x, (0, 3), value=v)
        for x, v in ((rewards, 9.0), (values, math.nan), (mask, 0))
    ]
    wider, _ = estimate_advantages(wide[0], wide[1], bootstrap, wide[2], **numbers)
    assert torch.equal(wider[:, : mask.shape[1]], advantages) and not wider[:, mask.shape[1] :].any()
    order = torch.randperm(len(lengths), generator=generator)
    shuffled, _ = estimate_advantages(rewards[order], values[order], bootstrap[order], mask[order], **numbers)
    assert torch.equal(shuffled, advantages[order])
    assert torch.allclose(returns[mask], (advantages + values)[mask])


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(1e-6, 1.0),
    st.integers(1, 512),
    st.none() | st.lists(st.sampled_from(["dense", "query_key_value"]), min_size=1, unique=True),
    st.none() | st.floats(0.1, 1e4),
)
def test_a_configuration_survives_its_file(tmp_path_factory, seed, lr, max_new_tokens, targets, timeout_s):
    values = {"model": "m", "prompts": ["a"], "reward": "x:y", "output": "o", "seed": seed, "ppo": {"lr": lr}}
    values["sampling"] = {"max_new_tokens": max_new_tokens}
    values["lora"] = {"targets": targets}
    values["train"] = {"reward_timeout_s": timeout_s}
    config = load_config(values)
    path = tmp_path_factory.mktemp("configs") / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
