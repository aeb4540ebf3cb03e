"""What has to hold on an accelerator: pytest -m gpu -n 0

Nothing else in the suite touches one. TEXTRL_SWARM_TEST_DEVICE=cpu runs the same tests without; they were
written on machines that have none.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from families import BLOCKS, VOCAB, random_checkpoint
from petals.utils.convert_block import QuantType
from plain_peft import PlainPeft, connect, difference, fill, greedy, run
from torch import Tensor
from transformers import AutoModelForCausalLM

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.decoders.outside import Outside
from textrl_swarm.learning.learner import Learner
from textrl_swarm.models.base_model import resolve
from textrl_swarm.models.layers import find_blocks
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.client.parts import load_parts
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.swarm.server.served_model import ServedBlock, ServedModel

DEVICE = os.environ.get("TEXTRL_SWARM_TEST_DEVICE", "cuda")
KINDS = ("bloom", "llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "falcon_h1")
# Of the largest number: rounding of fp32 and of bf16 in four blocks, in kernels that sum in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

TOKENS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
PROMPTS = [TOKENS[0, :7].tolist(), TOKENS[1, :3].tolist()]


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory) -> Path:
    # Rows of 64 numbers: 4-bit scales are for so many.
    sizes = {} if request.param == "bloom" else {"intermediate_size": 64}
    directory = tmp_path_factory.mktemp("models") / request.param
    return random_checkpoint(request.param, directory, hidden_size=64, **sizes)


def served(
    checkpoint: Path, dtype: torch.dtype, quant_type: QuantType = QuantType.NONE
) -> tuple[Outside, list[ServedBlock]]:
    model = ServedModel(resolve(checkpoint), dtype, torch.device(DEVICE))
    blocks = [model.make_ready(model.load(i), i, quant_type) for i in range(BLOCKS)]
    return load_parts(resolve(checkpoint), dtype, DEVICE), blocks


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_blocks_are_those_of_the_whole_model(checkpoint, dtype):
    outside, blocks = served(checkpoint, dtype)
    for block in blocks:
        tensors = [*block.parameters(), *block.buffers()]
        assert {tensor.device.type for tensor in tensors} == {DEVICE}
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval().to(DEVICE)
    tokens = TOKENS.to(DEVICE)
    with torch.no_grad():
        hidden = outside.embed(tokens)
        for block in blocks:
            hidden = block(hidden)
            assert hidden.dtype == dtype and hidden.device.type == DEVICE
        logits = outside.logits(outside.finish(hidden))
        assert difference(logits.float(), plain(tokens).logits.float()) < TOLERANCE[dtype]
        steps = torch.cat(list(cached_steps(outside, blocks, tokens)), dim=1)
        assert difference(steps.float(), hidden.float()) < TOLERANCE[dtype]


def cached_steps(outside: Outside, blocks: list[ServedBlock], tokens: Tensor):
    caches = []
    for block in blocks:
        shapes = block.cache_spec.tensors(len(tokens), tokens.shape[1], outside.skeleton.dtype)
        caches.append([torch.zeros(shape, dtype=dtype, device=DEVICE) for shape, dtype in shapes])
    past = 0
    for chunk in tokens.split((6, 1, 1, 5), dim=1):
        hidden = outside.embed(chunk, past)
        for block, tensors in zip(blocks, caches, strict=True):
            hidden = block.block.step(hidden, block.cache_spec, tensors, Chunk(past))
        past += chunk.shape[1]
        yield hidden


@pytest.mark.parametrize("quant_type", [QuantType.INT8, QuantType.NF4], ids=lambda kind: kind.name)
def test_quantised_blocks_have_gradients(checkpoint, quant_type):
    outside, blocks = served(checkpoint, torch.bfloat16, quant_type)
    leaf = hidden = outside.embed(TOKENS.to(DEVICE)).detach().requires_grad_()
    for block in blocks:
        hidden = block(hidden)
    (grad,) = torch.autograd.grad(hidden.float().square().mean(), leaf)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_a_local_policy_trains(checkpoint, quantization):
    options = {"device": DEVICE, "quantization": quantization, "dtype": "bfloat16"}
    with load_policy(checkpoint, lora=LoraSettings(r=4), **options) as policy:
        assert {p.device.type for p in find_blocks(policy._model)[1].parameters()} == {DEVICE}
        learner = Learner(policy, PPOConfig(lr=1e-2, epochs=1), SamplingConfig(max_new_tokens=6, seed=5))
        rollout = policy.generate(PROMPTS, learner.rollout_sampling())
        rewards = torch.zeros(rollout.response_mask.shape, device=rollout.response_mask.device)
        rewards[:, -1] = rollout.response_mask[:, -1].float()
        metrics = learner.learn(rollout, rewards)
        assert metrics["sampler_kl"] < 0.1
        assert all(torch.isfinite(one).all() for one in policy.trainable_parameters().values())


@pytest.mark.swarm
def test_a_swarm_equals_plain_transformers_and_peft(checkpoint, tmp_path):
    options = ("--torch_dtype", "float32", "--device", DEVICE)
    with (
        LocalSwarm(checkpoint, num_servers=2, server_options=options) as swarm,
        connect(swarm, LoraSettings(r=4)) as policy,
    ):
        fill(policy, 3)
        plain = PlainPeft(policy, tmp_path)
        found, expected = run(policy, TOKENS), plain.run(TOKENS)
        assert difference(found.logits, expected.logits) < TOLERANCE[torch.float32]
        assert found.grads.keys() == expected.grads.keys()
        for name, grad in expected.grads.items():
            assert "lora" not in name or difference(found.grads[name], grad) < 1e-2
        assert greedy(policy, PROMPTS, 6) == [plain.greedy(prompt, 6) for prompt in PROMPTS]
