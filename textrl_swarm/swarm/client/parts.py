"""The client's own part of a model: embeddings, final norm and output embeddings."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from textrl_swarm.decoders.loading import load_outside
from textrl_swarm.decoders.outside import Outside
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.models.pretrained import usable_device


def load_parts(
    base: BaseModel, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> Outside:
    """A model's, of a directory or on the hub.

    Args:
        dtype: None or "auto" = that of the checkpoint.

    Raises:
        ModelError: a weight is missing, or its file cannot be read.
        ConfigError: this machine has no such device, or torch no such dtype.
    """
    place = usable_device("cpu" if device is None else device)
    skeleton, _ = load_outside(base, dtype)
    return Outside(skeleton, place)


def parts_of(model: Any) -> Outside:
    """Those of a user's petals model (DistributedBloomForCausalLM), which go on belonging to it."""
    config = AutoConfig.for_model(**model.config.to_dict())
    skeleton = Skeleton(config, model.dtype)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for name, _ in list(skeleton.model.named_parameters(remove_duplicate=False)):
        if skeleton.is_outside(name):
            path, _, leaf = name.rpartition(".")
            setattr(skeleton.model.get_submodule(path), leaf, theirs[name])
    skeleton.model.name_or_path = model.name_or_path
    skeleton.model.generation_config = model.generation_config
    return Outside(skeleton, model.device)
