"""Routed experts of mixtures: LoRA as PEFT's `target_parameters` has it, 8 and 4 bits, frozen routers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import BLOCKS, HIDDEN, VOCAB, random_checkpoint
from plain_peft import PlainPeft, assert_same, difference, fill, run
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from textrl_swarm.commands.export import export_command
from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import ConfigError
from textrl_swarm.models import experts
from textrl_swarm.models.adapter_files import read_blocks, read_settings
from textrl_swarm.models.layers import expert_layers, find_blocks, linear_layers, routed_experts
from textrl_swarm.models.quantization import quantize_experts
from textrl_swarm.policies.loading import load_policy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Fused gate and up; transposed, interleaved, with biases; dense in the first block; without gates; all tokens
# through all experts.
KINDS = ("mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "llama4_text")
EXPERTS = {"nemotron_h": ("experts.up_proj", "experts.down_proj")}
BOTH = ("experts.gate_up_proj", "experts.down_proj")
TOKENS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = random_checkpoint(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return get


def plain_model(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


# ---------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("others", [(), ("o_proj",)], ids=["experts alone", "and a linear layer"])
@pytest.mark.parametrize("family", KINDS)
def test_lora_is_that_of_peft(checkpoint_of, tmp_path, family, others):
    targets = (*EXPERTS.get(family, BOTH), *others)
    with load_policy(checkpoint_of(family), lora=LoraSettings(r=2, targets=targets)) as policy:
        fill(policy, 3)
        plain = PlainPeft(policy, tmp_path)
        assert_same(run(policy, TOKENS), plain.run(TOKENS))
        with policy.adapter_disabled(), plain.model.disable_adapter(), torch.no_grad():
            off, base = policy(TOKENS).logits, plain.model(TOKENS).logits
        assert torch.equal(off, base)
        assert difference(policy(TOKENS).logits, base) > 1e-2


def test_one_parameter_alone_has_the_name_that_peft_gives_it(checkpoint_of, tmp_path):
    lora = LoraSettings(r=2, targets=("experts.down_proj",))
    with load_policy(checkpoint_of("mixtral"), lora=lora) as policy:
        fill(policy, 3)
        names = [name for name in policy.adapter_parameters() if ".0." in name]
        start = "base_model.model.model.layers.0.mlp.experts.lora_"
        assert names == [f"{start}A.weight", f"{start}B.weight"]
        assert_same(run(policy, TOKENS), PlainPeft(policy, tmp_path).run(TOKENS))


def test_the_last_blocks_alone(checkpoint_of, tmp_path):
    lora = LoraSettings(r=2, targets=("q_proj", *BOTH), layers=2)
    with load_policy(checkpoint_of("mixtral"), lora=lora) as policy:
        fill(policy, 3)
        found = {name.split(".layers.")[1].split(".")[0] for name in policy.adapter_parameters()}
        assert found == {"2", "3"}
        assert_same(run(policy, TOKENS), PlainPeft(policy, tmp_path).run(TOKENS))
        assert (
            set(read_settings(tmp_path).targets) == set(lora.targets) and read_settings(tmp_path).layers == 2
        )
        with load_policy(checkpoint_of("mixtral"), ref_adapter=tmp_path) as again:
            assert torch.equal(again(TOKENS).logits, policy(TOKENS).logits)


def test_experts_are_adapted_by_name_only(checkpoint_of):
    with load_policy(checkpoint_of("mixtral"), lora=LoraSettings(r=2)) as policy:
        assert not [name for name in policy.adapter_parameters() if "experts" in name]
    with pytest.raises(ConfigError, match=r"'experts.gate_up' is no .* did you mean 'experts.gate_up_proj'"):
        load_policy(checkpoint_of("mixtral"), lora=LoraSettings(targets=("experts.gate_up",)))
    with pytest.raises(ConfigError, match=r"'experts.down_proj' is no"):
        load_policy(checkpoint_of("llama"), lora=LoraSettings(targets=("experts.down_proj",)))


@pytest.mark.parametrize("family", ["afmoe", "hunyuan_v1_moe", "jamba", "gpt_oss", "qwen2_moe"])
def test_routers_stay_frozen(checkpoint_of, family):
    model = plain_model(checkpoint_of(family))
    blocks = find_blocks(model)[1]
    assert any(expert_layers(block) for block in blocks)
    for block in blocks:
        assert not [path for path in linear_layers(block) if {"router", "gate"} & set(path.split("."))]


def test_the_model_is_as_before_when_the_policy_is_closed(checkpoint_of):
    model = plain_model(checkpoint_of("gpt_oss"))
    expected, classes = model(TOKENS).logits, [type(module) for module in model.modules()]
    with load_policy(model, lora=LoraSettings(r=2, targets=("q_proj", *BOTH))) as policy:
        fill(policy, 3)
        assert difference(policy(TOKENS).logits, expected) > 1e-2
    assert torch.equal(model(TOKENS).logits, expected)
    assert [type(module) for module in model.modules()] == classes
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_cost_of_an_update_is_that_of_the_routed_tokens(checkpoint_of):
    block = find_blocks(plain_model(checkpoint_of("mixtral")))[1][0]
    ((_, module),) = routed_experts(block)
    (count, out, hidden), r = module.down_proj.shape, 3
    update = experts.LowRank(torch.randn(r * count, hidden), torch.randn(out, r * count), 0.5)
    tokens, per_token = 5, 2
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1], [0, 1]])  # nobody wants the last expert

    def products() -> int:
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(tokens, HIDDEN), chosen, torch.rand(tokens, per_token))
        return counter.get_total_flops()

    experts.route(module, lambda name: None)
    without = products()
    experts.route(module, lambda name: update if name == "down_proj" else None)
    assert products() - without == 2 * tokens * per_token * r * (hidden + out)


# --------------------------------------------------------------------------------------- 8 and 4 bits


def quantised(dense: torch.nn.Module, kind: str) -> torch.nn.Module:
    holder = torch.nn.ModuleDict({"experts": copy.deepcopy(dense)})
    quantize_experts(holder, kind)
    return holder.to("cpu")["experts"]


@pytest.mark.parametrize(("kind", "error", "tolerance"), [("int8", 0.02, 0.03), ("nf4", 0.16, 1e-5)])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_quantised_experts_are_layers_of_bitsandbytes(tmp_path, family, kind, error, tolerance):
    """Each expert is one of bitsandbytes' own layers. With dense experts of the same rounded numbers, outputs
    and gradients are equal; int8 also rounds what is multiplied.
    """
    import bitsandbytes as bnb

    # bitsandbytes 0.50 reads 4-bit rows of 32 or 96 numbers wrongly on CPUs: a block of 64 has one scale.
    directory = random_checkpoint(family, tmp_path, hidden_size=64, intermediate_size=128)
    ((_, dense),) = routed_experts(find_blocks(plain_model(directory))[1][0])
    dense.requires_grad_(False)
    rounded, reference = quantised(dense, kind), copy.deepcopy(dense)
    for name in ("gate_up_proj", "down_proj"):
        for expert, layer in enumerate(getattr(rounded, name)):
            assert isinstance(layer, bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit)
            numbers = layer(torch.eye(layer.in_features))
            numbers = numbers if dense.is_transposed else numbers.T
            assert 0 < difference(numbers, getattr(dense, name)[expert]) < error
            getattr(reference, name)[expert] = numbers
    nbytes = [sum(p.nbytes for p in module.parameters()) for module in (dense, rounded)]
    assert nbytes[1] < nbytes[0] / 3
    outcomes = [mixture(module) for module in (reference, rounded)]
    for expected, found in zip(*outcomes, strict=True):
        assert difference(found, expected) < tolerance


def mixture(module: torch.nn.Module) -> list[torch.Tensor]:
    """Output of experts with an update of all their parameters, gradients of input and update."""
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for name, sizes in expert_layers(module).items():
        a, b = (torch.randn(shape, generator=generator).requires_grad_() for shape in sizes.shapes(2))
        updates[name] = experts.LowRank(a, b, 0.1)
    experts.route(module, updates.get)
    rows = torch.randn(7, module.down_proj.shape[2 if module.is_transposed else 1], generator=generator)
    rows.requires_grad_()
    chosen = torch.tensor([[0, 1], [1, 3]] * 3 + [[2, 0]])
    output = module(rows, chosen, torch.rand(7, 2, generator=generator))
    wanted = [rows, *(tensor for update in updates.values() for tensor in update[:2])]
    probe = torch.randn(output.shape, generator=generator)
    return [output, *torch.autograd.grad((output * probe).sum(), wanted)]


def test_4bit_rows_that_bitsandbytes_misreads_are_told(tmp_path, caplog):
    for hidden in (64, 96):
        directory = random_checkpoint(
            "llama", tmp_path / str(hidden), hidden_size=hidden, intermediate_size=128
        )
        with load_policy(directory, quantization="4bit", device="cpu"):
            pass
        assert ("misreads the 4-bit weights of layers with 96 inputs" in caplog.text) == (hidden == 96)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_policy_quantises_and_adapts_the_same_experts(checkpoint_of, quantization):
    lora = LoraSettings(r=2, targets=("q_proj", *BOTH))
    with (
        load_policy(checkpoint_of("mixtral")) as plain,
        load_policy(checkpoint_of("mixtral"), quantization=quantization) as policy,
    ):
        assert policy.adapter_parameters().keys() == plain.adapter_parameters().keys()
    with (
        load_policy(checkpoint_of("mixtral"), lora=lora) as plain,
        load_policy(checkpoint_of("mixtral"), lora=lora, quantization=quantization) as policy,
    ):
        assert policy.adapter_parameters().keys() == plain.adapter_parameters().keys()
        fill(policy, 3)
        on = run(policy, TOKENS)
        assert all(torch.isfinite(grad).all() and grad.abs().max() > 0 for grad in on.grads.values())
        with policy.adapter_disabled(), torch.no_grad():
            assert difference(policy(TOKENS).logits, on.logits) > 1e-2


# ------------------------------------------------------------------------------------------- on disk


def test_an_adapter_is_read_block_by_block(checkpoint_of, tmp_path):
    lora = LoraSettings(r=2, targets=("o_proj", *BOTH))
    with load_policy(checkpoint_of("deepseek_v3"), lora=lora) as policy:
        fill(policy, 3)
        policy.save_adapter(tmp_path)
        tensors = policy.adapter_parameters()
    model = plain_model(checkpoint_of("deepseek_v3"))
    _, blocks = read_blocks(tmp_path, model)
    assert blocks[0].keys() == {"self_attn.o_proj"}  # dense
    assert blocks[1].keys() == {"self_attn.o_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    a, b = blocks[BLOCKS - 1]["mlp.experts.gate_up_proj"]
    inner = "base_model.model.model.layers.3.mlp.experts.base_layer.lora_"
    assert torch.equal(a, tensors[f"{inner}A.weight"]) and torch.equal(b, tensors[f"{inner}B.weight"])


@pytest.mark.slow  # a fresh process for each
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_adapter_of_experts_is_exported_and_merged(checkpoint_of, tmp_path, family, merge):
    lora = LoraSettings(r=2, targets=("o_proj", *BOTH))
    with load_policy(checkpoint_of(family), lora=lora) as policy:
        fill(policy, 3)
        policy.save_adapter(tmp_path / "adapter")
        with torch.no_grad():
            expected = policy(TOKENS).logits
    console = Console(record=True, width=200)
    export_command(str(tmp_path / "adapter"), tmp_path / "out", console, merge=merge)
    assert "4 of 4 greedy continuations are the same" in console.export_text()
    if merge:
        with torch.no_grad():
            assert difference(plain_model(tmp_path / "out")(TOKENS).logits, expected) < 1e-4
