"""Policies on this machine against plain transformers and peft: logits, gradients, the model afterwards."""

import copy
import json
import logging
import math
import re
import sys

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    BLOCKS_NAME,
    CONFIGS,
    EOS,
    LINEARS,
    VOCAB,
    character_tokenizer,
    perturb,
    random_tokens,
    tiny_model,
)
from families import random_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
)

from textrl_swarm.config import LoraSettings, SamplingConfig
from textrl_swarm.errors import AdapterError, ConfigError, ModelError, PromptError
from textrl_swarm.learning.learner import Learner
from textrl_swarm.models import tiny
from textrl_swarm.models.pretrained import load_tokenizer
from textrl_swarm.models.quantization import keep_differentiable
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.policies.local import LocalPolicy


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def tensors_of(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}


def as_peft(model, policy, **settings):
    """The same adapter on another copy of the base model, by plain peft; each test spells out `settings`."""
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings)).eval()
    result = set_peft_model_state_dict(
        peft_model, {name: p.detach().clone() for name, p in policy.adapter_parameters().items()}
    )
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return peft_model


def optimizer_steps(policy, count, lr=0.05):
    """Trains on random tokens; returns the losses."""
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=lr)
    tokens, losses = random_tokens(4, 12, seed=7), []
    for _ in range(count):
        out = policy(tokens)
        logprobs = out.logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])
        loss = -logprobs.mean() + (out.values - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Against transformers and peft


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing(architecture):
    model, tokens = tiny_model(architecture), random_tokens(3, 14)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        with load_policy(model) as policy:
            assert torch.equal(policy(tokens).logits, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_peft(architecture):
    model, tokens = tiny_model(architecture), random_tokens(3, 14)
    policy = load_policy(copy.deepcopy(model), lora=LoraSettings(r=3, alpha=7))
    perturb(policy)
    oracle = as_peft(model, policy, r=3, lora_alpha=7, target_modules=sorted(LINEARS[architecture]))

    weights = torch.randn(3, 14, VOCAB, generator=torch.Generator().manual_seed(1))
    logits, expected = policy(tokens).logits, oracle(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {
        name.replace(".default.", "."): p.grad for name, p in oracle.named_parameters() if p.grad is not None
    }
    assert gradients.keys() == policy.adapter_parameters().keys() == get_peft_model_state_dict(oracle).keys()
    for name, parameter in policy.adapter_parameters().items():
        assert gradients[name].abs().max() > 0, name
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * float(gradients[name].abs().max())
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_adapter_loads_in_plain_peft(architecture, tmp_path):
    model, tokens = tiny_model(architecture), random_tokens(2, 9)
    with load_policy(copy.deepcopy(model)) as policy, torch.no_grad():
        perturb(policy)
        policy.save_adapter(tmp_path)
        expected = policy(tokens).logits
    oracle = PeftModel.from_pretrained(model, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(oracle(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
        merged = oracle.merge_and_unload()(input_ids=tokens).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)  # merging rounds W + BA once


def test_values_are_the_head_on_the_last_hidden_states():
    model, tokens = tiny_model("llama"), random_tokens(2, 9)
    hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    policy = load_policy(model)
    head = policy.trainable_parameters()
    expected = hidden @ head["value_head.weight"][0] + head["value_head.bias"]
    values = policy(tokens).values
    assert values.shape == (2, 9)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    values.sum().backward()
    assert all(
        p.grad.abs().max() > 0
        for name, p in policy.trainable_parameters().items()
        if "lora_B" in name or "value_head" in name
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_right_padding_changes_nothing(architecture):
    policy, tokens = load_policy(tiny_model(architecture)), random_tokens(2, 12)
    perturb(policy)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    padded = tokens.masked_fill(mask == 0, 1)
    with torch.no_grad():
        alone, padded, other_padding = (
            policy(tokens[:1, :7]),
            policy(padded, mask),
            policy(tokens, attention_mask=mask),
        )
    torch.testing.assert_close(padded.logits[:1, :7], alone.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded.values[:1, :7], alone.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_padding.logits[:1, :7], alone.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite", "bert", "modernbert-decoder"])
def test_logits_are_the_models_own_where_it_scales_or_caps_them(architecture):
    model, tokens = tiny_model(architecture, bos_token_id=0), random_tokens(3, 9)
    policy = load_policy(
        copy.deepcopy(model),
        lora=LoraSettings(targets={"bert": "key", "modernbert-decoder": "Wo"}.get(architecture, "k_proj")),
    )
    with torch.no_grad():
        assert torch.equal(policy(tokens).logits, model(input_ids=tokens).logits)
        hidden = policy.hidden_states(tokens)
        torch.testing.assert_close(
            policy.project(hidden[1, 4]), policy.project(hidden)[1, 4], rtol=1e-5, atol=1e-5
        )
    perturb(policy)
    policy(tokens).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in policy.adapter_parameters().values())


def test_a_cap_is_seen_where_logits_are_small():
    model, tokens = tiny_model("gemma2", final_logit_softcapping=30.0), random_tokens(2, 9)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)  # the cap now changes logits by less than 1 in 10,000
        assert torch.equal(load_policy(model)(tokens).logits, model(input_ids=tokens).logits)


def test_the_decoder_is_back_after_an_error_in_the_models_own_head(monkeypatch):
    policy, tokens = load_policy(tiny_model("gemma2")), random_tokens(2, 9)
    expected = policy(tokens).logits
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(policy._model.lm_head, "forward", lambda hidden: 1 / 0)
        policy(tokens)
    assert torch.equal(policy(tokens).logits, expected)


@pytest.mark.parametrize("architecture", ["openai-gpt", "rwkv", "bamba", "minimax", "bert"])
def test_generation_agrees_with_whole_forwards_whatever_the_models_cache_is(architecture, caplog):
    policy = load_policy(tiny_model(architecture))
    assert ("cannot be used with an attention cache" in caplog.text) == (
        architecture in ("openai-gpt", "rwkv")
    )
    tokens = random_tokens(2, 12)
    with torch.no_grad(), policy.session(2, 12) as session:
        pieces = [session.step(tokens[:, :5]), *(session.step(tokens[:, i : i + 1]) for i in range(5, 12))]
        torch.testing.assert_close(
            torch.cat(pieces, dim=1), policy.hidden_states(tokens), rtol=1e-4, atol=1e-4
        )


def test_a_cache_that_forgets_is_not_used(caplog):
    model = tiny_model("gpt2")
    remembering = model.transformer.forward
    model.transformer.forward = lambda input_ids, past_key_values=None, **options: remembering(
        input_ids, **options
    )
    policy, tokens = load_policy(model), random_tokens(2, 6)
    assert (
        "GPT2LMHeadModel cannot be used with an attention cache (with a cache the model computes something "
        "else)" in caplog.text
    )
    with torch.no_grad(), policy.session(2, 6) as session:
        session.step(tokens[:, :4])
        torch.testing.assert_close(session.step(tokens[:, 4:]), policy.hidden_states(tokens)[:, 4:])


# The ref policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_disabled_is_the_base_model(architecture):
    model, tokens = tiny_model(architecture), random_tokens(2, 9)
    with torch.no_grad():
        base = model(input_ids=tokens).logits
        policy = load_policy(model)
        perturb(policy)
        adapted = policy(tokens).logits
        assert (adapted - base).abs().max() > 0.1
        with policy.adapter_disabled():
            assert torch.equal(policy(tokens).logits, base)
            with policy.adapter_disabled():
                assert torch.equal(policy(tokens).logits, base)
            assert torch.equal(policy(tokens).logits, base)
        assert torch.equal(policy(tokens).logits, adapted)


def test_adapter_is_back_after_an_exception():
    policy, tokens = load_policy(tiny_model("gpt2")), random_tokens(2, 9)
    perturb(policy)
    adapted = policy(tokens).logits
    with pytest.raises(PromptError), policy.adapter_disabled(), policy.adapter_disabled():
        policy(torch.full((1, 2), VOCAB))
    with pytest.raises(IndexError), policy.adapter_disabled():
        # Fails inside the model, while peft has the adapter off.
        policy.hidden_states(torch.full((1, 2), VOCAB))
    assert torch.equal(policy(tokens).logits, adapted)
    optimizer_steps(policy, 1)
    assert not torch.equal(policy(tokens).logits, adapted)


def test_adapter_disabled_between_forward_and_backward_keeps_the_gradients():
    tokens, gradients = random_tokens(2, 9), []
    for disturb in (False, True):
        policy = load_policy(tiny_model("bloom"))
        perturb(policy)
        loss = policy(tokens).logits.square().mean()
        if disturb:
            with policy.adapter_disabled(), torch.no_grad():
                policy(tokens)
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in policy.adapter_parameters().items()})
    assert_same_tensors(*gradients)


def test_generation_inside_adapter_disabled_is_the_base_models():
    model = tiny_model("bloom")
    sampling = SamplingConfig(max_new_tokens=12, do_sample=False)
    with load_policy(copy.deepcopy(model)) as fresh:
        base = fresh.generate([[5, 6, 7]], sampling).tokens
    policy = load_policy(model)
    perturb(policy, seed=3)
    assert not torch.equal(policy.generate([[5, 6, 7]], sampling).tokens, base)
    with policy.adapter_disabled():
        assert torch.equal(policy.generate([[5, 6, 7]], sampling).tokens, base)


# Which layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_targets_are_all_linear_layers_of_every_block(architecture):
    names = load_policy(tiny_model(architecture)).adapter_parameters()
    # ("0", "c_attn"): block, layer; attention and mlp stand between.
    adapted = {(name.split(".")[-6], name.split(".")[-3]) for name in names}
    assert {layer for _, layer in adapted} == LINEARS[architecture]
    assert {part for name in names for part in name.split(".") if part.isdigit()} == {"0", "1", "2"}
    # GPT-2 has two layers called c_proj.
    layers_per_block = len(LINEARS[architecture]) + (architecture == "gpt2")
    assert len(names) == 3 * 2 * layers_per_block


def test_named_targets_match_whole_names_only():
    names = load_policy(tiny_model("bloom"), lora=LoraSettings(targets="dense")).adapter_parameters()
    assert set(names) == {
        f"base_model.model.transformer.h.{i}.self_attention.dense.lora_{part}.weight"
        for i in range(3)
        for part in "AB"
    }


def test_targets_may_be_paths_inside_a_block():
    policy = load_policy(tiny_model("gpt2"), lora=LoraSettings(targets=("mlp.c_proj", "c_attn")))
    layers = {
        name.split(".h.")[1].split(".", 1)[1].split(".lora_")[0] for name in policy.adapter_parameters()
    }
    assert layers == {"mlp.c_proj", "attn.c_attn"}


def test_unknown_target_names_the_closest():
    with pytest.raises(
        ConfigError,
        match=r"target 'query_value' is no linear layer .*did you mean 'query_key_value'\? known: dense, ",
    ):
        load_policy(tiny_model("bloom"), lora=LoraSettings(targets=("dense", "query_value")))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_adapts_the_last_blocks_and_says_so(architecture, tmp_path):
    model, tokens = tiny_model(architecture), random_tokens(2, 9)
    policy = load_policy(copy.deepcopy(model), lora=LoraSettings(layers=2))
    assert {part for name in policy.adapter_parameters() for part in name.split(".") if part.isdigit()} == {
        "1",
        "2",
    }
    perturb(policy)
    policy.save_adapter(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.layers_to_transform == [1, 2] and config.layers_pattern == BLOCKS_NAME[architecture]
    with torch.no_grad():
        expected = policy(tokens).logits
        oracle = PeftModel.from_pretrained(model, tmp_path).eval()
        torch.testing.assert_close(oracle(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
    again = load_policy(tiny_model(architecture), lora=LoraSettings(layers=2), seed=9)
    again.load_adapter(tmp_path)
    assert torch.equal(again(tokens).logits, expected)


EVERY = {"gate_proj", "up_proj", "down_proj"}  # of a dense MLP
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        # Attention in the second block only.
        ("lfm2", {"q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3"}),
        # PEFT takes the others for experts.
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        # Without dt_proj, which its code reads as a matrix.
        ("jamba", ATTENTION | EVERY | {"in_proj", "out_proj", "x_proj"}),
        ("phimoe", ATTENTION),  # its router is a linear layer that returns a pair
        ("llama4_text", ATTENTION | EVERY),
        # A feed-forward layer called 2, beside a block called 2.
        ("ctrl", {"Wq", "Wk", "Wv", "dense", "0", "2"}),
        ("bert", {"query", "key", "value", "dense"}),  # its head has a "dense" too
    ],
)
def test_blocks_that_differ_or_share_names_with_other_layers(architecture, expected, layers, tmp_path):
    # Frozen as the policy's, because torch multiplies frozen matrices in other ways.
    model = tiny_model(architecture).requires_grad_(False)
    tokens = random_tokens(2, 9)
    policy = load_policy(copy.deepcopy(model), lora=LoraSettings(layers=layers))
    perturb(policy)
    names = policy.adapter_parameters()
    found = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    absent: set[str] = set()  # of the last block
    if layers == 1:
        absent = {"lfm2": {"q_proj", "k_proj", "v_proj"}, "jamba": ATTENTION}.get(architecture, set())
    assert found == expected - absent
    blocks = {next(part for part in name.split(".") if part.isdigit()) for name in names}
    assert blocks == ({"2"} if layers else {"0", "1", "2"}) and not any(
        "lm_head" in name or "cls" in name for name in names
    )
    policy.save_adapter(tmp_path)
    with torch.no_grad():
        expected = policy(tokens).logits
        oracle = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        torch.testing.assert_close(oracle(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(load_policy(copy.deepcopy(model), ref_adapter=tmp_path)(tokens).logits, expected)
        with policy.adapter_disabled():
            assert torch.equal(policy(tokens).logits, model(input_ids=tokens).logits)
        torch.testing.assert_close(
            oracle.merge_and_unload()(input_ids=tokens).logits, expected, rtol=1e-3, atol=1e-3
        )


def test_a_target_that_only_some_blocks_have():
    names = load_policy(tiny_model("lfm2"), lora=LoraSettings(targets="q_proj")).adapter_parameters()
    assert set(names) == {
        f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight" for part in "AB"
    }


@pytest.mark.parametrize(
    ("architecture", "lora", "message"),
    [
        (
            "mamba2",
            LoraSettings(targets="out_proj"),
            r"LoRA cannot adapt mixer\.out_proj .*refused by PEFT.*; choose",
        ),
        (
            "deepseek_v3",
            LoraSettings(targets="up_proj"),
            r"LoRA cannot adapt mlp\.shared_experts\.up_proj, mlp\.up_proj .*experts.*; choose",
        ),
    ],
)
def test_what_peft_cannot_adapt_leaves_the_model_as_it_was(architecture, lora, message):
    model = tiny_model(architecture).train()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=message):
        load_policy(model, lora=lora)
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters()) and all(
        module.training for module in model.modules()
    )
    targets = {"mamba2": "in_proj", "deepseek_v3": "o_proj"}[architecture]
    assert load_policy(model, lora=LoraSettings(targets=targets)).adapter_parameters()


def test_a_model_that_sees_images_too_is_trained_on_text():
    text = {**CONFIGS["llama"][1], "vocab_size": VOCAB, "head_dim": 8, "max_position_embeddings": 64}
    vision = {  # as many blocks as the language model has
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, image_token_index=47, mm_tokens_per_image=4
    )
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), random_tokens(2, 9)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        with load_policy(model) as policy:
            assert torch.equal(policy(tokens).logits, expected) and (
                policy.max_length,
                policy.vocab_size,
            ) == (64, VOCAB)
            assert all(
                name.startswith("base_model.model.model.language_model.layers.")
                for name in policy.adapter_parameters()
            )


def test_a_model_that_returns_tuples_by_default():
    model, tokens = tiny_model("gpt2"), random_tokens(2, 9)
    expected = load_policy(copy.deepcopy(model))(tokens).logits
    model.config.return_dict = False
    with load_policy(model) as policy:
        assert torch.equal(policy(tokens).logits, expected)
    assert model.config.return_dict is False


def test_a_model_that_needs_more_than_tokens(monkeypatch):
    model = tiny_model("gpt2")
    monkeypatch.setattr(model.transformer, "forward", lambda input_ids, pixels, **options: None)
    with pytest.raises(ModelError, match=r"cannot be run as a decoder of tokens alone: TypeError.*pixels"):
        load_policy(model)
    model.config.num_hidden_layers = 7
    with pytest.raises(
        ModelError, match=r"\(model type gpt2\) is not supported: it has no list of 7 transformer blocks"
    ):
        load_policy(model)


def test_layers_of_all_blocks_is_no_layers():
    names = [
        set(load_policy(tiny_model("bloom"), lora=LoraSettings(layers=layers)).adapter_parameters())
        for layers in (3, None)
    ]
    assert names[0] == names[1]


# What stays as it was


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "llama", "qwen2"])
def test_the_base_is_bit_identical_after_optimizer_steps(architecture):
    model = tiny_model(architecture)
    before, tied = state(model), model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (architecture != "llama")
    policy = load_policy(model)
    start, adapter = tensors_of(policy), set(map(id, policy.adapter_parameters().values()))
    assert {id(parameter) for parameter in policy._peft.parameters() if parameter.requires_grad} == adapter
    losses = optimizer_steps(policy, 5)
    assert losses[-1] < losses[0]
    assert all(
        not torch.equal(parameter, start[name]) for name, parameter in policy.trainable_parameters().items()
    )
    policy.close()
    assert_same_tensors(state(model), before)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "llama"])
def test_close_leaves_the_model_as_it_was(architecture):
    model, tokens = tiny_model(architecture).train(), random_tokens(2, 9)
    modules, names = (
        [type(module) for module in model.modules()],
        [name for name, _ in model.named_parameters()],
    )
    with torch.no_grad():
        base = copy.deepcopy(model).eval()(input_ids=tokens).logits
    policy = load_policy(model)
    assert not policy._peft.training  # no dropout while it is a policy
    perturb(policy)
    policy.close()
    policy.close()
    assert [type(module) for module in model.modules()] == modules
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters()) and all(
        module.training for module in model.modules()
    )
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=tokens).logits, base)
    with pytest.raises(ModelError, match="this policy is closed"):
        policy(tokens)


def test_a_model_can_be_wrapped_again_after_close():
    model, tokens = tiny_model("gpt2"), random_tokens(2, 9)
    with load_policy(model, lora=LoraSettings(r=2)) as policy:
        perturb(policy)
    with torch.no_grad():
        base = model(input_ids=tokens).logits
        assert torch.equal(load_policy(model, lora=LoraSettings(r=5, layers=1))(tokens).logits, base)


def test_a_second_policy_on_one_model_closes_the_first(caplog):
    model, tokens = tiny_model("gpt2").train(), random_tokens(2, 9)
    modules, fresh = (
        [type(module) for module in model.modules()],
        load_policy(copy.deepcopy(model))(tokens).logits,
    )
    first = load_policy(model)  # as in a notebook whose cell runs twice
    perturb(first)
    second = load_policy(model, lora=LoraSettings(r=2))
    assert "this model was another policy's: that policy is closed" in caplog.text
    assert torch.equal(second(tokens).logits, fresh)
    with pytest.raises(ModelError, match="this policy is closed"):
        first(tokens)
    first.close()
    assert torch.equal(second(tokens).logits, fresh)  # the first one's close has nothing to take out any more
    del first, second  # abandoned without close
    load_policy(model).close()
    assert [type(module) for module in model.modules()] == modules and model.training


def test_a_models_own_save_waits_until_the_layers_are_out(tmp_path):
    model = tiny_model("gpt2")
    with (
        load_policy(model),
        pytest.raises(ModelError, match=r"use policy\.save_adapter\(directory\) for the adapter, "),
    ):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_tensors(state(AutoModelForCausalLM.from_pretrained(tmp_path)), state(model))


def test_a_failed_start_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("gpt2")
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"LoRA layers=4, but the model has 3 blocks; use 1 to 3"):
        load_policy(model, lora=LoraSettings(layers=4))
    # As if the model scaled its logits.
    monkeypatch.setattr(LocalPolicy, "project", lambda self, hidden: 2 * self._head(hidden))
    with pytest.raises(ModelError, match="such models are not supported"):
        load_policy(model)
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_global_generator_is_left_alone(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    for source in (model, tmp_path):
        with load_policy(source) as policy:
            policy(random_tokens(1, 4))
            policy.generate([[4, 5]], SamplingConfig(max_new_tokens=3, seed=2))
        assert torch.equal(torch.get_rng_state(), before)


def test_same_seed_same_adapter_whatever_else_is_adapted():
    first, again, other = (tensors_of(load_policy(tiny_model("bloom"), seed=seed)) for seed in (3, 3, 4))
    assert_same_tensors(first, again)
    assert all(
        not torch.equal(first[name], other[name])
        for name in first
        if "lora_A" in name or name == "value_head.weight"
    )
    part = load_policy(
        tiny_model("bloom"), seed=3, lora=LoraSettings(layers=1, targets="dense")
    ).adapter_parameters()
    assert len(part) == 2 and all(torch.equal(tensor, first[name]) for name, tensor in part.items())


def test_first_values_are_uniform_within_the_bound():
    model = tiny_model("gpt2", n_embd=64)
    for name, tensor in load_policy(model, lora=LoraSettings(r=64)).adapter_parameters().items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.99 * bound < tensor.abs().max() <= bound and tensor.std().item() == pytest.approx(
                bound / math.sqrt(3), rel=0.03
            )


# Loading: directories, objects, refusals


def test_loading_a_directory(tmp_path):
    directory = tiny.random_bloom(tmp_path / "model", layers=2, hidden=32)
    model, tokens = AutoModelForCausalLM.from_pretrained(directory), random_tokens(2, 9)
    with load_policy(str(directory)) as policy, torch.no_grad():
        assert torch.equal(policy(tokens).logits, model(input_ids=tokens).logits)
        assert policy.tokenizer.eos_token_id == EOS and policy.base_model == str(directory)
        assert (policy.vocab_size, policy.hidden_size, policy.device.type) == (128, 32, "cpu")


def test_the_base_models_name_is_in_the_saved_adapter(tmp_path):
    directory = tiny.random_bloom(tmp_path / "model", layers=2, hidden=32)
    load_policy(directory).save_adapter(tmp_path / "adapter")
    assert LoraConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(directory)


@pytest.mark.parametrize(
    ("architecture", "limit"), [("gpt2", 64), ("llama", 64), ("opt", 64), ("mpt", 64), ("bloom", None)]
)
def test_the_models_length_limit(architecture, limit):
    policy = load_policy(tiny_model(architecture))
    assert policy.max_length == limit
    if limit is not None:
        with pytest.raises(PromptError, match="input_ids has 65 tokens per row, but the model allows 64"):
            policy(random_tokens(1, 65))


def test_a_policys_tokenizer_may_be_given():
    tokenizer = character_tokenizer()
    assert load_policy(tiny_model("gpt2")).tokenizer is None
    assert load_policy(tiny_model("gpt2"), tokenizer=tokenizer).tokenizer is tokenizer


def test_a_tokenizer_that_cannot_be_loaded_is_told(tmp_path, caplog):
    directory = tiny.random_bloom(tmp_path / "model", layers=1, hidden=32)
    (directory / "tokenizer.json").write_text("{cut")
    assert load_policy(directory).tokenizer is None
    assert re.search(
        "the tokenizer of .*model' cannot be loaded: Expecting property name .*; prompts must be token ids",
        caplog.text,
    )
    caplog.clear()
    for path in directory.glob("*token*"):
        path.unlink()
    assert load_policy(directory).tokenizer is None and not caplog.text  # there is none


def tokenizer_with_its_own_code(directory):
    path = directory / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": "Own"}
    path.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    return directory


def test_a_tokenizers_own_code_is_not_run_and_nothing_is_asked(tmp_path, caplog, monkeypatch):
    """Without trust_remote_code=False, transformers asks on the terminal and waits."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    directory = tokenizer_with_its_own_code(tiny.random_bloom(tmp_path / "model", layers=1, hidden=32))
    told = "cannot be loaded: it comes with code of its own, which is not run here"
    assert load_policy(directory).tokenizer is None
    assert told in caplog.text
    with pytest.raises(ModelError, match=told):
        load_tokenizer(str(directory))


def test_paths_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    with load_policy("~/model", lora=LoraSettings(r=2)) as policy:
        learner = Learner(policy)
        learner.save("~/saved")
        expected = policy(random_tokens(1, 5)).logits
    with load_policy("~/model", ref_adapter="~/saved") as policy:
        Learner(policy).load("~/saved")
        assert torch.equal(policy(random_tokens(1, 5)).logits, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "saved"}


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt_neox", "cohere", "opt"])
def test_a_missing_tokenizer_is_none_at_all(family, tmp_path):
    """Transformers makes an empty one for these, whose end token would end responses."""
    directory = random_checkpoint(family, tmp_path / "model")
    with load_policy(directory) as policy:
        assert policy.tokenizer is None
        assert policy.stop_ids == {2}  # of the model's own configuration
        with pytest.raises(PromptError, match="token ids"):
            policy.generate(["The soup"], SamplingConfig(max_new_tokens=2))
    with pytest.raises(ModelError, match="has no tokenizer: there are no files with its vocabulary"):
        load_tokenizer(str(directory))


def test_a_model_without_a_name_has_not_the_tokenizer_of_the_current_directory(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tiny.random_bloom(tmp_path / "model", layers=1, hidden=32))
    assert load_policy(tiny_model("gpt2")).tokenizer is None and not caplog.text


def directory_with(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(content)
    return tmp_path


T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 1,
}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": VOCAB,
    "initializer_range": 0.5,
}


def t5_directory(tmp_path):
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5)).save_pretrained(tmp_path)
    return tmp_path


def damaged_model(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    return tmp_path


def model_of_other_shape(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    save_file(
        {"transformer.wte.weight": torch.zeros(3, 3)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return tmp_path


def checkpoint_without_head(tmp_path):
    tiny_model("llama").model.save_pretrained(tmp_path)
    return tmp_path


def model_with_its_own_code(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(
        model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    return directory_with(tmp_path, config__json=json.dumps(config))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere", "there is no directory .*nowhere"),
        (lambda path: "./nowhere", "there is no directory nowhere"),
        (lambda path: "some/where/else", "there is no directory some/where/else"),
        (lambda path: directory_with(path, file="x") / "file", "file is a file; point to the directory"),
        (lambda path: path, "has no config.json; point to a directory written by save_pretrained"),
        (
            lambda path: directory_with(path, config__json="{}"),
            "has a config.json but no weights; expected one of model.safetensors, ",
        ),
        (
            lambda path: directory_with(path, config__json="{", pytorch_model__bin=""),
            "config.json cannot be read: .*pytorch_model.bin is empty",
        ),
        (damaged_model, "the weights of .* cannot be loaded: "),
        (model_of_other_shape, "the weights of .* cannot be loaded: "),
        (t5_directory, r"is an encoder-decoder model \(t5\); only decoder-only"),
        (checkpoint_without_head, "1 weights are missing in the checkpoint of .*, e.g. lm_head.weight"),
        (
            model_with_its_own_code,
            r"comes with code of its own, .*trust_remote_code=True\) and pass the model",
        ),
        (lambda path: 7, "model must be a directory, a hub id or a transformers model, got int"),
    ],
)
def test_models_that_cannot_be_loaded(make, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        load_policy(make(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: get_peft_model(tiny_model("gpt2"), LoraConfig(task_type="CAUSAL_LM")),
            "already has a PEFT adapter: pass the base model",
        ),
        (
            lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5)),
            r"encoder-decoder model \(t5\)",
        ),
        (lambda: AutoModel.from_config(tiny_model("gpt2").config), "GPT2Model has no output embeddings"),
        (
            lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **BERT)),
            r"BertLMHeadModel \(model type bert\) sees later tokens",
        ),
        (lambda: tiny_model("gpt2").to("meta"), "GPT2LMHeadModel has weights that are not in memory"),
        (lambda: tiny_model("roformer"), r"RoFormerForCausalLM \(model type roformer\) sees later tokens"),
        (lambda: torch.nn.Linear(2, 2), "Linear is no transformers model"),
    ],
)
def test_model_objects_that_cannot_be_used(make, message):
    model = make()
    with pytest.raises(ModelError, match=message):
        load_policy(model)


def test_unknown_dtype(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be loaded: .*float7"):
        load_policy(tmp_path, dtype="float7")


def test_an_adapter_beside_the_models_weights(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    with pytest.raises(
        AdapterError,
        match="holds a model, which transformers would load with the adapter in it: "
        "give the adapter a directory of its own",
    ):
        policy.save_adapter(tmp_path)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"holds a model and, beside its weights, an adapter: move adapter_config\.json and "
    ):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": torch.bfloat16},
            "dtype=torch.bfloat16, but the model is loaded in torch.float32: "
            r"convert it with model.to\(dtype\)",
        ),
        ({"dtype": "float16"}, "dtype='float16', but the model is loaded in torch.float32"),
        ({"device": "meta"}, r"device='meta', but the model is on cpu: move it with model.to\(device\)"),
        ({"device": "banana"}, "device='banana' cannot be used on this machine: .*banana"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used on this machine: .*(CUDA|device|NVIDIA)"),
    ],
)
def test_a_model_object_is_taken_as_it_is(options, message):
    model = tiny_model("gpt2")
    with pytest.raises(ConfigError, match=message):
        load_policy(model, **options)
    for agreeing in (
        {"dtype": "float32", "device": "cpu"},
        {"dtype": torch.float32, "device": torch.device("cpu")},
        {"dtype": "auto"},
    ):
        load_policy(model, **agreeing).close()


@pytest.mark.parametrize("device", ["banana", "cuda:99", 99])
def test_devices_that_do_not_exist(device, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"device={device!r} cannot be used on this machine: "):
        load_policy(tmp_path, device=device)


def test_device_0_is_not_no_device(tmp_path, monkeypatch):
    tiny_model("gpt2").save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "textrl_swarm.policies.local_loading.usable_device",
        lambda device: asked.append(device) or torch.device("cpu"),
    )
    load_policy(tmp_path, device=0)
    assert asked == [0]


def spoiled(model, factor):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(factor)
    return model


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda: spoiled(tiny_model("gpt2"), float("nan")), "float32"),
        (lambda: spoiled(tiny_model("gpt2"), 1e6).half(), "float16"),
    ],
)
def test_numbers_that_are_not_finite_are_not_taken_for_something_else(make, dtype):
    with pytest.raises(
        ModelError,
        match=f"computes NaN or infinite numbers in torch.{dtype}: its weights are damaged, or too large",
    ):
        load_policy(make())


def test_dropout_stays_off_when_the_user_puts_the_model_into_training_mode():
    model, tokens = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5), random_tokens(2, 9)
    policy = load_policy(model)
    expected = policy(tokens).logits
    model.train()
    assert torch.equal(policy(tokens).logits, expected)


def test_quantization_must_be_known_and_chosen_at_loading():
    with pytest.raises(ConfigError, match="quantization must be None, '8bit' or '4bit', got 'int8'"):
        load_policy("anywhere", quantization="int8")
    with pytest.raises(ConfigError, match="quantization is chosen when weights are loaded"):
        load_policy(tiny_model("gpt2"), quantization="8bit")


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.tensor([[1, VOCAB]]), None, "token ids must be in 0..47, got 1..48"),
        (torch.tensor([[-1, 2]]), None, "token ids must be in 0..47, got -1..2"),
        (torch.tensor([1, 2]), None, r"whole numbers of shape \(rows, tokens\), got torch.int64 \(2,\)"),
        (torch.tensor([[1.0, 2.0]]), None, r"got torch.float32 \(1, 2\)"),
        (torch.zeros(0, 4, dtype=torch.int64), None, r"got torch.int64 \(0, 4\)"),
        (torch.zeros(2, 0, dtype=torch.int64), None, r"got torch.int64 \(2, 0\)"),
        (torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), "padding only on the right"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]), "padding only on the right"),
        (torch.tensor([[1, 2]]), torch.tensor([[1]]), "the shape of input_ids"),
    ],
)
def test_tokens_that_cannot_be_scored(tokens, mask, message):
    with pytest.raises(PromptError, match=message):
        load_policy(tiny_model("gpt2"))(tokens, mask)


# Half precision and quantised weights


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "llama"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_base_with_fp32_adapter_and_head(architecture, dtype, tmp_path):
    model, tokens = tiny_model(architecture), random_tokens(2, 9)
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, dtype=dtype)
    half = torch.bfloat16 if dtype == "bfloat16" else dtype
    adapted = set(map(id, policy.trainable_parameters().values()))
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}
    assert {p.dtype for p in policy._peft.parameters() if id(p) not in adapted} == {half}
    with torch.no_grad():
        out, expected = (
            policy(tokens),
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=half)(input_ids=tokens).logits,
        )
    assert torch.equal(out.logits, expected) and out.values.dtype == torch.float32
    start = tensors_of(policy)
    losses = optimizer_steps(policy, 4)
    assert losses[-1] < losses[0]
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, start[name])
        for name, p in policy.trainable_parameters().items()
    )
    rollout = policy.generate([[4, 5, 6], [7]], SamplingConfig(max_new_tokens=6, seed=0))
    assert (
        rollout.old_logprobs.dtype == rollout.values.dtype == torch.float32
        and torch.isfinite(rollout.old_logprobs).all()
    )


def quantised_storage(model):
    """Every tensor of the base model that a forward reads, quantisation constants included."""
    found = {
        name: tensor.detach().clone() for name, tensor in model.named_parameters() if ".lora_" not in name
    }
    for name, parameter in model.named_parameters():
        for constant in ("CB", "SCB"):
            if isinstance(getattr(parameter, constant, None), torch.Tensor):
                found[f"{name}.{constant}"] = getattr(parameter, constant).clone()
        if getattr(parameter, "quant_state", None) is not None:
            found[f"{name}.absmax"] = parameter.quant_state.absmax.clone()
    return found


@pytest.mark.parametrize("architecture", ["bloom", "gpt2", "llama"])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_training_on_the_cpu(architecture, quantization, tmp_path, caplog):
    model, tokens = tiny_model(architecture), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        policy = load_policy(tmp_path / "base", quantization=quantization, device="cpu")
        storage = quantised_storage(policy._model)
        assert {str(t.dtype) for t in storage.values()} >= {
            "torch.int8" if quantization == "8bit" else "torch.uint8"
        }
        start = tensors_of(policy)
        with torch.no_grad():
            base = policy(tokens).logits
        assert (base - model(input_ids=tokens).logits).abs().max() > 0  # it is quantised
        losses = optimizer_steps(policy, 4)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, start[name])
        for name, p in policy.trainable_parameters().items()
    )
    assert_same_tensors(quantised_storage(policy._model), storage)
    with torch.no_grad(), policy.adapter_disabled():
        assert torch.equal(policy(tokens).logits, base)
    # bitsandbytes would warn at every matrix product; that it misreads rows of 32 numbers is another matter.
    told = [record for record in caplog.records if "misreads" not in record.getMessage()]
    assert not told, caplog.text

    policy.save_adapter(tmp_path / "adapter")
    settings = {"load_in_8bit": True} if quantization == "8bit" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32,
    }  # fmt: skip
    quantised = BitsAndBytesConfig(**settings)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised, device_map={"": "cpu"}
    )
    # Else bitsandbytes itself fails on these narrow layers, on processors with AVX512-BF16.
    keep_differentiable(plain)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(input_ids=tokens).logits
        torch.testing.assert_close(policy(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    rollout = policy.generate([[4, 5, 6], [7]], SamplingConfig(max_new_tokens=6, seed=0))
    assert torch.isfinite(rollout.old_logprobs).all() and rollout.response_mask.any(dim=1).all()


def test_a_4bit_model_that_was_repacked_for_inference_is_refused(tmp_path):
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=options, device_map={"": "cpu"}
    )
    # What a forward in evaluation mode does on processors with AVX512-BF16, and only there
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ModelError, match=r"repacked .* for inference, at its first forward.*load the model again and make"
    ):
        load_policy(model)


def test_a_4bit_head(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["none"]
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=options, device_map={"": "cpu"}
    )
    assert model.lm_head.weight.dtype == torch.uint8
    policy = load_policy(model)
    assert (policy.vocab_size, policy.hidden_size) == (VOCAB, 32) and policy(
        random_tokens(2, 5)
    ).logits.shape == (2, 5, VOCAB)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantization_that_reaches_no_layer_or_few_is_told(quantization, tmp_path, caplog):
    # Its linear layers are of a class that transformers does not quantise.
    tiny_model("falcon").save_pretrained(tmp_path / "falcon")
    with pytest.raises(
        ModelError,
        match=rf"quantization='{quantization}' reaches no weight in the blocks of FalconForCausalLM .*leave",
    ):
        load_policy(tmp_path / "falcon", quantization=quantization, device="cpu")
    random_checkpoint("llama4_text", tmp_path / "llama4")  # its experts have code of their own
    load_policy(tmp_path / "llama4", quantization=quantization, device="cpu")
    told = rf"quantization='{quantization}' leaves \d\d % of the bytes in the blocks of Llama4ForCausalLM"
    assert re.search(told, caplog.text)


def test_a_machine_without_bitsandbytes_is_told_what_to_type(tmp_path, monkeypatch):
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=r"quantization='8bit' needs bitsandbytes; type: pip install bitsandbytes"
    ):
        load_policy(tmp_path / "base", quantization="8bit")


def test_an_adapter_trained_on_quantised_weights_fits_the_full_model(tmp_path):
    tiny_model("bloom").save_pretrained(tmp_path / "base")
    with load_policy(tmp_path / "base", quantization="4bit") as quantised:
        optimizer_steps(quantised, 2)
        quantised.save_adapter(tmp_path / "adapter")
        trained = tensors_of(quantised)
    full = load_policy(tmp_path / "base")
    full.load_adapter(tmp_path / "adapter")
    assert_same_tensors(tensors_of(full), trained)
