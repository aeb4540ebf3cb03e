"""A policy whose base model sits on this machine, in full precision or 8-bit or 4-bit. The door to bitsandbytes.

Any decoder-only Hugging Face model; PEFT applies the adapter. Knows nothing about swarms or training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from textrl_swarm.adapters import choose_targets, initial_tensor, lora_config
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
        if isinstance(model, PeftModel):
            raise ModelError("this model already has a PEFT adapter: pass the base model, then policy.load_adapter(directory)")
        if quantization is not None:
            raise ConfigError("quantization is chosen when weights are loaded: pass the model's directory or hub id, or a quantised model")
        return LocalPolicy(model, lora, seed, tokenizer or _tokenizer(model.name_or_path))
    from transformers import AutoModelForCausalLM

    config = read_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{model} is an encoder-decoder model ({config.model_type}); only decoder-only language models can be trained")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = {"dtype": dtype or "auto"}
    if quantization is not None:
        options.update(quantization_config=_quantization_config(quantization, device), device_map={"": device})
    try:
        loaded = AutoModelForCausalLM.from_pretrained(hub_name(model), **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the weights of {str(model)!r} cannot be loaded: {error}") from error
    if quantization is None:
        loaded.to(device)
    return LocalPolicy(loaded, lora, seed, tokenizer or _tokenizer(hub_name(model)))


def _tokenizer(model: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # prompts must then be token ids


def _quantization_config(quantization: str, device: torch.device):
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"quantization={quantization!r} needs bitsandbytes; type: pip install bitsandbytes ({error})") from error
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


class LocalPolicy(Policy):
    """A transformers model on this machine with a PEFT adapter and a value head.

    Args:
        model: a causal language model; it is put in evaluation mode (no dropout) and gets the adapter's layers until `close`.
    """

    def __init__(self, model: nn.Module, lora: LoraSettings, seed: int, tokenizer):
        config = model.config
        self.base_model, self.tokenizer, self.lora = str(model.name_or_path), tokenizer, lora
        self.device = next(model.parameters()).device
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings; pass a model for causal language modelling")
        self.hidden_size, self.vocab_size = head.weight.shape[1], head.weight.shape[0]
        self.max_length = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)
        blocks_path, blocks = _find_blocks(model)
        linears = _linear_layers(blocks[0])
        self.peft_config = lora_config(
            lora, choose_targets(linears, lora.targets), len(blocks), blocks_path.rsplit(".", 1)[-1], self.base_model
        )
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # PEFT draws first values from the global generator; ours replace them
            self._peft = get_peft_model(model, self.peft_config)
        self._peft.eval()
        self._model, self._head = model, head
        self._parameters = {
            name.replace(".default.", "."): parameter for name, parameter in self._peft.named_parameters() if ".lora_" in name
        }
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(initial_tensor(name, tuple(parameter.shape), seed))
        self.value_head = ValueHead(self.hidden_size, seed=seed).to(self.device)
        self._check_head()

    def _check_head(self) -> None:
        """Some architectures scale or cap their logits after the output embeddings; then `project` would be wrong."""
        tokens = torch.arange(4, device=self.device)[None] % self.vocab_size
        with torch.no_grad():
            ours = self.project(self.hidden_states(tokens)).float()
            theirs = self._model(tokens).logits.float()
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max() + 1e-6)):
            raise ModelError(
                f"{type(self._model).__name__} changes its logits after the output embeddings; such models are not supported yet"
            )

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
        return nullcontext() if self._adapter_on else self._peft.disable_adapter()

    def close(self) -> None:
        """Takes the adapter's layers out of the model again."""
        if self._peft is not None:
            self._peft.unload()
            self._peft = None


class _LocalSession:
    def __init__(self, policy: LocalPolicy, cache):
        self._policy, self._cache = policy, cache

    def step(self, tokens: Tensor) -> Tensor:
        with torch.no_grad(), self._policy._adapter():
            return self._policy._model.base_model(tokens, past_key_values=self._cache, use_cache=True).last_hidden_state


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its path in the model."""
    count = getattr(model.config, "num_hidden_layers", None)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise ModelError(f"{type(model).__name__} has no list of {count} transformer blocks; such models are not supported")
    return found[0]


def _linear_layers(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Path inside the block -> (in_features, out_features); GPT-2's Conv1D counts."""
    layers = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            layers[path] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":
            layers[path] = tuple(module.weight.shape)
    return layers
