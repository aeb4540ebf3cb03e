"""Frozen carriers that cross floors, each field with its shape. Knows nothing about who fills or reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PolicyOutput:
    """What a policy says about B sequences of S tokens over a vocabulary of V."""

    logits: Tensor  # (B, S, V) unscaled: no temperature, no filters; row s predicts token s + 1
    values: Tensor  # (B, S) fp32: estimated return from the state after token s


@dataclass(frozen=True)
class RolloutBatch:
    """Trajectories of one rollout, right-padded. B responses, S tokens in all, at most T of them chosen by the policy.

    Row order: prompt 0 sample 0, prompt 0 sample 1, ..., prompt 1 sample 0, ...
    """

    tokens: Tensor  # (B, S) int64: prompt, then response, then padding
    prompt_lengths: Tensor  # (B,) int64, at least 1
    response_mask: Tensor  # (B, T) bool: True where the policy chose the t-th response token, end token included
    terminated: Tensor  # (B,) bool: True where the response ended with the end token, False where it was cut at the length limit
    old_logprobs: Tensor  # (B, T) fp32, nats: of the chosen tokens at the sampling temperature, over the full vocabulary
    values: Tensor  # (B, T) fp32: value of the state in which the t-th token was chosen
    texts: tuple[str, ...]  # (B,) decoded responses, special tokens left out
    temperature: float  # logits were divided by this before sampling; scoring must do the same

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def response_lengths(self) -> Tensor:
        """(B,) int64: number of tokens the policy chose."""
        return self.response_mask.sum(dim=1)
