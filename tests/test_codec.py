"""Hidden states in fewer bits: the numbers by themselves, and through real servers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_peft import fill, random_tokens, run

from textrl_swarm.config import CODECS, Codec, LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.errors import ConfigError, ShapeError
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.codec import decode, encode, encoded_bytes

ANY = {"max_nats": 100.0, "min_cosine": 0.01}
SHARE = {"fp16": 132 / 256, "int8": 68 / 256}  # of the bytes of 64 numbers in fp32


@given(st.integers(1, 300), st.integers(-30, 30), st.sampled_from(CODECS), st.integers(0, 2**31))
def test_numbers_come_back_within_half_a_step(width, exponent, codec, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(2, 3, width, generator=generator) * 10.0**exponent
    found = decode(encode(numbers, codec), codec)
    assert found.shape == numbers.shape and found.dtype == torch.float32
    blocks = [numbers] if codec == "fp16" else numbers.split(128, dim=-1)
    decoded = [found] if codec == "fp16" else found.split(128, dim=-1)
    for block, other in zip(blocks, decoded, strict=True):
        largest = block.abs().amax(dim=-1, keepdim=True)
        step = largest * (2**-11 if codec == "fp16" else 1 / 127 / 2)
        assert ((block - other).abs() <= step * 1.01).all()


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_and_what_is_not_finite_shows(codec):
    numbers = torch.zeros(1, 3, 130)
    assert torch.equal(decode(encode(numbers, codec), codec), numbers)
    numbers[0, 1, 5], numbers[0, 2, 129] = torch.inf, torch.nan
    finite = torch.isfinite(decode(encode(numbers, codec), codec)).all(dim=-1)
    assert finite.tolist() == [[True, False, False]]


def test_bytes_per_number():
    numbers = torch.randn(2, 3, 1024)
    assert encode(numbers, "fp16").shape == (2, 3, 2 * 1024 + 4)
    assert encode(numbers, "int8").shape == (2, 3, 1024 + 8 * 4)
    for codec in CODECS:
        assert all(
            encode(numbers[..., :n], codec).shape[-1] == encoded_bytes(n, codec) for n in (1, 128, 129)
        )


@pytest.mark.parametrize(
    ("encoded", "codec"),
    [
        (torch.zeros(1, 2, 4, dtype=torch.uint8), "fp16"),
        (torch.zeros(1, 2, 9, dtype=torch.uint8), "fp16"),
        (torch.zeros(1, 2, 4, dtype=torch.uint8), "int8"),
        (torch.zeros(1, 2, 40), "int8"),
        (torch.zeros(2, 40, dtype=torch.uint8), "int8"),
        (torch.zeros(1, 2, 40, dtype=torch.uint8), "int4"),
        (torch.zeros(1, 2, 40, dtype=torch.uint8), ["int8"]),
    ],
    ids=str,
)
def test_bytes_that_are_no_numbers(encoded, codec):
    with pytest.raises(ShapeError, match="are no hidden states in"):
        decode(encoded, codec)


# ------------------------------------------------------------------------------------------ real servers


@pytest.mark.swarm
@pytest.mark.parametrize("kind", [pytest.param("fp16", marks=pytest.mark.slow), "int8"])
def test_training_and_generation_in_fewer_bytes(two_servers, kind):
    """As near as the policy said, and the same each time."""
    tokens = random_tokens(8, 20, seed=3)
    adapters = {"lora": LoraSettings(r=4), "initial_peers": two_servers.initial_peers}
    sampling = SamplingConfig(max_new_tokens=8, num_samples=4, seed=0, stop_token_ids=())
    results, sizes = [], []
    for codec in (None, Codec(kind, **ANY), Codec(kind, **ANY)):
        with load_policy(two_servers.model, **adapters, codec=codec) as policy:
            assert (policy.codec_loss is None) == (codec is None)
            fill(policy, 3)
            run(policy, tokens)  # the adapter is there
            before = policy.traffic.sent["activations"], policy.traffic.received["activations"]
            result = run(policy, tokens)
            sizes.append(
                (
                    policy.traffic.sent["activations"] - before[0],
                    policy.traffic.received["activations"] - before[1],
                )
            )
            rollout = policy.generate([[5, 6, 7]], sampling)
            rewards = torch.rand(rollout.response_mask.shape, generator=torch.Generator().manual_seed(0))
            metrics = PPO(policy, PPOConfig(epochs=1)).update(rollout, rewards)
            assert metrics["ratio_first_pass_max_deviation"] == 0
            assert abs(metrics["sampler_kl"]) < 0.1
            results.append((*flattened(result), rollout.tokens, *policy.adapter_parameters().values()))
            if codec is not None:
                assert 0 < policy.codec_loss.nats < {"fp16": 0.003, "int8": 0.1}[kind]
                assert policy.codec_loss.cosine > {"fp16": 0.9999, "int8": 0.98}[kind]
    for coded, plain in zip(sizes[1], sizes[0], strict=True):
        assert coded / plain == SHARE[kind]
    exact, first, again = results
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert 0 < (first[0] - exact[0]).norm() < 0.05 * exact[0].norm()


def flattened(result):
    logits, values, gradients = result
    return logits, values, torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.swarm
def test_a_codec_that_changes_too_much_is_refused(two_servers):
    options = {"initial_peers": two_servers.initial_peers, "lora": LoraSettings(r=4)}
    with pytest.raises(ConfigError, match=r"codec=int8 changes logprobs of .* by 0\.\d+ nats .*take fp16"):
        load_policy(two_servers.model, **options, codec=Codec("int8", max_nats=1e-6))
    with pytest.raises(ConfigError, match=r"cosine of 0\.9999\d+ between gradients \(min_cosine: 1\); leave"):
        load_policy(two_servers.model, **options, codec=Codec("fp16", min_cosine=1))


def test_a_model_on_this_machine_sends_nothing(tiny_bloom):
    with pytest.raises(ConfigError, match="codec='int8' is for a model in a swarm"):
        load_policy(tiny_bloom(), codec="int8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "8bit"}, "codec must be fp16 or int8, got '8bit'"),
        ({"kind": "int8", "max_nats": 0}, "max_nats must be > 0, got 0"),
        ({"kind": "int8", "min_cosine": 1.5}, r"min_cosine must be in \(0, 1\], got 1.5"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        Codec(**settings)
