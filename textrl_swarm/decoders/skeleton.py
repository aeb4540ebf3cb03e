"""A decoder without memory: the whole model on torch's meta device, and where its blocks are.

What transformers computes without weights (masks, rotary frequencies) is real. Knows nothing about files or
servers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import Cache

from textrl_swarm.decoders.chunks import mask_of, positions_of
from textrl_swarm.errors import ModelError
from textrl_swarm.models.layers import find_blocks


class Skeleton:
    """A model on the meta device whose buffers are on a real one.

    Args:
        config: of the whole model, as AutoConfig reads it.
        dtype: of the weights to come.

    Raises:
        ModelError: no decoder of transformers, or none with a list of transformer blocks.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype):
        self.dtype = dtype
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{config.model_type} is an encoder-decoder model; only decoders can be cut into blocks"
            )
        config = copy.deepcopy(config)
        vars(config).pop("quantization_config", None)  # of the numbers in the files
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        except ValueError as error:  # transformers lists all its decoders in this message
            raise ModelError(f"{config.model_type} is no decoder that transformers knows") from error
        self.model.tie_weights()
        self.model.eval().requires_grad_(False)
        self.config = self.model.config.get_text_config(decoder=True)
        self.blocks_path, self.blocks = find_blocks(self.model)
        # Not get_decoder(), which is the head in Llama 4 and ModernBERT.
        self.decoder_path = self.blocks_path.rpartition(".")[0]
        self.decoder: Any = self.model.get_submodule(self.decoder_path)
        takes = inspect.signature(type(self.decoder).forward).parameters
        self._cache_argument = "cache_params" if "cache_params" in takes else "past_key_values"
        self._takes_positions = "position_ids" in takes

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """H, numbers per token between two blocks."""
        return self.config.hidden_size

    def run_decoder(
        self, past: int, cache: Cache | None, padding: Sequence[int] = (), **inputs: Tensor
    ) -> Any:
        """The decoder's own forward.

        Args:
            past: tokens before these.
            cache: that holds them; None = none do.
            padding: see Chunk.
            inputs: `input_ids` (B, S) or `inputs_embeds` (B, S, H).
        """
        (given,) = inputs.values()
        length = given.shape[1]
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options[self._cache_argument] = cache
        if padding:
            options["attention_mask"] = mask_of(padding, past + length, given.device)
        if self._takes_positions:  # Bamba would count from 0 again
            options["position_ids"] = positions_of(padding or (0,), past, length, given.device)
        return self.decoder(**inputs, **options)

    def move(self, device: torch.device) -> None:
        """Moves what is not on the meta device."""
        for module in self.model.modules():
            for name, tensor in [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]:
                if not tensor.is_meta and tensor.device != device:
                    if isinstance(tensor, nn.Parameter):
                        tensor.data = tensor.data.to(device)
                    else:
                        setattr(module, name, tensor.to(device))

    def block_prefix(self, block: int) -> str:
        """What the names of a block's weights begin with in the model, e.g. "model.layers.3."."""
        return f"{self.blocks_path}.{block}."

    def is_outside(self, name: str) -> bool:
        """Whether a weight of the model belongs to what a swarm's client holds: embeddings, final norm and
        output embeddings. Neither do the blocks, nor what sees images.
        """
        head = self.model.get_output_embeddings()
        heads = () if head is None else [id(parameter) for parameter in head.parameters()]
        if name.startswith(f"{self.blocks_path}."):
            return False
        in_decoder = name.startswith(f"{self.decoder_path}.") or not self.decoder_path
        return in_decoder or id(_tensor(self.model, name)) in heads


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None)
