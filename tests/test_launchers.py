"""The launchers as users start them: toys through the same lines, the plan for BLOOM-176B, small machines."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from textrl_swarm.errors import ConfigError

LAUNCHERS = Path(__file__).resolve().parent.parent / "launchers"
GB = 10**9


def launch(name: str, *arguments: object, directory: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, LAUNCHERS / name, *map(str, arguments)],
        cwd=directory, env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(LAUNCHERS.parent)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def launch_here(monkeypatch, name: str, *arguments: str) -> object:
    """The exit code of a launcher that loads nothing, in this process."""
    monkeypatch.setattr(sys, "argv", [f"launchers/{name}", *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.syspath_prepend(str(LAUNCHERS))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(LAUNCHERS / name), run_name="__main__")
    return caught.value.code


def check_run(done: subprocess.CompletedProcess, run: Path) -> None:
    """Whether it ended with an adapter that was trained and that plain peft loads."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adapter in run/adapter" in done.stdout
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    changed = [float(tensor.abs().max()) for name, tensor in tensors.items() if "lora_B" in name]
    assert min(changed) > 0
    base = AutoModelForCausalLM.from_pretrained(run / "base_model")
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, run / "adapter")(tokens).logits
    assert (after - before).abs().max() > 1e-3
    assert json.loads((run / "summary.json").read_text())["iterations"] == 2


@pytest.mark.swarm
@pytest.mark.slow  # the demo of test_cli goes the same way
def test_bloom_petals_runs_end_to_end_on_a_swarm_of_its_own(tmp_path, hardly_pretrained):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "base_model").symlink_to(hardly_pretrained)
    done = launch(
        "bloom_petals.py",
        "--tiny",
        "--output",
        "run",
        "--iterations",
        2,
        "--set",
        "train.report_to=[]",
        directory=tmp_path,
    )
    check_run(done, tmp_path / "run")
    assert "on 2 server(s) of a swarm" in done.stdout


@pytest.mark.swarm
@pytest.mark.slow  # pretrains the toy
def test_the_toy_of_bloom_petals_learns_before_ones_eyes(tmp_path):
    done = launch("private_swarm.py", "--tiny", "--output", "run", "--iterations", 12, directory=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    assert sum(scores[:2]) / 2 < 0.7
    assert sum(scores[-3:]) / 3 > 0.9


@pytest.mark.slow
def test_bloomz_runs_the_same_lines_in_8_bits_on_the_cpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    done = launch(
        "bloomz_7b1_local.py",
        "--tiny",
        "--output",
        "run",
        "--iterations",
        2,
        "--set",
        "train.report_to=[]",
        directory=tmp_path,
    )
    check_run(done, tmp_path / "run")
    assert "8bit, 16 responses at once, cpu) fits" in done.stdout
    assert "in 8bit on this machine (cpu)" in done.stdout


def test_the_plan_says_how_many_servers_and_what_to_type(monkeypatch, capsys):
    """By hand, for nf4 on 24 GB, of which CUDA takes 1, in 1e9 bytes.

    12 blocks are 12 * (1.388 + 0.235) + 2 * 2.147 = 23.8 of 24.7; 13 would be 25.4.
    """
    assert launch_here(monkeypatch, "bloom_petals.py") == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "24 GB" in line)
    assert row.endswith("6 (12) │")
    assert "textrl-swarm serve bigscience/bloom --new-swarm --quant_type nf4 --num_blocks 12" in shown
    assert "2. 5 more" in shown
    assert "176,247,271,424 parameters in 70 blocks" in shown
    assert "1 Gbit/s" in shown
    # Commands are to be copied whole.
    prose = [line for line in shown.splitlines() if not line.startswith("    ")]
    assert max(map(len, prose)) <= 80


@pytest.mark.parametrize(
    ("model", "parameters", "row"),
    [
        # The model cards' 116.8 and 235.1 billion. 12 blocks of 36 are 12 * (1.825 + 0.017) + 4.7 GB of 24.7;
        # 15 of 94 are 15 * (1.399 + 0.017) + 4.7.
        ("gpt-oss-120b", "116,829,156,672 parameters in 36 blocks", "3 (12) │"),
        ("qwen3-235b", "235,093,634,560 parameters in 94 blocks", "7 (15) │"),
    ],
)
def test_the_plan_for_models_of_today(monkeypatch, capsys, model, parameters, row):
    assert launch_here(monkeypatch, "private_swarm.py", "--model", model) == 0
    shown = capsys.readouterr().out
    assert parameters in shown
    assert next(line for line in shown.splitlines() if "24 GB" in line).endswith(row)
    assert f"--model {model} --initial-peers ADDRESS" in shown


# ----------------------------------------------------------------------------------------- choosing what fits


@pytest.fixture(scope="module")
def bloomz() -> dict:
    return runpy.run_path(str(LAUNCHERS / "bloomz_7b1_local.py"), run_name="launcher")


@pytest.mark.parametrize(
    ("free", "model", "quantization", "at_once", "told"),
    [
        ({"cpu": 64 * GB, "cuda": 24 * GB}, "bigscience/bloomz-7b1-mt", "8bit", 16, "fits"),
        (
            {"cpu": 64 * GB, "cuda": 16 * GB},
            "bigscience/bloomz-7b1-mt",
            "8bit",
            8,
            "only 16.0 GB of its memory are free",
        ),
        *(
            pytest.param(
                {"cpu": 64 * GB, "cuda": size * GB},
                f"bigscience/{model}",
                bits,
                4,
                f"only {size}.0 GB",
                marks=pytest.mark.slow,
            )
            for size, model, bits in ((11, "bloomz-7b1-mt", "4bit"), (8, "bloomz-3b", "8bit"))
        ),
        (
            {"cpu": 64 * GB},
            "bigscience/bloomz-560m",
            None,
            16,
            "this machine has no CUDA GPU; training bigscience/bloomz-560m",
        ),
    ],
)
def test_the_best_that_fits_is_chosen_and_said(bloomz, free, model, quantization, at_once, told):
    choice, sentence = bloomz["choose"](bloomz["CHOICES"], free, quantizes=True)
    assert (choice.model, choice.quantization, choice.at_once) == (model, quantization, at_once)
    assert told in sentence


def test_without_bitsandbytes_nothing_is_quantised(bloomz):
    choice, sentence = bloomz["choose"](bloomz["CHOICES"], {"cpu": 64 * GB, "cuda": 80 * GB}, quantizes=False)
    assert choice.quantization is None
    assert "pip install bitsandbytes" in sentence


def test_a_machine_on_which_nothing_fits_is_told_what_is_needed(bloomz):
    with pytest.raises(
        ConfigError, match=r"needs about 17\.\d GB, but this machine has no CUDA GPU; .*bloom_petals.py"
    ):
        bloomz["choose"](bloomz["CHOICES"], {"cpu": GB}, quantizes=True)


def test_no_fallback_stops_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = launch_here(monkeypatch, "bloomz_7b1_local.py", "--no-fallback")
    assert said.startswith("error: bigscience/bloomz-7b1-mt (8bit, 16 responses at once, cuda) needs about")


@pytest.mark.parametrize("name", ["bloom_petals.py", "private_swarm.py", "bloomz_7b1_local.py"])
def test_help_is_what_it_does_what_it_needs_and_the_commands(monkeypatch, capsys, name):
    assert launch_here(monkeypatch, name, "--help") == 0
    shown = capsys.readouterr().out
    for text in ("What it does", "What it needs", f"python launchers/{name} --tiny", "textrl-swarm export"):
        assert text in shown
