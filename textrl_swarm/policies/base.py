"""What the learner sees: a language model with a trainable adapter and a value head, wherever its blocks are.

`Policy` names what a kind of policy must provide (five short methods) and builds the rest on it, so that
local models and swarms run the identical path. Knows nothing about rewards, environments or optimizers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from textrl_swarm.config import LoraSettings, SamplingConfig
from textrl_swarm.errors import AdapterError, AnswersRefuted, PromptError
from textrl_swarm.models import adapter_files
from textrl_swarm.models.texts import stop_ids
from textrl_swarm.models.value_head import ValueHead
from textrl_swarm.policies.generation import PromptLike, generate
from textrl_swarm.policies.sessions import DecodingSession
from textrl_swarm.types import CodecLoss, PolicyOutput, RolloutBatch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from typing_extensions import Self

    from textrl_swarm.models.adapters import LoraConfig
    from textrl_swarm.swarm.traffic import Traffic


Result = TypeVar("Result")

logger = logging.getLogger(__name__)

MAX_FEATURE_BYTES = 1 << 30  # of a rollout


class Policy(ABC):
    """A policy over token sequences. Context manager; `close` may be called twice."""

    tokenizer: PreTrainedTokenizerBase | None
    """Of the base model; None when the model came as an object without one."""

    value_head: ValueHead
    """Reads the last hidden state; fp32."""

    device: torch.device
    lora: LoraSettings
    peft_config: LoraConfig

    base_model: str
    """Directory or hub id; "" when the model came as an object without a name."""

    vocab_size: int
    hidden_size: int

    generation_config: GenerationConfig | None = None
    """What the base model's own `generate` goes by, see `models.texts.generation_config`."""

    max_length: int | None = None
    """Most tokens (prompt and response) of one sequence."""

    max_session_tokens: int | None = None
    """Most rows x tokens of one decoding session."""

    session_row_tokens: int = 0
    """Tokens that each row counts for beside its own: what takes memory however short a row is."""

    max_step_tokens: int | None = None
    """Most rows x tokens of prompts that a session is given at once."""

    sessions_at_once: int = 1
    """Sessions that are worth running side by side."""

    takes_padding: bool = False
    """Whether rows of unequal length may share a session."""

    length_limit_reason: str = "the model"
    """What sets these limits, for messages."""

    quantization: str | None = None
    """Of a model on this machine: "8bit" or "4bit", whether it was loaded so or saved so."""

    rounds_by_batch: bool = False
    """Whether a row's numbers depend on the rows computed with it (8-bit weights pick outlier columns per
    batch).
    """

    traffic: Traffic | None = None
    """Bytes that went through the swarm; None for a local policy."""

    codec_loss: CodecLoss | None = None
    """What a codec of hidden states changes; None = there is none."""

    checks_answers: bool = False
    """Whether a share of what servers compute is computed again by others, so that `trusted` work may be done
    twice.
    """

    num_servers: int = 0

    _adapter_on: bool = True
    _reference: dict[str, Tensor] | None = None  # the ref policy's adapter; None = no adapter

    # ------------------------------------------------------------- what each kind of policy provides

    @abstractmethod
    def features(self, tokens: Tensor) -> Tensor:
        """What does not change during an update: (B, S) int64 tokens -> (B, S, ...), input of
        `hidden_states`.

        With `LoraSettings.layers`, this is the output of the blocks below the adapted ones, which then run
        once per rollout: the ref policy and every epoch share it. Without blocks to spare, or where it would
        take more than `MAX_FEATURE_BYTES`, it is the tokens themselves, and all blocks run in
        `hidden_states`. Rows, and columns from the left, may be sliced.
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

    def keeps_features(self, tokens: Tensor, dtype: torch.dtype) -> bool:
        """Whether hidden states of so many tokens are small enough to be kept during an update."""
        return tokens.numel() * self.hidden_size * dtype.itemsize <= MAX_FEATURE_BYTES

    def close(self) -> None:  # noqa: B027 - a policy that holds nothing need not override it
        """Releases what is held elsewhere."""

    # ------------------------------------------------------------------------------ the same for all

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> PolicyOutput:
        """Logits and values of whole sequences, differentiable.

        Args:
            input_ids: (B, S) int64, right-padded.
            attention_mask: (B, S), 1 on real tokens. It is only checked: in a causal model, nothing that
                follows a token can change it.

        Raises:
            PromptError: tokens out of range, a wrong shape, more than `max_length` tokens, or padding on the
                left.
        """
        tokens = self._checked_tokens(input_ids, attention_mask)
        if self.max_length is not None and tokens.shape[1] > self.max_length:
            raise PromptError(
                f"input_ids has {tokens.shape[1]} tokens per row, but {self.length_limit_reason} allows "
                f"{self.max_length}"
            )
        hidden = self.hidden_states(self.features(tokens))
        return PolicyOutput(self.project(hidden), self.value_head(hidden))

    def generate(self, prompts: Sequence[PromptLike], sampling: SamplingConfig | None = None) -> RolloutBatch:
        """Samples responses to prompts (texts or lists of token ids).

        Raises:
            PromptError: no prompts, an empty or malformed one, or one that is too long.
            NumericsError: the model's logits are NaN or infinite.
        """
        return self.trusted(lambda: generate(self, prompts, sampling or SamplingConfig()))

    def trusted(self, work: Callable[[], Result], undo: Callable[[], object] = lambda: None) -> Result:
        """Does some work, and once more whenever a server was refuted that may have touched it.

        Args:
            undo: what puts everything back to where the work began.
        """
        while True:
            try:
                return work()
            except AnswersRefuted:  # its server is not asked again, so this comes to an end
                logger.warning("what the refuted server may have touched is computed again")
                undo()

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside, this is the base model without the adapter. There is no second model anywhere."""
        before = self._adapter_on
        self._adapter_on = False
        try:
            yield
        finally:
            self._adapter_on = before

    def start_from(self, directory: str | Path) -> None:
        """Loads an adapter, and keeps a frozen copy of it as the ref policy, so that KL begins at 0.

        Raises:
            AdapterError: as `load_adapter`.
        """
        self.load_adapter(directory)
        self._reference = {
            name: parameter.detach().clone() for name, parameter in self.adapter_parameters().items()
        }

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, this is the ref policy: the adapter of `start_from`, or else the base model. Without
        gradients.
        """
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
        """Token ids that end a response, see `models.texts.stop_ids`."""
        return stop_ids(self.tokenizer, self.generation_config)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """All that an optimizer may change: the adapter by its PEFT names, and `value_head.*`."""
        head = {f"value_head.{name}": parameter for name, parameter in self.value_head.named_parameters()}
        return {**self.adapter_parameters(), **head}

    def save_adapter(self, directory: str | Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors (PEFT's format), and
        value_head.safetensors.

        Raises:
            AdapterError: `directory` is a file, or holds a model.
        """
        head = dict(self.value_head.named_parameters())
        adapter_files.save_tensors(directory, self.adapter_parameters(), self.peft_config, head)

    def load_adapter(self, directory: str | Path) -> None:
        """Loads an adapter of the same shape, and the value head when one was saved with it.

        Raises:
            AdapterError: not an adapter, or one for another model or other LoRA settings; nothing is changed
                then.
        """
        parameters = self.adapter_parameters()
        tensors = adapter_files.load_tensors(directory, parameters, self.peft_config)
        head_path = Path(directory).expanduser() / adapter_files.VALUE_HEAD_WEIGHTS
        head = adapter_files.read_tensors(head_path) if head_path.is_file() else {}
        head_parameters = dict(self.value_head.named_parameters())
        expected = {name: parameter.shape for name, parameter in head_parameters.items()}
        if head and {name: tensor.shape for name, tensor in head.items()} != expected:
            raise AdapterError(
                f"{head_path} belongs to a model of another hidden size than {self.hidden_size}"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)
            for name, tensor in head.items():
                head_parameters[name].copy_(tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _checked_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        tokens = torch.as_tensor(input_ids)
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
            raise PromptError(
                f"input_ids must be whole numbers of shape (rows, tokens), got {tokens.dtype} "
                f"{tuple(tokens.shape)}"
            )
        low = int(tokens.min())
        high = int(tokens.max())
        if not 0 <= low <= high < self.vocab_size:
            raise PromptError(f"token ids must be in 0..{self.vocab_size - 1}, got {low}..{high}")
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask).bool()
            if mask.shape != tokens.shape or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise PromptError(
                    "attention_mask must have the shape of input_ids and padding only on the right "
                    "(tokenizer.padding_side='right')"
                )
        return tokens.to(device=self.device, dtype=torch.int64)
