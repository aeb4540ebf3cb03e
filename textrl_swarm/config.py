"""Settings as frozen dataclasses, checked when built. Knows nothing about models, servers or files.

Each field is documented by the string below it. `help()` shows these strings too, because `document_fields`
appends them to the class's docstring; the run.yaml reference is generated from them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from textrl_swarm.errors import ConfigError, closest

Settings = TypeVar("Settings")

QUANTIZATIONS = ("8bit", "4bit")
CODECS = ("fp16", "int8")  # of hidden states on the wire

_PEER_ID = re.compile("[1-9A-HJ-NP-Za-km-z]{30,}")


# --------------------------------------------------------------------------------- documented fields


@functools.cache
def field_docs(cls: type) -> Mapping[str, str]:
    """Field name -> the string below the field in the source, with its line breaks folded; {} without the
    source.
    """
    try:
        tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    except (OSError, TypeError):
        return {}
    body = next(
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )
    docs = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return docs


def document_fields(cls: type[Settings]) -> type[Settings]:
    """Class decorator: appends an "Attributes:" section with every field's own docstring to the class's
    docstring.
    """
    docs = field_docs(cls)  # type: ignore[arg-type]
    if docs:
        lines = [
            textwrap.fill(f"{name}: {text}", 106, subsequent_indent="    ") for name, text in docs.items()
        ]
        section = "Attributes:\n" + textwrap.indent("\n".join(lines), "    ")
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{section}\n"
    return cls


# -------------------------------------------------------------------------------------------- checks


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not holds:
        raise ConfigError(message)


def is_int(value: object) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _require_numbers(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        require(ok, f"{name} must be a finite number, got {value!r}")


def _require_bools(config: object, *names: str) -> None:
    for name in names:  # the text "false" from a file would count as True
        value = getattr(config, name)
        require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")


def _require_counts(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(is_int(value) and value >= 1, f"{name} must be a whole number >= 1, got {value!r}")


def from_dict(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Builds a settings dataclass from plain values; unknown keys are refused with the closest name."""
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        require(name in known, f"unknown setting {name!r} of {cls.__name__}; {closest(name, known)}")
    return cls(**values)


# ------------------------------------------------------------------------------------------ settings


@document_fields
@dataclass(frozen=True)
class LoraSettings:
    """Which weights are trained: low-rank updates W + (alpha / r) * B A on linear layers inside the blocks.

    Called settings, not config, because `peft.LoraConfig` is something else.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    r: int = 8
    """Rank. Trainable parameters and the adapter's bytes grow linearly with it."""

    alpha: float = 16
    """The update is scaled by alpha / r."""

    rank_stabilized: bool = False
    """True = the update is scaled by alpha / sqrt(r), so that adapters of large ranks learn as fast
    (arXiv 2312.03732)."""

    targets: tuple[str, ...] | None = None
    """Names of linear layers, e.g. ("query_key_value", "dense"); None = all linear layers of a block. The
    routed experts of a mixture are adapted only by name, e.g. "experts.gate_up_proj" and
    "experts.down_proj": each expert has matrices of its own, so the adapter is large."""

    layers: int | None = None
    """Adapt only the last k blocks; None = all. The blocks below run once per update, and not in every
    forward."""

    def __post_init__(self) -> None:
        require(is_int(self.r) and self.r >= 1, f"LoRA rank r must be a whole number >= 1, got {self.r!r}")
        _require_numbers(self, "alpha")
        _require_bools(self, "rank_stabilized")
        require(self.alpha > 0, f"LoRA alpha must be > 0, got {self.alpha!r}")
        if self.targets is not None:
            object.__setattr__(self, "targets", _checked_targets(self.targets))
        ok = self.layers is None or (is_int(self.layers) and self.layers >= 1)
        require(
            ok,
            f"LoRA layers must be None (all blocks) or a whole number >= 1 (the last k), got {self.layers!r}",
        )

    @property
    def scale(self) -> float:
        """Of the update B A."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)


def _checked_targets(given: object) -> tuple[str, ...]:
    targets = (given,) if isinstance(given, str) else given
    names = tuple(targets) if isinstance(targets, Iterable) else ()
    ok = bool(names) and all(isinstance(name, str) and name for name in names)
    require(ok, f"LoRA targets must be names of linear layers or None for all of them, got {given!r}")
    return names


@document_fields
@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Filters and the repetition penalty shape exploration only; logprobs are those of the full vocabulary.
    """

    max_new_tokens: int = 32
    """Most tokens of a response, end token included."""

    temperature: float = 1.0
    """Logits are divided by it when sampling and when scoring."""

    top_k: int = 0
    """Keep the k most likely tokens; 0 = off (Fan et al. 2018, arXiv 1805.04833)."""

    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability; 1 = off (Holtzman et al. 2019, arXiv
    1904.09751).
    """

    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the response so far become less likely; 1 = off (arXiv
    1909.05858).
    """

    do_sample: bool = True
    """False = take the most likely token each time."""

    num_samples: int = 1
    """Responses per prompt."""

    stop_token_ids: tuple[int, ...] | None = None
    """Token ids that end a response; None = those at which the model's own `generate` ends and the
    tokenizer's end and separator, or an environment's `gen_stop_toks`, which begin with these."""

    seed: int | None = None
    """The same seed, policy and prompts give the same responses; None = draw from torch's global generator,
    from which a Learner takes one seed for all its rollouts."""

    def __post_init__(self) -> None:
        _require_counts(self, "max_new_tokens", "num_samples")
        ok = is_int(self.top_k) and self.top_k >= 0
        require(ok, f"top_k must be a whole number >= 0 (0 = off), got {self.top_k!r}")
        _require_numbers(self, "temperature", "top_p", "repetition_penalty")
        require(
            self.temperature > 0,
            f"temperature must be > 0, got {self.temperature!r}; "
            "for the most likely token each time use do_sample=False",
        )
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1] (1 = off), got {self.top_p!r}")
        require(
            self.repetition_penalty > 0,
            f"repetition_penalty must be > 0 (1 = off), got {self.repetition_penalty!r}",
        )
        _require_bools(self, "do_sample")
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", _checked_ids(self.stop_token_ids))
        require(
            self.seed is None or is_int(self.seed), f"seed must be a whole number or None, got {self.seed!r}"
        )


def _checked_ids(given: object) -> tuple[int, ...]:
    ids = tuple(given) if isinstance(given, Iterable) else (None,)
    ok = all(is_int(token) and token >= 0 for token in ids)
    require(ok, f"stop_token_ids must be a list of token ids or None, got {given!r}")
    return ids


class _ByAlgorithm:
    """Stands for a setting that was not given."""

    def __repr__(self) -> str:
        return "<as the algorithm has it>"


_BY_ALGORITHM: Any = _ByAlgorithm()

_PPO = {
    "baseline": "critic",
    "scale_advantages": "none",
    "whiten_advantages": True,
    "ratio": "token",
    "clip": "ppo",
    "clip_range": 0.2,
    "clip_range_high": None,
    "loss_mean": "tokens",
    "kl_coef": 0.05,
    "kl_in": "reward",
    "kl_estimator": "k1",
    "mask_truncated": False,
}
_GROUP = {"baseline": "group", "scale_advantages": "group", "whiten_advantages": False, "kl_coef": 0.0}

ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "ppo": _PPO,
    "grpo": {
        **_PPO,
        **_GROUP,
        "loss_mean": "responses",
        "kl_coef": 0.04,
        "kl_in": "loss",
        "kl_estimator": "k3",
    },
    "dr_grpo": {**_PPO, **_GROUP, "scale_advantages": "none", "loss_mean": "length"},
    "dapo": {**_PPO, **_GROUP, "clip_range_high": 0.28, "mask_truncated": True},
    "gspo": {
        **_PPO,
        **_GROUP,
        "ratio": "response_mean",
        "clip_range": 3e-4,
        "clip_range_high": 4e-4,
        "loss_mean": "responses",
    },
    "cispo": {**_PPO, **_GROUP, "clip": "cispo", "clip_range_high": 5.0},
    "rloo": {
        **_PPO,
        "baseline": "leave_one_out",
        "whiten_advantages": False,
        "ratio": "response",
        "loss_mean": "responses",
    },
    "reinforce++": {**_PPO, "baseline": "none"},
}
"""Name of an algorithm -> its settings, of which each may be given otherwise."""

_CHOICES: Mapping[str, Sequence[str]] = {
    "baseline": ("critic", "group", "leave_one_out", "none"),
    "scale_advantages": ("none", "group", "batch"),
    "ratio": ("token", "response", "response_mean"),
    "clip": ("ppo", "cispo"),
    "loss_mean": ("tokens", "responses", "length"),
    "kl_in": ("reward", "loss"),
    "kl_estimator": ("k1", "k2", "k3"),
    "sampler_correction": ("none", "truncate", "mask"),
    "sampler_ratio_of": ("token", "response"),
    "lr_schedule": ("linear", "cosine"),
}


@document_fields
@dataclass(frozen=True)
class PPOConfig:
    """The update: PPO, or another algorithm over the same rollouts.

    An algorithm is a name for some of the settings, of which each may be given otherwise. Other defaults are
    the literature's; each names its source.

    Source: Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593; Huang et al. 2024,
    arXiv 2403.17031. Of the algorithms: docs/objectives.md.
    """

    algorithm: str = "ppo"
    """ppo, grpo, dr_grpo, dapo, gspo, cispo, rloo or reinforce++. All but ppo have no value head."""

    lr: float = 1e-4
    """AdamW's learning rate for adapter and value head. LoRA wants about 10 times the rate of full training
    (arXiv 2106.09685)."""

    value_lr: float | None = None
    """The value head's own learning rate; None = lr."""

    lr_warmup_updates: int = 0
    """The learning rate rises linearly over this many updates."""

    lr_decay_updates: int | None = None
    """The learning rate falls to 0 over this many updates (arXiv 1909.08593); None = constant."""

    lr_schedule: str = "linear"
    """How it falls: linear, or cosine (arXiv 1608.03983)."""

    epochs: int = 4
    """Passes over each rollout (arXiv 1909.08593)."""

    minibatch_size: int = 64
    """Responses per optimizer step; a number above the rollout's size means the whole rollout."""

    micro_batch_tokens: int | None = None
    """Most tokens (responses x the longest of them with its prompt) of one forward. A larger minibatch is
    computed in parts whose gradients add up to the same; None = whole minibatches, which take more memory."""

    baseline: str = _BY_ALGORITHM
    """What a response's return is compared with: critic (the value head, by generalised advantage
    estimation), group (the mean of the responses to the prompt), leave_one_out (the mean of the others), or
    none."""

    scale_advantages: str = _BY_ALGORITHM
    """With group or leave_one_out, advantages are divided by the standard deviation of the group or of the
    batch's scores; none = they are not."""

    whiten_advantages: bool = _BY_ALGORITHM
    """Scale advantages to mean 0 and variance 1 over the real tokens of a rollout."""

    ratio: str = _BY_ALGORITHM
    """What is clipped: the ratio of new to old policy of each token, of a whole response, or response_mean,
    the geometric mean over its tokens. With the last two, a response has one advantage, the mean of its
    tokens'."""

    clip: str = _BY_ALGORITHM
    """ppo = the worse of the clipped and the unclipped ratio; cispo = the clipped ratio as a constant
    factor."""

    clip_range: float = _BY_ALGORITHM
    """The ratio is clipped to 1 +- this (arXiv 1707.06347)."""

    clip_range_high: float | None = _BY_ALGORITHM
    """The ratio is clipped to 1 plus this instead, and with cispo to at most this; None = clip_range."""

    ratio_max: float | None = None
    """Bounds the ratio where the advantage is negative, too (arXiv 2505.07291); None = no bound."""

    loss_mean: str = _BY_ALGORITHM
    """The loss is the mean over all tokens, or over responses of their means, or the sum over tokens divided
    by responses times length, the most tokens that a response may have."""

    mask_truncated: bool = _BY_ALGORITHM
    """True = responses that were cut at the length limit are left out of the policy's loss."""

    sampler_correction: str = "none"
    """Weigh losses with the ratio of the policy as it is scored to the policy as it sampled, which quantised
    servers and codecs set apart: truncate = of at most sampler_ratio_max, mask = what is above it counts
    nothing."""

    sampler_ratio_of: str = "token"
    """The ratio is each token's, or that of a whole response."""

    sampler_ratio_max: float = 3.0
    """See sampler_correction."""

    gamma: float = 1.0
    """Discount per token (arXiv 1909.08593); with the baselines critic and none."""

    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""

    bootstrap_truncated: bool = False
    """True = add the value of the last state to a response that was cut at the length limit. On RandomWalks,
    policies then learned never to end."""

    value_clip_range: float | None = 0.2
    """New values move at most this far from the old ones; None = no clipping."""

    value_coef: float = 0.1
    """Weight of the value loss (arXiv 1909.08593)."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 = off."""

    entropy_target: float | None = None
    """The bonus acts while the entropy, in nats per token, is at most this, and its weight grows by
    entropy_step with each such update and shrinks with the others (arXiv 2505.22312); None = fixed
    entropy_coef."""

    entropy_step: float = 0.005
    """See entropy_target."""

    kl_coef: float = _BY_ALGORITHM
    """Weight of the KL to the ref policy; 0 = off."""

    kl_in: str = _BY_ALGORITHM
    """reward = a penalty on each token's reward (arXiv 2403.17031); loss = a term of the loss."""

    kl_estimator: str = _BY_ALGORITHM
    """Of the KL from one token: k1, the log ratio; k2, half its square; k3, of less variance."""

    kl_unbiased: bool = False
    """With kl_in: loss, weigh its estimates with the ratio of new to old policy (arXiv 2512.02556)."""

    adaptive_kl_target: float | None = None
    """Steer kl_coef towards this KL, in nats per response (arXiv 1909.08593, section 2.2); None = fixed
    kl_coef.
    """

    adaptive_kl_horizon: int = 10_000
    """Responses over which the adaptive kl_coef reacts."""

    target_kl: float | None = None
    """End the epochs of an update once approx_kl exceeds this; None = never."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm."""

    whiten_rewards: bool = False
    """Scale rewards to variance 1 and keep their mean (arXiv 1909.08593)."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    adam_eps: float = 1e-5
    """AdamW's epsilon (arXiv 2403.17031)."""

    seed: int = 0
    """Decides the order of minibatches."""

    def __post_init__(self) -> None:
        known = isinstance(self.algorithm, str) and self.algorithm in ALGORITHMS
        require(
            known, f"there is no algorithm {self.algorithm!r}; {closest(str(self.algorithm), ALGORITHMS)}"
        )
        for name, value in ALGORITHMS[self.algorithm].items():
            if getattr(self, name) is _BY_ALGORITHM:
                object.__setattr__(self, name, value)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")
        _require_numbers(
            self, "lr", "gamma", "gae_lambda", "clip_range", "value_coef", "entropy_coef", "kl_coef"
        )
        _require_numbers(
            self, "max_grad_norm", "weight_decay", "adam_eps", "entropy_step", "sampler_ratio_max"
        )
        _require_counts(self, "epochs", "minibatch_size", "adaptive_kl_horizon")
        ok = self.micro_batch_tokens is None or (
            is_int(self.micro_batch_tokens) and self.micro_batch_tokens >= 1
        )
        require(
            ok, f"micro_batch_tokens must be a whole number >= 1 or None, got {self.micro_batch_tokens!r}"
        )
        ok = is_int(self.lr_warmup_updates) and self.lr_warmup_updates >= 0
        require(ok, f"lr_warmup_updates must be a whole number >= 0, got {self.lr_warmup_updates!r}")
        ok = self.lr_decay_updates is None or (is_int(self.lr_decay_updates) and self.lr_decay_updates >= 1)
        require(ok, f"lr_decay_updates must be a whole number >= 1 or None, got {self.lr_decay_updates!r}")
        for name in ("lr", "clip_range", "max_grad_norm", "adam_eps", "entropy_step", "sampler_ratio_max"):
            require(getattr(self, name) > 0, f"{name} must be > 0, got {getattr(self, name)!r}")
        for name in ("value_coef", "entropy_coef", "kl_coef", "weight_decay"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)!r}")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        for name in (
            "value_clip_range", "adaptive_kl_target", "target_kl", "clip_range_high", "ratio_max",
            "entropy_target", "value_lr",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                _require_numbers(self, name)
                require(getattr(self, name) > 0, f"{name} must be > 0 or None, got {getattr(self, name)!r}")
        _require_bools(self, "bootstrap_truncated", "whiten_advantages", "whiten_rewards", "mask_truncated")
        _require_bools(self, "kl_unbiased")
        require(is_int(self.seed), f"seed must be a whole number, got {self.seed!r}")
        self._require_agreement()

    def _require_agreement(self) -> None:
        """Settings that nothing would look at, or that contradict each other."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if self.baseline != "critic":
            for name in ("value_lr", "value_coef", "value_clip_range", "gae_lambda", "bootstrap_truncated"):
                require(
                    getattr(self, name) == defaults[name],
                    f"{name}={getattr(self, name)!r} is for a critic, and baseline={self.baseline} has none "
                    f"(algorithm: {self.algorithm}); leave it out, or set baseline: critic",
                )
        if self.baseline not in ("group", "leave_one_out"):
            require(
                self.scale_advantages == "none",
                f"scale_advantages={self.scale_advantages} is for the baselines group and leave_one_out, not "
                f"for {self.baseline}; use whiten_advantages",
            )
        require(
            self.adaptive_kl_target is None or self.kl_coef > 0,
            f"adaptive_kl_target steers kl_coef, which is 0 (algorithm: {self.algorithm}); set one to begin "
            "with",
        )
        require(
            self.clip == "ppo" or self.clip_range_high is not None,
            "clip: cispo needs clip_range_high, the largest ratio; algorithm: cispo has 5.0",
        )
        require(
            self.lr_schedule == "linear" or self.lr_decay_updates is not None,
            "lr_schedule: cosine needs lr_decay_updates",
        )
        require(
            self.adaptive_kl_target is None or self.kl_in == "reward",
            "adaptive_kl_target steers a KL penalty in the reward; set kl_in: reward, or leave it out",
        )
        require(
            not self.kl_unbiased or self.kl_in == "loss",
            "kl_unbiased is for a KL in the loss; set kl_in: loss, or leave it out",
        )
        require(
            self.clip == "ppo" or self.ratio_max is None,
            "ratio_max is for clip: ppo; with cispo, clip_range_high bounds the ratio",
        )


@document_fields
@dataclass(frozen=True)
class Codec:
    """In how many bits hidden states and their gradients travel, and how much that may change.

    Both limits are measured when a policy is made, on 128 random tokens: one that is exceeded is an error.
    """

    kind: Literal["fp16", "int8"]  # CODECS
    """Numbers in 16 bits with a scale per token, or in 8 with a scale for each 128 of them. Servers that
    compute in 16 bits send 16 without a codec."""

    max_nats: float = 0.05
    """Most nats by which logprobs may differ: the mean over tokens drawn from the model."""

    min_cosine: float = 0.98
    """Least cosine between the adapter's gradient with and without."""

    def __post_init__(self) -> None:
        require(self.kind in CODECS, f"codec must be fp16 or int8, got {self.kind!r}")
        _require_numbers(self, "max_nats", "min_cosine")
        require(self.max_nats > 0, f"max_nats must be > 0, got {self.max_nats!r}")
        require(0 < self.min_cosine <= 1, f"min_cosine must be in (0, 1], got {self.min_cosine!r}")


@document_fields
@dataclass(frozen=True)
class ServerChecks:
    """How much of what servers compute is computed again by others."""

    rate: float = 0.015
    """Of the work; 0 = servers are believed."""

    record: str | None = None
    """File to which each refuted server is added, as a line of JSON; servers in it are not used."""

    here: bool = False
    """Whether this machine computes blocks too, from the model's files: where nobody else holds them, or two
    servers contradict each other."""

    def __post_init__(self) -> None:
        _require_numbers(self, "rate")
        require(0 <= self.rate <= 1, f"checks.rate must be in [0, 1], got {self.rate!r}")


@document_fields
@dataclass(frozen=True)
class SwarmAccess:
    """Which servers are used, and what lets this machine into a swarm that is not open to all."""

    allowed_servers: tuple[str, ...] = ()
    """Ids of the servers that may be used, as they stand behind /p2p/ in addresses; none = all."""

    secret_file: str | None = None
    """File with the secret of a swarm whose servers were started with --secret-file."""

    identity: str | None = None
    """File with the private key of this machine's peer, made when there is none; null = another for each
    run. Servers with --allowed-peers know peers by it."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.allowed_servers, (tuple, list)),
            f"allowed_servers must be a list of ids, got {self.allowed_servers!r}",
        )
        for peer in self.allowed_servers:
            require(
                isinstance(peer, str) and bool(_PEER_ID.fullmatch(peer)),
                f"allowed_servers: {peer!r} is no peer's id; it is what follows /p2p/ in a server's address",
            )
        for name in ("secret_file", "identity"):
            value = getattr(self, name)
            require(
                value is None or (isinstance(value, str) and value != ""),
                f"{name} must be a path, got {value!r}",
            )


def checked_local_blocks(given: object) -> tuple[int, int]:
    """How many of the first blocks, and of the last, a swarm's client computes. Raises ConfigError."""
    counts = tuple(given) if isinstance(given, (tuple, list)) else ()
    ok = len(counts) == 2 and all(is_int(count) and count >= 0 for count in counts)
    require(ok, f"local_blocks must be two whole numbers >= 0, [first, last], got {given!r}")
    return counts


@document_fields
@dataclass(frozen=True)
class Timeouts:
    """How long a client waits for the swarm before it gives up."""

    connect_s: float = 10.0
    """Until a stream to a server is open."""

    request_s: float = 120.0
    """One forward, backward, push or generation step on one server."""

    discovery_s: float = 60.0
    """Until all blocks are found when a policy is made."""

    recovery_s: float = 300.0
    """How long one request may be retried, or wait for lost blocks, before it fails."""

    def __post_init__(self) -> None:
        for name in ("connect_s", "request_s", "discovery_s", "recovery_s"):
            _require_numbers(self, name)
            value = getattr(self, name)
            require(value >= 0, f"{name} must be a number of seconds >= 0, got {value!r}")
