"""Exports load in plain transformers + peft as what was trained; what cannot be exported says why."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from architectures import character_tokenizer, perturb, tiny_model
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from textrl_swarm import cli
from textrl_swarm.commands import export as export_commands
from textrl_swarm.commands.export import export_adapter, export_merged
from textrl_swarm.commands.train import train_command
from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import AdapterError, CheckpointError, ExportError, ModelError
from textrl_swarm.export import check
from textrl_swarm.export import write as writing
from textrl_swarm.export.card import model_card
from textrl_swarm.export.source import find_source
from textrl_swarm.models.adapter_files import read_settings
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.runs.config import load_config

ROOT = Path(__file__).resolve().parent.parent
TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Architecture -> directories of a base model and an adapter on it, and the policy's logits.

    The current directory is a new one.
    """
    monkeypatch.chdir(tmp_path)

    def make(
        architecture: str = "gpt2",
        lora: LoraSettings = LoraSettings(r=3),  # noqa: B008
        dtype: torch.dtype = torch.float32,
        **settings,
    ):
        tiny_model(architecture, **settings).to(dtype).save_pretrained(tmp_path / "base")
        character_tokenizer().save_pretrained(tmp_path / "base")
        with load_policy("./base", lora=lora) as policy, torch.no_grad():
            perturb(policy, 1)
            policy.save_adapter("trained")
            return policy(TOKENS).logits.float()

    return make


@pytest.fixture(scope="module")
def finished_run(tiny_bloom, tmp_path_factory):
    """A directory in which a run of three iterations was made."""
    directory, before = tmp_path_factory.mktemp("run"), Path.cwd()
    os.chdir(directory)
    Path("tasks.py").write_text(
        "def vowels(items, texts):\n    return [float(sum(c in 'aeiou' for c in text)) for text in texts]\n"
    )
    config = load_config(
        {
            "model": str(tiny_bloom(seed=5, layers=2, hidden=32, vocab=48)), "output": "runs/a",
            "prompts": ["the soup"], "reward": "tasks.py:vowels",
            "sampling": {"max_new_tokens": 4}, "ppo": {"lr": 1e-2}, "lora": {"r": 2, "layers": 1},
            "train": {"iterations": 3, "prompts_per_iteration": 2, "report_to": []},
        }
    )  # fmt: skip
    train_command(config, silent())
    os.chdir(before)
    return directory


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """The finished run in the current directory, to do with as one likes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    return Path("runs/a")


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def main(monkeypatch, entry, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        entry()
    return ended.value.code or 0


# -------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "llama", "opt", "gpt_neox"])
def test_an_adapter_is_the_policy_in_plain_peft(trained, architecture):
    expected = trained(architecture)
    out = export_adapter(find_source("trained"), "out", silent(), check=False)
    assert torch.allclose(
        logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("./base"), str(out))),
        expected,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gpt2", {}),
        ("bloom", {}),
        ("llama", {}),
        ("opt", {}),
        ("gpt_neox", {}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_merged_model_is_the_policy_in_plain_transformers(trained, architecture, settings):
    expected = trained(architecture, **settings)
    base = AutoModelForCausalLM.from_pretrained("./base")
    out = export_merged(find_source("trained"), "out", silent(), check=False)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(logits_of(merged), expected, atol=1e-4)
    # Tied embeddings stay untouched.
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert (
        AutoTokenizer.from_pretrained(out)("soup")["input_ids"] == character_tokenizer()("soup")["input_ids"]
    )


@pytest.mark.slow  # two fresh processes
def test_the_check_in_a_fresh_process_says_how_far_apart_they_are(trained):
    trained("gpt2", LoraSettings(r=2, layers=1))
    for export in (export_adapter, export_merged):
        console = silent()
        export(find_source("trained"), f"out_{export.__name__}", console)
        assert (
            "loaded back: 4 of 4 greedy continuations are the same; largest difference of a logit: "
            in console.file.getvalue()
        )


@pytest.mark.parametrize("damage", ["scale", pytest.param("drop", marks=pytest.mark.slow)])
def test_the_check_notices_an_export_that_is_not_what_was_trained(trained, monkeypatch, damage):
    trained()
    copy = shutil.copyfile

    def damaging(source, target):
        copy(source, target)
        if Path(target).name == "adapter_model.safetensors":
            tensors = load_file(target)
            if damage == "scale":
                tensors = {name: tensor * 1.5 for name, tensor in tensors.items()}
            else:
                tensors.pop(next(name for name in tensors if "lora_B" in name))
            save_file(tensors, target)

    monkeypatch.setattr(writing.shutil, "copyfile", damaging)
    with pytest.raises(ExportError, match="what was written is not what was trained: a logit differs by"):
        export_adapter(find_source("trained"), "out", silent())


@pytest.mark.slow  # a fresh process
def test_sixteen_bits_are_merged_with_a_word_about_rounding(trained):
    trained("llama", dtype=torch.bfloat16)
    console = silent()
    # With the check, whose tolerance is that of 16 bits.
    out = export_merged(find_source("trained"), "out", console)
    assert "the weights are torch.bfloat16: merging rounds" in console.file.getvalue()
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.slow  # a fresh process
def test_an_adapter_of_a_quantised_base_is_merged_into_the_unquantised_one_with_a_word(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("quantization: null", "quantization: 8bit"))
    console = silent()
    source = find_source(run)
    out = export_merged(source, "out", console)
    told = console.file.getvalue()
    assert "trained on weights in 8bit; it is merged into the weights as they were before" in told
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == torch.float32
    tokens = torch.randint(0, merged.config.vocab_size, (4, 8), generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        load_policy(source.base_model, quantization="8bit", lora=read_settings(source.adapter)) as policy,
    ):
        policy.load_adapter(source.adapter)
        differences = [
            (policy(row[None]).logits[0, -1] - merged(row[None]).logits[0, -1]).abs().max() for row in tokens
        ]
    (measured,) = re.findall(r"beside the policy in 8bit: .* largest difference of a logit: (\S+)", told)
    assert float(measured) == pytest.approx(float(max(differences)), rel=0.05) and float(measured) > 0


@pytest.mark.slow  # two models quantised
def test_what_a_machine_cannot_quantise_is_not_compared(run, monkeypatch):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("quantization: null", "quantization: 8bit"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    console = silent()
    export_adapter(find_source(run), "out", console)
    assert "loaded back" in console.file.getvalue()
    assert (
        "the policy in 8bit cannot be loaded here for a comparison: quantization='8bit' needs bitsandbytes"
        in console.file.getvalue()
    )


def test_the_fresh_process_finds_what_this_one_finds_and_nothing_of_ours_by_accident(tmp_path, monkeypatch):
    for directory in ("lib", "package", "relative/to/here"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "lib" / "only_here.py").write_text("found = 'in lib'")
    (tmp_path / "package" / "types.py").write_text("raise ImportError('shadows that of Python')")
    script = tmp_path / "package" / "plain_check.py"
    script.write_text("import enum, json, os, only_here\nprint(json.dumps([only_here.found, os.getcwd()]))")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setattr(check.plain_check, "__file__", str(script))
    monkeypatch.chdir(tmp_path / "relative")
    assert check.answers_of_fresh_process("./to/here", None, []) == ["in lib", str(tmp_path / "relative")]


# --------------------------------------------------------------------------------------------- the model card


def test_the_card_of_a_run(run):
    export_adapter(find_source(run), "out", silent(), check=False)
    card = ModelCard.load("out/README.md")
    assert (
        card.data.library_name == "peft"
        and {"lora", "ppo"} <= set(card.data.tags)
        and card.data.pipeline_tag == "text-generation"
    )
    for text in (
        "r=2, alpha=16",
        "the last 1 blocks",
        "reward: `tasks.py:vowels`",
        "iteration 3, score",
        "PeftModel.from_pretrained",
    ):
        assert text in card.text


def test_the_card_names_a_base_model_of_the_hub_and_not_a_directory_of_this_machine(trained, monkeypatch):
    trained()
    assert model_card(find_source("trained"), merged=False).data.base_model is None
    found = find_source("trained", base_model="bigscience/bloom-petals")
    card = model_card(found, merged=False)
    assert card.data.base_model == "bigscience/bloom"  # the repository that exists
    assert 'from_pretrained("bigscience/bloom")' in card.text
    assert "merge_and_unload" not in model_card(found, merged=True).text


def test_the_card_shows_weights_of_rewards_that_are_not_1(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    function, model = (
        {**config["reward"][0], "weight": 0.5},
        {"weight": 1.0, "function": None, "model": "judge", "label": 1},
    )
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "reward": [function, model]}))
    assert (
        "reward: `0.5 * tasks.py:vowels` + `judge (label 1)`"
        in model_card(find_source(run), merged=False).text
    )


def test_names_are_no_markup_and_no_template(trained, monkeypatch):
    trained()
    base = Path("base[/b] {{ x }} {% y %}")
    base.parent.mkdir()
    Path("base").rename(base)
    monkeypatch.setattr(export_commands, "_check", lambda *_: None)
    for export in (export_adapter, export_merged):
        console, out = silent(), f"out/[/b]{export.__name__}"
        written = export(find_source("trained", base_model=f"./{base}"), out, console)
        assert f" in {out}\n" in console.file.getvalue()
        assert f"`./{base}`" in (written / "README.md").read_text()


# ----------------------------------------------------------------------------------- where adapters are found


def test_of_a_run_the_finished_adapter_or_a_checkpoint(run):
    assert find_source(run).adapter == run / "adapter"
    assert find_source(run, "last").adapter == run / "checkpoints" / "iteration_000003"
    second = find_source(run, "2")
    assert second.adapter == run / "checkpoints" / "iteration_000002" and second.metrics["iteration"] == 2
    shutil.rmtree(run / "adapter")
    assert find_source(run).adapter == run / "checkpoints" / "iteration_000003"
    with pytest.raises(CheckpointError, match=r"has no checkpoint '1'; give last or one of 2, 3"):
        find_source(run, "1")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="never finished an iteration, so there is nothing to export"):
        find_source(run)


def finished_after(run: Path, iterations: int) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "iterations": iterations}))


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_of_a_run_that_went_on_after_it_was_finished_the_newest_checkpoint(run):
    finished_after(run, 2)  # then it was extended, and killed in iteration 4
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 4, "score": 99.0}) + "\n" + '{"iteration": 3, "sco')
    source = find_source(run)
    assert source.adapter == run / "checkpoints" / "iteration_000003" and source.metrics["iteration"] == 3
    assert "last iteration: iteration 3, score" in model_card(source, merged=False).text
    finished_after(run, 3)
    source = find_source(run)
    assert source.adapter == run / "adapter" and source.metrics["iteration"] == 3


@pytest.mark.parametrize("summary", [None, '{"iterations"', "[]", '{"iterations": null}'])
def test_of_a_run_without_a_whole_summary_the_newest_checkpoint(run, summary):
    (run / "summary.json").unlink()
    if summary is not None:
        (run / "summary.json").write_text(summary)
    assert find_source(run).adapter == run / "checkpoints" / "iteration_000003"
    shutil.rmtree(run / "checkpoints")
    source = find_source(run)
    # Of which iteration it is, nobody knows.
    assert source.adapter == run / "adapter" and source.metrics == {}


def test_a_damaged_checkpoint_is_not_exported(run, caplog):
    shutil.rmtree(run / "adapter")
    third, second = (run / "checkpoints" / f"iteration_00000{number}" for number in (3, 2))
    flip_a_bit(third)
    for checkpoint in (None, "last"):
        caplog.clear()
        source = find_source(run, checkpoint)
        assert source.adapter == second and source.metrics["iteration"] == 2
        assert (
            f"{third} is damaged (adapter_model.safetensors is not what was written); exporting an older one"
            in caplog.text
        )
    for path, checkpoint in ((run, "3"), (third, None)):
        with pytest.raises(CheckpointError, match=r"iteration_000003 is damaged .*; export another one"):
            find_source(path, checkpoint)
    flip_a_bit(second)
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged$"):
        find_source(run)


def test_when_all_checkpoints_are_damaged_the_finished_adapter_is_named(run):
    finished_after(run, 1)
    for checkpoint in (run / "checkpoints").iterdir():
        flip_a_bit(checkpoint)
    with pytest.raises(
        CheckpointError, match="are damaged; an older adapter is in runs/a/adapter, export that"
    ):
        find_source(run)
    assert find_source(run / "adapter").adapter == run / "adapter"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere", "there is no directory nowhere"),
        ("outdir/bes", "there is no directory outdir/bes; outdir has 40_finish, best"),
        ("outdir", "did you mean outdir/40_finish? there are 40_finish, best"),
        ("old", "was saved by TextRL itself"),
        ("empty", "empty holds no adapter"),
        ("nameless", "names no base model; give it with --model"),
    ],
)
def test_directories_without_an_adapter(trained, path, told):
    trained()
    for name in ("outdir/best", "outdir/40_finish", "nameless"):
        shutil.copytree("trained", name)
    config = json.loads(Path("nameless/adapter_config.json").read_text())
    Path("nameless/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    Path("empty").mkdir()
    Path("old").mkdir()
    Path("old/model.pt").write_bytes(b"")
    with pytest.raises(AdapterError) as caught:
        find_source(path)
    assert told in str(caught.value)


def test_a_checkpoint_of_something_that_is_no_run(trained):
    trained()
    with pytest.raises(CheckpointError, match="is no run of"):
        find_source("trained", "last")


def everything_in(directory: Path | str) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in Path(directory).rglob("*")}


@pytest.mark.parametrize("export", [export_adapter, export_merged])
@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("runs/../base", "base holds the base model that is to be exported"),
        ("link", "link holds the base model"),
        ("trained", "trained holds the adapter"),
        (".", "holds the base model"),
        ("base_alike", "no export wrote (config.json, generation_config.json, model.safetensors"),
        (
            "adapter_alike",
            "no export wrote (README.md, adapter_config.json, adapter_model.safetensors, "
            "value_head.safetensors); move",
        ),
        ("tasks.py", "is a file"),
    ],
)
def test_what_is_not_an_earlier_export_is_not_written_over(trained, export, out, told):
    trained()
    Path("link").symlink_to("base")
    Path("tasks.py").write_text("")
    shutil.copytree("base", "base_alike")
    shutil.copytree("trained", "adapter_alike")
    Path("adapter_alike/README.md").write_text("---\ntags: [lora]\n---\nmy notes")
    Path("runs").mkdir()
    before = everything_in(".")
    with pytest.raises(ExportError, match=re.escape(told)):
        export(find_source("trained"), out, silent(), check=False)
    assert everything_in(".") == before


@pytest.mark.parametrize(
    "out", ["runs", "runs/a", "runs/a/adapter", "runs/a/checkpoints", "runs/a/checkpoints/iteration_000002"]
)
def test_a_run_is_not_written_over(run, out):
    before = everything_in(".")
    for checkpoint in (None, "3"):
        with pytest.raises(ExportError, match=r"is to be exported|refusing to overwrite"):
            export_adapter(find_source(run, checkpoint), out, silent(), check=False)
    assert everything_in(".") == before


@pytest.mark.parametrize("foreign", ["NOTES", ".git"])
def test_an_earlier_export_is_replaced_if_nothing_was_added_to_it(trained, foreign):
    trained()
    for export in (export_adapter, export_adapter, export_merged, export_merged, export_adapter):
        export(find_source("trained"), "out", silent(), check=False)
    assert not Path("out/config.json").exists()
    Path("out", foreign).mkdir() if foreign == ".git" else Path("out", foreign).write_text("mine")
    with pytest.raises(
        ExportError,
        match=rf"contains files that no export wrote \({foreign}\); move them away or name another directory",
    ):
        export_adapter(find_source("trained"), "out", silent(), check=False)
    assert Path("out", foreign).exists()


def test_an_export_of_an_export_does_not_replace_what_it_is_made_from(trained):
    trained()
    # Has a card of ours, and is a base model now.
    export_merged(find_source("trained"), "merged", silent(), check=False)
    export_adapter(find_source("trained"), "out", silent(), check=False)
    for source, out in ((find_source("trained", base_model="merged"), "merged"), (find_source("out"), "out")):
        with pytest.raises(ExportError, match=f"{out} holds the .* that is to be exported"):
            export_adapter(source, out, silent(), check=False)


def test_a_base_model_that_it_does_not_fit_or_that_is_not_there(trained):
    trained()
    tiny_model("gpt2", n_embd=48).save_pretrained("other")
    with pytest.raises(AdapterError, match="does not fit"):
        export_merged(find_source("trained", base_model="./other"), "out", silent())
    with pytest.raises(AdapterError, match="does not fit"):
        export_adapter(find_source("trained", base_model="./other"), "out", silent())


@pytest.mark.parametrize("base", ["./nowhere", "models/nowhere"])
def test_a_base_model_that_is_not_there_is_told_before_anything_is_written(trained, base):
    trained()
    Path("out").mkdir()
    for export, verify in ((export_adapter, True), (export_merged, True), (export_merged, False)):
        with pytest.raises(
            ModelError,
            match=rf"(?s)nowhere.*\nSearched from {re.escape(str(Path.cwd()))}. Name the model with --model",
        ):
            export(find_source("trained", base_model=base), "out", silent(), check=verify)
        assert not list(Path("out").iterdir())
    export_adapter(find_source("trained", base_model=base), "out", silent(), check=False)  # needs no model


def test_the_exported_adapter_names_the_base_model_that_was_given(trained, tmp_path):
    trained()
    out = export_adapter(
        find_source("trained", base_model=str(tmp_path / "base")), "out", silent(), check=False
    )
    assert PeftConfig.from_pretrained(str(out)).base_model_name_or_path == str(tmp_path / "base")
    assert read_settings(out) == read_settings("trained")


# ------------------------------------------------------------------------------- broken files, stubborn disks


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "adapter_config.json cannot be read: Expecting"), ("[]", "holds a list instead of")],
)
def test_adapter_settings_that_are_none(trained, text, told):
    trained()
    Path("trained/adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=told):
        find_source("trained")


@pytest.mark.parametrize("text", ["model: [", "\x00", "{model: m, reward: f, sampling: {}, ppo: {}}"])
def test_a_broken_configuration_of_a_run(run, text):
    (run / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read as the configuration of a run"):
        find_source(run)


@pytest.mark.parametrize("text", ["{lr: 3, name: mine}", "- a\n- b", "", "model: gpt2"])
def test_a_configuration_of_another_program_makes_no_run(trained, text):
    trained()
    Path("trained/config.yaml").write_text(text)
    source = find_source("trained")
    assert source.adapter == Path("trained") and source.config is None


def test_a_disk_that_does_not_take_it(trained, monkeypatch):
    trained()
    Path("file").write_text("")
    for export in (export_adapter, export_merged):
        with pytest.raises(
            ExportError,
            match=r"file/out cannot be written: .*Not a directory.*; make room or name another directory",
        ):
            export(find_source("trained"), "file/out", silent(), check=False)
    Path("mounted").mkdir()
    replace = os.replace

    def busy(source, target):  # as renaming a mount point is answered
        if Path(source).name == "mounted":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(ExportError, match=r"mounted cannot be written: .*resource busy.*mounted'; make room"):
        export_adapter(find_source("trained"), "mounted", silent(), check=False)
    assert not list(Path("mounted").iterdir()) and not list(Path().glob(".*"))


# ---------------------------------------------------------------------------------------------------- the hub


def test_uploading_calls_the_hub_with_what_was_written(trained, monkeypatch):
    trained()
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append((repo_id, options))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, folder_path, **options):
        calls.append((sorted(path.name for path in Path(folder_path).iterdir()), options))

    monkeypatch.setattr(writing.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(writing.HfApi, "upload_folder", upload_folder)
    code = main(
        monkeypatch,
        cli.main,
        "export",
        "trained",
        "out",
        "--no-verify",
        "--push-to-hub",
        "me/mine",
        "--private",
    )
    assert code == 0
    (repo_id, created), (files, uploaded) = calls
    assert (repo_id, created["private"], uploaded["repo_id"]) == ("me/mine", True, "me/mine")
    assert files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "value_head.safetensors",
    ]


def test_without_a_hub_the_export_stays_and_the_error_says_what_to_do(trained, monkeypatch, capsys):
    trained()
    assert (
        main(monkeypatch, cli.main, "export", "trained", "out", "--no-verify", "--push-to-hub", "me/mine")
        == 1
    )
    told = capsys.readouterr().err
    assert "out is written, but me/mine could not be uploaded" in told and "hf auth login" in told
    assert Path("out/adapter_model.safetensors").is_file()


# ----------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("flag", ["--dump", "--dumpdir"])
def test_textrl_dump(trained, monkeypatch, capsys, flag):
    expected = trained()
    monkeypatch.setattr(export_commands, "_check", lambda *_: None)  # tested above
    assert main(monkeypatch, cli.dump, "--model", "./base", "--rl", "trained", flag, "dumped") == 0
    assert "Finish model dump." in capsys.readouterr().out
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained("dumped")), expected, atol=1e-4)


def test_textrl_dump_of_nothing_is_one_line(trained, monkeypatch, capsys):
    trained()
    assert main(monkeypatch, cli.dump, "--model", "./base", "--rl", "traned", "--dump", "dumped") == 1
    assert "error: there is no directory traned; . has trained" in capsys.readouterr().err


@pytest.mark.slow  # test_launchers runs the same path through a swarm
def test_the_launcher_runs_the_same_path_on_a_toy(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "export_adapter.py"), "--tiny", str(tmp_path / "toy")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loaded back: 4 of 4") == 2
    assert (tmp_path / "toy" / "adapter" / "README.md").is_file() and (
        tmp_path / "toy" / "merged" / "model.safetensors"
    ).is_file()
