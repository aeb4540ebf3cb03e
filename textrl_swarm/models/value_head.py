"""The value head: one linear layer from a hidden state to an estimated return.

Knows nothing about where hidden states come from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textrl_swarm.errors import ShapeError


class ValueHead(nn.Module):
    """Value of the state behind each hidden state.

        value = weight . hidden + bias,   weight ~ N(0, 1 / (H + 1)^2), bias = 0

    The first weights are small, so that the first advantages are the rewards and not the noise of an
    untrained critic; but not zero, so that the head passes a gradient to its input from the first update on.
    They come from a
    generator of their own: building a head leaves torch's global generator unchanged. Weights and results are
    fp32 even when the hidden states are bf16.

    Args:
        hidden_size: H, >= 1.
        seed: same seed, same initial weights.

    Raises:
        ShapeError: hidden_size < 1.

    Source: Ziegler et al. 2019, arXiv 1909.08593 (a scalar head on the policy's last hidden state; its code
    starts at exactly zero).
    """

    def __init__(self, hidden_size: int, seed: int = 0):
        super().__init__()
        if hidden_size < 1:
            raise ShapeError(
                f"hidden_size must be >= 1, got {hidden_size!r}; pass the width of the model's hidden states"
            )
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1)
        self.weight = nn.Parameter(weight)  # (1, H)
        self.bias = nn.Parameter(torch.zeros(1))  # (1,)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) of any float dtype -> (...) fp32. Raises ShapeError for another width."""
        if hidden.dim() == 0 or hidden.shape[-1] != self.weight.shape[1]:
            raise ShapeError(
                f"hidden has shape {tuple(hidden.shape)}, expected (..., {self.weight.shape[1]}): another "
                "model's?"
            )
        return F.linear(hidden.float(), self.weight, self.bias).squeeze(-1)
