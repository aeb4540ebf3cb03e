"""MXFP4 and FP8 checkpoints, as gpt-oss and DeepSeek V3 are published: dequantised block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import VOCAB, random_checkpoint
from plain_peft import PlainPeft, assert_same, connect, difference, fill, run
from stored_formats import store_in_fp8, store_in_mxfp4
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from textrl_swarm.config import LoraSettings
from textrl_swarm.decoders.checkpoint import Checkpoint
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.models.base_model import resolve
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.local import LocalSwarm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TOKENS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
LORA = LoraSettings(r=2, targets=("o_proj", "experts.gate_up_proj", "experts.down_proj"))
READ = {"fp8": FineGrainedFP8Config(dequantize=True), "mxfp4": Mxfp4Config(dequantize=True)}


@pytest.fixture(scope="module", params=["fp8", "mxfp4"])
def stored(request, tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A checkpoint, and what transformers makes of it."""
    directory = tmp_path_factory.mktemp("models") / request.param
    if request.param == "fp8":
        store_in_fp8(random_checkpoint("deepseek_v3", directory, qk_rope_head_dim=8))
    else:
        store_in_mxfp4(random_checkpoint("gpt_oss", directory, hidden_size=64, intermediate_size=64))
    read = READ[request.param]
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=read)
    return directory, plain.eval()


def test_blocks_are_those_of_transformers(stored):
    directory, plain = stored
    base = resolve(directory)
    skeleton = Skeleton(base.config, torch.float32)
    checkpoint = Checkpoint(base, skeleton)
    digests = set()
    for i, expected in enumerate(plain.model.layers):
        found = dict(checkpoint.load_block(i).named_parameters())
        assert found.keys() == dict(expected.named_parameters()).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.named_parameters())
        digests.add(checkpoint.digest_block(i))
    assert len(digests) == len(plain.model.layers)


def test_a_local_policy_is_what_transformers_makes_of_it(stored, tmp_path):
    directory, plain = stored
    with load_policy(directory, lora=LORA, dtype="float32") as policy, torch.no_grad():
        assert torch.equal(policy(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_local_policy_may_be_quantised_anew(stored, quantization):
    directory, plain = stored
    with load_policy(directory, lora=LORA, dtype="float32", quantization=quantization) as policy:
        assert policy.quantization == quantization
        if quantization == "8bit":  # the toys of 32 numbers a row are too coarse in 4 bits to say anything
            with torch.no_grad():
                assert 0 < difference(policy(TOKENS).logits, plain(TOKENS).logits) < 0.3
        fill(policy, 3)
        outcome = run(policy, TOKENS)
        assert all(torch.isfinite(grad).all() and grad.abs().max() > 0 for grad in outcome.grads.values())


@pytest.mark.slow  # servers of its own, for each format
@pytest.mark.swarm
def test_servers_dequantise_it(stored, tmp_path):
    directory, _ = stored
    options = ("--torch_dtype", "float32")
    with (
        LocalSwarm(directory, num_servers=2, server_options=options) as swarm,
        connect(swarm, LORA, filled=3) as policy,
    ):
        assert_same(run(policy, TOKENS), PlainPeft(policy, tmp_path).run(TOKENS))
