"""TextRL's actor: binds an environment and a model, makes the PPO agent, and speaks (`predict`)."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig, from_dict
from textrl_swarm.errors import ConfigError, closest
from textrl_swarm.learning.ppo import MakeOptimizer
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.compat import lend_tokenizer_name
from textrl_swarm.textrl.agent import PPOAgent
from textrl_swarm.textrl.env import TextRLEnv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

lend_tokenizer_name()

logger = logging.getLogger(__name__)

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class TextRLActor:
    """A policy for an environment.

    Args:
        env: prompts and reward.
        model: a transformers model (plain or quantised), a petals Distributed* model, a directory or hub id,
            or a Policy.
        tokenizer: of the model.
        optimizer: "adamw", "adam", "sgd", a torch optimizer's class, a function from a list of parameters to
            a torch optimizer, or a torch optimizer. Of the last, the actor takes class and settings (learning
            rate included) for the adapter's parameters, which did not exist when it was made.
        gpu_id: index of the CUDA device for a model given by name; -1 = the CPU, None = CUDA when there is
            one.
        unfreeze_layer_from_past: train LoRA on the last n blocks only; 0 = all (or the environment's
            setting).
        act_deterministically: `predict` and evaluation take the most likely token.
        temperature, top_k, top_p, repetition_penalty: of sampling, see SamplingConfig.
        compare_sample: must agree with the environment's when given.
        lora: see LoraSettings; None = its defaults.
        seed: of adapter, value head and sampling.
    """

    def __init__(
        self,
        env: TextRLEnv,
        model: nn.Module | Policy | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        optimizer: str | MakeOptimizer | torch.optim.Optimizer = "adamw",
        gpu_id: int | None = None,
        unfreeze_layer_from_past: int = 0,
        act_deterministically: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        compare_sample: int | None = None,
        lora: LoraSettings | None = None,
        seed: int = 0,
    ):
        if compare_sample is not None and compare_sample != env.compare_sample:
            raise ConfigError(
                f"compare_sample={compare_sample}, but the environment was made with {env.compare_sample}; "
                "give it to TextRLEnv"
            )
        if isinstance(optimizer, str):
            optimizer = optimizer.lower()
            if optimizer not in _OPTIMIZERS:
                raise ConfigError(f"unknown optimizer {optimizer!r}; {closest(optimizer, _OPTIMIZERS)}")
        if not isinstance(optimizer, (str, torch.optim.Optimizer)) and not callable(optimizer):
            raise ConfigError(
                f"optimizer must be a name ({', '.join(_OPTIMIZERS)}), a function or a torch optimizer, "
                f"got {optimizer!r}"
            )
        self.env = env
        self.optimizer = optimizer
        self.act_deterministically = act_deterministically
        self.seed = seed
        self.sampling = SamplingConfig(
            max_new_tokens=env.env_max_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        layers = unfreeze_layer_from_past or env.unfreeze_layer_from_past
        if lora is None:
            lora = LoraSettings(layers=layers or None)
        elif layers:
            raise ConfigError(
                "give either lora=LoraSettings(layers=n) or unfreeze_layer_from_past=n, not both"
            )
        if isinstance(model, Policy):
            if lora not in (LoraSettings(), model.lora) and not (layers and layers == model.lora.layers):
                raise ConfigError(
                    f"the policy trains {model.lora}; give other LoRA settings to load_policy, where it is "
                    "made"
                )
            self.policy = model
        else:
            device = None
            if gpu_id is not None and not isinstance(model, nn.Module):  # a model object stays where it is
                device = "cpu" if gpu_id < 0 else f"cuda:{gpu_id}"
            self.policy = load_policy(model, lora=lora, device=device, seed=seed, tokenizer=tokenizer)
        env.stop_also_at(self.policy.stop_ids)
        self.agent: PPOAgent | None = None

    def agent_ppo(
        self,
        update_interval: int = 10,
        minibatch_size: int = 2000,
        epochs: int = 20,
        lr: float = PPOConfig.lr,
        **ppo_fields: Any,
    ) -> PPOAgent:
        """The agent that trains this actor.

        Args:
            update_interval: env steps (one token of each sample) between updates.
            minibatch_size: env steps per optimizer step; minibatches hold whole responses of about that many,
                never a copy.
            epochs: passes over each rollout.
            lr: learning rate.
            ppo_fields: any other field of PPOConfig, e.g. kl_coef=0.1.
        """
        if not isinstance(minibatch_size, int) or minibatch_size < 1:
            raise ConfigError(
                f"minibatch_size must be a whole number >= 1 of env steps, got {minibatch_size!r}"
            )
        responses = max(1, minibatch_size // self.env.env_max_length) * self.env.compare_sample
        fields = {"minibatch_size": responses, "epochs": epochs, "lr": lr, "seed": self.seed, **ppo_fields}
        config = from_dict(PPOConfig, fields)
        self.agent = PPOAgent(
            self.policy,
            config,
            self.sampling,
            update_interval=update_interval,
            act_deterministically=self.act_deterministically,
            make_optimizer=self._make_optimizer(config),
        )
        return self.agent

    def _make_optimizer(self, config: PPOConfig) -> MakeOptimizer | None:
        optimizer = self.optimizer
        if optimizer == "adamw":
            return None  # the learner's own
        if isinstance(optimizer, str):
            named = _OPTIMIZERS[optimizer]
            return lambda parameters: named(parameters, lr=config.lr)
        if isinstance(optimizer, torch.optim.Optimizer):
            return _like(optimizer)
        if isinstance(optimizer, type) and "lr" in inspect.signature(optimizer).parameters:
            with_lr: Callable[..., torch.optim.Optimizer] = optimizer
            return lambda parameters: with_lr(parameters, lr=config.lr)
        return optimizer

    def predict(self, input_item: str | dict[str, Any] | Sequence[str]) -> list[str]:
        """`compare_sample` responses to a prompt, without asking the reward or disturbing an episode."""
        env = self.env
        sampling = dataclasses.replace(
            self.sampling,
            num_samples=env.compare_sample,
            do_sample=not self.act_deterministically,
            seed=None,
            max_new_tokens=env.env_max_length,
            stop_token_ids=tuple(sorted(env.stop_ids)),
        )
        prompt = env.encode(env.item(input_item))
        return list(self.policy.generate([prompt.ids], sampling).texts)


def _like(optimizer: torch.optim.Optimizer) -> MakeOptimizer:
    """Makes optimizers of the same class with the same settings, for other parameters."""
    cls = type(optimizer)
    group = optimizer.param_groups[0]
    accepted = inspect.signature(cls).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    names = [name for name in optimizer.defaults if name in group and (takes_any or name in accepted)]
    settings = {name: group[name] for name in names}
    logger.info("%s with lr=%g is made anew for the adapter and the value head", cls.__name__, group["lr"])
    return lambda parameters: cls(parameters, **settings)
