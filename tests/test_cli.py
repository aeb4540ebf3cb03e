"""The command line as its users meet it: help, errors in one line, `serve`, `demo`; and a quiet import."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import typer
from architectures import character_tokenizer, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig

from textrl_swarm import cli
from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import ServerFailed
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.client.rpc import ServerCalls

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(typer.main.get_command(cli.app).commands)
LOOPBACK = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
ADDRESS = re.compile(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+")
ENDS_WITHIN_S = 60  # or it hangs; 10 s on a machine that does nothing else


def main(monkeypatch, *arguments: str) -> int:
    """The exit code of `textrl-swarm ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["textrl-swarm", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


class Command:
    """`textrl-swarm ARGUMENTS` in a process of its own."""

    def __init__(self, *arguments: object):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "textrl_swarm.cli", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=ROOT, env={**os.environ, "COLUMNS": "200"}, preexec_fn=_listen_to_ctrl_c,
        )  # fmt: skip
        self.said = ""

    def wait_for(self, text: str) -> str:
        """Everything said up to the line that holds `text`."""
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return self.said
        raise AssertionError(f"ended with {self.process.wait()} before saying {text!r}:\n{self.said}")

    def ctrl_c(self) -> list[psutil.Process]:
        """As a terminal would; returns the processes that shall end."""
        parent = psutil.Process(self.process.pid)
        family = [parent, *parent.children(recursive=True)]
        self.process.send_signal(signal.SIGINT)
        return family

    def finish(self) -> int:
        self.said += self.process.stdout.read()
        return self.process.wait()


def _listen_to_ctrl_c() -> None:
    # Background jobs of a shell inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[Command]:
    command = Command(*arguments)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.send_signal(signal.SIGTERM)
        command.finish()
        command.process.stdout.close()


# -------------------------------------------------------------------------------------------- help and errors


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=str)
def test_every_command_explains_itself_with_examples(monkeypatch, capsys, arguments):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(monkeypatch, *arguments, "--help") == 0
    shown = capsys.readouterr().out
    if arguments:
        assert f"textrl-swarm {arguments[0]} " in shown.split("Usage")[1]  # the examples
    else:
        assert all(name in shown for name in COMMANDS)


def test_the_commands():
    assert {"demo", "serve"} <= set(COMMANDS)


def test_a_peer_id_stays_the_same(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["textrl-swarm", "peer-id", str(tmp_path / "key")])
    shown = []
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].startswith("Qm")
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0


def test_no_command_shows_the_help(monkeypatch, capsys):
    assert main(monkeypatch) in (0, 2)
    shown = capsys.readouterr()
    assert "demo" in shown.out + shown.err


@pytest.fixture(scope="module")
def not_bloom(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("t5")
    AutoConfig.for_model("t5").save_pretrained(directory)
    (directory / "model.safetensors").touch()
    return directory


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve", "/no/such/model", "--new-swarm"], "/no/such/model"),
        (["serve", "/no/such/[/odd] one", "--new-swarm"], "/no/such/[/odd] one"),
        (["serve", "NOT_BLOOM", "--new-swarm"], "t5 is an encoder-decoder model"),
        (
            ["serve", "BLOOM", "--new-swarm", "--servers", "5"],
            "4 blocks can be split over 1 to 4 servers, not 5",
        ),
        (
            ["serve", "BLOOM", "--new-swarm", "--servers", "2", "--block_indices", "0:2"],
            "leave out --block_indices",
        ),
        (
            ["serve", "BLOOM", "--initial-peers", "localhost:31337"],
            "'localhost:31337' is not a peer's address",
        ),
        (["serve", "BLOOM", "--initial-peers", "/ip4/127.0.0.1/tcp/31337"], "is not a peer's address"),
        (["serve", "BLOOM", "--new-swarm", "--secret-file", "/no/such"], "/no/such cannot be read"),
        (["serve", "BLOOM", "--new-swarm", "--allowed-peers", "/no/such"], "/no/such cannot be read"),
        (["serve", "BLOOM", "--new-swarm", "--identity_path", "/dev/null"], "/dev/null is not a file"),
        (["peer-id", "/no/such/key"], "/no/such/key cannot be made"),
        (["demo", "--quantization", "3bit", "--out", "OUT"], "quantization must be 8bit or 4bit, got '3bit'"),
        (["demo", "--servers", "5", "--out", "OUT"], "has 4 blocks"),
        (["demo", "--family", "lama", "--out", "OUT"], "no tiny model of 'lama'; did you mean 'llama'?"),
        (["demo", "--local", "--out", "NOT_BLOOM"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line_and_exit_code_1(
    monkeypatch, capsys, tiny_bloom, not_bloom, tmp_path, arguments, told
):
    if "NOT_BLOOM" in arguments and "demo" in arguments:
        (tmp_path / "base_model").mkdir()
        (tmp_path / "base_model" / "thesis.tex").touch()
        arguments, told = (
            ["demo", "--local", "--out", tmp_path],
            "holds something other than a tiny model of ours",
        )
    places = {"BLOOM": tiny_bloom(), "NOT_BLOOM": not_bloom, "OUT": tmp_path}
    assert main(monkeypatch, *(places.get(argument, argument) for argument in arguments)) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.strip().splitlines()
    assert line.startswith("error: ") and told in line
    assert "Traceback" not in shown.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "BLOOM"],
        ["serve", "BLOOM", "--new-swarm", "--initial-peers", "/ip4/192.0.2.7/tcp/31337/p2p/12D3KooW"],
        ["serve"],
        ["demo", "--servers", "0"],
        ["demo", "--iterations", "many"],
        ["serv"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(monkeypatch, capsys, tiny_bloom, arguments):
    assert (
        main(monkeypatch, *(tiny_bloom() if argument == "BLOOM" else argument for argument in arguments)) == 2
    )
    shown = capsys.readouterr().err
    assert "Usage" in shown and "Traceback" not in shown
    if arguments[:2] == ["serve", "BLOOM"]:
        assert "--new-swarm (start one) or --initial-peers" in " ".join(shown.replace("│", " ").split())


def test_addresses_and_options_that_follow():
    peer = "/ip4/192.0.2.7/tcp/31337/p2p/12D3KooW"
    assert cli._split_addresses([peer], [f"/dns/a{peer}", *LOOPBACK, "--cache_dir", "/data"]) == (
        [peer, f"/dns/a{peer}"], [*LOOPBACK, "--cache_dir", "/data"],
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- import


def test_importing_the_package_does_nothing_visible():
    code = """
import os, sys, threading
before, opened = dict(os.environ), []
def hook(event, args):
    if event.startswith(("socket.", "subprocess.", "urllib.")):
        opened.append((event, args))
sys.addaudithook(hook)
import textrl_swarm
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert not opened, opened
heavy = {"torch", "transformers", "peft", "petals", "hivemind", "pfrl", "gym", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert threading.active_count() == 1
assert set(textrl_swarm.__all__) <= set(dir(textrl_swarm))
import logging
assert not logging.getLogger().handlers and not logging.getLogger("textrl_swarm").handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_is_there():
    import textrl_swarm

    for name in textrl_swarm.__all__:
        assert getattr(textrl_swarm, name).__name__ == name
    with pytest.raises(AttributeError, match="No textrl_swarm attribute TextRLenv"):
        _ = textrl_swarm.TextRLenv


def run_file(directory: Path, model: Path, **changes) -> Path:
    """The least run.yaml."""
    (directory / "rewards.py").write_text("def score(items, texts):\n    return [0.0 for text in texts]\n")
    values = {
        "model": str(model), "prompts": ["az"], "reward": f"{directory}/rewards.py:score",
        "output": str(directory / "run"), "sampling": {"max_new_tokens": 3},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "report_to": []},
    }  # fmt: skip
    (directory / "run.yaml").write_text(json.dumps({**values, **changes}))
    return directory / "run.yaml"


@pytest.mark.parametrize("do_sample", ["true", "false"])
def test_logits_that_are_no_numbers_are_one_line_and_exit_code_1(monkeypatch, capsys, tmp_path, do_sample):
    """One word's embedding is damaged: the model loads, and the prompt has that word."""
    model, tokenizer = tiny_model("llama"), character_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("z")] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = run_file(tmp_path, tmp_path / "model")
    assert main(monkeypatch, "train", config, "--set", f"sampling.do_sample={do_sample}") == 1
    said = capsys.readouterr()
    assert (
        "error: rows [0, 1, 2, 3] of the model's logits hold NaN" in said.err and "Traceback" not in said.err
    )


@pytest.mark.swarm
@pytest.mark.parametrize("do_sample", ["true", "false"])
def test_a_swarm_whose_numbers_are_none(monkeypatch, capsys, tmp_path, tiny_bloom, two_servers, do_sample):
    original = ServerCalls.open_generation

    async def open_generation(self, *args, **options):
        stream = await original(self, *args, **options)

        async def receive(hidden, *, last_only):
            raise ServerFailed("server X returned NaN or infinite numbers")

        stream.receive = receive
        return stream

    monkeypatch.setattr(ServerCalls, "open_generation", open_generation)
    swarm = {
        "initial_peers": two_servers.initial_peers, "dht_prefix": two_servers.dht_prefix,
        "timeouts": {"connect_s": 5, "request_s": 10, "discovery_s": 10, "recovery_s": 3},
    }  # fmt: skip
    config = run_file(tmp_path, tiny_bloom(seed=1), swarm=swarm)
    assert main(monkeypatch, "train", config, "--set", f"sampling.do_sample={do_sample}") == 1
    said = capsys.readouterr().err
    assert "returned NaN or infinite numbers" in said.split("error:")[1] and "Traceback" not in said


def test_a_stop_string_of_the_model_that_is_no_token(monkeypatch, capsys, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    written = tmp_path / "model" / "generation_config.json"
    written.write_text(json.dumps({"eos_token_id": 0, "stop_strings": ["the end"]}))
    config = run_file(tmp_path, tmp_path / "model")
    assert main(monkeypatch, "train", config) == 1
    assert (
        "'the end' is not one token: the tokenizer splits it into ['t', 'h', 'e'" in capsys.readouterr().err
    )
    monkeypatch.setattr(
        sys, "argv", ["textrl-swarm", "train", str(config), "--set", "sampling.stop_token_ids=[0]"]
    )
    with contextlib.suppress(SystemExit):
        cli.main()
    assert (tmp_path / "run" / "summary.json").is_file(), "ids are the way out"


# ------------------------------------------------------------------------------------------------------ serve


@pytest.mark.swarm
def test_serve_a_client_joins_another_server_joins_and_ctrl_c_ends_all(tiny_bloom):
    model = tiny_bloom(seed=4)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with load_policy(model) as local, torch.no_grad():
        expected = local(tokens).logits
    with started("serve", model, "--servers", 2, "--new-swarm", *LOOPBACK) as first:
        said = first.wait_for("Ctrl-C ends the servers")
        assert "holds blocks 0..1 of 4" in said and "holds blocks 2..3 of 4" in said
        address = re.search(r"--initial-peers (\S+)", said)[1]  # of the line to paste
        assert (
            ADDRESS.fullmatch(address) and f'load_policy({str(model)!r}, initial_peers=["{address}"])' in said
        )
        with load_policy(str(model), initial_peers=[address]) as policy, torch.no_grad():
            assert policy.num_servers == 2
            assert torch.allclose(policy(tokens).logits, expected, atol=1e-5)
        with started(
            "serve", model, "--initial-peers", address, "--block_indices", "1:3", *LOOPBACK
        ) as second:
            assert "holds blocks 1..2 of 4" in second.wait_for("Ctrl-C ends the servers")
            second_address = ADDRESS.search(second.said.split("clients join")[1])[0]
            with load_policy(str(model), initial_peers=[second_address]) as policy, torch.no_grad():
                # Knows the blocks of the others.
                assert torch.allclose(policy(tokens).logits, expected, atol=1e-5)
            families = [first.ctrl_c(), second.ctrl_c()]
            assert (first.finish(), second.finish()) == (0, 0)
    assert (
        sum(process.name() == "p2pd" for family in families for process in family if process.is_running())
        == 0
    )
    gone, alive = psutil.wait_procs(
        [process for family in families for process in family], timeout=ENDS_WITHIN_S
    )
    assert not alive and len(gone) > 9
    for command in (first, second):
        assert command.said.strip().endswith("all servers have ended")


# ------------------------------------------------------------------------------------------------------- demo

SUMMARY = {
    "score_before", "score_after", "kl", "seconds", "servers", "base_model", "adapter", "iterations",
    "tokens_per_second", "bytes_sent", "bytes_received",
}  # fmt: skip


@pytest.fixture
def out(tmp_path, hardly_pretrained) -> Path:
    return out_with(hardly_pretrained, tmp_path / "runs")


def out_with(base_model: Path, directory: Path) -> Path:
    directory.mkdir()
    (directory / "base_model").symlink_to(base_model)
    return directory


@pytest.fixture(scope="module")
def local_demo(tmp_path_factory, hardly_pretrained) -> tuple[Path, str]:
    """Where it wrote, and what it said."""
    out = out_with(hardly_pretrained, tmp_path_factory.mktemp("local") / "runs")
    with started("demo", "--local", "--iterations", 2, "--out", out) as command:
        assert command.finish() == 0, command.said
    return out, command.said


def check_outcome(out: Path, iterations: int, servers: int) -> dict:
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert (summary["iterations"], summary["servers"], summary["plain_peft_agrees"]) == (
        iterations,
        servers,
        True,
    )
    assert 0 <= summary["score_before"] <= 1 and 0 <= summary["score_after"] <= 1
    assert (summary["bytes_sent"] > 0) == (summary["bytes_received"] > 0) == (servers > 0)
    assert len(summary["score_per_iteration"]) == len(summary["kl_per_iteration"]) == iterations
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    with load_policy(summary["base_model"], lora=LoraSettings(r=8)) as policy:
        policy.load_adapter(summary["adapter"])
    assert any(
        bool(t.any())
        for name, t in load_file(Path(summary["adapter"]) / "adapter_model.safetensors").items()
        if "lora_B" in name
    )
    return summary


@pytest.mark.slow  # most of a minute; the next one runs the demo too
def test_demo_on_this_machine(local_demo):
    out, said = local_demo
    summary = check_outcome(out, iterations=2, servers=0)
    assert not summary["interrupted"]
    assert "16 of 16 greedy continuations are the same" in said
    assert f"score {summary['score_before']:.2f} -> {summary['score_after']:.2f}" in said
    assert "before" in said and "The soup is" in said


def test_ctrl_c_in_training_keeps_what_was_learned(out):
    with started("demo", "--local", "--iterations", 500, "--out", out) as command:
        command.wait_for("iteration 2/500")
        command.ctrl_c()
        assert command.finish() == 130, command.said
    done = int(re.search(r"interrupted after iteration (\d+)", command.said)[1])
    assert 2 <= done < 10
    assert check_outcome(out, iterations=done, servers=0)["interrupted"]


@pytest.mark.swarm
@pytest.mark.slow  # a minute; test_ppo compares the same training at a smaller size
def test_demo_through_a_swarm_equals_the_local_one(out, local_demo):
    with started("demo", "--iterations", 2, "--out", out) as command:
        assert command.finish() == 0, command.said
    summary = check_outcome(out, iterations=2, servers=2)
    local = json.loads((local_demo[0] / "summary.json").read_text())
    assert summary["score_per_iteration"] == pytest.approx(local["score_per_iteration"], abs=1e-6)
    found, expected = (load_file(Path(s["adapter"]) / "adapter_model.safetensors") for s in (summary, local))
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5
