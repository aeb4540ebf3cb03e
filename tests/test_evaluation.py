"""Held-out prompts: what is scored and kept, when a run ends early, and runs compared."""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from textrl_swarm.commands.compare import compare_command
from textrl_swarm.commands.train import train_command
from textrl_swarm.config import LoraSettings, SamplingConfig
from textrl_swarm.errors import ConfigError, PromptError
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.runs.config import RunConfig, load_config
from textrl_swarm.runs.evaluation import read_evaluations

REWARDS = """
import random

def vowels(items, texts):
    return [sum(c in "aeiou" for c in t) / max(1, len(t)) + 1e-9 * random.random() for t in texts]

def falling(items, texts, seen=[]):
    seen.append(None)
    return [-float(len(seen))] * len(texts)
"""
HELD_OUT = {"prompts": ["the tea", "my bed"], "every": 2, "samples": 3}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tasks.py").write_text(REWARDS)


@pytest.fixture
def configure(tiny_bloom):
    def get(output: str, evaluation=HELD_OUT, reward: str = "vowels", **changes) -> RunConfig:
        return load_config(
            {
                "model": str(tiny_bloom(seed=5, layers=2, hidden=32, vocab=48)),
                "output": output, "prompts": ["the soup", "my phone", "a"], "reward": f"tasks.py:{reward}",
                "sampling": {"max_new_tokens": 5, "num_samples": 2}, "lora": {"r": 2},
                "ppo": {"lr": 1e-2, "epochs": 2, "minibatch_size": 3},
                "train": {"iterations": 5, "prompts_per_iteration": 2, "report_to": []},
                "evaluation": evaluation, **changes,
            }
        )  # fmt: skip

    return get


def train(config: RunConfig) -> tuple[str, dict]:
    random.seed(0)
    np.random.seed(0)
    console = Console(record=True, width=200, file=io.StringIO())
    summary = train_command(config, console)
    return console.export_text(), summary


def adapter(path: str) -> dict[str, torch.Tensor]:
    return load_file(f"{path}/adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_policy_is_evaluated_and_the_best_is_kept(configure):
    config = configure("runs/a")
    said, summary = train(config)
    lines = read_evaluations(Path("runs/a"))
    assert [line["iteration"] for line in lines] == [0, 2, 4, 5]
    best = max(lines, key=lambda line: line["sampled"])
    assert summary["best"] == {"iteration": best["iteration"], "score": best["sampled"]}
    assert f"best on held-out prompts: {best['sampled']:.3f} after iteration {best['iteration']}" in said
    assert re.search(r"iteration 4/5 .* held out \d\.\d{3} sampled, \d\.\d{3} greedy", said)
    metrics = {
        line["iteration"]: line
        for line in map(json.loads, Path("runs/a/metrics.jsonl").read_text().splitlines())
    }
    for line in lines[1:]:
        assert metrics[line["iteration"]]["evaluation/sampled"] == line["sampled"]
    assert "evaluation/sampled" not in metrics[1]
    # What the kept adapter says is what was scored.
    with load_policy(config.model, lora=LoraSettings(r=2)) as policy:
        policy.load_adapter("runs/a/best")
        sampling = SamplingConfig(max_new_tokens=5, do_sample=False)
        texts = policy.generate(HELD_OUT["prompts"], sampling).texts
    score = sum(sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts) / 2
    assert best["greedy"] == pytest.approx(score, abs=1e-6)


def test_a_run_learns_the_same_with_evaluations_and_without(configure):
    train(configure("runs/a"))
    train(configure("runs/b", evaluation=None))
    assert same(adapter("runs/a/adapter"), adapter("runs/b/adapter"))


def test_a_run_that_is_continued_evaluates_the_rest(configure, monkeypatch):
    train(configure("runs/whole"))
    with monkeypatch.context() as patched:
        patched.setattr("textrl_swarm.runs.run.save_checkpoint", _interrupted_at(4))
        train(configure("runs/b"))
    assert [line["iteration"] for line in read_evaluations(Path("runs/b"))] == [0, 2, 4]
    train(configure("runs/b"))
    assert read_evaluations(Path("runs/b")) == read_evaluations(Path("runs/whole"))
    assert same(adapter("runs/b/best"), adapter("runs/whole/best"))


def _interrupted_at(iteration: int):
    from textrl_swarm.runs.checkpoint import save_checkpoint

    def save(run, done, *args, **options):
        if done == iteration:
            raise KeyboardInterrupt
        return save_checkpoint(run, done, *args, **options)

    return save


def test_a_run_that_gets_no_better_ends(configure):
    held_out = {**HELD_OUT, "every": 1, "patience": 2}
    said, summary = train(configure("runs/a", held_out, reward="falling"))
    assert summary["iterations"] == 2 and summary["best"]["iteration"] == 0
    assert "2 evaluations without a better one ended the run" in said
    _, again = train(configure("runs/a", held_out, reward="falling"))
    assert again["iterations"] == 2  # it stays ended
    _, longer = train(configure("runs/a", {**held_out, "patience": 3}, reward="falling"))
    assert longer["iterations"] == 3


def test_other_held_out_prompts_begin_anew(configure):
    train(configure("runs/a"))
    train(configure("runs/a", {**HELD_OUT, "prompts": ["a cat"]}, train={
        "iterations": 6, "prompts_per_iteration": 2, "report_to": [],
    }))  # fmt: skip
    assert [line["iteration"] for line in read_evaluations(Path("runs/a"))] == [6]


def test_scores_of_another_kind_are_not_compared(configure):
    train(configure("runs/a", {**HELD_OUT, "samples": 0, "by": "greedy"}))
    longer = {"iterations": 6, "prompts_per_iteration": 2, "report_to": []}
    _, summary = train(configure("runs/a", train=longer))
    assert summary["best"]["iteration"] == 6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": []}, ConfigError, "evaluation.prompts must be a list, a file, or a mapping"),
        ({"every": 0}, ConfigError, "every must be a whole number >= 1, got 0"),
        ({"samples": -1}, ConfigError, "samples must be a whole number >= 0, got -1"),
        ({"patience": 0}, ConfigError, "patience must be a whole number >= 1, got 0"),
        ({"samples": 0}, ConfigError, "by: sampled needs samples"),
        ({"by": "score"}, ConfigError, "evaluation.by: input should be 'sampled' or 'greedy'"),
        ({"prompts": [""]}, PromptError, "the input must be a text that is not empty"),
        ({"prompts": "missing.txt"}, PromptError, "missing.txt"),
    ],
)
def test_bad_settings_are_refused_before_the_run(configure, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        train(configure("runs/a", {**HELD_OUT, **changes}))
    assert not Path("runs/a/metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------- compare


def compared(*runs: str, out: str | None = None) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    compare_command([Path(run) for run in runs], None if out is None else Path(out), console)
    return console.export_text()


def test_runs_beside_each_other(configure):
    train(configure("runs/a"))
    train(configure("runs/b", None, ppo={"algorithm": "rloo", "lr": 1e-3}))
    said = compared("runs/a", "runs/b", out="pictures/compared.png")
    metrics = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    tokens = sum(4 * line["response_tokens"] for line in metrics)
    best = max(read_evaluations(Path("runs/a")), key=lambda line: line["sampled"])
    row = next(line for line in said.splitlines() if "runs/a" in line)
    for told in (
        f"{tokens:,.0f}", f"{metrics[0]['score']:.3f}", f"{metrics[-1]['score']:.3f}",
        f"{metrics[-1]['kl']:.3f}", f"{best['sampled']:.3f} at {best['iteration']}",
    ):  # fmt: skip
        assert told in row
    assert 'ppo.algorithm: "ppo" -> "rloo"' in said and "ppo.lr: 0.01 -> 0.001" in said
    assert "output" not in said
    assert Path("pictures/compared.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_trained_is_counted(configure):
    """A value head of 33 numbers is trained with a critic only."""
    counts = []
    for output, algorithm in (("runs/a", "ppo"), ("runs/b", "rloo")):
        config = configure(
            output, None, ppo={"algorithm": algorithm}, train={"iterations": 1, "report_to": []}
        )
        said, _ = train(config)
        counts.append(re.search(r"([\d,]+) trainable parameters", said)[1])
        console = Console(record=True, width=200, file=io.StringIO())
        train_command(replace(config, output="elsewhere"), console, dry_run=True)
        counts.append(re.search(r"trainable parameters\D+([\d,]+) of", console.export_text())[1])
    with_head, planned, without, planned_without = (int(count.replace(",", "")) for count in counts)
    assert with_head == planned == without + 33 == planned_without + 33


def test_what_is_no_run_is_refused(configure):
    Path("empty").mkdir()
    train(configure("runs/a", None))
    with pytest.raises(ConfigError, match=r"--out c.foo: a picture's name ends in .png, .pdf"):
        compared("runs/a", out="c.foo")
    Path("runs/a/config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"runs/a/config.yaml is no run's configuration"):
        compared("runs/a")
    with pytest.raises(ConfigError, match="empty holds no run with a finished iteration"):
        compared("empty")
