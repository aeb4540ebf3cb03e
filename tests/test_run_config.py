"""Run configurations: what is read, what is refused and with which words, and what survives a round trip."""

from __future__ import annotations

import datetime
import enum
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from textrl_swarm.config import LoraSettings, PPOConfig
from textrl_swarm.errors import ConfigError
from textrl_swarm.runs.config import RewardConfig, differences, load_config

LEAST = {"model": "./m", "prompts": ["The soup is"], "reward": "tasks:score", "output": "runs/x"}
FULL = """
model: ./my-bloom
swarm:
  initial_peers: [/ip4/127.0.0.1/tcp/1/p2p/a]
lora: {r: 4, alpha: 8, targets: [dense], layers: 2}
sampling: {max_new_tokens: 24, temperature: 0.7, num_samples: 2}
ppo: {lr: 1e-3, target_kl: 0.1}
prompts: prompts.jsonl
reward:
  - {model: ./classifier, label: positive, weight: 2}
  - tasks:length
train: {iterations: 5, report_to: []}
output: runs/ü
seed: 3
"""


def test_a_file_with_everything(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(FULL, encoding="utf-8")
    config = load_config(path)
    assert config.swarm.initial_peers == ("/ip4/127.0.0.1/tcp/1/p2p/a",)
    assert config.lora == LoraSettings(r=4, alpha=8, targets=("dense",), layers=2)
    assert config.ppo.lr == 1e-3  # YAML 1.1 reads 1e-3 as a text
    assert config.reward == (
        RewardConfig(model="./classifier", label="positive", weight=2),
        RewardConfig(function="tasks:length"),
    )
    assert (config.sampling.num_samples, config.train.report_to, config.output) == (2, (), "runs/ü")


def test_one_seed_for_everything():
    config = load_config({**LEAST, "seed": 7})
    assert (config.seed, config.ppo.seed, config.sampling.seed) == (7, 7, 7)


def test_round_trip_through_plain_values(tmp_path):
    config = load_config({**LEAST, "seed": 7, "ppo": {"lr": 1e-5}, "lora": {"layers": 3}})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == load_config(config.to_dict()) == config


def test_four_samples_unless_told_otherwise():
    assert (
        load_config(LEAST).sampling.num_samples
        == load_config({**LEAST, "sampling": {"top_k": 3}}).sampling.num_samples
        == 4
    )


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("ppo.lr=3e-4", lambda c: c.ppo.lr, 3e-4),
        ("lora.targets=[dense, query_key_value]", lambda c: c.lora.targets, ("dense", "query_key_value")),
        ("quantization=8bit", lambda c: c.quantization, "8bit"),
        ("train.reward_timeout_s=2.5", lambda c: c.train.reward_timeout_s, 2.5),
        ("reward=other:score", lambda c: c.reward[0].function, "other:score"),
        ("output=runs/a=b", lambda c: c.output, "runs/a=b"),
        ("swarm=null", lambda c: c.swarm, None),
    ],
)
def test_overrides(override, get, expected):
    before = dict(LEAST)
    assert get(load_config(LEAST, [override])) == expected
    assert before == LEAST


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modell": "x"}, "unknown key 'modell'; did you mean 'model'?"),
        ({"lr": 1}, "unknown key 'lr'; did you mean 'ppo.lr'?"),
        ({"ppo": {"learning_rat": 1}}, "unknown key 'ppo.learning_rat'; known: adam_eps"),
        ({"ppo": {"epoch": 1}}, "unknown key 'ppo.epoch'; did you mean 'epochs'?"),
        ({"lora": {"rank": 4}}, "unknown key 'lora.rank'"),
        ({"reward": {"functon": "a:b"}}, "unknown key 'reward.0.functon'; did you mean 'function'?"),
        (
            {"ppo": {"epochs": "four"}},
            'ppo.epochs: input should be a valid integer, unable to parse string as an integer, got "four"',
        ),
        ({"ppo": {"epochs": 0}}, "ppo: epochs must be a whole number >= 1, got 0"),
        ({"ppo": 3}, "ppo: input should be a dictionary"),
        ({"model": None}, "model: input should be a valid string, got null"),
        ({"prompts": 3}, "prompts must be a list, a file, or a mapping with the key dataset; got 3"),
        ({"prompts": []}, "prompts must be a list"),
        ({"reward": 3}, "reward: input should be a list, got 3"),
        ({"reward": []}, "reward is empty"),
        ({"reward": {"label": "x"}}, 'give each reward either function: "module:name" or model: NAME'),
        (
            {"reward": {"function": "a:b", "label": "x"}},
            "label and with_prompt belong to a reward with model:",
        ),
        ({"swarm": {}}, "the key 'swarm.initial_peers' is missing"),
        ({"swarm": {"initial_peers": 5}}, "swarm.initial_peers: input should be a list, got 5"),
        ({"output": " "}, "output is empty; name a directory"),
        ({"seed": -1}, "seed must be in 0..4294967295, got -1"),
        ({"seed": 2**32}, "seed must be in 0..4294967295"),
        (
            {"reward": {"model": "m", "label": True}},
            "reward.0.label: YAML reads True; put a label such as yes or no in quotes",
        ),
        ({"swarm": {"initial_peers": ["a"]}, "quantization": "8bit"}, "servers of a swarm choose their own"),
        (
            {"ppo": {"algorithm": "rloo"}, "sampling": {"num_samples": 1}},
            "rloo compares the responses to a prompt (baseline: leave_one_out); sampling.num_samples must be "
            "at least 2, got 1",
        ),
        (
            {"train": {"resample": 1}, "sampling": {"num_samples": 1}},
            "train.resample replaces prompts whose responses score the same; sampling.num_samples must",
        ),
        (
            {"swarm": {"initial_peers": ["a"]}, "gradient_checkpointing": True},
            "servers always compute blocks again in backward",
        ),
        ({"swarm": {"initial_peers": ["a"], "codec": "8bit"}}, "codec must be fp16 or int8, got '8bit'"),
        (
            {"swarm": {"initial_peers": ["a"], "codec": {"kind": "int8", "max_nats": 0}}},
            "max_nats must be > 0, got 0",
        ),
        ({"ppo": {"micro_batch_tokens": 0}}, "micro_batch_tokens must be a whole number >= 1 or None, got 0"),
        ({"quantization": "3bit"}, "quantization: input should be '8bit' or '4bit', got \"3bit\""),
        ({"sampling": {"seed": 1}}, "sampling.seed: a run has one seed; set the key `seed` instead"),
        ({"sampling": {"temperature": 0}}, "temperature must be > 0"),
        (
            {"train": {"report_to": ["tensorbord"]}},
            "train.report_to.0: input should be 'tensorboard', 'wandb' or 'trackio'",
        ),
        ({"train": {"iterations": 0}}, "iterations must be a whole number >= 1, got 0"),
        ({"train": {"reward_timeout_s": -1}}, "reward_timeout_s must be > 0 seconds or null, got -1"),
    ],
)
def test_what_is_refused(changes, expected):
    with pytest.raises(ConfigError) as caught:
        load_config({**LEAST, **changes})
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "get", "expected"),
    [
        ({"ppo": None, "train": None}, lambda c: (c.ppo.lr, c.train.iterations), (1e-4, 100)),
        ({"sampling": None}, lambda c: c.sampling.num_samples, 4),
        ({"swarm": {"initial_peers": "/ip4/1"}}, lambda c: c.swarm.initial_peers, ("/ip4/1",)),
        ({"lora": {"targets": "dense"}}, lambda c: c.lora.targets, ("dense",)),
        ({"train": {"report_to": "wandb"}}, lambda c: c.train.report_to, ("wandb",)),
        ({"output": "~/runs"}, lambda c: c.output, str(Path.home() / "runs")),
        (
            {"prompts": [{"input": "x", "when": datetime.date(2026, 1, 2)}]},
            lambda c: c.to_dict()["prompts"][0]["when"],
            "2026-01-02",
        ),
    ],
)
def test_what_may_be_written_shorter(changes, get, expected):
    assert get(load_config({**LEAST, **changes})) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: a\nseed: 1\nseed: 2\n", "the key 'seed' is there twice"),
        ("ppo: {lr: 1}\nmodel: a\nppo: {epochs: 2}\n", "the key 'ppo' is there twice"),
        ("? [a, b]\n: 1\n", "is not YAML"),
        ("model: " + "[" * 3000, "is not YAML"),
        ("seed: " + "1" * 5000, "is not YAML"),
        ("output: 2024-99-99", "is not YAML: month must be in 1..12"),
    ],
    ids=["key", "section", "list", "deep", "digits", "date"],
)
def test_files_that_are_refused(tmp_path, text, told):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config(tmp_path / "run.yaml")


def test_an_override_that_is_no_yaml():
    with pytest.raises(ConfigError, match="--set output=2024-99-99: the value is not YAML"):
        load_config(LEAST, ["output=2024-99-99"])


def test_every_complaint_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config({"model": 3, "prompts": ["a"], "ppo": {"epochs": "x"}})
    assert all(
        key in str(caught.value)
        for key in ("model:", "ppo.epochs:", "'reward' is missing", "'output' is missing")
    )


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (None, "there is no configuration file"),
        (b"model: [", "is not YAML"),
        (b"- a\n- b", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"model: \xff\xfe", "is not UTF-8 text"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, contents, expected):
    (tmp_path / "other.yaml").write_text("model: m")
    path = tmp_path / "run.yaml"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert contents is not None or "other.yaml" in str(caught.value)


@pytest.mark.parametrize("override", ["ppo.lr", "=3", "ppo.lr=[1"])
def test_overrides_that_are_refused(override):
    with pytest.raises(ConfigError, match="--set"):
        load_config(LEAST, [override])


def test_differences_name_the_key_and_both_values():
    old, new = (
        load_config(LEAST).to_dict(),
        load_config({**LEAST, "ppo": {"lr": 1e-3}, "lora": {"r": 2}}).to_dict(),
    )
    lines = differences(old, new)
    assert lines[0].startswith('lora: null -> {"r": 2')
    assert lines[1:] == ["ppo.lr: 0.0001 -> 0.001"]
    assert differences(old, old) == []


def with_value(value) -> dict:
    return {**LEAST, "prompts": [{"input": "a", "key": value}]}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"b", "a"}, "prompts.0.key: config.yaml cannot hold a set; give sorted(...)"),
        (frozenset("a"), "cannot hold a frozenset; give sorted(...)"),
        (np.arange(3), "cannot hold a ndarray; give its .tolist()"),
        (torch.ones(2), "cannot hold a Tensor; give its .tolist()"),
        ([1, {"deep": {"a"}}], "prompts.0.key.1.deep: config.yaml cannot hold a set"),
        ({("a", 1): 2}, "prompts.0.key: config.yaml cannot hold a tuple"),
        (b"x", "cannot hold a bytes"),
        (1j, "cannot hold a complex"),
        (threading.Lock(), "cannot hold a lock"),
        (LoraSettings(), "cannot hold a LoraSettings"),
    ],
)
def test_values_that_a_file_cannot_hold_are_refused_and_not_made_texts(value, told):
    with pytest.raises(ConfigError) as caught:
        load_config(with_value(value))
    assert told in str(caught.value)


def test_lists_without_end_are_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="prompts: lists and mappings are nested too deep"):
        load_config({**LEAST, "prompts": loop})


Color = enum.Enum("Color", {"RED": "r"}, type=str)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({1: "a", 2.5: "b", None: "c", False: "d"}, {1: "a", 2.5: "b", None: "c", False: "d"}),
        ((1, (2,)), [1, [2]]),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.str_("a"), "a"),
        (Color.RED, "r"),
        (Path("/a"), "/a"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        ("\u2028\x85\ud800", "\u2028\x85\ud800"),
        (2**70, 2**70),
    ],
)
def test_values_that_survive_a_round_trip(tmp_path, value, kept):
    config = load_config(with_value(value))
    assert config.prompts[0]["key"] == kept
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    assert differences(load_config(path).to_dict(), config.to_dict()) == []


def test_values_of_a_file_are_those_of_the_file_that_it_becomes(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: m\nreward: a:b\noutput: o\n"
        "prompts:\n- {input: a, when: 2026-01-02, labels: {0: bad, 1: good}}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    assert config.prompts == [{"input": "a", "when": "2026-01-02", "labels": {0: "bad", 1: "good"}}]
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_nan_has_not_changed(tmp_path):
    old, new = (load_config(with_value([float("nan")])).to_dict() for _ in range(2))
    assert differences(old, new) == []
    assert differences(old, load_config(with_value([1.0])).to_dict()) != []


def test_the_users_own_values_are_not_changed():
    mine = {**LEAST, "ppo": {"lr": 1}, "prompts": [{"input": "a", "keywords": ["x"]}]}
    config = load_config(mine, ["ppo.lr=2", "train.iterations=3"])
    config.prompts[0]["keywords"].clear()
    assert mine == {**LEAST, "ppo": {"lr": 1}, "prompts": [{"input": "a", "keywords": ["x"]}]}


def test_home_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        {
            "model": "~/m", "ref_adapter": "~/a", "output": "~/runs/a/", "prompts": {"dataset": "~/p"},
            "reward": [{"function": "~/r.py:f"}, {"model": "~/c"}],
        }
    )  # fmt: skip
    assert (config.model, config.ref_adapter, config.output) == (
        "/home/me/m",
        "/home/me/a",
        "/home/me/runs/a",
    )
    assert config.prompts == {"dataset": "/home/me/p"}
    assert (config.reward[0].function, config.reward[1].model) == ("/home/me/r.py:f", "/home/me/c")
    assert load_config({**LEAST, "prompts": "~/p.txt"}).prompts == "/home/me/p.txt"
    assert load_config(LEAST, ["reward=~/r.py:f"]).reward[0].function == "/home/me/r.py:f"
    assert load_config({**LEAST, "output": "~nobody-here/x"}).output == "~nobody-here/x"


def test_another_algorithm_on_a_configuration_that_is_written_out(tmp_path):
    """What was the former algorithm's goes with it; what was chosen stays."""
    whole = load_config({**LEAST, "ppo": {"clip_range": 0.1}}, ["ppo.lr=3e-4"])
    path = tmp_path / "config.yaml"
    path.write_text(whole.to_yaml())
    found = load_config(path, ["ppo.kl_coef=0.02", "ppo.algorithm=grpo"]).ppo
    expected = PPOConfig(algorithm="grpo", clip_range=0.1, lr=3e-4, kl_coef=0.02, seed=found.seed)
    assert found == expected
    assert load_config(path).ppo == whole.ppo and load_config(path, ["ppo.algorithm=ppo"]) == whole
