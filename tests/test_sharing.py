"""Prompts that rows share: which prefix is chosen; computing it once changes nothing but the time."""

import asyncio
import dataclasses
from functools import partial

import pytest
import torch
from architectures import perturb, tiny_model
from families import FAMILIES, random_checkpoint
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hypothesis import given
from hypothesis import strategies as st
from plain_peft import connect

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.decoders.sharing import PackedRows, SharedPrefix, shared_prefix
from textrl_swarm.errors import ShapeError
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.client.chain import run_in_background
from textrl_swarm.swarm.client.micro_batches import cut, put_together
from textrl_swarm.swarm.streams import OpenStream, is_connected

# Recurrent states of transformers keep no gradients.
RECURRENT = {"qwen3_next", "qwen3_5_text", "bamba", "mamba2", "mamba", "jamba"}
USUAL = {"bloom", "gemma3_text", "qwen3_next"}


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


# ----------------------------------------------------------------------------------- packed, and real servers


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 6), st.integers(1, 40), st.randoms())
def test_rows_and_gradients_come_out_of_micro_batches_as_they_went_in(prompts, each, rest, limit, random):
    """Gradients of a prefix's rows add up in one place, and come back in one of its rows."""
    tokens = samples(prompts, each, 4, 4 + rest)[
        torch.tensor(random.sample(range(prompts * each), prompts * each))
    ]
    shared = SharedPrefix(4, *distinct(tokens[:, :4]))
    numbers = torch.nn.functional.one_hot(tokens, 90).float()
    gradient = torch.randint(-9, 9, numbers.shape).float()
    batches = cut(*tokens.shape, limit, shared)
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(len(tokens)))
    sent = [batch.inputs(numbers) for batch in batches]
    for part, batch in zip(sent, batches, strict=True):
        assert part.shape[:2] == (1, part.shape[1]) and (part.shape[1] <= limit or len(batch.rows) == 1)
        assert PackedRows.decode(batch.packed.encode(), part.shape[1]) == batch.packed
    returned = put_together(batches, [batch.outputs(part) for batch, part in zip(batches, sent, strict=True)])
    assert torch.equal(returned, numbers)
    packed = [batch.grad_outputs(gradient) for batch in batches]
    back = put_together(batches, [b.grad_inputs(part) for b, part in zip(batches, packed, strict=True)])
    assert torch.equal(back[:, 4:], gradient[:, 4:])
    zeros = torch.zeros(len(shared.rows), *gradient[0, :4].shape)
    sums = [zeros.index_add(0, shared.index, grads[:, :4]) for grads in (gradient, back)]
    assert torch.equal(*sums)


def test_a_long_prompt_is_not_sent_for_every_few_of_its_samples():
    """1300 tokens in all, more than usual; but no more than the servers take."""
    tokens = samples(1, 8, 500, 600)
    assert [len(batch.rows) for batch in cut(8, 600, 2048, shared_prefix(tokens))] == [8]
    assert [len(batch.rows) for batch in cut(8, 600, 1000, shared_prefix(tokens))] == [5, 3]
    many = samples(1, 40, 500, 501)  # attention sees the prompt once for each
    assert [len(batch.rows) for batch in cut(40, 501, 2048, shared_prefix(many))] == [16, 16, 8]


def distinct(prefixes):
    unique, index = prefixes.unique(dim=0, return_inverse=True)
    rows = torch.tensor([int((index == i).nonzero()[0]) for i in range(len(unique))])
    return rows, index


@pytest.mark.parametrize(
    "raw",
    [None, 5, [], [2], [0, [0]], [2, []], [2, [0, 2]], [2, [1]], [2, ["x"]], [99, [0]], [2, [0, 1, 0, 1]]],
)
def test_a_strangers_packing(raw):
    with pytest.raises(ShapeError, match="share prefixes"):
        PackedRows.decode(raw, 10 - 1)


@pytest.mark.swarm
@pytest.mark.parametrize("layers", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_prompts_travel_once(two_servers, layers):
    """Half the bytes here; hidden states to the bit, gradients up to the order of their sums."""
    tokens = samples(4, 8, 24, 40)
    with connect(two_servers, LoraSettings(r=4, layers=layers), filled=3) as policy:
        found, sent = [], []
        for shares in (True, True, False):
            limits = policy._client.chain.limits
            policy._client.chain.limits = dataclasses.replace(limits, takes_sharing=shares)
            policy.hidden_states(policy.features(tokens[:1]))  # the adapter is there
            before = policy.traffic.sent["activations"]
            hidden = policy.hidden_states(policy.features(tokens))
            loss = policy.project(hidden).log_softmax(-1)[..., 5].mean()
            gradients = torch.autograd.grad(loss, list(policy.adapter_parameters().values()))
            sent.append(policy.traffic.sent["activations"] - before)
            found.append([hidden.detach(), *gradients])
    once, again, whole = found
    assert sent[0] == sent[1] == sent[2] * (4 * 24 + 32 * 16) / (32 * 40)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(once, whole, strict=True))


@pytest.mark.swarm
@pytest.mark.parametrize(
    ("raw", "tokens"), [([3, [0, 0]], 4), ([2, [0, 9]], 4), ("x", 4), ([2500, [0] * 4], 2504)]
)
def test_a_packing_that_makes_no_sense_is_answered(two_servers, raw, tokens):
    with connect(two_servers, filled=1) as policy:
        calls, span = policy._client._calls, policy._client.spans[0]
        uid = " ".join(policy._client.router.uids[span.start : span.stop])

        async def ask():
            stream = await OpenStream.open(
                calls._stub(span.peer).rpc_requests, 5, partial(is_connected, calls.p2p, span.peer)
            )
            hidden = torch.zeros(1, tokens, policy.hidden_size)
            try:
                await stream.send(uid, [hidden], {"request": "forward", "packed": raw})
                return await asyncio.wait_for(stream.receive(1000), 10)
            finally:
                await stream.close()

        with pytest.raises(P2PHandlerError, match="share prefixes"):
            run_in_background(ask())


@pytest.mark.swarm
def test_a_server_that_cannot_share_is_not_used_where_others_do(two_servers, monkeypatch):
    """It would take the packed rows for one long row, or refuse them again and again."""
    with connect(two_servers) as policy:
        client, span = policy._client, policy._client.spans[0]
        uid, original = client.router.uids[span.start], client._calls.info

        async def info(peer, uid):
            return {**await original(peer, uid), "takes_sharing": False}

        assert run_in_background(client._inspect(span, uid)) is None
        monkeypatch.setattr(client._calls, "info", info)
        refusal = run_in_background(client._inspect(span, uid))
        assert "cannot compute once what rows have in common" in str(refusal)
