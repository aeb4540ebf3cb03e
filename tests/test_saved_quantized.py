"""Checkpoints whose weights are saved in 8 or 4 bits, as hubs are full of: trained, exported and merged as
others, or refused with what to type.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from textrl_swarm import LoraSettings, load_policy
from textrl_swarm.commands.export import export_command
from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.models.base_model import resolve
from textrl_swarm.models.quantization import saved_quantization
from textrl_swarm.swarm.local import LocalSwarm

BITS = ["8bit", "4bit"]
SETTINGS = {
    "8bit": {"load_in_8bit": True},
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
}


@pytest.fixture(scope="module")
def saved(tiny_bloom, tmp_path_factory) -> dict[str, Path]:
    """bits -> directory of the same tiny BLOOM, with its weights in so many bits."""
    found = {}
    for bits in BITS:
        directory = tmp_path_factory.mktemp("models") / bits
        shutil.copytree(tiny_bloom(seed=1), directory)
        model = AutoModelForCausalLM.from_pretrained(
            tiny_bloom(seed=1),
            quantization_config=BitsAndBytesConfig(**SETTINGS[bits]),
            device_map={"": "cpu"},
        )
        model.save_pretrained(directory)
        found[bits] = directory
    return found


@pytest.fixture
def adapted(saved, tmp_path):
    """bits -> directory of an adapter that was made on the quantised model, and changes its answers."""

    def make(bits: str) -> Path:
        generator = torch.Generator().manual_seed(0)
        with load_policy(saved[bits], lora=LoraSettings(r=2)) as policy, torch.no_grad():
            for parameter in policy.adapter_parameters().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            policy.save_adapter(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize("bits", BITS)
def test_the_policy_knows_and_computes_as_the_one_quantised_at_loading(saved, tiny_bloom, bits, caplog):
    tokens = torch.tensor([[3, 4, 5, 6]])
    with caplog.at_level(logging.INFO), torch.no_grad(), load_policy(saved[bits]) as policy:
        logits = policy(tokens).logits
        assert (policy.quantization, policy.rounds_by_batch) == (bits, bits == "8bit")
    assert not [record for record in caplog.records if "inputs will be cast" in record.getMessage()]
    with torch.no_grad(), load_policy(tiny_bloom(seed=1), quantization=bits) as policy:
        assert policy.quantization == bits
        torch.testing.assert_close(policy(tokens).logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_the_option_must_agree_with_the_checkpoint(saved, bits, recwarn):
    load_policy(
        saved[bits], quantization=bits
    ).close()  # transformers would warn that it ignores a second one
    assert not recwarn.list
    other = next(iter(set(BITS) - {bits}))
    message = f"quantization='{other}', but the weights of .* are saved in {bits}: leave it out"
    with pytest.raises(ConfigError, match=message):
        load_policy(saved[bits], quantization=other)


@pytest.mark.parametrize(
    ("bits", "merge"),
    [
        pytest.param("8bit", False, marks=pytest.mark.slow),
        ("8bit", True),
        pytest.param("4bit", False, marks=pytest.mark.slow),
        pytest.param("4bit", True, marks=pytest.mark.slow),
    ],
)
def test_exports_are_checked_against_what_they_were_made_of(adapted, tmp_path, bits, merge):
    console = Console(record=True, width=300)
    export_command(str(adapted(bits)), tmp_path / "out", console, merge=merge)
    told = console.export_text()
    assert "loaded back: " in told
    if merge:
        assert f"trained on weights in {bits}; it is merged into the weights dequantised" in told
        assert f"beside the policy in {bits}: " in told
        assert getattr(AutoConfig.from_pretrained(tmp_path / "out"), "quantization_config", None) is None


def test_servers_take_models_that_are_not_quantised_yet(saved):
    with pytest.raises(ModelError, match=r"saved in 4bit, .* serve the model .* with --quant_type nf4"):
        LocalSwarm(saved["4bit"], num_servers=1)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_other_methods_are_refused_at_the_door(tiny_bloom, tmp_path, method):
    model = shutil.copytree(tiny_bloom(seed=1), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method}})
    )
    with pytest.raises(ModelError, match=f"are quantised by {method}; only those of bitsandbytes"):
        load_policy(model)
    with pytest.raises(ModelError, match=f"are quantised by {method}"):
        LocalSwarm(model, num_servers=1)
    with pytest.raises(ModelError, match=f"are quantised by {method}"):
        saved_quantization(resolve(model))
