"""What downloads and copies that went wrong leave in the place of a model's files: an error of ours that
names the file, never a traceback and never random weights.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from textrl_swarm import LoraSettings, load_policy
from textrl_swarm.errors import AdapterError, CheckpointError, ConfigError, ModelError
from textrl_swarm.export.source import find_source
from textrl_swarm.learning.learner import LEARNER_STATE, Learner
from textrl_swarm.models.adapter_files import read_tensors
from textrl_swarm.models.base_model import resolve
from textrl_swarm.models.pretrained import load_tokenizer
from textrl_swarm.rewards.classifiers import reward_model
from textrl_swarm.swarm.client.parts import load_parts

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n"
HTML = b"\n<!DOCTYPE html><html><body>404</body></html>"


class Code:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("run",))


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


DAMAGES: dict[str, tuple[bytes | Callable[[bytes], bytes], str]] = {
    "empty": (b"", "{name} is empty"),
    "a git-lfs pointer": (LFS, "{name} is a git-lfs pointer, .*type `git lfs pull`"),
    "a web page": (HTML, "{name} is a web page"),
    "half": (lambda whole: whole[: len(whole) // 2], "cannot be loaded: "),
    "another pickle": (pickle.dumps({"a": 1}, protocol=2), "cannot be loaded: .*corrupt file"),
    "code": (pickled(Code()), "no checkpoint of tensors, or is damaged"),
    "a list": (pickled([1, 2]), "cannot be loaded: "),
    "a number": (pickled(3), "cannot be loaded: "),
    "other tensors": (pickled({"a": torch.zeros(1)}), "weights are missing"),
    "noise": (bytes(range(256)) * 20, "cannot be loaded: "),
}


@pytest.fixture(scope="module")
def pickled_bloom(tiny_bloom, tmp_path_factory) -> Path:
    """A tiny BLOOM in pytorch_model.bin, as older checkpoints are."""
    directory = tmp_path_factory.mktemp("models") / "pickled"
    shutil.copytree(tiny_bloom(seed=1), directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    load_policy(directory).close()
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_in_a_damaged_pickle(pickled_bloom, tmp_path, damage):
    contents, message = DAMAGES[damage]
    model = shutil.copytree(pickled_bloom, tmp_path / "model")
    weights = model / "pytorch_model.bin"
    weights.write_bytes(contents(weights.read_bytes()) if callable(contents) else contents)
    for load in (load_policy, lambda path: load_parts(resolve(path), None, None)):
        with pytest.raises(ModelError, match=message.format(name=re.escape(str(weights)))):
            load(model)


def test_a_dtype_that_torch_does_not_know(tiny_bloom):
    with pytest.raises(ConfigError, match=r"dtype must be a torch dtype or its name.*got 'floaty'"):
        load_parts(resolve(tiny_bloom(seed=1)), "floaty", None)


@pytest.mark.parametrize("file", ["model-2.bin", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("damage", ["empty", "a git-lfs pointer", "a web page", "a list"])
def test_a_damaged_shard_or_index(pickled_bloom, tmp_path, file, damage):
    model = shutil.copytree(pickled_bloom, tmp_path / "model")
    weights = torch.load(model / "pytorch_model.bin")
    (model / "pytorch_model.bin").unlink()
    torch.save(weights, model / "model-2.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-2.bin")}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    load_policy(model).close()
    contents, message = DAMAGES[damage]
    (model / file).write_bytes(b"[]" if damage == "a list" and file.endswith("json") else contents)
    with pytest.raises(ModelError, match=message.format(name=re.escape(str(model / file)))):
        load_policy(model)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "{name} is empty"),
        (LFS, "{name} is a git-lfs pointer"),
        (b'{"model_type": "blo', "{name} cannot be read: Unterminated"),
        (b"[1]", "{name} cannot be read: it holds a list"),
        (b"null", "{name} cannot be read: it holds a NoneType"),
        (b'{"a": "\xff"}', "{name} cannot be read: .*utf-8"),
    ],
)
def test_a_damaged_configuration(tiny_bloom, tmp_path, file, contents, message):
    model = shutil.copytree(tiny_bloom(seed=1), tmp_path / "model")
    (model / file).write_bytes(contents)
    with pytest.raises(ModelError, match=message.format(name=re.escape(str(model / file)))):
        resolve(model)


@pytest.mark.parametrize(
    "contents", ['{"model_type": "bloom", "hidden_size": "x"}', '{"model_type": 3}', "{}"]
)
def test_a_configuration_of_no_model(tiny_bloom, tmp_path, contents):
    model = shutil.copytree(tiny_bloom(seed=1), tmp_path / "model")
    (model / "config.json").write_text(contents)
    with pytest.raises(ModelError, match=r"model/config\.json describes no model: "):
        resolve(model)


@pytest.mark.parametrize("damage", ["empty", "a git-lfs pointer", "a web page"])
def test_a_damaged_tokenizer_reward_model_and_adapter(tiny_bloom, tmp_path, damage):
    contents, message = DAMAGES[damage]
    model = shutil.copytree(tiny_bloom(seed=1), tmp_path / "model")
    (model / "tokenizer.json").write_bytes(contents)
    expected = message.format(name=".*tokenizer.json")
    with pytest.raises(ModelError, match=expected):
        load_tokenizer(str(model))
    with pytest.raises(ModelError, match=expected):
        reward_model(model, 0)
    (tmp_path / "adapter_model.safetensors").write_bytes(contents)
    with pytest.raises(AdapterError, match=message.format(name=".*adapter_model.safetensors")):
        read_tensors(tmp_path / "adapter_model.safetensors")


def test_an_adapter_in_a_pickle_is_refused_with_the_command_that_converts_it(tiny_bloom, tmp_path):
    adapter = tmp_path / "an adapter"
    with load_policy(tiny_bloom(seed=1), lora=LoraSettings(r=2)) as policy:
        policy.save_adapter(adapter)
        weights = load_file(adapter / "adapter_model.safetensors")
        torch.save(weights, adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(AdapterError, match="convert it: cd ") as refused:
            policy.load_adapter(adapter)
        with pytest.raises(AdapterError, match="convert it: cd "):
            find_source(adapter)
        command = str(refused.value).split("convert it: ")[1]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path})
        policy.load_adapter(adapter)
    converted = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "contents", [b"", LFS, pickled([1]), pickled({})], ids=["empty", "lfs", "list", "dict"]
)
def test_a_damaged_state_of_the_optimizer(tiny_bloom, tmp_path, contents):
    with load_policy(tiny_bloom(seed=1), lora=LoraSettings(r=2)) as policy:
        learner = Learner(policy)
        learner.save(tmp_path)
        (tmp_path / LEARNER_STATE).write_bytes(contents)
        with pytest.raises(CheckpointError, match=rf"{LEARNER_STATE} cannot be read .* or remove it"):
            learner.load(tmp_path)
