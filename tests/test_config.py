"""Settings: every refusal and its message, and that accepted values stay as given."""

import dataclasses
import re

import pytest

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig, from_dict
from textrl_swarm.errors import ConfigError, TextRLSwarmError

NAN, INF = float("nan"), float("inf")


def case(cls, message, **settings):
    return pytest.param(cls, settings, message, id=f"{cls.__name__} {settings}")


def whole(cls, name, value):
    return case(cls, f"{name} must be a whole number >= 1, got {value!r}", **{name: value})


def finite(cls, name, value):
    return case(cls, f"{name} must be a finite number, got {value!r}", **{name: value})


R = "LoRA rank r must be a whole number >= 1, got {!r}"
TARGETS = "LoRA targets must be names of linear layers or None for all of them, got {!r}"
LAYERS = "LoRA layers must be None (all blocks) or a whole number >= 1 (the last k), got {!r}"
POSITIVE = ("lr", "clip_range", "max_grad_norm", "adam_eps", "entropy_step", "sampler_ratio_max")
NOT_NEGATIVE = ("value_coef", "entropy_coef", "kl_coef", "weight_decay")
FRACTIONS = ("gamma", "gae_lambda")
POSITIVE_OR_NONE = (
    "value_clip_range", "adaptive_kl_target", "target_kl", "clip_range_high", "ratio_max", "entropy_target",
    "value_lr",
)  # fmt: skip
REFUSED = [
    *[case(LoraSettings, R.format(value), r=value) for value in (0, -1, 2.0, "8", True, None)],
    *[
        case(LoraSettings, f"rank_stabilized must be True or False, got {value!r}", rank_stabilized=value)
        for value in ("yes", None, 1)
    ],
    *[finite(LoraSettings, "alpha", value) for value in ("16", None, NAN, INF, True)],
    *[case(LoraSettings, f"LoRA alpha must be > 0, got {value!r}", alpha=value) for value in (0, -1.5)],
    *[
        case(LoraSettings, TARGETS.format(value), targets=value)
        for value in ((), [], "", ("dense", ""), [1], 5, b"dense")
    ],
    *[case(LoraSettings, LAYERS.format(value), layers=value) for value in (0, -2, 1.0, "all", True)],
    *[
        whole(SamplingConfig, name, value)
        for name in ("max_new_tokens", "num_samples")
        for value in (0, -1, 1.5, "4", True, None)
    ],
    *[
        case(SamplingConfig, f"top_k must be a whole number >= 0 (0 = off), got {v!r}", top_k=v)
        for v in (-1, 2.0, "5", None, True)
    ],
    *[
        finite(SamplingConfig, name, v)
        for name in ("temperature", "top_p", "repetition_penalty")
        for v in (NAN, INF, None, "1", True)
    ],
    *[
        case(
            SamplingConfig,
            f"temperature must be > 0, got {value!r}; "
            "for the most likely token each time use do_sample=False",
            temperature=value,
        )
        for value in (0, -0.5)
    ],
    *[
        case(SamplingConfig, f"top_p must be in (0, 1] (1 = off), got {value!r}", top_p=value)
        for value in (0, -0.1, 1.01)
    ],
    *[
        case(SamplingConfig, f"repetition_penalty must be > 0 (1 = off), got {v!r}", repetition_penalty=v)
        for v in (0, -1.0)
    ],
    *[
        case(SamplingConfig, f"do_sample must be True or False, got {value!r}", do_sample=value)
        for value in ("false", None, 1)
    ],
    *[
        case(SamplingConfig, f"seed must be a whole number or None, got {value!r}", seed=value)
        for value in (1.0, "0", True)
    ],
    *[
        case(
            SamplingConfig,
            f"stop_token_ids must be a list of token ids or None, got {value!r}",
            stop_token_ids=value,
        )
        for value in (5, [-1], ["</s>"], "13")
    ],
    *[
        whole(PPOConfig, name, value)
        for name in ("epochs", "minibatch_size", "adaptive_kl_horizon")
        for value in (0, 1.5, None)
    ],
    *[
        case(
            PPOConfig,
            f"lr_decay_updates must be a whole number >= 1 or None, got {value!r}",
            lr_decay_updates=value,
        )
        for value in (0, 1.5, True)
    ],
    *[
        case(PPOConfig, f"lr_warmup_updates must be a whole number >= 0, got {v!r}", lr_warmup_updates=v)
        for v in (-1, 1.5, None, True)
    ],
    *[
        case(
            PPOConfig,
            f"micro_batch_tokens must be a whole number >= 1 or None, got {value!r}",
            micro_batch_tokens=value,
        )
        for value in (0, -512, 1.5, True, "all")
    ],
    *[
        finite(PPOConfig, name, value)
        for name in (*POSITIVE, *NOT_NEGATIVE, *FRACTIONS)
        for value in (NAN, INF, None, "1e-4")
    ],
    *[
        case(PPOConfig, f"{name} must be > 0, got {value!r}", **{name: value})
        for name in POSITIVE
        for value in (0, -1e-4)
    ],
    *[case(PPOConfig, f"{name} must be >= 0, got -0.1", **{name: -0.1}) for name in NOT_NEGATIVE],
    *[
        case(PPOConfig, f"{name} must be in [0, 1], got {v!r}", **{name: v})
        for name in FRACTIONS
        for v in (-0.1, 1.1)
    ],
    *[
        case(PPOConfig, f"{name} must be > 0 or None, got {value!r}", **{name: value})
        for name in POSITIVE_OR_NONE
        for value in (0, -1)
    ],
    *[finite(PPOConfig, name, value) for name in POSITIVE_OR_NONE for value in (NAN, "x")],
    *[
        case(PPOConfig, f"{name} must be True or False, got {value!r}", **{name: value})
        for name in (
            "bootstrap_truncated",
            "whiten_advantages",
            "whiten_rewards",
            "mask_truncated",
            "kl_unbiased",
        )
        for value in ("no", None, 0)
    ],
    *[
        case(PPOConfig, f"{name} must be one of {choices}, got {value!r}", **{name: value})
        for name, choices in (
            ("baseline", "critic, group, leave_one_out, none"),
            ("scale_advantages", "none, group, batch"),
            ("ratio", "token, response, response_mean"),
            ("clip", "ppo, cispo"),
            ("loss_mean", "tokens, responses, length"),
            ("kl_in", "reward, loss"),
            ("kl_estimator", "k1, k2, k3"),
            ("sampler_correction", "none, truncate, mask"),
            ("sampler_ratio_of", "token, response"),
            ("lr_schedule", "linear, cosine"),
        )
        for value in ("x", None, 1)
    ],
    *[
        case(
            PPOConfig,
            f"there is no algorithm {value!r}; {hint}known: cispo, dapo, dr_grpo, grpo, gspo, ppo, "
            "reinforce++, rloo",
            algorithm=value,
        )
        for value, hint in (("grpox", "did you mean 'grpo'? "), ("x", ""))
    ],
    *[
        case(
            PPOConfig,
            f"{name}={value!r} is for a critic, and baseline=leave_one_out has none (algorithm: rloo); leave "
            "it out, or set baseline: critic",
            algorithm="rloo",
            **{name: value},
        )
        for name, value in (
            ("value_lr", 1e-3),
            ("value_coef", 0.5),
            ("value_clip_range", None),
            ("gae_lambda", 0.9),
            ("bootstrap_truncated", True),
        )
    ],
    case(
        PPOConfig,
        "scale_advantages=group is for the baselines group and leave_one_out, not for critic; use "
        "whiten_advantages",
        scale_advantages="group",
    ),
    case(
        PPOConfig,
        "adaptive_kl_target steers a KL penalty in the reward; set kl_in: reward, or leave it out",
        algorithm="grpo",
        adaptive_kl_target=6.0,
    ),
    case(
        PPOConfig,
        "adaptive_kl_target steers kl_coef, which is 0 (algorithm: dapo); set one to begin with",
        algorithm="dapo",
        adaptive_kl_target=6.0,
    ),
    case(
        PPOConfig,
        "clip: cispo needs clip_range_high, the largest ratio; algorithm: cispo has 5.0",
        clip="cispo",
    ),
    case(PPOConfig, "lr_schedule: cosine needs lr_decay_updates", lr_schedule="cosine"),
    case(
        PPOConfig, "kl_unbiased is for a KL in the loss; set kl_in: loss, or leave it out", kl_unbiased=True
    ),
    case(
        PPOConfig,
        "ratio_max is for clip: ppo; with cispo, clip_range_high bounds the ratio",
        algorithm="cispo",
        ratio_max=3.0,
    ),
    *[
        case(PPOConfig, f"seed must be a whole number, got {value!r}", seed=value)
        for value in (None, 0.5, "0")
    ],
]


@pytest.mark.parametrize(("cls", "settings", "message"), REFUSED)
def test_refused(cls, settings, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") as refused:
        cls(**settings)
    assert isinstance(refused.value, ValueError) and isinstance(refused.value, TextRLSwarmError)


def test_every_setting_has_a_refusal():
    covered = {(parameters.values[0], name) for parameters in REFUSED for name in parameters.values[1]}
    assert covered == {
        (cls, field.name)
        for cls in (LoraSettings, SamplingConfig, PPOConfig)
        for field in dataclasses.fields(cls)
    }


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (LoraSettings, {"r": 1, "alpha": 0.5, "layers": 1}),
        (
            SamplingConfig,
            {
                "max_new_tokens": 1,
                "top_p": 1,
                "top_k": 0,
                "temperature": 1e-3,
                "repetition_penalty": 0.5,
                "seed": -1,
            },
        ),
        (
            PPOConfig,
            {
                "gamma": 0,
                "gae_lambda": 1,
                "value_clip_range": None,
                "kl_coef": 0,
                "entropy_coef": 0,
                "weight_decay": 0.1,
            },
        ),
        (PPOConfig, {"value_clip_range": 0.1, "adaptive_kl_target": 6, "target_kl": 0.02, "seed": -3}),
    ],
)
def test_accepted_as_given(cls, settings):
    config = cls(**settings)
    assert {name: getattr(config, name) for name in settings} == settings
    assert from_dict(cls, dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("dense", ("dense",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ({"a": 1}, ("a",)), (None, None)],
)
def test_targets_become_a_tuple(targets, expected):
    settings = LoraSettings(targets=targets)
    assert settings.targets == expected
    hash(settings)


@pytest.mark.parametrize(
    ("cls", "name", "message"),
    [
        (
            LoraSettings,
            "rank",
            r"unknown setting 'rank' of LoraSettings; .*known: alpha, layers, r, rank_stabilized, targets",
        ),
        (
            LoraSettings,
            "target",
            r"unknown setting 'target' of LoraSettings; did you mean 'targets'\? known: ",
        ),
        (
            SamplingConfig,
            "max_tokens",
            r"unknown setting 'max_tokens' of SamplingConfig; did you mean 'max_new_tokens'\? known: ",
        ),
        (
            PPOConfig,
            "learning_rate",
            r"unknown setting 'learning_rate' of PPOConfig; .*known: adam_eps, adaptive_kl_horizon, ",
        ),
        (PPOConfig, "gae_lamda", r"unknown setting 'gae_lamda' of PPOConfig; did you mean 'gae_lambda'\?"),
    ],
)
def test_unknown_settings_name_the_closest(cls, name, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(cls, {name: 1})


def test_from_dict_checks_values_too():
    assert from_dict(SamplingConfig, {"top_k": 5}) == SamplingConfig(top_k=5)
    with pytest.raises(ConfigError, match="top_k must be a whole number >= 0"):
        from_dict(SamplingConfig, {"top_k": -5})


@pytest.mark.parametrize("config", [LoraSettings(), SamplingConfig(), PPOConfig()])
def test_frozen(config):
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    assert config == type(config)() and hash(config) == hash(type(config)())
