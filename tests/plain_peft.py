"""The oracle of the swarm tests: plain transformers and PEFT, given only the model and a saved adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from textrl_swarm.config import LoraSettings, Timeouts
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.launch import ServerProcess

FAST = Timeouts(connect_s=10, request_s=30, discovery_s=20, recovery_s=60)


def connect(
    swarm,
    lora: LoraSettings | None = None,
    *,
    filled: int | None = None,
    timeouts: Timeouts = FAST,
    local_blocks: tuple[int, int] | None = None,
) -> Policy:
    """A policy over the swarm's servers; `filled` = seed of numbers put into all its parameters."""
    policy = load_policy(
        swarm.model,
        initial_peers=swarm.initial_peers,
        lora=lora or LoraSettings(r=4),
        timeouts=timeouts,
        local_blocks=local_blocks,
    )
    if filled is not None:
        fill(policy, filled)
    return policy


def is_used(policy: Policy, server: ServerProcess) -> bool:
    """Whether requests go to a server."""
    chosen = {str(span.peer) for span in policy._client.spans}
    return server.addresses[0].rsplit("/", 1)[1] in chosen


def fill(policy: Policy, seed: int, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(policy.trainable_parameters().items()):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """(rows, length) int64; ids that every tiny model has, without its special tokens."""
    return torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(logits: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """Reaches every adapter tensor and the value head."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) + values.square().mean()


class Outcome(NamedTuple):
    logits: Tensor
    values: Tensor
    grads: dict[str, Tensor]


def run(policy: Policy, tokens: Tensor) -> Outcome:
    """Forward and backward of a policy."""
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None
    out = policy(tokens)
    loss_of(out.logits, out.values, tokens).backward()
    return Outcome(out.logits.detach(), out.values.detach(), grads_of(policy))


def grads_of(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in policy.trainable_parameters().items()}


def two_steps(
    policy: Policy, tokens: Tensor, disturb: Callable[[str], object] = lambda moment: None
) -> dict[str, Tensor]:
    """The parameters after two optimizer steps; `disturb` is called at each named moment."""
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=0.05)
    for step in range(2):
        optimizer.zero_grad()
        disturb(f"before forward {step}")
        out = policy(tokens)
        disturb(f"before backward {step}")
        loss_of(out.logits, out.values, tokens).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}


class PlainPeft:
    """The adapter that `policy` saves, on the plain base model."""

    def __init__(self, policy: Policy, directory: Path):
        policy.save_adapter(directory)
        base = AutoModelForCausalLM.from_pretrained(policy.base_model, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, str(directory), is_trainable=True).eval()
        self.head = {
            name: tensor.requires_grad_()
            for name, tensor in load_file(directory / "value_head.safetensors").items()
        }

    def run(self, tokens: Tensor) -> Outcome:
        for tensor in (*self.model.parameters(), *self.head.values()):
            tensor.grad = None
        out = self.model(tokens, output_hidden_states=True)
        values = out.hidden_states[-1] @ self.head["weight"][0] + self.head["bias"]
        loss_of(out.logits, values, tokens).backward()
        grads = {
            name.replace(".default.", "."): p.grad.clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        head_grads = {f"value_head.{name}": tensor.grad.clone() for name, tensor in self.head.items()}
        return Outcome(out.logits.detach(), values.detach(), {**grads, **head_grads})

    def hidden(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(tokens, output_hidden_states=True).hidden_states[-1]

    def greedy(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        """Prompt and response, the end token included."""
        tokens = torch.tensor([prompt])
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            max_length=None,
        )
        return out[0].tolist()


def greedy(policy: Policy, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Prompt and response of each row."""
    from textrl_swarm.config import SamplingConfig

    batch = policy.generate(prompts, SamplingConfig(do_sample=False, max_new_tokens=max_new_tokens))
    lengths = (batch.prompt_lengths + batch.response_lengths).tolist()
    return [row[:length].tolist() for row, length in zip(batch.tokens, lengths, strict=True)]


def difference(found: Tensor, expected: Tensor, among: Tensor | None = None) -> float:
    """Largest error relative to the largest expected number, or to the largest of others."""
    largest = (expected if among is None else among).abs().max()
    assert found.shape == expected.shape
    assert largest > 0
    return ((found - expected).abs().max() / largest).item()


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> tuple[float, float]:
    """Returns the differences of logits and gradients.

    1e-5: a sum of some hundred fp32 products in another order; what is measured is 0 to 2e-6.
    """
    logits = difference(found.logits, expected.logits)
    assert logits < tolerance
    assert difference(found.values, expected.values) < tolerance
    assert found.grads.keys() == expected.grads.keys()
    errors = {}
    for name, grad in expected.grads.items():
        # The value head's bias is one number, a mean that may be near 0.
        among = expected.grads[name.replace(".bias", ".weight")]
        errors[name] = difference(found.grads[name], grad, among)
    assert max(errors.values()) < tolerance, sorted(errors.items(), key=lambda item: -item[1])[:3]
    return logits, max(errors.values())
