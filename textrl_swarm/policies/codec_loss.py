"""What a codec of hidden states changes, measured on random tokens. Knows nothing about how they travel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from textrl_swarm.policies.base import Policy
from textrl_swarm.types import CodecLoss


class Probe(NamedTuple):
    """What a policy computes for some tokens."""

    logprobs: Tensor
    """(B, T, V)"""

    gradient: Tensor
    """(n,) of the adapter."""


def compared(exact: Probe, coded: Probe) -> CodecLoss:
    """Of the same tokens without and with the codec."""
    differences = (coded.logprobs - exact.logprobs).abs()
    nats = float((exact.logprobs.exp() * differences).sum(dim=-1).mean())
    cosine = torch.nn.functional.cosine_similarity(exact.gradient, coded.gradient, dim=0)
    return CodecLoss(nats, float(cosine))


def probe(policy: Policy) -> Probe:
    """Logprobs of 128 random tokens, and the gradient of their mean."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(policy.vocab_size, (4, 32), generator=generator)
    with torch.enable_grad():
        logprobs = policy(tokens).logits[:, :-1].float().log_softmax(dim=-1)
        chosen = logprobs.gather(-1, tokens[:, 1:, None].to(logprobs.device)).mean()
        gradients = torch.autograd.grad(chosen, list(policy.adapter_parameters().values()))
    return Probe(logprobs.detach(), torch.cat([gradient.flatten() for gradient in gradients]))
