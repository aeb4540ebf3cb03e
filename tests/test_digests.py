"""Digests name a block's numbers, however a checkpoint stores them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from textrl_swarm.models.digests import checkpoint_digests, digest_tensors

BLOCKS = "transformer.h"
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor(3)}


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    return digest_tensors(sorted(weights.items()))


def changed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**WEIGHTS, name: tensor}


@pytest.mark.parametrize(
    "weights",
    [
        changed("a", torch.arange(6.0).reshape(3, 2)),
        changed("a", torch.tensor([[0.0, 1, 2], [3, 4, 5.0001]])),
        changed("b.c", torch.tensor(4)),
        changed("d", torch.zeros(0)),
        {"a": WEIGHTS["a"]},
        {"a": WEIGHTS["a"], "b.d": WEIGHTS["b.c"]},
    ],
    ids=["shape", "one number", "an integer", "one more", "one less", "a name"],
)
def test_any_difference_changes_the_digest(weights):
    assert digest_of(weights) != digest_of(WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_count_and_not_how_they_are_stored(dtype):
    numbers = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = {"b": numbers.float().t().contiguous().t(), "a": torch.ones(1)}
    assert digest_of({"a": torch.ones(1), "b": numbers}) == digest_of(stored)


def test_large_tensors_are_hashed_whole(monkeypatch):
    monkeypatch.setattr("textrl_swarm.models.digests._CHUNK_NUMBERS", 4)
    numbers = torch.arange(11.0)
    in_parts = digest_of({"a": numbers})
    numbers[10] = 0
    assert digest_of({"a": numbers}) != in_parts
    monkeypatch.undo()
    numbers[10] = 10
    assert digest_of({"a": numbers}) == in_parts


@pytest.fixture
def saved(tiny_bloom, tmp_path):
    """The form of a checkpoint -> a directory with the same weights in that form."""
    source = tiny_bloom(seed=1)

    def save(form: str) -> Path:
        directory = tmp_path / form
        shutil.copytree(source, directory)
        weights = load_file(directory / "model.safetensors")
        if form == "bin":
            (directory / "model.safetensors").unlink()
            torch.save(weights, directory / "pytorch_model.bin")
        if form == "without transformer.":
            bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
            save_file(bare, directory / "model.safetensors", metadata={"format": "pt"})
        if form == "sharded":
            (directory / "model.safetensors").unlink()
            AutoModelForCausalLM.from_pretrained(source).save_pretrained(directory, max_shard_size="100KB")
            assert len(list(directory.glob("model-*.safetensors"))) > 2
        return directory

    return save


@pytest.mark.parametrize("form", ["bin", "without transformer.", "sharded"])
def test_all_forms_of_a_checkpoint_have_the_same_digests(saved, form):
    expected = checkpoint_digests(str(saved("as it is")), BLOCKS)
    assert list(expected) == [0, 1, 2, 3]
    assert len(set(expected.values())) == 4
    assert checkpoint_digests(str(saved(form)), BLOCKS) == expected


def test_a_hub_model_is_read_from_the_local_cache(hub_model):
    digests = checkpoint_digests(hub_model, BLOCKS)
    (snapshot,) = Path(os.environ["HF_HOME"], "hub", "models--tests--tiny-bloom.v1", "snapshots").iterdir()
    assert digests == checkpoint_digests(str(snapshot), BLOCKS)
    assert list(digests) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("spoil", ["gone", "cut short"])
def test_blocks_in_files_that_cannot_be_read_have_no_digest(saved, spoil, caplog):
    directory = saved("sharded")
    expected = checkpoint_digests(str(directory), BLOCKS)
    shards = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    shard = directory / shards["transformer.h.2.mlp.dense_h_to_4h.weight"]
    lost = {int(key.split(".")[2]) for key, name in shards.items() if name == shard.name and ".h." in key}
    if spoil == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        found = checkpoint_digests(str(directory), BLOCKS)
    assert found == {block: digest for block, digest in expected.items() if block not in lost}
    assert 0 < len(found) < 4
    assert ("cannot be read" in caplog.text) == (spoil == "cut short")


def test_a_bin_file_of_an_old_torch_is_not_compared(saved, caplog):
    """Such files are read whole or not at all: a model's blocks need not fit into the client's memory."""
    path = saved("bin") / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert checkpoint_digests(str(path.parent), BLOCKS) == {}
    assert "cannot be read, so its blocks are not compared" in caplog.text


def test_nothing_here_means_no_digests(tmp_path):
    assert checkpoint_digests(str(tmp_path), BLOCKS) == {}
    assert checkpoint_digests("nobody/nothing", BLOCKS) == {}
