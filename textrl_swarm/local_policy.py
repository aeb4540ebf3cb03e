"""A policy whose base model sits on this machine, in full precision or 8-bit or 4-bit. The door to bitsandbytes.

Any decoder-only Hugging Face model; PEFT applies the adapter. Knows nothing about swarms or training.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from textrl_swarm.adapters import choose_targets, find_blocks, initial_tensor, is_conv1d, keep_differentiable, linear_layers, lora_config
from textrl_swarm.base_model import hub_name, read_config
from textrl_swarm.config import QUANTIZATIONS, LoraSettings
from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.policy import Policy
from textrl_swarm.value_head import ValueHead


def load_local_policy(model, quantization, lora: LoraSettings, dtype, device, seed: int, *, tokenizer=None) -> LocalPolicy:
    """See `policy.load_policy`."""
    if quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantization must be None, '8bit' or '4bit', got {quantization!r}")
    if isinstance(model, nn.Module):
        _require_plain_decoder(model)
        if quantization is not None:
            raise ConfigError("quantization is chosen when weights are loaded: pass the model's directory or hub id, or a quantised model")
        return LocalPolicy(model, lora, seed, tokenizer or _tokenizer(model.name_or_path))
    from transformers import AutoModelForCausalLM

    config = read_config(model)
    _require_decoder(config, str(model))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"dtype": dtype or "auto"}
    if quantization is not None:
        options.update(quantization_config=_quantization_config(quantization, device), device_map={"": device})
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(hub_name(model), output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the weights of {str(model)!r} cannot be loaded: {error}") from error
    if found["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(found["missing_keys"])
        raise ModelError(f"{len(missing)} weights are missing in the checkpoint of {str(model)!r}, e.g. {missing[0]}")
    if quantization is None:
        loaded.to(device)
    return LocalPolicy(loaded, lora, seed, tokenizer or _tokenizer(hub_name(model)))


def _tokenizer(model: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # prompts must then be token ids


def _require_decoder(config, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({config.model_type}); only decoder-only language models can be trained: "
            "use one of those, e.g. bigscience/bloomz-560m in the place of an instruction-tuned T5, or gpt2 in that of BART"
        )


def _require_plain_decoder(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            "this model already has a PEFT adapter: pass the base model, then policy.load_adapter(directory); "
            "if another policy uses it, close() that one first"
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{name} is no transformers model; pass one, or a directory or hub id")
    _require_decoder(model.config, name)


def _quantization_config(quantization: str, device: torch.device):
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"quantization={quantization!r} needs bitsandbytes; type: pip install bitsandbytes ({error})") from error
    if quantization == "8bit":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_notice)
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def _is_no_mask_notice(record: logging.LogRecord) -> bool:
    """transformers recommends an attention mask when it sees padding; ours is on the right of a causal model, where none is needed."""
    return "We strongly recommend passing in an `attention_mask`" not in str(record.msg)


logging.getLogger("transformers.modeling_utils").addFilter(_is_no_mask_notice)


def _is_no_cast_notice(record: logging.LogRecord) -> bool:
    """bitsandbytes says at every 8-bit matrix product that it computes in fp16: thousands of lines per rollout."""
    return "inputs will be cast from" not in str(record.msg)


class LocalPolicy(Policy):
    """A transformers model on this machine with a PEFT adapter and a value head.

    Args:
        model: a causal language model; until `close` it is in evaluation mode (no dropout), frozen, and has the adapter's layers.
    """

    def __init__(self, model: nn.Module, lora: LoraSettings, seed: int, tokenizer):
        config = model.config
        self.base_model, self.tokenizer, self.lora = str(model.name_or_path), tokenizer, lora
        self.device, self.generation_config = next(model.parameters()).device, getattr(model, "generation_config", None)
        self.rounds_by_batch = getattr(model, "is_loaded_in_8bit", False)
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings; pass a model for causal language modelling")
        self.hidden_size, self.vocab_size = head.weight.shape[1], head.weight.shape[0]
        self.max_length = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)
        blocks_path, blocks = find_blocks(model)
        linears = linear_layers(blocks[0])
        if not linears:
            raise ModelError(f"the blocks of {type(model).__name__} have no linear layers that LoRA could be applied to")
        self.peft_config = lora_config(
            lora, choose_targets(linears, lora.targets), len(blocks), blocks_path.rsplit(".", 1)[-1], self.base_model
        )
        self.peft_config.fan_in_fan_out = any(is_conv1d(module) for module in blocks[0].modules())  # or PEFT sets it, with a warning
        self._was_training, self._was_trainable = model.training, [p for p in model.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # PEFT draws from the global generator; ours replace them
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            self._peft = get_peft_model(model, self.peft_config)
        self._peft.eval()
        keep_differentiable(self._peft)
        self._model, self._head = model, head
        self._parameters = {
            name.replace(".default.", "."): parameter for name, parameter in self._peft.named_parameters() if ".lora_" in name
        }
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(initial_tensor(name, tuple(parameter.shape), seed))
        self.value_head = ValueHead(self.hidden_size, seed=seed).to(self.device)
        try:
            self._check_model()
        except BaseException:
            self.close()
            raise

    def _check_model(self) -> None:
        """Some models scale or cap their logits after the output embeddings, or look ahead; then `project` or padding would be wrong."""
        tokens = torch.arange(4, device=self.device)[None] % self.vocab_size
        with torch.no_grad():
            hidden, shorter = self.hidden_states(tokens), self.hidden_states(tokens[:, :-1])
            ours, theirs = self.project(hidden), self._model(tokens).logits
        name = type(self._model).__name__
        if not _close(hidden[:, :-1], shorter, 0.1):  # 8-bit products depend a little on what else is in the batch
            raise ModelError(
                f"{name} (model type {self._model.config.model_type}) sees later tokens; only decoder-only models can be trained"
            )
        if not _close(ours, theirs, 0.01):
            raise ModelError(f"{name} changes its logits after the output embeddings; such models are not supported yet")

    def features(self, tokens: Tensor) -> Tensor:
        return tokens

    def hidden_states(self, features: Tensor) -> Tensor:
        with self._adapter():
            return self._model.base_model(features, use_cache=False).last_hidden_state

    def project(self, hidden: Tensor) -> Tensor:
        return self._head(hidden.to(self._head.weight.dtype) if self._head.weight.is_floating_point() else hidden)

    @contextmanager
    def session(self, rows: int, max_length: int) -> Iterator[_LocalSession]:
        from transformers import DynamicCache

        yield _LocalSession(self, DynamicCache(config=self._model.config))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def _adapter(self):
        if self._peft is None:
            raise ModelError("this policy is closed, its adapter is no longer in the model; make a new one with load_policy")
        return nullcontext() if self._adapter_on else self._peft.disable_adapter()

    def close(self) -> None:
        """Takes the adapter's layers out of the model, which then is as it came."""
        if self._peft is not None:
            self._peft.unload()
            self._model.train(self._was_training)
            for parameter in self._was_trainable:
                parameter.requires_grad_(True)
            self._peft = None


class _LocalSession:
    def __init__(self, policy: LocalPolicy, cache):
        self._policy, self._cache = policy, cache

    def step(self, tokens: Tensor) -> Tensor:
        with torch.no_grad(), self._policy._adapter():
            return self._policy._model.base_model(tokens, past_key_values=self._cache, use_cache=True).last_hidden_state


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether no number differs by more than `tolerance` times the largest."""
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())
