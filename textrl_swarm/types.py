"""Frozen carriers that cross floors, each field with its shape. Knows nothing about who fills or reads
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Item = dict[str, Any]  # a prompt as rewards get it: "input" and whatever else the user put beside it


@dataclass(frozen=True)
class Prompt:
    """A prompt that was checked and tokenized once."""

    item: Item

    ids: tuple[int, ...]
    """Token ids, at least one."""


@dataclass(frozen=True)
class PolicyOutput:
    """What a policy says about B sequences of S tokens over a vocabulary of V."""

    logits: Tensor
    """(B, S, V) without temperature and filters; row s predicts token s + 1."""

    values: Tensor
    """(B, S) fp32: estimated return from the state after token s."""


@dataclass(frozen=True)
class Trajectory:
    """One prompt and its response of n tokens, n >= 1."""

    prompt: Tensor
    """(p,) int64, at least one token."""

    response: Tensor
    """(n,) int64, end token included."""

    logprobs: Tensor
    """(n,) fp32, nats: as `RolloutBatch.old_logprobs`."""

    values: Tensor
    """(n,) fp32: as `RolloutBatch.values`."""

    terminated: bool
    """Whether the response ended with an end token."""

    text: str = ""
    """The decoded response, see `models.texts.decode_response`."""


@dataclass(frozen=True)
class RolloutBatch:
    """Trajectories of one rollout, right-padded: B responses, S tokens in all, at most T of them chosen by
    the policy.

    Row order: prompt 0 sample 0, prompt 0 sample 1, ..., prompt 1 sample 0, ...
    """

    tokens: Tensor
    """(B, S) int64: prompt, then response, then padding."""

    prompt_lengths: Tensor
    """(B,) int64, at least 1."""

    response_mask: Tensor
    """(B, T) bool: True where the policy chose the t-th response token, end token included."""

    terminated: Tensor
    """(B,) bool: True where the response ended with an end token, False where it was cut at the length
    limit.
    """

    old_logprobs: Tensor
    """(B, T) fp32, nats: log-probabilities of the chosen tokens as the sampler computed them, at the sampling
    temperature over the full vocabulary. The update recomputes its own old logprobs and compares them with
    these (`sampler_kl`)."""

    values: Tensor
    """(B, T) fp32: the value head's estimate in the state in which the t-th token was chosen, as the sampler
    computed it. For inspection: the update recomputes its own."""

    texts: tuple[str, ...]
    """(B,) decoded responses, see `models.texts.decode_response`."""

    temperature: float
    """Logits were divided by it before sampling; scoring must do the same."""

    @staticmethod
    def from_trajectories(
        trajectories: Sequence[Trajectory], *, temperature: float, pad_token: int = 0
    ) -> RolloutBatch:
        """Pads trajectories on the right. What stands in the padding of `tokens` never reaches a result."""

        def padded(rows: Sequence[Tensor], fill: float = 0) -> Tensor:
            return pad_sequence(list(rows), batch_first=True, padding_value=fill)

        return RolloutBatch(
            tokens=padded([torch.cat([one.prompt, one.response]) for one in trajectories], pad_token),
            prompt_lengths=torch.tensor([len(one.prompt) for one in trajectories]),
            response_mask=padded([torch.ones_like(one.response, dtype=torch.bool) for one in trajectories]),
            terminated=torch.tensor([one.terminated for one in trajectories]),
            old_logprobs=padded([one.logprobs for one in trajectories]),
            values=padded([one.values for one in trajectories]),
            texts=tuple(one.text for one in trajectories),
            temperature=temperature,
        )

    def trajectories(self) -> list[Trajectory]:
        """The rows without their padding; `from_trajectories` puts them together again."""
        rows = []
        lengths = zip(self.prompt_lengths.tolist(), self.response_lengths.tolist(), strict=True)
        for i, (start, count) in enumerate(lengths):
            row = Trajectory(
                prompt=self.tokens[i, :start],
                response=self.tokens[i, start : start + count],
                logprobs=self.old_logprobs[i, :count],
                values=self.values[i, :count],
                terminated=bool(self.terminated[i]),
                text=self.texts[i],
            )
            rows.append(row)
        return rows

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def response_lengths(self) -> Tensor:
        """(B,) int64: number of tokens the policy chose."""
        return self.response_mask.sum(dim=1)


@dataclass(frozen=True)
class CodecLoss:
    """What a codec of hidden states changed on random tokens."""

    nats: float
    """By which the logprob of a token drawn from the model differs, in the mean."""

    cosine: float
    """Between the adapter's gradients."""
