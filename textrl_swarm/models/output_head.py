"""From the decoder's last hidden states to logits, with what each model does on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from textrl_swarm.errors import ModelError


def output_embeddings(model: Any) -> Any:
    """The layer that makes logits. Raises ModelError when the model has none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no output embeddings; pass a model for causal language modelling"
        )
    return head


class OutputHead:
    """The output embeddings of a model and everything around them, as its own forward has it.

    Args:
        model: a causal language model.
        decoder: its module whose output the head reads.
        hidden_size: of that output.

    Raises:
        ModelError: the model has no output embeddings.
    """

    def __init__(self, model: Any, decoder: nn.Module, hidden_size: int):
        self._model, self._decoder = model, decoder
        self._hidden_size = hidden_size
        self._embeddings = output_embeddings(model)
        self._is_all = self._embeddings_are_all()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) for hidden states (..., H)."""
        return self._plain_logits(hidden) if self._is_all else self._model_logits(hidden)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embeddings.weight.device

    def _plain_logits(self, hidden: Tensor) -> Tensor:
        return self._embeddings(self._as_input(hidden))

    def _as_input(self, hidden: Tensor) -> Tensor:
        weight = self._embeddings.weight
        return hidden.to(weight.dtype) if weight.is_floating_point() else hidden

    def _model_logits(self, hidden: Tensor) -> Tensor:
        """Logits by the model's own forward without its decoder, with what it does around the output
        embeddings.
        """
        row = self._as_input(hidden.reshape(1, -1, hidden.shape[-1]))
        with _returning(self._decoder, _DecoderOutput(last_hidden_state=row)):
            tokens = torch.zeros(row.shape[:2], dtype=torch.int64, device=self.device)
            logits = self._model(tokens).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def _embeddings_are_all(self) -> bool:
        """Whether logits are the output embeddings' and nothing else: some models scale or cap them, or have
        layers before.

        Tried on random hidden states whose logits are so large (up to 1000) that a soft cap shows.
        """
        size, head = self._hidden_size, self._embeddings
        if isinstance(head, nn.Linear) and head.in_features != size:
            return False
        with torch.no_grad():
            probe = torch.randn((1, 8, size), generator=torch.Generator().manual_seed(0)).to(self.device)
            probe *= 1000 / self._plain_logits(probe).float().abs().max().clamp_min(1e-3)
            return torch.equal(self._plain_logits(probe).float(), self._model_logits(probe).float())


class _DecoderOutput(BaseModelOutputWithPast):
    """Whatever else a model's head asks its decoder's output for (router logits, cross attentions) is
    None.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside, the module computes nothing and returns `output`."""
    own = module.__dict__.get("forward")  # accelerate puts its hooks there
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
