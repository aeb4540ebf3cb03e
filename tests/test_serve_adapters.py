"""Adapters that servers load at start: stock petals clients get what plain transformers + peft give."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from petals import DistributedBloomForCausalLM
from plain_peft import PlainPeft, assert_same, connect, difference, fill, random_tokens, run
from rich.console import Console
from stock_client import _greedy_by_session, end

from textrl_swarm.commands.serve import _check_adapters, serve_command
from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import AdapterError
from textrl_swarm.models.base_model import resolve
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.local import LocalSwarm

TOKENS = torch.tensor([[9, 8, 7, 30, 31], [50, 51, 52, 53, 54]])


@pytest.fixture(scope="module")
def plain(tiny_bloom, tmp_path_factory):
    """Directory name -> the adapter there, on plain transformers + peft: in all blocks or the last two."""
    directory, made = tmp_path_factory.mktemp("adapters"), {}
    for name, lora in (
        ("kind", LoraSettings(r=4)),
        ("late", LoraSettings(r=2, rank_stabilized=True, targets=("dense", "dense_h_to_4h"), layers=2)),
    ):
        with load_policy(tiny_bloom(seed=1), lora=lora) as policy:
            fill(policy, lora.r)
            made[directory / name] = PlainPeft(policy, directory / name)
    return made


@pytest.mark.slow  # half a minute
@pytest.mark.swarm
def test_stock_clients_get_the_adapter_that_they_name(tiny_bloom, plain, tmp_path):
    with LocalSwarm(
        tiny_bloom(seed=1), num_servers=2, server_options=("--adapters", *map(str, plain))
    ) as swarm:
        base = next(iter(plain.values())).model
        for directory, oracle in plain.items():
            logits, tokens, grad = talk(swarm, active_adapter=directory.name)
            assert difference(logits, oracle.run(TOKENS).logits) < 1e-4
            assert tokens == [oracle.greedy(row.tolist(), 6) for row in TOKENS]
            assert torch.isfinite(grad).all() and grad.abs().max() > 0
        with base.disable_adapter(), torch.no_grad():
            expected = base(TOKENS).logits
        logits, _, _ = talk(swarm)  # without one it is the base
        assert difference(logits, expected) < 1e-5 and difference(oracle.run(TOKENS).logits, expected) > 0.05
        with connect(swarm, LoraSettings(r=3), filled=3) as policy:  # and the same servers train
            assert_same(
                run(policy, random_tokens(2, 7, seed=1)),
                PlainPeft(policy, tmp_path).run(random_tokens(2, 7, seed=1)),
            )


def talk(swarm, **options) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """A stock client: logits, greedy continuations through a session, gradient of the embeddings."""
    model = DistributedBloomForCausalLM.from_pretrained(
        swarm.model,
        initial_peers=swarm.initial_peers,
        dht_prefix=resolve(swarm.model).dht_prefix,
        max_retries=5,
        request_timeout=20,
        **options,
    )
    try:
        embeddings = model.transformer.word_embeddings(TOKENS).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        logits.square().mean().backward()
        return logits.detach(), _greedy_by_session(model, TOKENS, 6).tolist(), embeddings.grad
    finally:
        end(model)


def test_names_are_those_of_the_directories(tiny_bloom, plain):
    model = str(tiny_bloom(seed=1))
    assert _check_adapters(resolve(model), ["--adapters", *map(str, plain), "--device", "cpu"]) == [
        "kind",
        "late",
    ]
    assert _check_adapters(resolve(model), ["--device", "cpu"]) == []


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ("nothing", "'nothing' is neither a directory nor an adapter on the hub"),
        ("empty", "holds no adapter: there is no adapter_config.json"),
        ("wide", "does not fit"),
        ("gpt2", "which is no LoRA weight inside a block|does not fit"),
        ("alphas", "has rank_pattern or alpha_pattern; only one rank and alpha"),
        ("twice/kind", "two adapters would both be announced as 'kind'"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_a_server_starts(
    tiny_bloom, plain, tmp_path, monkeypatch, made, told
):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    kind = next(iter(plain))
    shutil.copytree(kind, "twice/kind")
    shutil.copytree(kind, "alphas")
    config = json.loads(Path("alphas/adapter_config.json").read_text())
    Path("alphas/adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"dense": 32}}))
    for name, model in (("wide", tiny_bloom(seed=3, hidden=48)), ("gpt2", tiny_model("gpt2"))):
        with contextlib.closing(load_policy(model, lora=LoraSettings(r=2))) as policy:
            policy.save_adapter(name)
    options = ["--adapters", made, *([str(kind)] if made == "twice/kind" else [])]
    with pytest.raises(AdapterError, match=told):
        serve_command(str(tiny_bloom(seed=1)), 1, [], options, Console(file=io.StringIO()))
