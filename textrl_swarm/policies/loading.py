"""`load_policy`: a policy on this machine or through a swarm, from one set of arguments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from textrl_swarm.config import Codec, LoraSettings, ServerChecks, SwarmAccess, Timeouts
from textrl_swarm.errors import ConfigError, closest
from textrl_swarm.models import adapter_files
from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.policies.base import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Never


def load_policy(
    model: str | Path | BaseModel | nn.Module,
    initial_peers: Sequence[str] | None = None,
    dht_prefix: str | None = None,
    quantization: str | None = None,
    lora: LoraSettings | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    *,
    gradient_checkpointing: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ref_adapter: str | Path | None = None,
    timeouts: Timeouts | None = None,
    codec: Codec | Literal["fp16", "int8"] | None = None,
    checks: ServerChecks | None = None,
    access: SwarmAccess | None = None,
    local_blocks: Sequence[int] | None = None,
    **unknown: Never,
) -> Policy:
    """Makes a policy on this machine or through a swarm.

    Args:
        model: directory or hub id, a transformers model, or a petals Distributed* model.
        initial_peers: addresses of servers that hold the blocks, as `textrl-swarm serve` prints them; None =
            the model is on this machine.
        dht_prefix: name under which the swarm announces the model; None = made from `model`.
        quantization: None, "8bit" or "4bit" (bitsandbytes). On this machine only: servers choose their own.
        lora: which weights are trained; None = those of `ref_adapter`, or else the defaults.
        dtype: of the weights on this machine; None = the checkpoint's. A loaded model keeps its own.
        device: None = CUDA when there is one (on this machine), else the CPU. A loaded model stays where it
            is.
        seed: of the adapter's and the value head's first values.
        gradient_checkpointing: of a model on this machine: keep only the blocks' inputs for backward, which
            computes each block once more. The same gradients with less memory and about a third more time.
        tokenizer: instead of the one that belongs to `model`.
        ref_adapter: directory of a PEFT LoRA adapter to start from, which is then also the ref policy; None =
            start from the base model, which is then the ref policy.
        timeouts: how long to wait for the swarm; None = the defaults.
        codec: "fp16", "int8" or a Codec with limits of its own: hidden states travel in fewer bits; None = in
            the servers' dtype, which changes nothing.
        checks: how much of what servers compute is computed again by others; None = they are believed.
        access: which servers are used, and what lets this machine in; None = all servers of an open swarm.
        local_blocks: (first, last): how many of the first blocks, and of the last, this machine computes
            instead of the swarm, which gets to see less of the prompts then; None = none.

    Raises:
        ModelError: the model cannot be used.
        ConfigError: impossible arguments, an unknown one, a codec that changes more than it may, a record of
            refuted servers that is none, or local blocks that do not fit.
        AdapterError: `ref_adapter` does not fit.
        AddressError, PetalsMissing, BlocksUnavailable, ServerMismatch, AccessDenied: the swarm cannot be
            used.
    """
    for name in unknown:
        known = [known for known in inspect.signature(load_policy).parameters if known != "unknown"]
        raise ConfigError(f"unknown argument {name!r} of load_policy; {closest(name, known)}")
    if lora is None:
        lora = LoraSettings() if ref_adapter is None else adapter_files.read_settings(ref_adapter)
    if initial_peers is not None or type(model).__name__.startswith("Distributed"):
        from textrl_swarm.policies.remote import load_remote_policy

        if gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing=True is for a model on this machine: servers always compute blocks "
                "again in backward; leave it out"
            )

        policy: Policy = load_remote_policy(
            model,
            initial_peers=initial_peers,
            dht_prefix=dht_prefix,
            quantization=quantization,
            lora=lora,
            dtype=dtype,
            device=device,
            seed=seed,
            tokenizer=tokenizer,
            timeouts=timeouts or Timeouts(),
            codec=codec if codec is None or isinstance(codec, Codec) else Codec(codec),
            checks=checks,
            access=access or SwarmAccess(),
            local_blocks=(0, 0) if local_blocks is None else local_blocks,
        )
    else:
        of_swarm = {
            "dht_prefix": dht_prefix,
            "timeouts": timeouts,
            "codec": codec,
            "checks": checks,
            "access": access,
            "local_blocks": local_blocks,
        }
        for name, value in of_swarm.items():
            if value is not None:
                raise ConfigError(
                    f"{name}={value!r} is for a model in a swarm: give initial_peers too, or leave it out"
                )
        from textrl_swarm.policies.local_loading import load_local_policy

        policy = load_local_policy(
            model,
            quantization=quantization,
            lora=lora,
            dtype=dtype,
            device=device,
            seed=seed,
            tokenizer=tokenizer,
            gradient_checkpointing=gradient_checkpointing,
        )
    if ref_adapter is not None:
        try:
            policy.start_from(ref_adapter)
        except BaseException:
            policy.close()
            raise
    return policy
