"""The client's own part of a model: embeddings, final norm and output embeddings."""

from __future__ import annotations

import copy

import torch
from petals.client.from_pretrained import ignore_keys
from transformers import BloomForCausalLM, PreTrainedModel

from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.models.pretrained import load_weights, usable_device


class _WithoutBlocks(BloomForCausalLM):
    _keys_to_ignore_on_load_unexpected = (r"^(transformer\.)?h\.",)


def load_parts(
    base: BaseModel, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> PreTrainedModel:
    """The model without its blocks; weight files that hold nothing but blocks are not downloaded.

    Raises:
        ModelError: a weight is missing, or its file cannot be read.
        ConfigError: this machine has no such device.
    """
    place = usable_device("cpu" if device is None else device)
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = 0
    with ignore_keys(_WithoutBlocks._keys_to_ignore_on_load_unexpected):
        parts = load_weights(_WithoutBlocks, base, config=config, dtype=dtype or "auto")
    return parts.to(place)
