"""Clients and servers mean the same model, down to its numbers; a client's own part of it is whole."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from plain_peft import assert_same, connect, random_tokens, run
from safetensors.torch import load_file, save_file

from textrl_swarm import cli
from textrl_swarm.config import SamplingConfig, Timeouts
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.errors import BlocksUnavailable, ModelError, ServerFailed, ServerMismatch
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.client.chain import run_in_background
from textrl_swarm.swarm.client.rpc import ServerCalls
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.swarm.protocol import ServedWeights

pytestmark = pytest.mark.swarm

TOKENS = random_tokens(3, 7, seed=3)
NOBODY = ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWMkdAkJw8nTLLrZg8nZbmzt9vWnn4h2Zn5nYxQbnYwTcE"]
FAST = Timeouts(connect_s=5, request_s=20, discovery_s=10, recovery_s=20)

# ------------------------------------------------------------------------------ one name, two models


def test_a_client_of_another_model_with_the_same_name_and_shapes_is_told(two_servers, tiny_bloom):
    names = {"initial_peers": two_servers.initial_peers, "dht_prefix": two_servers.dht_prefix}
    text = (
        rf"server …\w{{6}} announces '{two_servers.dht_prefix}' but holds another model: the weights of "
        r"blocks [02]\.\.[13] \(\w{12}\.\.\.\) are not those of this machine's checkpoint \(\w{12}\.\.\.\)"
    )
    with pytest.raises(ServerMismatch, match=text):
        load_policy(tiny_bloom(seed=9), **names, timeouts=FAST)


def without_blocks(model: Path, directory: Path) -> Path:
    """What a client has that downloaded no more than it needs."""
    shutil.copytree(model, directory)
    weights = load_file(directory / "model.safetensors")
    own = {name: tensor for name, tensor in weights.items() if ".h." not in name}
    save_file(own, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_one_changed_number_is_another_model(two_servers, tiny_bloom, tmp_path):
    model = shutil.copytree(tiny_bloom(seed=1), tmp_path / "changed")
    weights = load_file(model / "model.safetensors")
    weights["transformer.h.3.mlp.dense_4h_to_h.bias"][5] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    names = {"initial_peers": two_servers.initial_peers, "dht_prefix": two_servers.dht_prefix}
    with pytest.raises(ServerMismatch, match=r"the weights of block 3 \("):
        load_policy(model, **names, timeouts=FAST)
    with load_policy(without_blocks(model, tmp_path / "parts"), **names, timeouts=FAST) as policy:
        policy(TOKENS)  # nothing to compare the servers' blocks with


def spoil_expectations(policy) -> None:
    """Makes the client believe that it met these servers with other weights."""
    client = policy._client
    for span in client.spans:
        uids = client.router.uids[span.start : span.stop]
        client._calls.expect(span.peer, dict.fromkeys(uids, ServedWeights("0" * 64, "float32", None)))


def test_every_request_is_refused_by_a_server_with_other_weights(two_servers):
    with connect(two_servers, filled=90) as policy:
        calls, span = policy._client._calls, policy._client.spans[0]
        uids = policy._client.router.uids[span.start : span.stop]
        hidden, adapter = torch.zeros(1, 2, policy.hidden_size), policy._take_snapshot(policy._flats())

        async def generate():
            stream = await calls.open_generation(span.peer, uids, rows=1, max_length=4, key="")
            await stream.send(hidden, Chunk(0), step=0, last_only=False)
            return await stream.receive(hidden, last_only=False)

        sizes = [adapter.blocks[block].numel() for block in range(span.start, span.stop)]
        requests = {
            "forward": lambda: calls.forward(span.peer, uids, hidden, ""),
            "push": lambda: calls.push(span.peer, uids, range(span.start, span.stop), adapter),
            "backward": lambda: calls.backward(span.peer, uids, hidden, hidden, adapter.key, sizes, True),
            "generation": generate,
        }
        for make in requests.values():
            run_in_background(make())
        spoil_expectations(policy)
        for make in requests.values():
            with pytest.raises(
                ServerFailed, match="have other weights or another dtype here than when asked"
            ):
                run_in_background(make())


def test_a_server_that_was_restarted_is_asked_again_which_weights_it_has(two_servers, monkeypatch):
    asked, info = [], ServerCalls.info

    async def counted(self, peer, uid):
        asked.append(peer)
        return await info(self, peer, uid)

    monkeypatch.setattr(ServerCalls, "info", counted)
    sampling = SamplingConfig(max_new_tokens=4, do_sample=False)
    with connect(two_servers, filled=91) as policy:
        expected, generated = run(policy, TOKENS), policy.generate([[5, 6, 7]], sampling)
        assert len(asked) == 2
        spoil_expectations(policy)
        assert_same(run(policy, TOKENS), expected)
        assert len(asked) == 4
        spoil_expectations(policy)
        assert policy.generate([[5, 6, 7]], sampling).tokens.equal(generated.tokens)
        assert len(asked) == 6


def test_a_server_that_comes_back_with_fewer_blocks_is_used_for_them(tiny_bloom):
    """The announcements that it made before, under the same id, have not expired yet."""
    with LocalSwarm(tiny_bloom(seed=1), spans=[(2, 4), (0, 4)]) as swarm:
        with connect(swarm, filled=4) as policy:
            assert len(policy._client.spans) == 1  # the second, which reaches furthest
            expected = run(policy, TOKENS)
            swarm.kill(1)
            swarm._spans[1] = (0, 2)
            swarm.start(1)
            assert_same(run(policy, TOKENS), expected, tolerance=1e-6)
        with connect(swarm) as policy:
            assert [(span.start, span.stop) for span in policy._client.spans] == [(0, 2), (2, 4)]


@pytest.mark.slow  # starts a server of its own, twice
def test_a_server_that_comes_back_with_another_model_is_refused(tiny_bloom, tmp_path):
    served = shutil.copytree(tiny_bloom(seed=1), tmp_path / "a" / "checkpoint-500")
    ours = without_blocks(served, tmp_path / "b" / "checkpoint-500")
    with LocalSwarm(served, num_servers=1) as swarm:
        options = {"initial_peers": swarm.initial_peers, "timeouts": FAST}
        with load_policy(ours, **options) as policy:
            policy(TOKENS)
            shutil.copy(tiny_bloom(seed=9) / "model.safetensors", served)
            swarm.kill(0)
            swarm.start(0)
            with pytest.raises(ServerMismatch, match=r"blocks 0\.\.3 .* are not those of server …\w{6} \("):
                policy(TOKENS)
        with load_policy(ours, **options) as policy:  # a new client knows nothing of the time before
            policy(TOKENS)
        with pytest.raises(ServerMismatch, match="this machine's checkpoint"):
            load_policy(tiny_bloom(seed=1), dht_prefix="checkpoint-500", **options)


@pytest.mark.slow  # starts a server of its own
def test_a_server_with_other_weights_does_not_join(two_servers, tiny_bloom, monkeypatch, capfd):
    address = two_servers.initial_peers[0]
    command = ["textrl-swarm", "serve", str(tiny_bloom(seed=9)), "--initial-peers", address]
    options = ["--dht_prefix", two_servers.dht_prefix, "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
    monkeypatch.setattr("sys.argv", [*command, *options, "--device", "cpu", "--no_auto_relay"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    shown = " ".join(capfd.readouterr().err.split())
    assert f"this swarm serves another model as '{two_servers.dht_prefix}'" in shown
    assert "choose another name for yours: --dht_prefix NAME" in shown


def test_a_chain_that_mixes_forms_says_so(two_servers, caplog):
    with connect(two_servers) as policy, caplog.at_level(logging.WARNING):
        client, span = policy._client, policy._client.spans[1]
        alike = {span.start: ServedWeights("", "float32", None)}
        client._tell_mixture(span, alike)
        assert "do not compute alike" not in caplog.text
        other = {span.start: ServedWeights("", "float32", "int8")}
        for _ in range(2):
            client._tell_mixture(span, other)
    assert caplog.text.count("do not compute alike, so results depend on which of them answers") == 1
    assert re.search(
        r"blocks 0\.\.1 on server …\w+: float32; blocks 2\.\.3 on server …\w+: float32 \(int8\)", caplog.text
    )


# ------------------------------------------------------------------------------ the client's own part


def rewrite(change):
    """Changes the dictionary of weights in model.safetensors."""

    def spoil(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return spoil


def lacking(name: str):
    return rewrite(lambda weights: weights.pop(f"transformer.{name}"))


def with_nan(name: str):
    return rewrite(lambda weights: weights[f"transformer.{name}"].view(-1)[3:4].fill_(float("nan")))


def untied(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def replaced(content: bytes):
    return lambda model: (model / "model.safetensors").write_bytes(content)


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4000\n"


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lacking("word_embeddings.weight"), "weights are missing in the checkpoint"),
        (lacking("ln_f.weight"), "1 weights are missing in the checkpoint .* e.g. transformer.ln_f.weight"),
        (lacking("word_embeddings_layernorm.bias"), "e.g. transformer.word_embeddings_layernorm.bias"),
        (untied, "1 weights are missing in the checkpoint .* e.g. lm_head.weight"),
        (with_nan("ln_f.bias"), "transformer.ln_f.bias in the checkpoint of .* NaN or infinite numbers"),
        (with_nan("word_embeddings.weight"), "word_embeddings.weight in the checkpoint of .* NaN"),
        (replaced(POINTER), "the weights of .* cannot be loaded"),
        (replaced(b""), "the weights of .* cannot be loaded"),
        (cut, "the weights of .* cannot be loaded"),
    ],
)  # fmt: skip
def test_a_client_whose_own_part_is_not_whole(tiny_bloom, tmp_path, spoil, text):
    model = shutil.copytree(tiny_bloom(seed=1), tmp_path / "model")
    spoil(model)
    for initial_peers in (None, NOBODY):  # as locally, and before anybody is asked
        if initial_peers is None and "NaN" in text:
            continue  # a local policy finds them by computing: tests/test_local_policy.py
        with pytest.raises(ModelError, match=text):
            load_policy(model, initial_peers=initial_peers)


def test_without_a_tokenizer_prompts_are_token_ids(two_servers, tiny_bloom, tmp_path):
    model = shutil.copytree(tiny_bloom(seed=1), tmp_path / two_servers.dht_prefix)
    for file in model.glob("tokenizer*"):
        file.unlink()
    with load_policy(model, initial_peers=two_servers.initial_peers) as policy:
        assert policy.tokenizer is None
        assert policy.generate([[5, 6]], SamplingConfig(max_new_tokens=2)).tokens.shape[1] == 4


def test_an_impossible_device_is_told_before_anybody_is_asked(tiny_bloom):
    from textrl_swarm.errors import ConfigError

    with pytest.raises(ConfigError, match="device='nowhere' cannot be used on this machine"):
        load_policy(tiny_bloom(seed=1), initial_peers=NOBODY, device="nowhere")


def test_the_blocks_are_not_in_the_clients_memory(two_servers):
    with connect(two_servers) as policy:
        assert not any(".h." in name for name, _ in policy._parts.skeleton.model.named_parameters())
    with pytest.raises(BlocksUnavailable):
        load_policy(
            two_servers.model,
            initial_peers=two_servers.initial_peers,
            dht_prefix="elsewhere",
            timeouts=Timeouts(connect_s=5, discovery_s=1),
        )
