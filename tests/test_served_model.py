"""What a server knows of its model before it loads weights."""

from __future__ import annotations

import pytest
import torch
from families import BLOCKS, random_checkpoint

from textrl_swarm.decoders.caches import server_cache_bytes
from textrl_swarm.models.base_model import resolve
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
