"""Adapters on disk: round trips, and every way in which the wrong one is refused with nothing changed."""

import copy
import json

import pytest
import torch
from architectures import perturb, random_tokens, tiny_model
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import AdapterError, ConfigError
from textrl_swarm.models import adapter_files, adapters
from textrl_swarm.models.layers import LayerSizes, linear_layers
from textrl_swarm.policies.loading import load_policy

BLOOM = tiny_model("bloom")


def bloom_policy(seed=0, **settings):
    """A fresh policy on the same base model; `settings` are LoraSettings'."""
    return load_policy(copy.deepcopy(BLOOM), lora=LoraSettings(**{"r": 4, "alpha": 8, **settings}), seed=seed)


def tensors_of(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}


def saved(directory, policy):
    perturb(policy, seed=5)
    policy.save_adapter(directory)
    return directory


def rewrite(directory, change, file=adapter_files.ADAPTER_WEIGHTS):
    """Changes the tensors of a safetensors file, or the settings of adapter_config.json."""
    path = directory / file
    content = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    change(content)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        path.write_text(json.dumps(content))
    return directory


# What is saved, and back


def test_round_trip_with_value_head(tmp_path):
    policy, other, tokens = bloom_policy(), bloom_policy(seed=1), random_tokens(2, 9)
    saved(tmp_path, policy)
    other.load_adapter(str(tmp_path))
    for name, tensor in tensors_of(policy).items():
        assert torch.equal(other.trainable_parameters()[name], tensor), name
    out, expected = other(tokens), policy(tokens)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.values, expected.values)


def test_files_and_names_are_pefts(tmp_path):
    policy = bloom_policy()
    saved(tmp_path / "ours", policy)
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"}
    plain = get_peft_model(
        copy.deepcopy(BLOOM), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    plain.save_pretrained(tmp_path / "pefts")
    ours, pefts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "pefts"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in pefts.items()}
    assert ours.keys() == policy.adapter_parameters().keys()
    head = load_file(tmp_path / "ours" / "value_head.safetensors")
    assert {name: tuple(t.shape) for name, t in head.items()} == {"weight": (1, 32), "bias": (1,)}


def test_saving_changes_nothing_and_may_be_repeated(tmp_path):
    policy = bloom_policy()
    perturb(policy)
    before = tensors_of(policy)
    for _ in range(2):
        policy.save_adapter(tmp_path / "new" / "directory")
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in policy.trainable_parameters().items()
    )
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters().values())


def test_an_adapter_that_plain_peft_trained_can_be_loaded(tmp_path):
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query_key_value", "dense"],
        "init_lora_weights": False,
    }
    plain, tokens = (
        get_peft_model(copy.deepcopy(BLOOM), LoraConfig(task_type="CAUSAL_LM", **settings)).eval(),
        random_tokens(2, 9),
    )
    plain.save_pretrained(tmp_path)
    policy = bloom_policy(targets=("query_key_value", "dense"))
    head = policy.value_head.weight.detach().clone()
    policy.load_adapter(tmp_path)
    torch.testing.assert_close(policy(tokens).logits, plain(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(policy.value_head.weight, head)  # there was none to load


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_first_values_that_leave_the_base_alone_are_fine(start, tmp_path):
    rewrite(
        saved(tmp_path, bloom_policy()),
        lambda config: config.update(init_lora_weights=start),
        adapter_files.ADAPTER_CONFIG,
    )
    bloom_policy(seed=1).load_adapter(tmp_path)


def test_half_precision_adapters_are_loaded_as_fp32(tmp_path):
    policy = bloom_policy()
    saved(tmp_path, policy)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}),
    )
    other = bloom_policy(seed=1)
    other.load_adapter(tmp_path)
    for name, parameter in other.adapter_parameters().items():
        assert parameter.dtype == torch.float32 and torch.equal(
            parameter, policy.adapter_parameters()[name].bfloat16().float()
        )


def test_an_optimizer_made_before_loading_still_holds_the_parameters(tmp_path):
    saved(tmp_path, bloom_policy())
    policy = bloom_policy(seed=1)
    parameters = list(policy.trainable_parameters().values())
    policy.load_adapter(tmp_path)
    assert all(a is b for a, b in zip(policy.trainable_parameters().values(), parameters, strict=True))


def test_saving_over_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="file is a file; give a directory to save the adapter in"):
        bloom_policy().save_adapter(tmp_path / "file")


# The wrong one. bloom_policy() (r=4, alpha=8, all linears, all blocks) refuses the directory of each case.


def without(*files):
    def make(path):
        saved(path, bloom_policy())
        for name in files:
            (path / name).unlink()
        return path

    return make


def with_settings(**settings):
    return lambda path: rewrite(
        saved(path, bloom_policy()), lambda config: config.update(settings), adapter_files.ADAPTER_CONFIG
    )


def with_file(name, content):
    def make(path):
        saved(path, bloom_policy())
        (path / name).write_bytes(content)
        return path

    return make


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])
    return path.parent


def spoil(number, file=adapter_files.ADAPTER_WEIGHTS):
    def change(tensors):
        tensors[sorted(tensors)[-1]].view(-1)[-1] = number

    return lambda path: rewrite(saved(path, bloom_policy()), change, file)


def plain_adapter(config):
    def make(path):
        get_peft_model(copy.deepcopy(BLOOM), config).save_pretrained(path)
        return path

    return make


NAME = r"base_model\.model\.transformer\.h\."
CASES = {
    "no directory": (
        lambda path: path / "nowhere",
        r"nowhere holds no adapter: there is no adapter_config\.json",
    ),
    "a file": (
        lambda path: with_file("file", b"x")(path) / "file",
        r"file holds no adapter: there is no adapter_config\.json",
    ),
    "empty directory": (lambda path: path, r"holds no adapter: there is no adapter_config\.json"),
    "no config": (without("adapter_config.json"), r"there is no adapter_config\.json"),
    "no weights": (without("adapter_model.safetensors"), r"there is no adapter_model\.safetensors"),
    "config is no JSON": (
        with_file("adapter_config.json", b"{"),
        r"adapter_config\.json cannot be read: JSONDecodeError",
    ),
    "config is a list": (with_file("adapter_config.json", b"[]"), r"adapter_config\.json cannot be read: "),
    "config is empty": (
        with_file("adapter_config.json", b"{}"),
        "holds a nameless adapter; only LoRA adapters can be loaded",
    ),
    "config is no text": (
        with_file("adapter_config.json", b"\xff\xfe\x00"),
        r"adapter_config\.json cannot be read: ",
    ),
    "unknown kind": (with_settings(peft_type="NEWER"), r"adapter_config\.json cannot be read: .*NEWER"),
    "not LoRA": (
        plain_adapter(
            IA3Config(task_type="CAUSAL_LM", target_modules=["query_key_value"], feedforward_modules=[])
        ),
        "holds a IA3 adapter; only LoRA adapters can be loaded",
    ),
    "damaged weights": (
        with_file("adapter_model.safetensors", b"\x08\x00"),
        r"adapter_model\.safetensors cannot be read: ",
    ),
    "cut weights": (
        lambda path: cut(saved(path, bloom_policy()) / "adapter_model.safetensors"),
        r"adapter_model\.safetensors cannot be read: ",
    ),
    "NaN": (spoil(float("nan")), rf"has NaN or infinite numbers in {NAME}2\..*\(1 tensors in all\)"),
    "infinite": (spoil(float("inf")), "has NaN or infinite numbers"),
    "NaN in the value head": (
        spoil(float("nan"), "value_head.safetensors"),
        r"value_head\.safetensors has NaN or infinite numbers in weight",
    ),
    "damaged value head": (
        with_file("value_head.safetensors", b"x"),
        r"value_head\.safetensors cannot be read",
    ),
    "other value head": (
        lambda path: rewrite(
            saved(path, bloom_policy()),
            lambda t: t.update(weight=torch.zeros(1, 33)),
            "value_head.safetensors",
        ),
        r"value_head\.safetensors belongs to a model of another hidden size than 32",
    ),
    "other architecture": (
        lambda path: saved(path, load_policy(tiny_model("llama"), lora=LoraSettings(r=4, alpha=8))),
        rf"does not fit: 24 tensors are missing, e\.g\. {NAME}0\.mlp\.dense_4h_to_h\.lora_A\.weight",
    ),
    "wider model": (
        lambda path: saved(
            path, load_policy(tiny_model("bloom", hidden_size=64), lora=LoraSettings(r=4, alpha=8))
        ),
        rf"does not fit: {NAME}0\.self_attention\.query_key_value\.lora_A\.weight "
        r"has shape \(4, 64\), expected \(4, 32\)",
    ),
    "deeper model": (
        lambda path: saved(
            path, load_policy(tiny_model("bloom", n_layer=4), lora=LoraSettings(r=4, alpha=8))
        ),
        rf"8 tensors are unknown here, e\.g\. {NAME}3\.",
    ),
    "other rank": (
        lambda path: saved(path, bloom_policy(r=2)),
        r"\(2, 32\), expected \(4, 32\)\. It was made for base model None, r=2, targets \[.*\], blocks all; "
        "this policy has .* r=4",
    ),
    "fewer targets": (
        lambda path: saved(path, bloom_policy(targets="dense")),
        r"18 tensors are missing.* r=4, targets \['dense'\], blocks all; "
        r"this policy has .* targets \['dense', 'dense_4h_to_h', ",
    ),
    "fewer blocks": (
        lambda path: saved(path, bloom_policy(layers=1)),
        rf"16 tensors are missing, e\.g\. {NAME}0\..* blocks \[2\]; this policy has .* blocks all",
    ),
    "other alpha": (
        lambda path: saved(path, bloom_policy(alpha=6)),
        r"is scaled by alpha / r = 6 / 4, this policy by alpha / r = 8 / 4; make the policy with alpha=6",
    ),
    "rank-stabilised": (
        with_settings(use_rslora=True),
        r"is scaled by alpha / sqrt r = 8 / sqrt 4, this policy by alpha / r = 8 / 4; make the policy with "
        "alpha=8, rank_stabilized=True",
    ),
    "own alphas": (
        with_settings(alpha_pattern={"dense": 32}),
        "has rank_pattern or alpha_pattern; only one rank and alpha",
    ),
    "rank zero in the config": (with_settings(r=0), "alpha / r = 8 / 0, this policy by alpha / r = 8 / 4"),
    "DoRA": (
        plain_adapter(
            LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)
        ),
        "has use_dora=True; only plain LoRA can be loaded: merge it into the base model",
    ),
    "DoRA in the config only": (with_settings(use_dora=True), "has use_dora=True; only plain LoRA"),
    "activated LoRA": (
        with_settings(alora_invocation_tokens=[5]),
        r"has alora_invocation_tokens=\[5\]; only plain LoRA",
    ),
    **{
        start: (
            with_settings(init_lora_weights=start),
            rf"has init_lora_weights='{start}', which changed the base weights: "
            "convert it .*path_initial_model_for_weight_conversion",
        )
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")
    },
    "LoftQ": (  # PEFT itself reads it only where SciPy is installed
        with_settings(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
        "has init_lora_weights='loftq'|cannot be read: ImportError.*scipy",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_wrong_adapter_is_refused_and_nothing_changes(case, tmp_path):
    make, message = CASES[case]
    directory, policy = make(tmp_path), bloom_policy()
    perturb(policy, seed=8)
    before = tensors_of(policy)
    with pytest.raises(AdapterError, match=message):
        policy.load_adapter(directory)
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(parameter, before[name]), name


def test_the_right_one_after_wrong_ones(tmp_path):
    right = saved(tmp_path / "right", bloom_policy())
    policy = bloom_policy(seed=1)
    with pytest.raises(AdapterError):
        policy.load_adapter(saved(tmp_path / "wrong", bloom_policy(r=2)))
    policy.load_adapter(right)
    assert all(
        torch.equal(policy.adapter_parameters()[name], t)
        for name, t in load_file(right / "adapter_model.safetensors").items()
    )


# Names and starts, by hand

LINEARS = {
    "self_attention.query_key_value": LayerSizes(8, 24),
    "self_attention.dense": LayerSizes(8, 8),
    "mlp.dense_h_to_4h": LayerSizes(8, 32),
    "mlp.dense_4h_to_h": LayerSizes(32, 8),
}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, set(LINEARS)),
        (("dense",), {"self_attention.dense"}),
        (("self_attention.dense",), {"self_attention.dense"}),
        (("dense_h_to_4h", "query_key_value"), {"mlp.dense_h_to_4h", "self_attention.query_key_value"}),
    ],
)
def test_choose_targets(targets, expected):
    chosen = adapters.choose_targets(LINEARS, targets)
    assert chosen == {path: LINEARS[path] for path in LINEARS if path in expected}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "dense_h_to_4",
            "'dense_h_to_4' is no linear layer of this model's blocks; "
            r"did you mean 'dense_h_to_4h'\? known: dense, ",
        ),
        (
            "zzz",
            "'zzz' is no linear layer of this model's blocks; "
            "known: dense, dense_4h_to_h, dense_h_to_4h, query_key_value",
        ),
        ("self_attention", "'self_attention' is no linear layer"),
        ("mlp.dense", "'mlp.dense' is no linear layer"),
    ],
)
def test_unknown_targets(target, message):
    with pytest.raises(ConfigError, match=message):
        adapters.choose_targets(LINEARS, ("dense", target))


def test_first_adapted_block():
    assert [adapters.first_adapted_block(4, layers) for layers in (None, 1, 3, 4)] == [0, 3, 1, 0]
    with pytest.raises(
        ConfigError, match="LoRA layers=5, but the model has 4 blocks; use 1 to 4, or None for all"
    ):
        adapters.first_adapted_block(4, 5)


def test_first_values_depend_on_name_and_seed_only():
    name = "base_model.model.transformer.h.0.self_attention.dense.lora_A.weight"
    torch.manual_seed(0)
    first = adapters.initial_tensor(name, (4, 100), 0)
    torch.manual_seed(1)
    assert torch.equal(adapters.initial_tensor(name, (4, 100), 0), first)
    assert first.abs().max() <= 0.1 and not torch.equal(adapters.initial_tensor(name, (4, 100), 1), first)
    assert not torch.equal(adapters.initial_tensor(name.replace("h.0", "h.1"), (4, 100), 0), first)
    assert not adapters.initial_tensor(name.replace("lora_A", "lora_B"), (100, 4), 0).any()


class TopKRouter(torch.nn.Linear):
    """Returns a pair, as Llama 4's router does."""


class GroupedLinear(torch.nn.Linear):
    """One matrix for each group of inputs, as in DeepSeek V4."""


def test_subclasses_that_compute_something_else_are_no_linear_layers():
    block = torch.nn.ModuleDict(
        {"router": TopKRouter(4, 2), "grouped": GroupedLinear(4, 2), "dense": torch.nn.Linear(4, 3)}
    )
    assert linear_layers(block) == {"dense": LayerSizes(4, 3)}
