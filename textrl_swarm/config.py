"""Settings as frozen dataclasses, checked when built. Knows nothing about models, servers or files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from textrl_swarm.errors import ConfigError, closest

QUANTIZATIONS = ("8bit", "4bit")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_numbers(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        _require(ok, f"{name} must be a finite number, got {value!r}")


def _require_bools(config: object, *names: str) -> None:
    for name in names:  # "false" from a file would count as True
        _require(isinstance(getattr(config, name), bool), f"{name} must be True or False, got {getattr(config, name)!r}")


def from_dict(cls: type, values: dict):
    """Builds a settings dataclass from plain values; unknown keys are refused with the closest name."""
    known = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        _require(name in known, f"unknown setting {name!r} of {cls.__name__}; {closest(name, known)}")
    return cls(**values)


@dataclass(frozen=True)
class LoraSettings:
    """Which weights are trained: low-rank updates W + (alpha / r) * B A on linear layers inside the blocks.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    r: int = 8  # rank; trainable parameters and adapter bytes grow linearly with it
    alpha: float = 16  # the update is scaled by alpha / r
    targets: tuple[str, ...] | None = None  # names of linear layers, e.g. ("query_key_value", "dense"); None = all of a block
    layers: int | None = None  # train only the last k blocks (the blocks below are then computed once per rollout); None = all

    def __post_init__(self):
        _require(_is_int(self.r) and self.r >= 1, f"LoRA rank r must be a whole number >= 1, got {self.r!r}")
        _require_numbers(self, "alpha")
        _require(self.alpha > 0, f"LoRA alpha must be > 0, got {self.alpha!r}")
        if self.targets is not None:
            targets = (self.targets,) if isinstance(self.targets, str) else self.targets
            ok = isinstance(targets, Iterable) and bool(targets := tuple(targets)) and all(isinstance(t, str) and t for t in targets)
            _require(ok, f"LoRA targets must be names of linear layers or None for all of them, got {self.targets!r}")
            object.__setattr__(self, "targets", targets)
        ok = self.layers is None or (_is_int(self.layers) and self.layers >= 1)
        _require(ok, f"LoRA layers must be None (all blocks) or a whole number >= 1 (the last k), got {self.layers!r}")


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. Filters and the penalty shape exploration only; logprobs are those of the full vocabulary."""

    max_new_tokens: int = 32  # at most this many tokens are chosen per response, end token included
    temperature: float = 1.0  # logits are divided by it, here and when scoring
    top_k: int = 0  # keep the k most likely tokens; 0 = off
    top_p: float = 1.0  # keep the smallest set of tokens with this much probability; 1 = off
    repetition_penalty: float = 1.0  # > 1 makes tokens of the prompt and the response so far less likely (arXiv 1909.05858); 1 = off
    do_sample: bool = True  # False: the most likely token each time
    num_samples: int = 1  # responses per prompt
    stop_token_ids: tuple[int, ...] | None = None  # tokens that end a response; None = the model's end tokens (of an environment: its own)
    seed: int | None = None  # same seed, same policy, same prompts: same responses; None = from torch's global generator

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, f"{name} must be a whole number >= 1, got {value!r}")
        _require(_is_int(self.top_k) and self.top_k >= 0, f"top_k must be a whole number >= 0 (0 = off), got {self.top_k!r}")
        _require_numbers(self, "temperature", "top_p", "repetition_penalty")
        _require(
            self.temperature > 0,
            f"temperature must be > 0, got {self.temperature!r}; for the most likely token each time use do_sample=False",
        )
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1] (1 = off), got {self.top_p!r}")
        _require(self.repetition_penalty > 0, f"repetition_penalty must be > 0 (1 = off), got {self.repetition_penalty!r}")
        _require_bools(self, "do_sample")
        if self.stop_token_ids is not None:
            ok = isinstance(self.stop_token_ids, Iterable) and all(_is_int(i) and i >= 0 for i in self.stop_token_ids)
            _require(ok, f"stop_token_ids must be a list of token ids or None, got {self.stop_token_ids!r}")
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require(self.seed is None or _is_int(self.seed), f"seed must be a whole number or None, got {self.seed!r}")


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation of whole responses. Defaults are the literature's; each names its source.

    Source: Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593; Huang et al. 2024, arXiv 2403.17031.
    """

    lr: float = 1e-4  # AdamW learning rate of adapter and value head; LoRA wants about 10x that of full training (arXiv 2106.09685)
    lr_decay_updates: int | None = None  # lr falls linearly to 0 over this many updates (arXiv 1909.08593); None = constant
    epochs: int = 4  # passes over each rollout (arXiv 1909.08593)
    minibatch_size: int = 64  # responses per optimizer step; more than the rollout has = the whole rollout
    gamma: float = 1.0  # discount per token (arXiv 1909.08593)
    gae_lambda: float = 0.95  # generalised advantage estimation, arXiv 1506.02438
    bootstrap_truncated: bool = False  # True: a response cut at the length limit is worth the value of its last state on top of its rewards
    clip_range: float = 0.2  # the policy's ratio is clipped to 1 +- this (arXiv 1707.06347)
    value_clip_range: float | None = 0.2  # new values move at most this far from the old ones; None = no clipping
    value_coef: float = 0.1  # weight of the value loss (arXiv 1909.08593)
    entropy_coef: float = 0.0  # weight of the entropy bonus; needs no reference policy
    kl_coef: float = 0.05  # per-token penalty -kl_coef * (logprob - ref_logprob) (arXiv 2403.17031); 0 = off
    adaptive_kl_target: float | None = None  # nats per response; None = fixed kl_coef, else it is steered (arXiv 1909.08593, section 2.2)
    adaptive_kl_horizon: int = 10_000  # responses over which the controller reacts
    target_kl: float | None = None  # stop the epochs of an update when approx_kl exceeds this; None = never
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    whiten_advantages: bool = True  # mean 0, variance 1 over the real tokens of a rollout
    whiten_rewards: bool = False  # variance 1, mean kept (arXiv 1909.08593)
    weight_decay: float = 0.0  # of AdamW
    adam_eps: float = 1e-5  # arXiv 2403.17031, detail on Adam's epsilon
    seed: int = 0  # order of minibatches

    def __post_init__(self):
        _require_numbers(
            self, "lr", "gamma", "gae_lambda", "clip_range", "value_coef", "entropy_coef", "kl_coef", "max_grad_norm",
            "weight_decay", "adam_eps",
        )  # fmt: skip
        for name in ("epochs", "minibatch_size", "adaptive_kl_horizon"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, f"{name} must be a whole number >= 1, got {value!r}")
        ok = self.lr_decay_updates is None or (_is_int(self.lr_decay_updates) and self.lr_decay_updates >= 1)
        _require(ok, f"lr_decay_updates must be a whole number >= 1 or None, got {self.lr_decay_updates!r}")
        for name in ("lr", "clip_range", "max_grad_norm", "adam_eps"):
            _require(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)!r}")
        for name in ("value_coef", "entropy_coef", "kl_coef", "weight_decay"):
            _require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)!r}")
        for name in ("gamma", "gae_lambda"):
            _require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        for name in ("value_clip_range", "adaptive_kl_target", "target_kl"):
            if getattr(self, name) is not None:
                _require_numbers(self, name)
                _require(getattr(self, name) > 0, f"{name} must be > 0 or None, got {getattr(self, name)!r}")
        _require_bools(self, "bootstrap_truncated", "whiten_advantages", "whiten_rewards")
        _require(_is_int(self.seed), f"seed must be a whole number, got {self.seed!r}")
