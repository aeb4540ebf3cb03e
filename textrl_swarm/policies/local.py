"""A policy whose base model sits on this machine, in full precision, 8-bit or 4-bit.

Any decoder-only Hugging Face model; PEFT applies the adapter. Knows nothing about swarms or training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textrl_swarm.config import QUANTIZATIONS, LoraSettings
from textrl_swarm.decoders.sharing import SharedPrefix, run_shared, shared_prefix
from textrl_swarm.errors import ModelError, TextRLSwarmError
from textrl_swarm.models.adapters import (
    add_adapter,
    first_adapted_block,
    initial_tensor,
    model_lora_config,
    remove_adapter,
)
from textrl_swarm.models.layers import find_blocks, never_called
from textrl_swarm.models.output_head import OutputHead, output_embeddings
from textrl_swarm.models.quantization import keep_differentiable, silence_8bit_casts
from textrl_swarm.models.texts import generation_config
from textrl_swarm.models.value_head import ValueHead
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.local_blocks import LocalBlocks
from textrl_swarm.policies.local_sessions import choose_session, is_close
from textrl_swarm.policies.sessions import DecodingSession

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textrl_swarm.models.adapters import PeftModel

logger = logging.getLogger(__name__)

POLICY = "_textrl_swarm_policy"  # attribute of a model: the policy whose layers are in it


def _is_no_mask_notice(record: logging.LogRecord) -> bool:
    """transformers recommends an attention mask when it sees padding; padding on the right of a decoder needs
    none.
    """
    return "We strongly recommend passing in an `attention_mask`" not in str(record.msg)


class LocalPolicy(Policy):
    """A transformers model on this machine with a PEFT adapter and a value head.

    Args:
        model: a causal language model; until `close` it is in evaluation mode (no dropout), frozen, and has
            the adapter's layers.
        gradient_checkpointing: keep only the blocks' inputs for backward.
    """

    max_step_tokens = 4096

    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraSettings,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None,
        gradient_checkpointing: bool = False,
    ):
        logging.getLogger("transformers.modeling_utils").addFilter(_is_no_mask_notice)
        name = type(model).__name__
        config = model.config.get_text_config(decoder=True)
        self.base_model = str(model.name_or_path)
        self.tokenizer = tokenizer
        self.lora = lora
        self.device = next(model.parameters()).device
        self.generation_config = generation_config(model)
        self.quantization = next(
            (bits for bits in QUANTIZATIONS if getattr(model, f"is_loaded_in_{bits}", False)), None
        )
        self.rounds_by_batch = self.quantization == "8bit"
        if self.rounds_by_batch:
            silence_8bit_casts()
        head = output_embeddings(model)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError(
                f"{name} has weights that are not in memory (meta device, or offloaded to disk): load all "
                "of them"
            )
        # 4-bit weights have another shape than their layer
        self.vocab_size = head.out_features if isinstance(head, nn.Linear) else head.weight.shape[0]
        limits = (
            getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "max_seq_len")
        )
        self.max_length = next(filter(None, limits), None)
        self._model: Any = model
        self._decoder: Any = _decoder(model)
        self._peft: PeftModel | None = None
        self._gradient_checkpointing = gradient_checkpointing
        self._blocks: LocalBlocks | None = None
        self._enters_blocks = False
        self._shares_prefixes = False
        self._was_training = model.training
        self._returned_dicts = model.config.return_dict
        self._was_trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            model.eval()
            model.config.return_dict = True
            keep_differentiable(model)
            tokens = self._probe_tokens(getattr(config, "pad_token_id", None))
            with torch.no_grad():
                self._adapt(tokens, seed)
                self._check_model(tokens)
        except BaseException as error:
            self._restore()
            is_ours = isinstance(error, (TextRLSwarmError, torch.cuda.OutOfMemoryError))
            if isinstance(error, Exception) and not is_ours:  # the model's own
                raise ModelError(f"{name} cannot be run as a decoder of tokens alone: {error!r}") from error
            raise
        self.value_head = ValueHead(self.hidden_size, seed=seed).to(self.device)

    def _probe_tokens(self, pad_token: int | None) -> Tensor:
        """(1, 4) int64: tokens to try the model on, none of them padding."""
        ids = [token for token in range(5) if token != pad_token][:4]
        return torch.tensor([ids], device=self.device) % self.vocab_size

    def _adapt(self, tokens: Tensor, seed: int) -> None:
        model = self._model

        def find_unused(layers: Mapping[str, str]) -> set[str]:
            return never_called(layers, model, lambda: model(tokens))

        self.peft_config = model_lora_config(self.lora, model, self.base_model, find_unused)
        self._peft = add_adapter(model, self.peft_config).eval()
        self._parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self._peft.named_parameters():
            if ".lora_" in name:
                self._parameters[name.replace(".default.", ".")] = parameter
        for name, parameter in self._parameters.items():
            parameter.copy_(initial_tensor(name, tuple(parameter.shape), seed))
        blocks = find_blocks(model)[1]
        self._first = first_adapted_block(len(blocks), self.lora.layers)
        self._blocks = LocalBlocks(blocks, self._first, recompute=self._gradient_checkpointing)
        setattr(model, POLICY, self)  # notebooks run cells again: the next policy takes these layers out
        model.save_pretrained = _refuse_to_save

    def _check_model(self, tokens: Tensor) -> None:
        """Finds out how the model makes its logits and keeps its caches.

        Raises ModelError for a model that looks ahead (padding would change it), or whose logits come from
        more than the last hidden states.
        """
        name = f"{type(self._model).__name__} (model type {self._model.config.model_type})"
        hidden = self._decoder(tokens, use_cache=False).last_hidden_state
        shorter = self.hidden_states(tokens[:, :2])
        expected = self._model(tokens).logits
        if not (torch.isfinite(hidden).all() and torch.isfinite(expected).all()):
            raise ModelError(
                f"{name} computes NaN or infinite numbers in {hidden.dtype}: its weights are damaged, or "
                "too large for float16 (then dtype='bfloat16' or 'float32' helps)"
            )
        stored = getattr(self._model.config, "quantization_config", None)
        is_quantized = self.quantization is not None or stored is not None
        is_exact = hidden.dtype == torch.float32 and not is_quantized
        tolerance = 0.01 if is_exact else 0.1  # 8-bit products depend a little on what else is in the batch
        if not is_close(hidden[:, :2], shorter, tolerance):
            raise ModelError(f"{name} sees later tokens; only decoder-only models can be trained")
        self.hidden_size = hidden.shape[-1]
        self._head = OutputHead(self._model, self._decoder, self.hidden_size)
        found = self.project(hidden)
        if found.shape != expected.shape or not is_close(found, expected, 0.01):
            raise ModelError(
                f"{name} makes its logits from more than the last hidden states; such models are not "
                "supported"
            )
        config = self._model.config.get_text_config(decoder=True)
        self._sessions = choose_session(
            self._decoder, config, self._run_decoder, tokens, hidden, tolerance, type(self._model).__name__
        )
        self.takes_padding = self._sessions.takes_padding
        self._enters_blocks = self._first > 0 and self._enters_exactly(tokens, hidden)
        # A block that is computed again would add to the cache twice.
        self._shares_prefixes = not self._gradient_checkpointing and self._shares_closely(tokens, tolerance)

    def _enters_exactly(self, tokens: Tensor, hidden: Tensor) -> bool:
        """Whether the decoder, entered at the first adapted block, computes the same last hidden states."""
        try:
            return torch.equal(self.hidden_states(self._below(tokens)), hidden)
        except Exception as error:  # of models whose later blocks look at the tokens or at earlier blocks
            logger.debug("all blocks of %s run in every forward: %r", self.base_model, error)
            return False

    def _shares_closely(self, tokens: Tensor, tolerance: float) -> bool:
        """Whether prompts that are computed once give the same hidden states and gradients up to rounding.

        Blocks whose states keep no gradients, such as Mamba's, do not.
        """
        rows = torch.cat([tokens, tokens.flip(1)])[[0, 1, 0]]
        rows[2, -1] = tokens[0, 0]
        distinct, index = (torch.tensor(places, device=self.device) for places in ([0, 1], [0, 1, 0]))
        prefix = SharedPrefix(2, distinct, index)
        parameters = list(self._parameters.values())
        found = []
        try:
            with torch.enable_grad():
                features = self.features(rows)
                for shared in (None, prefix):
                    hidden = self._last_hidden_states(features, shared)
                    weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
                    loss = (hidden.float() * weights).sum()
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                    found.append([hidden, *(g for g in gradients if g is not None)])
        except Exception as error:  # of models with caches of their own
            logger.debug("prompts of %s are computed once per row: %r", self.base_model, error)
            return False
        pairs = zip(found[1], found[0], strict=True)
        return all(is_close(ours, whole, tolerance) for ours, whole in pairs)

    # ------------------------------------------------------------------------------- as every policy

    def features(self, tokens: Tensor) -> Tensor:
        """See Policy."""
        if not self._enters_blocks or not self.keeps_features(tokens, self._model.dtype):
            return tokens
        with torch.no_grad():
            rows = max(1, self.max_step_tokens // tokens.shape[1])
            return torch.cat([self._below(part) for part in tokens.split(rows)])

    def _below(self, tokens: Tensor) -> Tensor:
        assert self._blocks is not None, "set while the adapter is in the model"
        return self._blocks.below(lambda: self._run_decoder(tokens, use_cache=False))

    def hidden_states(self, features: Tensor) -> Tensor:
        """See Policy."""
        return self._last_hidden_states(features, shared_prefix(features) if self._shares_prefixes else None)

    def _last_hidden_states(self, features: Tensor, shared: SharedPrefix | None) -> Tensor:
        if shared is None:
            return self._run(features, use_cache=False)
        skipped = self._first if features.is_floating_point() else 0
        return run_shared(self._run, self._decoder.config, features, shared, skipped)

    def _run(self, features: Tensor, **options: Any) -> Tensor:
        """Last hidden states of tokens, or of what the blocks below the adapted ones made of them."""
        if not features.is_floating_point():
            return self._run_decoder(features, **options).last_hidden_state
        assert self._blocks is not None, "set while the adapter is in the model"
        with self._blocks.entered(features):
            return self._run_decoder(inputs_embeds=features, **options).last_hidden_state

    def _run_decoder(self, *tokens: Tensor, **options: Any) -> Any:
        with self._adapter():
            return self._decoder(*tokens, **options)

    def project(self, hidden: Tensor) -> Tensor:
        """See Policy."""
        return self._head(hidden)

    @contextmanager
    def session(self, rows: int, max_length: int) -> Iterator[DecodingSession]:
        """See Policy."""
        yield self._sessions.new(rows, max_length)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """See Policy."""
        return self._parameters

    def _adapter(self) -> AbstractContextManager[object]:
        if self._peft is None:
            raise ModelError(
                "this policy is closed, its adapter is no longer in the model; make a new one with "
                "load_policy"
            )
        if self._model.training:  # a user's model.train(): dropout would make another policy of every forward
            self._model.eval()
        return nullcontext() if self._adapter_on else self._peft.disable_adapter()

    def close(self) -> None:
        """Takes the adapter's layers out of the model, and restores the model as it was."""
        if self._peft is not None:
            self._restore()

    def _restore(self) -> None:
        self._model.config.return_dict = self._returned_dicts
        if self._blocks is not None:
            self._blocks.restore()
        remove_adapter(self._model)
        self._model.train(self._was_training)
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        for name in (POLICY, "save_pretrained"):
            vars(self._model).pop(name, None)
        self._peft = None


def _refuse_to_save(*args: object, **options: object) -> None:
    raise ModelError(
        "this model has a policy's layers in it and would be saved under names that nothing can load: use "
        "policy.save_adapter(directory) for the adapter, `textrl-swarm export --merge` for a whole model, or "
        "policy.close() first for the base model"
    )


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder without the LM head.

    Falls back to the submodule that holds the blocks if get_decoder() returns the whole model or the head.
    """
    decoder = model.get_decoder()
    blocks_path, blocks = find_blocks(model)
    if decoder is not model and any(module is blocks for module in decoder.modules()):
        return decoder
    return getattr(model, blocks_path.split(".")[0])
