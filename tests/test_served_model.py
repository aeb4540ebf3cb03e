"""What a server knows of its model before it loads weights."""

from __future__ import annotations

import pytest
import torch
from families import BLOCKS, random_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from textrl_swarm.commands.serve import _download_options
from textrl_swarm.decoders.caches import server_cache_bytes
from textrl_swarm.decoders.tried import trial_tokens
from textrl_swarm.models.base_model import resolve
from textrl_swarm.models.layers import expert_layers, find_blocks, linear_layers
from textrl_swarm.models.quantization import keep_differentiable
from textrl_swarm.swarm import compat

compat.require_petals()

from petals.utils.convert_block import QuantType  # noqa: E402

from textrl_swarm.swarm.server.served_model import ServedModel  # noqa: E402

GIB = 1 << 30


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> ServedModel:
    """A dense block, then three with experts."""
    directory = random_checkpoint("deepseek_v3", tmp_path_factory.mktemp("models") / "deepseek_v3")
    return ServedModel(resolve(directory), torch.float32, torch.device("cpu"))


def test_bytes_are_those_of_a_real_block(deepseek):
    for index in range(BLOCKS):
        block = deepseek.make_ready(deepseek.load(index), index, QuantType.NONE)
        expected = sum(parameter.nbytes for parameter in block.parameters())
        assert deepseek.block_bytes(index, QuantType.NONE) == expected
    sizes = [
        deepseek.block_bytes(1, quant_type) for quant_type in (QuantType.NONE, QuantType.INT8, QuantType.NF4)
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_a_block_that_was_loaded_can_be_loaded_again(deepseek):
    first, second = deepseek.load(2), deepseek.load(2)
    assert first is not second
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert all(parameter.is_meta for parameter in deepseek.skeleton.blocks[2].parameters())


@pytest.mark.parametrize("inference", [False, True])
def test_a_block_has_a_speed(deepseek, inference):
    speed = deepseek.tokens_per_second(1, QuantType.NONE, tokens=4, steps=3, inference=inference)
    assert 0 < speed < 1e9


def test_as_many_blocks_as_fit_by_the_largest(deepseek):
    largest = max(deepseek.block_bytes(index, QuantType.NONE) for index in range(BLOCKS))
    cache = server_cache_bytes(100, *deepseek.cache_bytes([0]))
    backward = 2 * GIB * deepseek.planner.hidden_size // 14336
    for blocks in range(BLOCKS + 2):
        memory = backward + blocks * (largest + cache)
        assert deepseek.blocks_within(memory, QuantType.NONE, 100) == min(blocks, BLOCKS)
        if blocks:
            assert deepseek.blocks_within(memory - 1, QuantType.NONE, 100) == min(blocks - 1, BLOCKS)
    assert deepseek.blocks_within(0, QuantType.NONE, 100) == 0


@pytest.mark.parametrize(
    ("family", "least", "most"), [("llama", 0.9, 1), ("mixtral", 0.9, 1), ("llama4_text", 0.1, 0.5)]
)
def test_what_quantisation_reaches_is_known_before(tmp_path, family, least, most):
    model = ServedModel(resolve(random_checkpoint(family, tmp_path)), torch.float32, torch.device("cpu"))
    assert least < min(map(model.quantized_share, range(BLOCKS))) < most


def test_another_revision_of_the_hub_is_another_model(tmp_path, monkeypatch):
    """Its configuration and its weights; as after a download."""
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    for name, hidden in (("main", 32), ("old", 48)):
        commit = f"{hidden:040x}"
        (repository / "refs" / name).write_text(commit)
        random_checkpoint("llama", repository / "snapshots" / commit, hidden_size=hidden)
    options = ["--revision", "old", "--cache_dir", str(tmp_path), "--device", "cpu", "--token", "secret"]
    download = _download_options(options)
    assert download == {"revision": "old", "cache_dir": str(tmp_path), "token": "secret"}
    for chosen, hidden in ((download, 48), ({"cache_dir": str(tmp_path)}, 32)):
        base = resolve("owner/model", **chosen)
        assert base.config.hidden_size == hidden
        block = ServedModel(base, torch.float32, torch.device("cpu"), **chosen).load(1)
        assert block.self_attn.o_proj.weight.shape == (hidden, hidden)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3", "qwen3_next", "falcon_h1"])
def test_quantised_layers_are_those_of_transformers(tmp_path, family, kind):
    """Number by number; where transformers leaves nothing out (experts), so are a block's outputs."""
    directory = random_checkpoint(family, tmp_path)
    model = ServedModel(resolve(directory), torch.float32, torch.device("cpu"))
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    plain = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    ).eval()
    keep_differentiable(plain)
    blocks = find_blocks(plain)[1]
    for index in (0, BLOCKS - 1):
        served = model.make_ready(model.load(index), index, QuantType[kind.upper()])
        found, expected = served.block.module, blocks[index]
        compared = 0
        for path in linear_layers(expected):
            one, other = found.get_submodule(path), expected.get_submodule(path)
            if type(other) is torch.nn.Linear:
                continue  # transformers keeps Mamba's out_proj as it is
            assert torch.equal(one.weight.data, other.weight.data), path
            compared += 1
        assert compared > 0
        if not expert_layers(found) and compared == len(linear_layers(expected)):
            call = model.planner.plan(1, 16, None).calls[index].ready(None, None)
            hidden = trial_tokens(model.planner)
            if (family, kind) == ("deepseek_v3", "int8"):  # bitsandbytes' own layer takes three dimensions
                with pytest.raises(RuntimeError, match="must match the size"):
                    expected(hidden, *call.args, **call.kwargs)
                continue
            output = expected(hidden, *call.args, **call.kwargs)
            output = output[0] if isinstance(output, tuple) else output
            assert torch.equal(served(hidden), output)
