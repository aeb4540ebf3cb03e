"""What the learner sees: a language model with a trainable adapter and a value head, wherever its blocks are.

`Policy` says what a kind of policy must provide (five short methods) and builds the rest on it, so that local models and swarms run the
identical path. Knows nothing about rewards, environments or optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from textrl_swarm import adapters
from textrl_swarm.config import LoraSettings, SamplingConfig
from textrl_swarm.errors import AdapterError, ConfigError, PromptError
from textrl_swarm.generation import generate
from textrl_swarm.texts import stop_ids
from textrl_swarm.types import PolicyOutput, RolloutBatch
from textrl_swarm.value_head import ValueHead

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from textrl_swarm.swarm.rpc import Traffic


class DecodingSession(Protocol):
    """Attention caches of one batch: tokens in, last hidden states out."""

    def step(self, tokens: Tensor) -> Tensor:
        """(B, k) int64, the next k tokens of each row -> (B, k, H) last hidden states."""


class Policy(ABC):
    """A policy over token sequences. Context manager; `close` may be called twice.

    Attributes:
        tokenizer: of the base model; None when it came as an object without one.
        value_head: fp32, reads the last hidden state.
        generation_config: of the base model, when it came with one.
        max_length: most tokens (prompt and response) of one sequence, or None.
        max_session_tokens: most rows x tokens of one decoding session, or None.
        rounds_by_batch: the same row's numbers depend on the rows computed with it (8-bit weights pick outlier columns per batch).
        traffic: bytes that went through the swarm; None for a local policy.
    """

    tokenizer: PreTrainedTokenizerBase | None
    value_head: ValueHead
    device: torch.device
    lora: LoraSettings
    peft_config: LoraConfig
    base_model: str
    vocab_size: int
    hidden_size: int
    generation_config: GenerationConfig | None = None
    max_length: int | None = None
    max_session_tokens: int | None = None
    rounds_by_batch: bool = False
    length_limit_reason: str = "the model"  # who sets the limits, for messages
    traffic: Traffic | None = None
    num_servers: int = 0

    _adapter_on: bool = True
    _reference: dict[str, Tensor] | None = None  # the ref policy's adapter; None = no adapter

    # ------------------------------------------------------------------ what each kind of policy provides

    @abstractmethod
    def features(self, tokens: Tensor) -> Tensor:
        """What does not change during an update: (B, S) int64 tokens -> (B, S, ...), input of `hidden_states`.

        With `LoraSettings.layers` this is the output of the blocks below the adapted ones, so that they run once per rollout and not in
        every epoch. Rows, and columns from the left, may be sliced.
        """

    @abstractmethod
    def hidden_states(self, features: Tensor) -> Tensor:
        """(B, S, H) last hidden states, after the final norm; differentiable with respect to the adapter."""

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """(..., H) last hidden states -> (..., V) logits."""

    @abstractmethod
    def session(self, rows: int, max_length: int) -> AbstractContextManager[DecodingSession]:
        """Decoding with attention caches, for `rows` rows of at most `max_length` tokens."""

    @abstractmethod
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors by their PEFT state-dict names."""

    def close(self) -> None:
        """Releases what is held elsewhere."""
        return None

    # ------------------------------------------------------------------ the same for all

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> PolicyOutput:
        """Logits and values of whole sequences, differentiable.

        Args:
            input_ids: (B, S) int64, right-padded.
            attention_mask: (B, S), 1 on real tokens; only checked: what follows a token cannot change it in a causal model.

        Raises:
            PromptError: tokens out of range, a wrong shape, more than `max_length` tokens, or padding that is not on the right.
        """
        tokens = self._checked_tokens(input_ids, attention_mask)
        if self.max_length is not None and tokens.shape[1] > self.max_length:
            raise PromptError(f"input_ids has {tokens.shape[1]} tokens per row, but {self.length_limit_reason} allows {self.max_length}")
        hidden = self.hidden_states(self.features(tokens))
        return PolicyOutput(self.project(hidden), self.value_head(hidden))

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], sampling: SamplingConfig | None = None) -> RolloutBatch:
        """Responses to prompts (texts or token ids); see `generation.generate`."""
        return generate(self, prompts, sampling or SamplingConfig())

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside, this is the base model without the adapter. No second model anywhere."""
        before, self._adapter_on = self._adapter_on, False
        try:
            yield
        finally:
            self._adapter_on = before

    def start_from(self, directory: str | Path) -> None:
        """Takes over an adapter, and keeps a frozen copy of it as the ref policy, e.g. a supervised one: KL begins at 0.

        Raises:
            AdapterError: as `load_adapter`.
        """
        self.load_adapter(directory)
        self._reference = {name: parameter.detach().clone() for name, parameter in self.adapter_parameters().items()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, this is the ref policy: the adapter of `start_from`, or else the base model. For use without gradients."""
        if self._reference is None:
            with self.adapter_disabled():
                yield
            return
        parameters = self.adapter_parameters()
        trained = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self._reference[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a response."""
        return stop_ids(self.tokenizer, self.generation_config)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """All that an optimizer may change: the adapter by its PEFT names, and `value_head.*`."""
        head = {f"value_head.{name}": parameter for name, parameter in self.value_head.named_parameters()}
        return {**self.adapter_parameters(), **head}

    def save_adapter(self, directory: str | Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors (PEFT's format), and value_head.safetensors."""
        adapters.save_tensors(directory, self.adapter_parameters(), self.peft_config, dict(self.value_head.named_parameters()))

    def load_adapter(self, directory: str | Path) -> None:
        """Takes over an adapter of the same shape; the value head too when it was saved.

        Raises:
            AdapterError: not an adapter, or one for another model or other LoRA settings; nothing is changed then.
        """
        parameters = self.adapter_parameters()
        tensors = adapters.load_tensors(directory, parameters, self.peft_config)
        head_path = Path(directory) / adapters.VALUE_HEAD_WEIGHTS
        head = adapters.read_tensors(head_path) if head_path.is_file() else {}
        head_parameters = dict(self.value_head.named_parameters())
        if head and {name: t.shape for name, t in head.items()} != {name: p.shape for name, p in head_parameters.items()}:
            raise AdapterError(f"{head_path} belongs to a model of another hidden size than {self.hidden_size}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
            for name, tensor in head.items():
                head_parameters[name].copy_(tensor)

    def __enter__(self) -> Policy:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _checked_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        tokens = torch.as_tensor(input_ids)
        if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] == 0 or tokens.is_floating_point():
            raise PromptError(f"input_ids must be whole numbers of shape (rows, tokens), got {tokens.dtype} {tuple(tokens.shape)}")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise PromptError(f"token ids must be in 0..{self.vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}")
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask).bool()
            if mask.shape != tokens.shape or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise PromptError(
                    "attention_mask must have the shape of input_ids and padding only on the right (tokenizer.padding_side='right')"
                )
        return tokens.to(device=self.device, dtype=torch.int64)


def load_policy(
    model: object,
    initial_peers: Sequence[str] | None = None,
    dht_prefix: str | None = None,
    quantization: str | None = None,
    lora: LoraSettings | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ref_adapter: str | Path | None = None,
    **swarm_options,
) -> Policy:
    """A policy on this machine or through a swarm.

    Args:
        model: directory or hub id, a transformers model, or a petals Distributed* model.
        initial_peers: addresses of servers, as `textrl-swarm serve` prints them: the blocks are theirs. None = this machine.
        dht_prefix: name under which the swarm announces the model; None = made from `model`.
        quantization: None, "8bit" or "4bit" (bitsandbytes); local only, servers quantise with their own option.
        lora: which weights are trained; None = those of `ref_adapter`, or else the defaults.
        dtype: of the local weights; None = the checkpoint's. A model that is loaded already is taken as it is.
        device: None = CUDA when there is one (local), else the CPU; likewise.
        seed: of the adapter's and the value head's first values.
        tokenizer: instead of the one that belongs to `model`.
        ref_adapter: directory of a PEFT LoRA adapter to start from, which is also the ref policy (default: the base model is).
        swarm_options: `timeouts=Timeouts(...)`, see swarm/rpc.py.

    Raises:
        ModelError, ConfigError, AddressError, AdapterError, PetalsMissing, BlocksUnavailable, ServerMismatch.
    """
    if lora is None:
        lora = LoraSettings() if ref_adapter is None else adapters.read_settings(ref_adapter)
    if initial_peers is not None or type(model).__name__.startswith("Distributed"):
        from textrl_swarm.swarm_policy import load_swarm_policy

        policy = load_swarm_policy(
            model, initial_peers, dht_prefix, quantization, lora, dtype, device, seed, tokenizer=tokenizer, **swarm_options
        )
    elif dht_prefix is not None:
        raise ConfigError(f"dht_prefix={dht_prefix!r} names a model in a swarm: give initial_peers too, or leave it out")
    else:
        from textrl_swarm.local_policy import load_local_policy

        policy = load_local_policy(model, quantization, lora, dtype, device, seed, tokenizer=tokenizer, **swarm_options)
    if ref_adapter is not None:
        try:
            policy.start_from(ref_adapter)
        except BaseException:
            policy.close()
            raise
    return policy
