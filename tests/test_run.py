"""Runs in a directory: what they write and refuse to continue; a killed one ends with the same adapter."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from architectures import character_tokenizer, tiny_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from textrl_swarm.commands.train import train_command
from textrl_swarm.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    ModelError,
    PromptError,
    RewardError,
)
from textrl_swarm.learning.learner import Learner
from textrl_swarm.runs.checkpoint import PENDING, checkpoints
from textrl_swarm.runs.config import RunConfig, load_config
from textrl_swarm.runs.run import Run, locked, open_policy, read_ingredients

REWARDS = """
import random
import numpy, torch

def vowels(items, texts):
    # Of the global generators, which a resumed run continues.
    noise = random.random() + numpy.random.rand() + float(torch.rand(()))
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) + 1e-3 * noise for text in texts]

def per_token(input_item, predicted_list, finish):
    return [float("a" in tokens[-1]) for tokens in predicted_list]
"""


SEEN = """
seen = []

def sentences(items, texts):
    seen.extend(texts)
    return [0.0 for text in texts]

def steps(input_item, predicted_list, finish):
    seen.extend(map("".join, predicted_list))
    return 0.0
"""


@pytest.fixture(autouse=True)
def rewards_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tasks.py").write_text(REWARDS)


@pytest.fixture
def configure(tiny_bloom):
    """Changes to the least configuration -> RunConfig."""

    def get(output: str = "runs/a", *overrides: str, **changes) -> RunConfig:
        values = {
            "model": str(tiny_bloom(seed=5, layers=2, hidden=32, vocab=48)), "output": output,
            "prompts": ["the soup", "my phone", "a"], "reward": "tasks.py:vowels",
            "sampling": {"max_new_tokens": 5, "num_samples": 2}, "lora": {"r": 2},
            "ppo": {"lr": 1e-2, "epochs": 2, "minibatch_size": 3, "adaptive_kl_target": 1.0},
            "train": {"iterations": 5, "prompts_per_iteration": 2, "samples_every": 2, "report_to": []},
        }  # fmt: skip
        return load_config({**values, **changes}, overrides)

    return get


def seeded() -> None:
    random.seed(0)
    np.random.seed(0)


def train(config: RunConfig, **options) -> str:
    """Runs the command; returns what it said."""
    console = Console(file=io.StringIO(), width=200)
    train_command(config, console, **options)
    return console.file.getvalue()


def trained(output: str) -> dict[str, torch.Tensor]:
    adapter = Path(output, "adapter")
    return {
        **load_file(adapter / "adapter_model.safetensors"),
        **load_file(adapter / "value_head.safetensors"),
    }


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def assert_same_run(a: str, b: str) -> None:
    one, other = trained(a), trained(b)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    measured = [
        [
            (line["iteration"], line["score"], line["kl"], line["policy_loss"])
            for line in lines(f"{run}/metrics.jsonl")
        ]
        for run in (a, b)
    ]
    assert measured[0] == measured[1]


# ------------------------------------------------------------------------------------------ what a run writes


def test_files_of_a_run(configure):
    said = train(
        configure(
            train={
                "iterations": 5,
                "prompts_per_iteration": 2,
                "samples_every": 2,
                "report_to": ["tensorboard"],
            }
        )
    )
    assert {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
        "summary.json",
    } <= set(os.listdir("runs/a"))
    assert PENDING not in os.listdir("runs/a")
    assert (
        load_config("runs/a/config.yaml").to_dict()
        == configure(
            train={
                "iterations": 5,
                "prompts_per_iteration": 2,
                "samples_every": 2,
                "report_to": ["tensorboard"],
            }
        ).to_dict()
    )
    assert [line["iteration"] for line in lines("runs/a/metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert {line["iteration"] for line in lines("runs/a/samples.jsonl")} == {1, 3, 5}
    assert {"prompt", "response", "score"} <= lines("runs/a/samples.jsonl")[0].keys()
    assert [path.name for path in checkpoints(Path("runs/a"))] == ["iteration_000004", "iteration_000005"]
    assert list(Path("runs/a/tensorboard").iterdir())
    summary = json.loads(Path("runs/a/summary.json").read_text())
    assert (summary["iterations"], summary["adapter"]) == (5, "runs/a/adapter")
    assert (
        "iteration 5/5  score" in said
        and "samples of iteration 1" in said
        and "adapter in runs/a/adapter" in said
    )


def test_a_second_time_there_is_nothing_left_to_do(configure):
    train(configure())
    before = trained("runs/a")
    assert "continuing runs/a after iteration 5 of 5" in train(configure())
    after = trained("runs/a")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(lines("runs/a/metrics.jsonl")) == 5


# ------------------------------------------------------------------------------------------------- continuing


def test_a_run_that_is_continued_ends_as_one_that_was_not_interrupted(configure):
    seeded()
    train(configure("runs/whole"))
    seeded()
    train(configure("runs/parts", "train.iterations=2"))
    random.random(), np.random.rand(), torch.rand(3)  # another process would begin with other numbers
    train(configure("runs/parts", "train.iterations=3"))
    train(configure("runs/parts"))
    assert_same_run("runs/whole", "runs/parts")


_KILLED = """
import os, sys
from rich.console import Console
from textrl_swarm.commands import train as train_command
from textrl_swarm.learning import ppo
from textrl_swarm.runs import checkpoint, run
from textrl_swarm.runs.config import load_config
import random, numpy
random.seed(0); numpy.random.seed(0)
where, at = sys.argv[2], int(sys.argv[3])
calls = 0
def deadly(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return call
module, name = {
    "update": (ppo.PPO, "_optimizer_step"),
    "saving": (checkpoint, "sha256"),
    "pending": (run, "save_pending"),
    "renaming": (os, "replace"),
}[where]
setattr(module, name, deadly(getattr(module, name)))
train_command.train_command(load_config(sys.argv[1]), Console())
"""


@pytest.mark.parametrize(
    ("where", "at"),
    [
        ("update", 7),
        pytest.param("saving", 8, marks=pytest.mark.slow),
        pytest.param("renaming", 6, marks=pytest.mark.slow),
        pytest.param("pending", 3, marks=pytest.mark.slow),
    ],
    ids=["update", "saving", "renaming", "sampled"],
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(configure, where, at):
    seeded()
    train(configure("runs/whole", "train.iterations=4"))
    Path("run.yaml").write_text(configure("runs/killed", "train.iterations=4").to_yaml())
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, "run.yaml", where, str(at)], capture_output=True, text=True
    )
    assert killed.returncode == -9, killed.stderr
    assert len(checkpoints(Path("runs/killed"))) > 0 and not Path("runs/killed/adapter").exists()
    assert "continuing" in train(configure("runs/killed", "train.iterations=4"))
    assert_same_run("runs/whole", "runs/killed")


def test_responses_that_were_sampled_are_not_sampled_again(configure, monkeypatch):
    """A failing reward loses nothing: once it is mended, the same responses are scored."""
    seeded()
    train(configure("runs/whole", "train.iterations=2"))
    seeded()
    train(configure("runs/b", "train.iterations=1"))
    Path("tasks.py").write_text(REWARDS.replace("return [sum", "return [1 / 0 or sum"))
    with pytest.raises(
        RewardError,
        match=r"ZeroDivisionError[\s\S]*The responses of iteration 2 are kept in runs/b: fix the reward",
    ):
        train(configure("runs/b", "train.iterations=2"))
    assert Path("runs/b", PENDING).is_file()
    Path("tasks.py").write_text(REWARDS)
    with monkeypatch.context() as patched:
        patched.setattr(
            "textrl_swarm.learning.loop.sample_responses", lambda *_: pytest.fail("sampled again")
        )
        train(configure("runs/b", "train.iterations=2"))
    assert_same_run("runs/whole", "runs/b")


def test_a_run_that_resamples_ends_as_one_that_was_not_interrupted(configure):
    """The rollout that waits for its rewards is completed as it would have been."""
    silent = REWARDS.replace("return [sum", "return [(item['input'] != 'a') * sum").replace(
        "+ 1e-3 * noise for text in texts", "for item, text in zip(items, texts)"
    )
    Path("tasks.py").write_text(silent)
    overrides = "train.iterations=3", "train.resample=2"
    train(configure("runs/whole", *overrides))
    Path("tasks.py").write_text(silent.replace("return [(", "return [(len(texts) > 2 or 1 / 0) * ("))
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        train(configure("runs/b", *overrides))
    assert Path("runs/b", PENDING).is_file()
    Path("tasks.py").write_text(silent)
    train(configure("runs/b", *overrides))
    assert_same_run("runs/whole", "runs/b")


def test_a_torn_pending_rollout_is_sampled_again(configure, caplog):
    seeded()
    train(configure("runs/whole", "train.iterations=2"))
    seeded()
    train(configure("runs/b", "train.iterations=1"))
    Path("runs/b", PENDING).write_bytes(b"PK\x03\x04 torn")
    train(configure("runs/b", "train.iterations=2"))
    assert "are sampled again" in caplog.text
    assert_same_run("runs/whole", "runs/b")


def test_ctrl_c_says_how_to_continue(configure, monkeypatch):
    update, calls = Run.shows_samples, []

    def interrupted(self, index):
        calls.append(index)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return update(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "shows_samples", interrupted)
        said = train(configure())
    assert "Stopped. 2 of 5 iterations are saved in runs/a; rerun the command to resume." in said
    assert "continuing runs/a after iteration 2 of 5" in train(configure())


class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_finalizer_is_not_lost(configure, monkeypatch):
    update = Run.shows_samples

    def finalizing(self, index):
        if index == 1:
            Finalized()
        return update(self, index)

    monkeypatch.setattr(Run, "shows_samples", finalizing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        assert "Stopped. 2 of 5 iterations are saved in runs/a" in train(configure())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reward_that_draws_numbers_is_seeded_too(configure):
    train(configure("runs/a", "train.iterations=2"))
    random.random(), np.random.rand(), torch.rand(3)
    train(configure("runs/b", "train.iterations=2"))
    assert_same_run("runs/a", "runs/b")


def test_settings_that_are_changed_and_accepted_hold(configure):
    train(configure("runs/a", "train.iterations=2"))
    changed = configure(
        "runs/a",
        "train.iterations=3",
        "ppo.kl_coef=5.0",
        "ppo.weight_decay=0.5",
        "ppo.adam_eps=0.1",
        "ppo.lr=0.25",
    )
    train(changed, accept_changes=True)
    line = lines("runs/a/metrics.jsonl")[-1]
    assert (line["kl_coef"], line["lr"]) == (5.0, 0.25)
    (group,) = torch.load(checkpoints(Path("runs/a"))[-1] / "learner.pt")["optimizer"]["param_groups"]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.25, 0.1, 0.5)


def test_a_reward_that_leaves_the_directory_does_not_take_the_run_along(configure, tmp_path):
    Path("tasks.py").write_text(
        REWARDS.replace("    return [sum", "    import os; os.chdir('/'); return [sum")
    )
    train(configure("runs/a", "train.iterations=2"))
    assert (tmp_path / "runs/a/adapter/adapter_config.json").is_file() and len(
        checkpoints(tmp_path / "runs/a")
    ) == 2


def test_a_rewards_module_may_switch_gradients_off(configure):
    Path("tasks.py").write_text(REWARDS + "\ntorch.set_grad_enabled(False)\n")
    try:
        train(configure("runs/a", "train.iterations=1"))
    finally:
        torch.set_grad_enabled(True)
    assert lines("runs/a/metrics.jsonl")[0]["grad_norm"] > 0


def test_a_reward_may_change_its_prompts_but_not_the_next_ones(configure):
    Path("tasks.py").write_text(
        "def longer(items, texts):\n    for item in items:\n        item['input'] += '!'\n    return "
        "[len(i['input']) for i in items]\n"
    )
    train(configure("runs/a", "train.iterations=3", "train.samples_every=1", reward="tasks.py:longer"))
    assert {line["prompt"] for line in lines("runs/a/samples.jsonl")} == {"the soup", "my phone", "a"}
    assert max(line["score"] for line in lines("runs/a/samples.jsonl")) == len("the soup!")


@pytest.mark.parametrize(
    "change",
    [
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_dtype(torch.float16)",
        "torch.set_default_device('meta')",
        "torch.set_grad_enabled(False)",
        "torch.set_autocast_enabled('cpu', True)",
        "os.makedirs('there', exist_ok=True); os.chdir('there')",
    ],
)
def test_settings_that_rewards_change_do_not_reach_the_training(configure, change):
    settings = ("train.iterations=2", "reward=tasks.py:vowels")
    train(configure("runs/plain", *settings))
    body = "    return [sum"
    for i, code in enumerate(
        (REWARDS + f"\nimport os; {change}\n", REWARDS.replace(body, f"    import os; {change}\n{body}"))
    ):
        # the noise that a reward draws depends on the default dtype, so it draws in float32 here
        Path("tasks.py").write_text(
            code.replace("torch.rand(())", "torch.rand((), dtype=torch.float32, device='cpu')")
        )
        train(configure(f"runs/{i}", *settings))
        assert_same_run("runs/plain", f"runs/{i}")
        assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


EMPTYING = """
def emptying(items, texts):
    counts = [float(len(item["keywords"])) for item in items]
    for item in items:
        item["keywords"].clear()
    return counts
"""


def test_a_resumed_run_scores_as_if_a_reward_had_not_changed_its_prompts(configure):
    Path("tasks.py").write_text(EMPTYING)
    prompts = [{"input": text, "keywords": ["a", "b", "c"]} for text in ("the soup", "my phone")]
    for output, iterations in (("runs/a", 3), ("runs/b", 1), ("runs/b", 3)):
        train(
            configure(output, f"train.iterations={iterations}", prompts=prompts, reward="tasks.py:emptying")
        )
    assert_same_run("runs/a", "runs/b")
    assert [line["score"] for line in lines("runs/a/metrics.jsonl")] == [3.0] * 3
    assert [prompt["keywords"] for prompt in prompts] == [["a", "b", "c"]] * 2


RESUMING = """
import sys
sys.path.insert(0, sys.argv[1])
import dataclasses, io
from rich.console import Console
from many_values import VALUES
from textrl_swarm.commands import train as command
from textrl_swarm.runs.config import load_config
from textrl_swarm.runs.run import read_ingredients
prompts = [{"input": "the soup", "values": VALUES}, {"input": "a", "words": {"x", "y", "z"}}]
command.read_ingredients = lambda config: dataclasses.replace(read_ingredients(config), prompts=prompts)
command.train_command(load_config(sys.argv[2]), Console())
"""


@pytest.mark.slow  # two processes, half a minute
def test_a_run_with_values_of_every_type_resumes_in_another_process(configure):
    Path("resuming.py").write_text(RESUMING)
    for iterations, seed in ((1, "1"), (2, "2")):
        Path("run.yaml").write_text(configure("runs/a", f"train.iterations={iterations}").to_yaml())
        done = subprocess.run(
            [sys.executable, "resuming.py", str(Path(__file__).parent), "run.yaml"],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "continuing runs/a after iteration 1" in done.stdout


_FORKING = """
import os, sys, time
from rich.console import Console
from textrl_swarm.commands import train as train_command
from textrl_swarm.runs.config import load_config
import tasks
def forks(items, texts):
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
    os.kill(os.getpid(), 9)
tasks.vowels = forks
train_command.train_command(load_config(sys.argv[1]), Console())
"""


def test_workers_of_a_killed_trainer_do_not_keep_its_directory(configure):
    Path("run.yaml").write_text(configure("runs/a", reward="tasks:vowels").to_yaml())
    killed = subprocess.Popen(
        [sys.executable, "-c", _FORKING, "run.yaml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert killed.wait(120) == -9
        orphans = [
            p
            for p in psutil.process_iter(["cmdline"])
            if "run.yaml" in (p.info["cmdline"] or ()) and p.pid != killed.pid
        ]
        assert orphans, "the forked worker is gone already"
        train(configure("runs/a", "train.iterations=1"))
    finally:
        for orphan in orphans:
            orphan.kill()


def test_what_a_killed_process_left_half_written_is_cleared_away(configure):
    train(configure("runs/a", "train.iterations=1"))
    shutil.copytree("runs/a/adapter", "runs/a/.adapter.0a1b2c3d.part")
    # About to be replaced, and the new one never came.
    shutil.copytree("runs/a/adapter", "runs/a/.other.0a1b2c3d.old")
    Path("runs/a/checkpoints/.iteration_000002.0a1b2c3d.part").mkdir()
    theirs = {".bashrc.old", ".video.part"}  # a run's directory may be anybody's
    for name in theirs:
        Path("runs/a", name).write_text("mine")
    train(configure("runs/a", "train.iterations=2"))
    left = {path.name for path in Path("runs/a").rglob(".*")}
    assert left == {".lock", *theirs} and Path("runs/a/other/adapter_config.json").is_file()


def test_a_finished_run_says_the_same_when_it_is_asked_again(configure):
    train(configure("runs/a", "train.iterations=2"))
    first = json.loads(Path("runs/a/summary.json").read_text())
    train(configure("runs/a", "train.iterations=2"))
    assert json.loads(Path("runs/a/summary.json").read_text()) == first
    assert first["last"]["iteration"] == 2 and first["last"]["score"] > 0 and first["seconds"] > 0


def test_lines_that_are_none_of_ours_are_dropped_from_the_metrics(configure):
    train(configure("runs/a", "train.iterations=1"))
    with open("runs/a/metrics.jsonl", "a") as file:
        file.write('[]\n{"score": 1}\n{"iteration": null}\n{"iteration": 2, "sco')
    train(configure("runs/a", "train.iterations=2"))
    assert [line["iteration"] for line in lines("runs/a/metrics.jsonl")] == [1, 2]


def test_a_full_disk_is_told_and_loses_nothing(configure, monkeypatch):
    train(configure("runs/a", "train.iterations=1"))

    def full(*_, **__):
        raise RuntimeError("unexpected pos 1024 vs 918")  # as torch.save says it

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "save", full)
        with pytest.raises(
            CheckpointError,
            match=r"iteration_000002 cannot be written .*free some space and rerun the command",
        ):
            train(configure("runs/a", "train.iterations=2"))
    assert "after iteration 1" in train(configure("runs/a", "train.iterations=2"))


# -------------------------------------------------------------------------------------------- what is refused


def test_blocks_that_changed_in_place_are_noticed(configure, tiny_bloom, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_bloom(seed=5, layers=2, hidden=32, vocab=48), model)
    train(configure("runs/a", "train.iterations=1", f"model={model}"))
    weights = load_file(model / "model.safetensors")
    save_file(
        {k: t * 1.5 if "dense" in k and "weight" in k else t for k, t in weights.items()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="the contents of the base model's blocks changed"):
        train(configure("runs/a", "train.iterations=2", f"model={model}"))
    assert "after iteration 1" in train(
        configure("runs/a", "train.iterations=2", f"model={model}"), accept_changes=True
    )


def test_a_users_own_file_of_that_name_is_not_replaced(configure):
    Path("runs/a").mkdir(parents=True)
    own = "# mine\n" + configure("runs/a").to_yaml().partition("\n")[2]
    Path("runs/a/config.yaml").write_text(own)
    with pytest.raises(CheckpointError, match="is a file of your own"):
        train(configure())
    assert Path("runs/a/config.yaml").read_text() == own


def test_a_model_without_a_tokenizer(configure, tiny_bloom, tmp_path):
    shutil.copytree(
        tiny_bloom(seed=5, layers=2, hidden=32, vocab=48),
        tmp_path / "model",
        ignore=shutil.ignore_patterns("token*", "special*"),
    )
    with pytest.raises(ModelError, match="has no tokenizer"):
        train(configure(model=str(tmp_path / "model")))


def test_a_changed_configuration_is_refused_with_what_changed(configure):
    train(configure("runs/a", "train.iterations=1"))
    changed = configure("runs/a", "ppo.lr=0.5", "sampling.top_k=3")
    with pytest.raises(CheckpointError) as caught:
        train(changed)
    assert "ppo.lr: 0.01 -> 0.5" in str(caught.value) and "sampling.top_k: 0 -> 3" in str(caught.value)
    assert "--accept-changes" in str(caught.value) and "iterations" not in str(caught.value)
    assert "continuing runs/a after iteration 1" in train(changed, accept_changes=True)
    assert load_config("runs/a/config.yaml").ppo.lr == 0.5


def test_before_the_first_iteration_is_done_anything_may_be_changed(configure):
    """Its responses, sampled with other settings, are not used."""
    Path("tasks.py").write_text(REWARDS.replace("return [sum", "return [1 / 0 or sum"))
    with pytest.raises(RewardError):
        train(configure())
    Path("tasks.py").write_text(REWARDS)
    train(configure("runs/a", "sampling.max_new_tokens=3"))
    assert all(len(line["response"]) <= 3 for line in lines("runs/a/samples.jsonl"))


def test_changed_prompts_are_noticed(configure):
    Path("prompts.txt").write_text("the soup\nmy phone\n")
    train(configure("runs/a", "train.iterations=1", "prompts=prompts.txt"))
    Path("prompts.txt").write_text("the soup\n")
    with pytest.raises(CheckpointError, match="the contents of prompts changed"):
        train(configure("runs/a", "prompts=prompts.txt"))
    assert "after iteration 1" in train(configure("runs/a", "prompts=prompts.txt"), accept_changes=True)


def test_a_checkpoint_of_another_base_model_is_refused(configure, tiny_bloom, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_bloom(seed=5, layers=2, hidden=32, vocab=48), model)
    train(configure("runs/a", "train.iterations=1", f"model={model}"))
    shutil.rmtree(model)
    # The same shapes, other weights.
    shutil.copytree(tiny_bloom(seed=6, layers=2, hidden=32, vocab=48), model)
    with pytest.raises(CheckpointError, match="was trained on another base model"):
        train(configure("runs/a", f"model={model}"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "state"])
def test_a_damaged_checkpoint_is_passed_over(configure, damage, caplog):
    seeded()
    train(configure("runs/whole"))
    seeded()
    train(configure("runs/b", "train.iterations=4"))
    newest = checkpoints(Path("runs/b"))[-1]
    weights = newest / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "missing":
        (newest / "learner.pt").unlink()
    elif damage == "flipped":
        save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    else:
        (newest / "state.json").write_text('{"iteration": 4, "fi')
    assert "continuing runs/b after iteration 3 of 5" in train(configure("runs/b"))
    assert "is damaged" in caplog.text
    assert_same_run("runs/whole", "runs/b")


def test_nothing_but_damaged_checkpoints_is_an_error(configure):
    train(configure("runs/a", "train.iterations=2"))
    for checkpoint in checkpoints(Path("runs/a")):
        (checkpoint / "learner.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"all checkpoints in .*runs/a/checkpoints are damaged; move .*runs/a away"
    ):
        train(configure())


def test_a_checkpoint_under_another_name_while_it_is_written_does_not_count(configure):
    train(configure("runs/a", "train.iterations=1"))
    shutil.copytree(
        "runs/a/checkpoints/iteration_000001", "runs/a/checkpoints/.iteration_000002.12345678.part"
    )
    assert "after iteration 1" in train(configure("runs/a", "train.iterations=2"))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"model": "./nowhere"}, ModelError, "there is no directory nowhere"),
        ({"prompts": "prompts.jsonl"}, PromptError, "there is no prompts file"),
        ({"reward": "tasks.py:vowel"}, ConfigError, "did you mean 'vowels'?"),
        ({"reward": "task.py:vowels"}, ConfigError, "there is no file task.py"),
        ({"reward": {"model": "./nowhere", "label": "x"}}, ModelError, "there is no directory"),
        ({"reward": ["tasks.py:per_token", "tasks.py:vowels"]}, ConfigError, "asked after every token"),
        ({"ref_adapter": "nowhere"}, AdapterError, "ref_adapter: nowhere holds no adapter"),
        ({"output": "tasks.py"}, CheckpointError, "tasks.py is a file"),
        ({"swarm": {"initial_peers": ["nonsense"]}}, Exception, "not a peer's address"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(configure, changes, error, told):
    with pytest.raises(error) as caught:
        train(configure(**changes))
    assert told in str(caught.value)
    assert not checkpoints(Path("runs/a"))


def test_a_prompt_that_is_too_long_is_told_before_anything_is_trained(configure, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")  # 64 positions
    character_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(PromptError, match="prompt 1 has 60 tokens; with max_new_tokens=5 that makes 65"):
        train(configure(model=str(tmp_path / "gpt2"), prompts=["a", "a" * 60]))
    assert not checkpoints(Path("runs/a"))


def test_a_limit_below_the_longest_response_is_told_before_anything_is_trained(configure):
    with pytest.raises(ConfigError, match="may have 25 tokens, which are computed at once: set it to 25 or"):
        train(configure("runs/a", "ppo.micro_batch_tokens=24", prompts=["a", "a" * 20]))
    assert not checkpoints(Path("runs/a"))


def test_parts_and_checkpointing_train_the_same(configure):
    """As fp32 sums them in another order."""
    train(configure("runs/a"))
    train(configure("runs/b", "ppo.micro_batch_tokens=30", "gradient_checkpointing=true"))
    expected = trained("runs/a")
    for name, tensor in trained("runs/b").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_one_process_at_a_time(configure):
    with (
        locked(Path("runs/a")),
        pytest.raises(ConfigError, match=rf"another process \({os.getpid()}\) is training in runs/a"),
    ):
        train(configure())
    train(configure("runs/a", "train.iterations=1"))


def test_a_directory_with_another_config_yaml(configure):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text("- nothing of ours")
    with pytest.raises(CheckpointError, match="is a file of your own, which the run would replace"):
        train(configure())


# -------------------------------------------------------------------------------- the rest of a configuration


def test_a_ref_adapter_makes_the_kl_begin_at_zero(configure):
    train(configure("runs/sft", "train.iterations=2"))
    train(configure("runs/a", "train.iterations=2", ref_adapter="runs/sft/adapter"))
    kl = [line["kl"] for line in lines("runs/a/metrics.jsonl")]
    assert kl[0] == 0 and kl[1] != 0
    weights = Path("runs/sft/adapter/adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(CheckpointError, match="the contents of ref_adapter changed"):
        train(configure("runs/a", ref_adapter="runs/sft/adapter"))


def test_rewards_that_are_summed_are_logged_apart(configure):
    Path("tasks.py").write_text(
        REWARDS + "\ndef shortness(items, texts):\n    return [-float(len(t)) for t in texts]\n"
    )
    parts = [{"function": "tasks.py:vowels", "weight": 2}, {"function": "tasks.py:shortness", "weight": 0.5}]
    train(configure("runs/a", "train.iterations=1", reward=parts))
    (line,) = lines("runs/a/metrics.jsonl")
    assert line["score"] == pytest.approx(
        2 * line["reward/vowels"] + 0.5 * line["reward/shortness"], abs=1e-5
    )
    assert line["reward/shortness"] < 0


def test_a_reward_that_is_asked_after_every_token(configure):
    train(configure("runs/a", "train.iterations=1", reward="tasks.py:per_token"))
    assert len(lines("runs/a/metrics.jsonl")) == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_reporters_get_every_number(configure, monkeypatch, name):
    """Beside the real ones (below), whose files hold more than these calls."""
    told = []
    reporter = types.SimpleNamespace(
        init=lambda **options: told.append(options), log=lambda values, step: told.append((step, values)),
        Table=lambda columns, data: (columns, data), finish=lambda: told.append("end"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, name, reporter)
    train(configure("runs/a", "train.iterations=2", "train.samples_every=5", f"train.report_to=[{name}]"))
    started, *logged, ended = told
    assert started["config"]["train"]["iterations"] == 2 and ended == "end"
    assert [step for step, _ in logged] == [1, 1, 2, 2]
    numbers, table = logged[0][1], logged[1][1]
    assert numbers["score"] == lines("runs/a/metrics.jsonl")[0]["score"]
    columns, rows = table["samples"]
    assert [dict(zip(columns, row, strict=False)) for row in rows] == [
        {key: line[key] for key in columns}
        for line in lines("runs/a/samples.jsonl")
        if line["iteration"] == 1
    ]


@pytest.mark.slow  # the imports and servers of three trackers
def test_real_reporters_continue_the_same_run(configure, tmp_path):
    """Both as they are, in a process of their own, without an account.

    W&B keeps files to be uploaded later, trackio a database.
    """
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    Path("run.yaml").write_text(configure("runs/a", "train.report_to=[wandb,trackio]").to_yaml())
    for iterations in (2, 3):
        command = [
            sys.executable,
            "-m",
            "textrl_swarm.cli",
            "train",
            "run.yaml",
            "--set",
            f"train.iterations={iterations}",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len({path.name.rsplit("-", 1)[1] for path in Path("wandb").glob("offline-run-*-*")}) == 1
    assert len(list(Path("wandb").glob("offline-run-*-*/run-*.wandb"))) == 2
    with sqlite3.connect(tmp_path / "trackio" / "textrl-swarm.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id").fetchall()
    assert len({name for name, *_ in rows}) == 1
    scores = {step: json.loads(values)["score"] for _, step, values in rows if "score" in json.loads(values)}
    assert scores == {line["iteration"]: line["score"] for line in lines("runs/a/metrics.jsonl")}
    assert {step for _, step, values in rows if "samples" in json.loads(values)} == {1, 2, 3}


def test_a_reporter_that_is_not_installed(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="'wandb', which is not installed; type: pip install wandb"):
        train(configure(train={"report_to": ["wandb"]}))


def test_a_slow_reward_ends_the_run_with_its_responses_kept(configure):
    Path("tasks.py").write_text("import time\ndef slow(items, texts):\n    time.sleep(60)\n")
    with pytest.raises(
        RewardError, match=r"took longer than reward_timeout_s=0\.1 [\s\S]*are kept in runs/a"
    ):
        train(configure(reward="tasks.py:slow", train={"reward_timeout_s": 0.1, "report_to": []}))


@pytest.mark.parametrize("settings", [{"quantization": "8bit"}, {"dtype": "bfloat16"}], ids=str)
def test_other_precisions(configure, settings):
    train(configure("runs/a", "train.iterations=2", **settings))
    assert all(
        tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in trained("runs/a").values()
    )


@pytest.mark.swarm
def test_through_a_swarm_the_run_ends_with_the_same_adapter(configure, two_servers):
    """With blocks of its own on the machine that trains, too."""
    configs = {"runs/here": configure("runs/here", "train.iterations=2", model=two_servers.model)}
    for name, local_blocks in (("runs/there", [0, 0]), ("runs/ends", [1, 1])):
        swarm = {"initial_peers": list(two_servers.initial_peers), "local_blocks": local_blocks}
        configs[name] = configure(name, "train.iterations=2", model=two_servers.model, swarm=swarm)
    for config in configs.values():
        seeded()
        said = train(config)
    assert "on 2 server(s) of a swarm" in said
    one, *others = map(trained, configs)
    for other in others:
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5
    here, *elsewhere = (lines(f"{run}/metrics.jsonl") for run in configs)
    for there in elsewhere:
        assert [line["score"] for line in here] == [line["score"] for line in there]
        assert there[0]["bytes_sent"] > 0 == here[0]["bytes_sent"]


def test_dry_run_starts_nothing(configure):
    said = train(configure(), dry_run=True)
    assert "max_new_tokens: 5" in said and "trainable parameters" in said
    assert not Path("runs").exists()


@pytest.mark.swarm
def test_a_dry_run_measures_the_way_to_the_servers(configure, two_servers):
    peers = {"initial_peers": list(two_servers.initial_peers)}
    said = train(configure("runs/a", model=two_servers.model, swarm=peers), dry_run=True)
    assert re.search(r"bytes per iteration, 2 server\(s\)", said) and "4 server(s)" not in said
    assert re.search(r"[\d.]+ ms there and back, [\d.]+ [MG]bit/s in all", said)
    assert re.search(r"network time per iteration \W+[\d.]+ to [\d.]+ s", said)
    said = train(
        configure("runs/a", model=two_servers.model, swarm={**peers, "local_blocks": [1, 1]}), dry_run=True
    )
    assert "the servers hold blocks 1..2" in said and "bytes per iteration, 2 server(s)" in said
    with pytest.raises(ConfigError, match=r"local_blocks=\[1, 3\] leaves nothing to the swarm"):
        train(
            configure("runs/a", model=two_servers.model, swarm={**peers, "local_blocks": [1, 3]}),
            dry_run=True,
        )
    assert not Path("runs").exists()


def test_samples_are_the_first_of_each_prompt(configure):
    config = configure("runs/a", "train.iterations=1")
    with open_policy(config, read_ingredients(config).model) as policy:
        run = Run(config, read_ingredients(config), policy)
        (iteration,) = run.iterations()
    rows = lines("runs/a/samples.jsonl")
    assert [row["response"] for row in rows] == [
        iteration.collected.rollout.texts[0],
        iteration.collected.rollout.texts[2],
    ]


@pytest.mark.parametrize("form", ["sentences", "steps"])
@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_in_rewards(configure, tiny_bloom, form, skip):
    Path("seen.py").write_text(SEEN)
    model = shutil.copytree(tiny_bloom(seed=5, layers=2, hidden=32, vocab=48), "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["e"]})  # a token that is said now and then
    tokenizer.save_pretrained(model)
    config = configure(
        "runs/special", f"train.skip_special_tokens={str(skip).lower()}", "sampling.temperature=9",
        "sampling.max_new_tokens=24", "train.iterations=1", f"model={model}", reward=f"seen.py:{form}",
    )  # fmt: skip
    ingredients = read_ingredients(config)
    with open_policy(config, ingredients.model) as policy:
        list(Run(config, ingredients, policy).iterations())
    seen = ingredients.reward.__globals__["seen"]
    assert seen and any("e" in text for text in seen) != skip
