"""Estimates against models, saved tensors, the counters of a real iteration, and published figures."""

from __future__ import annotations

import itertools

import pytest
import torch
from architectures import ARCHITECTURES, CONFIGS, random_tokens, tiny_model
from families import FAMILIES
from plain_peft import connect
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.decoders.sizes import PRECISIONS, block_bytes, model_sizes
from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.runs.estimate import (
    GIB,
    activation_bytes,
    blocks_that_fit,
    estimate_run,
    server_memory_bytes,
    session_cache_bytes,
)

BLOOM_176B = BloomConfig(vocab_size=250880, hidden_size=14336, n_layer=70, n_head=112, dtype="bfloat16")
BLOOMZ_7B1 = BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32, dtype="bfloat16")


def run(config, lora=None, **changes):
    settings = {
        "quantization": None,
        "swarm_servers": 0,
        "responses": 64,
        "prompt_tokens": 32,
        "response_tokens": 48,
        "epochs": 4,
    }
    return estimate_run(config, lora or LoraSettings(), **{**settings, **changes})


# ------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "lfm2", "llama4_text", "rwkv"])
@pytest.mark.parametrize(
    "lora", [LoraSettings(r=3), LoraSettings(r=2, layers=2)], ids=["all", "last two blocks"]
)
def test_parameters_are_those_of_the_real_policy(architecture, lora):
    model = tiny_model(architecture)
    total = model.num_parameters()
    with load_policy(model, lora=lora) as policy:
        trained = sum(parameter.numel() for parameter in policy.trainable_parameters().values())
        adapter = sum(parameter.numel() for parameter in policy.adapter_parameters().values())
    estimate = run(model.config, lora)
    assert estimate.trainable_parameters == trained
    assert estimate.adapter_bytes == 4 * adapter
    assert estimate.total_parameters == total


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "falcon", "falcon_40b", "gpt_bigcode", "rwkv"])
def test_caches_are_as_large_as_real_ones(architecture):
    model = tiny_model(architecture)
    cache = getattr(model(input_ids=torch.zeros((3, 5), dtype=torch.int64)), "past_key_values", None)
    expected = 0 if cache is None else sum(kept_bytes(layer) for layer in cache.layers)
    sizes = model_sizes(model.config)
    assert session_cache_bytes(sizes, 3, 5, torch.float32) == expected
    assert run(model.config).working_bytes > 0 and (sizes.num_heads > 0) == (expected > 0)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next", "falcon_h1", "mamba2", "lfm2"])
def test_caches_of_other_kinds_are_as_large_as_real_ones(family):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    out = model(input_ids=torch.zeros((3, 9), dtype=torch.int64), use_cache=True)
    cache = getattr(out, "past_key_values", None) or out.cache_params
    expected = sum(kept_bytes(layer) for layer in cache.layers)
    assert session_cache_bytes(model_sizes(config), 3, 9, torch.float32) == expected > 0


def kept_bytes(layer) -> int:
    """Of one of transformers' own cache layers."""
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        tensors += getattr(layer, name, {}).values()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_named_targets_count_alone_and_where_they_are():
    config = tiny_model("lfm2").config  # attention in one block of three, q_proj is 32 -> 32
    assert run(config, LoraSettings(r=5, targets=("q_proj",))).adapter_bytes == 4 * 5 * (32 + 32)
    config = tiny_model("bloom").config  # query_key_value is 32 -> 96
    assert run(config, LoraSettings(r=5, targets=("query_key_value",))).adapter_bytes == 4 * 3 * 5 * (32 + 96)


def test_the_published_sizes_of_bloom_176b():
    sizes = model_sizes(BLOOM_176B)
    assert sizes.total == 176_247_271_424  # its model card
    assert sizes.num_blocks * block_bytes(sizes, 0, "bfloat16") + 2 * sizes.outside == pytest.approx(
        352e9, rel=2e-3
    )
    # fp16; all four linears, r = 8.
    assert run(BLOOM_176B).adapter_bytes / 2 == pytest.approx(257e6, rel=1e-3)
    assert run(BLOOM_176B, LoraSettings(targets=("query_key_value",))).adapter_bytes / 2 == pytest.approx(
        64e6, rel=5e-3
    )
    assert model_sizes(BLOOMZ_7B1).total == 7_069_016_064


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_weights_are_those_of_the_loaded_model(tiny_bloom, quantization):
    pytest.importorskip("bitsandbytes")
    directory = tiny_bloom(seed=1, hidden=64)
    with load_policy(directory, quantization=quantization, device="cpu") as policy:
        stored = 0
        for name, tensor in policy._model.state_dict().items():  # with the scales of quantised layers
            if (
                ".lora_" not in name
                and not name.endswith(("lm_head.weight", "quant_map", "weight_format"))
                and "quant_state" not in name
            ):
                stored += tensor.nbytes
    estimate = run(AutoConfig.from_pretrained(directory), quantization=quantization)
    # There bitsandbytes keeps the scales of 4-bit layers in bf16.
    on_cpus = 0.04 if quantization == "4bit" else 0
    assert estimate.weight_bytes * (1 - on_cpus) <= stored <= estimate.weight_bytes


@pytest.mark.parametrize(
    ("architecture", "least", "most"),
    [("bloom", 0.8, 1.05), ("gpt2", 0.9, 1.15), ("gpt_neox", 0.5, 1.0), ("llama", 0.5, 1.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_about_what_autograd_keeps(architecture, least, most, dtype):
    """Models whose attention is one fused operation keep no attention weights, and so less."""
    rows, length = 3, 40
    model = tiny_model(architecture).to(dtype)
    with load_policy(model) as policy:
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = policy.hidden_states(policy.features(random_tokens(rows, length)))
        del hidden
    expected = activation_bytes(model_sizes(model.config), LoraSettings(), rows, length, dtype.itemsize)
    assert least < sum(kept.values()) / expected < most


def peak_bytes(run) -> int:
    """Most memory that `run` held at once beside what was there before, as torch's allocator counts it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes, events = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(itertools.accumulate(size for _, size in sorted(changes)))


@pytest.mark.parametrize(("architecture", "least"), [("bloom", 0.7), ("llama", 0.25)])
@pytest.mark.parametrize("blocks", [4, 12])
def test_gradient_checkpointing_takes_no_more_than_estimated(architecture, least, blocks):
    tokens = random_tokens(8, 60)
    count = {"bloom": "n_layer", "llama": "num_hidden_layers"}[architecture]
    peaks = []
    for checkpointing in (False, True):
        model = tiny_model(architecture, **{count: blocks})
        with load_policy(model, lora=LoraSettings(r=2), gradient_checkpointing=checkpointing) as policy:

            def step(policy=policy):
                policy.hidden_states(tokens).square().mean().backward()

            step()  # memory that stays: gradients of the adapter
            peaks.append(max(peak_bytes(step) for _ in range(3)))  # the profiler may miss events
    expected = activation_bytes(model_sizes(model.config), LoraSettings(r=2), 8, 60, 4, recomputed=True)
    assert least < peaks[1] / expected < 1
    assert peaks[1] < (0.5 if blocks == 4 else 0.2) * peaks[0]


def test_bloomz_7b1_in_8_bits_trains_on_a_card_of_24_gb():
    """Minibatches of 64 responses; test_gradient_checkpointing_takes_no_more_than_estimated checks a term."""
    settings = {"quantization": "8bit", "responses": 64, "minibatch_size": 64, "epochs": 4}
    lengths = {"prompt_tokens": 64, "response_tokens": 192}
    for_cuda = GIB
    assert run(BLOOMZ_7B1, **settings, **lengths).memory_bytes > 100 * GIB
    parts = {"micro_batch_tokens": 1024, "gradient_checkpointing": True}
    assert run(BLOOMZ_7B1, **settings, **lengths, **parts).memory_bytes + for_cuda < 24e9


def test_a_server_has_room_for_weights_caches_adapters_and_a_backward():
    sizes = model_sizes(BLOOM_176B)
    by_hand = 2 * (2 * sizes.blocks[0] + 2 * 14336 * 4096 * 2) + 5 + 2 * GIB
    assert server_memory_bytes(sizes, 2, "bfloat16", adapter_bytes=5) == by_hand


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_blocks_that_fit_fit_and_one_more_does_not(precision):
    sizes = model_sizes(BLOOM_176B)
    blocks = blocks_that_fit(sizes, 40 * GIB, precision)
    assert (
        server_memory_bytes(sizes, blocks, precision)
        <= 40 * GIB
        < server_memory_bytes(sizes, blocks + 1, precision)
    )


def test_as_many_blocks_as_there_are_or_none():
    sizes = model_sizes(BLOOMZ_7B1)
    assert blocks_that_fit(sizes, 1000 * GIB, "8bit") == 30
    assert blocks_that_fit(sizes, GIB, "8bit") == 0


def test_a_client_of_a_swarm_holds_no_blocks():
    local, client = run(BLOOM_176B), run(BLOOM_176B, swarm_servers=10)
    assert local.weight_bytes > 350e9
    assert client.weight_bytes == pytest.approx(2 * 250880 * 14336, rel=1e-3)
    assert local.bytes_sent == local.bytes_received == 0


def test_a_client_holds_its_local_blocks():
    client, with_ends = (
        run(BLOOM_176B, swarm_servers=10, local_blocks=local_blocks) for local_blocks in ((0, 0), (1, 2))
    )
    blocks = sum(model_sizes(BLOOM_176B).blocks[:3])
    assert with_ends.weight_bytes - client.weight_bytes == 2 * blocks
    caches = session_cache_bytes(model_sizes(BLOOM_176B), 64, 80, torch.bfloat16) * 3 // 70
    assert with_ends.working_bytes > client.working_bytes and with_ends.working_bytes > caches


def test_less_is_kept_with_quantised_weights_fewer_adapted_blocks_and_smaller_minibatches():
    full = run(BLOOMZ_7B1)
    assert run(BLOOMZ_7B1, quantization="8bit").weight_bytes < 0.6 * full.weight_bytes
    assert run(BLOOMZ_7B1, quantization="4bit").weight_bytes < 0.4 * full.weight_bytes
    assert run(BLOOMZ_7B1, LoraSettings(layers=3)).working_bytes < 0.3 * full.working_bytes
    assert run(BLOOMZ_7B1, minibatch_size=8).working_bytes < 0.3 * full.working_bytes


# ------------------------------------------------------------------------------------------ bytes on the wire


@pytest.mark.swarm
@pytest.mark.usefixtures("as_if_far_away")
@pytest.mark.parametrize(
    ("lora", "minibatch_size", "micro_batch_tokens", "local_blocks"),
    [
        (LoraSettings(r=4), 4, 1024, (0, 0)),
        (LoraSettings(r=4), 6, 40, (0, 0)),
        (LoraSettings(r=4, layers=1), 64, 1024, (0, 0)),
        (LoraSettings(r=4), 4, 1024, (1, 1)),
        (LoraSettings(r=4, layers=1), 64, 1024, (1, 1)),
        (LoraSettings(r=4, layers=2), 64, 1024, (1, 1)),
    ],
    ids=[
        "all blocks",
        "micro-batches of two",
        "last block",
        "local blocks",
        "local last block",
        "local last and a server's",
    ],
)
def test_bytes_are_those_of_a_real_iteration(
    two_servers, monkeypatch, lora, minibatch_size, micro_batch_tokens, local_blocks
):
    """The second iteration: servers already have the first one's adapter. All responses have full length."""
    monkeypatch.setattr("textrl_swarm.swarm.protocol.MICRO_BATCH_TOKENS", micro_batch_tokens)
    prompts, sampling = (
        [[first, 6, 7, 8, 9, 10, 11] for first in (5, 6, 7)],
        SamplingConfig(max_new_tokens=12, num_samples=2, seed=0, stop_token_ids=()),  # of full length
    )
    with connect(two_servers, lora, local_blocks=local_blocks) as policy:
        ppo = PPO(policy, PPOConfig(epochs=2, minibatch_size=minibatch_size, lr=1e-2))
        for _ in range(2):
            before = {"sent": policy.traffic.sent.copy(), "received": policy.traffic.received.copy()}
            rollout = policy.generate(prompts, sampling)
            ppo.update(rollout, torch.rand(rollout.response_mask.shape))
        sent, received = policy.traffic.sent - before["sent"], policy.traffic.received - before["received"]
    config = AutoConfig.from_pretrained(two_servers.model)
    estimate = run(
        config,
        lora,
        swarm_servers=2,
        responses=6,
        prompt_tokens=7,
        response_tokens=12,
        epochs=2,
        minibatch_size=minibatch_size,
        samples=2,
        local_blocks=local_blocks,
    )
    assert rollout.response_mask.all()
    assert dict.fromkeys(estimate.sent, 0) | sent == estimate.sent
    assert dict.fromkeys(estimate.received, 0) | received == estimate.received


@pytest.mark.swarm
@pytest.mark.usefixtures("as_if_far_away")
@pytest.mark.parametrize(
    ("minibatch_size", "layers", "nearness"),
    [
        (64, None, 0),
        pytest.param(64, 1, 0, marks=pytest.mark.slow),
        pytest.param(6, None, 0.1, marks=pytest.mark.slow),
    ],
)
def test_bytes_of_prompts_that_travel_once(two_servers, minibatch_size, layers, nearness):
    """Which prompts meet in a smaller minibatch is a matter of chance: within a tenth."""
    prompts = [[first, *range(6, 36)] for first in (5, 6, 7)]
    sampling = SamplingConfig(max_new_tokens=12, num_samples=12, seed=0, stop_token_ids=())  # two groups
    lora = LoraSettings(r=4, layers=layers)
    with load_policy(two_servers.model, initial_peers=two_servers.initial_peers, lora=lora) as policy:
        ppo = PPO(policy, PPOConfig(epochs=2, minibatch_size=minibatch_size))
        ppo.update(rollout := policy.generate(prompts, sampling), torch.rand(rollout.response_mask.shape))
        before = {"sent": policy.traffic.sent.copy(), "received": policy.traffic.received.copy()}
        ppo.update(rollout := policy.generate(prompts, sampling), torch.rand(rollout.response_mask.shape))
        sent, received = policy.traffic.sent - before["sent"], policy.traffic.received - before["received"]
    sizes = {"responses": 36, "samples": 12, "prompt_tokens": 31, "response_tokens": 12}
    config = AutoConfig.from_pretrained(two_servers.model)
    settings = {"swarm_servers": 2, "epochs": 2, "minibatch_size": minibatch_size, **sizes}
    estimate = run(config, lora, **settings)
    assert dict(sent) == pytest.approx(estimate.sent, rel=nearness)
    assert dict(received) == pytest.approx(estimate.received, rel=nearness)
    whole = run(config, lora, **{**settings, "samples": 1})
    assert estimate.sent["activations"] < 0.6 * whole.sent["activations"]


def test_activations_per_token_are_the_bounds_worked_out_by_hand():
    """BLOOM-176B, 4 epochs, 3 servers, 16 bits: about 11 hidden states per hop and token, 6 of them up: a
    generation, a pass of the ref policy and 4 forwards to the first server, and 4 times gradients to each.
    """
    estimate = run(
        BLOOM_176B, swarm_servers=3, prompt_tokens=1, response_tokens=960, responses=1, wire_bytes=2
    )
    state = 14336 * 2 * 3 * 961
    assert estimate.sent["activations"] / state == pytest.approx(6 / 3 + 4, rel=0.01)
    activations_back = (
        estimate.received["activations"] + estimate.received["gradients"] - 4 * estimate.adapter_bytes
    )
    # A generation from each hop, ref policy and forwards from the last; the first hop returns no gradient.
    assert activations_back / state == pytest.approx(1 + (1 + 4) / 3 + 4 * 2 / 3, rel=0.01)


def test_adapting_only_the_last_blocks_spares_the_network():
    full, few = (run(BLOOM_176B, LoraSettings(layers=layers), swarm_servers=10) for layers in (None, 10))
    assert few.bytes_sent < 0.5 * full.bytes_sent
    assert few.bytes_received < 0.4 * full.bytes_received
    assert few.round_trips < full.round_trips


def test_the_network_takes_at_least_bytes_over_bandwidth_and_round_trips():
    estimate = run(BLOOM_176B, swarm_servers=2)
    fast, slow = estimate.network_seconds(bits_per_second=8e6, rtt_s=0.032)
    waiting = estimate.round_trips * 0.05
    assert fast == pytest.approx(max(estimate.bytes_sent, estimate.bytes_received) / 1e6 + waiting)
    assert slow == pytest.approx((estimate.bytes_sent + estimate.bytes_received) / 1e6 + waiting)


# -------------------------------------------------------------------------------------------------- bad input


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ModelError, match="t5"):
        run(AutoConfig.for_model("t5"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "float8"}, "unknown precision 'float8'; did you mean 'float32'?"),
        ({"lora": LoraSettings(targets=("dence",))}, "did you mean 'dense'?"),
        ({"lora": LoraSettings(layers=4)}, "the model has 3 blocks"),
        ({"swarm_servers": 4}, "3 blocks can be split over 1 to 3 servers, not 4"),
        ({"swarm_servers": 1, "local_blocks": (1, 2)}, "local_blocks=[1, 2] leaves nothing to the swarm"),
    ],
)
def test_errors_say_what_is_known(changes, told):
    with pytest.raises(ConfigError) as caught:
        run(AutoConfig.for_model(*CONFIGS["bloom"][:1], **CONFIGS["bloom"][1]), **changes)
    assert told in str(caught.value)
