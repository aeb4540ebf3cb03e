"""The examples run to the end at toy size, through the same lines as with real models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_reward_models import classifier

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, outdir: Path, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), "--outdir", str(outdir), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=outdir.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_trained(outdir: Path) -> None:
    """The best adapter is there, in PEFT's format, and is not the one of the beginning, whose B is zero."""
    config = json.loads((outdir / "best" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    tensors = load_file(outdir / "best" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert len((outdir / "scores.txt").read_text().splitlines()) > 2


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("gpt2.py", ()),
        pytest.param("bloomz_7b1.py", ("--quantization", "8bit"), marks=pytest.mark.slow),
        pytest.param("bloom_176b_swarm.py", (), marks=(pytest.mark.swarm, pytest.mark.slow)),
    ],
)
def test_an_example_trains_and_shows_before_and_after(tmp_path, script, arguments):
    said = run(script, tmp_path / "out", "--tiny", "--steps", 160, *arguments)
    assert_trained(tmp_path / "out")
    before, after = re.search(r"before: (.*)\nafter:  (.*)\n", said).groups()
    assert before != after
    if "swarm" in script:
        assert "MB received" in said


def test_the_swarm_example_never_talks_to_the_public_swarm():
    script = ROOT / "examples" / "bloom_176b_swarm.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and "give --initial-peers ADDRESS" in done.stderr


@pytest.mark.slow  # a fresh process
def test_a_model_is_steered_by_any_classifier(tmp_path, tiny_bloom):
    """Quick: a model and a classifier that know no English."""
    judge = classifier(tmp_path / "judge")
    models = ("--model", tiny_bloom(seed=1), "--classifier", judge, "--label", "neutral")
    said = run("controllable_generation.py", tmp_path / "out", "--steps", 400, "--kl-coef", 0, *models)
    assert_trained(tmp_path / "out")
    assert "probability of neutral, the same random numbers" in said and "The soup is" in said


@pytest.mark.slow
def test_sentences_become_better_under_a_classifier(tmp_path):
    """About two minutes: the model and its classifier are trained first."""
    said = run("controllable_generation.py", tmp_path / "out", "--tiny", "--steps", 3000)
    assert_trained(tmp_path / "out")
    before, after = map(float, re.search(r"mean score before (\d\.\d+), after (\d\.\d+)", said).groups())
    assert after > before + 0.2
    assert "probability of POSITIVE" in said
