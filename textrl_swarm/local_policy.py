"""A policy whose base model sits on this machine, in full precision or 8-bit or 4-bit. The door to bitsandbytes.

Any decoder-only Hugging Face model; PEFT applies the adapter. Knows nothing about swarms or training.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from textrl_swarm.adapters import add_adapter, find_blocks, initial_tensor, keep_differentiable, model_lora_config, remove_adapter
from textrl_swarm.base_model import hub_name, read_config
from textrl_swarm.config import QUANTIZATIONS, LoraSettings
from textrl_swarm.errors import ConfigError, ModelError, TextRLSwarmError
from textrl_swarm.policy import DecodingSession, Policy
from textrl_swarm.value_head import ValueHead

logger = logging.getLogger(__name__)

_POLICY = "_textrl_swarm_policy"  # attribute of a model: whose layers are in it


def load_local_policy(model, quantization, lora: LoraSettings, dtype, device, seed: int, *, tokenizer=None) -> LocalPolicy:
    """See `policy.load_policy`."""
    if quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantization must be None, '8bit' or '4bit', got {quantization!r}")
    if isinstance(model, nn.Module):
        if (earlier := vars(model).get(_POLICY)) is not None:
            logger.warning("this model was another policy's: that one is closed, and what it learned is no longer in the model")
            earlier.close()
        _require_plain_decoder(model)
        _require_as_it_is(model, quantization, dtype, device)
        return LocalPolicy(model, lora, seed, tokenizer or _tokenizer(model.name_or_path))
    from transformers import AutoModelForCausalLM

    config = read_config(model)
    _require_decoder(config, str(model))
    device = _usable_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    options = {"dtype": dtype or "auto", "trust_remote_code": False}
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
    else:
        _check_quantised(loaded, quantization)
    return LocalPolicy(loaded, lora, seed, tokenizer or _tokenizer(hub_name(model)))


def _usable_device(device: torch.device | str | int) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:  # AssertionError: torch without CUDA
        raise ConfigError(f"device={device!r} cannot be used on this machine: {error}") from error


def _require_as_it_is(model: PreTrainedModel, quantization, dtype, device) -> None:
    """Options of loading do not change a model that is loaded."""
    if quantization is not None:
        raise ConfigError("quantization is chosen when weights are loaded: pass the model's directory or hub id, or a quantised model")
    wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted not in (None, "auto", model.dtype):
        raise ConfigError(f"dtype={dtype!r}, but the model is loaded in {model.dtype}: convert it with model.to(dtype), or leave dtype out")
    if device is not None and _usable_device(device) != model.device:
        raise ConfigError(f"device={device!r}, but the model is on {model.device}: move it with model.to(device), or leave device out")


def _tokenizer(model: str):
    """None when there is none, or none that works; prompts must then be token ids."""
    from transformers import AutoTokenizer

    if not model:  # an object that was not loaded: "" would mean the current directory
        return None
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # what tokenizers raises for a damaged file is a plain Exception
        if any(Path(model).glob("tokenizer*")):
            logger.warning("the tokenizer in %s cannot be loaded, so prompts must be token ids: %r", model, error)
        return None


def _require_decoder(config, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({config.model_type}); only decoder-only language models can be trained: "
            "use one of those, e.g. bigscience/bloomz-560m in the place of an instruction-tuned T5, or gpt2 in that of BART"
        )


def _require_plain_decoder(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError("this model already has a PEFT adapter: pass the base model, then policy.load_adapter(directory)")
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


def _check_quantised(model: nn.Module, quantization: str) -> None:
    """transformers quantises layers of known classes and says nothing about the others."""
    name, parameters = type(model).__name__, list(find_blocks(model)[1].parameters())
    left = sum(p.nbytes for p in parameters if p.dtype not in (torch.int8, torch.uint8))
    share = left / sum(p.nbytes for p in parameters)
    if share == 1:
        raise ModelError(f"quantization={quantization!r} reaches no weight in the blocks of {name} (unusual kinds of layers): leave it out")
    if share > 0.5:
        logger.warning("quantization=%r leaves %.0f %% of the bytes in the blocks of %s as they were", quantization, 100 * share, name)


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
        config = model.config.get_text_config(decoder=True)
        self.base_model, self.tokenizer, self.lora = str(model.name_or_path), tokenizer, lora
        self.device, self.generation_config = next(model.parameters()).device, getattr(model, "generation_config", None)
        self.rounds_by_batch = getattr(model, "is_loaded_in_8bit", False)
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings; pass a model for causal language modelling")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError(
                f"{type(model).__name__} has weights that are not in memory (meta device, or offloaded to disk): load all of it"
            )
        self.vocab_size = head.out_features if isinstance(head, nn.Linear) else head.weight.shape[0]  # 4-bit weights have another shape
        limits = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "max_seq_len"))
        self.max_length = next(filter(None, limits), None)
        self._model, self._decoder, self._head, self._peft = model, _decoder(model), head, None
        self._before = (model.training, model.config.return_dict, [p for p in model.parameters() if p.requires_grad])
        pad = getattr(config, "pad_token_id", None)
        tokens = torch.tensor([[i for i in range(5) if i != pad][:4]], device=self.device) % self.vocab_size
        try:
            model.eval()
            model.config.return_dict = True
            keep_differentiable(model)
            with torch.no_grad():
                self._adapt(tokens, seed)
                self._check_model(tokens)
        except BaseException as error:
            self._restore()
            if isinstance(error, Exception) and not isinstance(error, (TextRLSwarmError, torch.cuda.OutOfMemoryError)):  # the model's own
                raise ModelError(f"{type(model).__name__} cannot be run as a decoder of tokens alone: {error!r}") from error
            raise
        self.value_head = ValueHead(self.hidden_size, seed=seed).to(self.device)

    def _adapt(self, tokens: Tensor, seed: int) -> None:
        model = self._model
        self.peft_config = model_lora_config(self.lora, model, self.base_model, tokens)
        self._peft = add_adapter(model, self.peft_config).eval()
        self._parameters = {
            name.replace(".default.", "."): parameter for name, parameter in self._peft.named_parameters() if ".lora_" in name
        }
        for name, parameter in self._parameters.items():
            parameter.copy_(initial_tensor(name, tuple(parameter.shape), seed))
        setattr(model, _POLICY, self)  # notebooks run cells again: the next policy takes these layers out
        model.save_pretrained = _refuse_to_save

    def _check_model(self, tokens: Tensor) -> None:
        """Finds out how the model makes its logits and keeps its caches; refuses one that looks ahead: padding would change it."""
        name = f"{type(self._model).__name__} (model type {self._model.config.model_type})"
        output = self._decoder(tokens, use_cache=False)
        hidden, shorter, theirs = output.last_hidden_state, self.hidden_states(tokens[:, :2]), self._model(tokens).logits
        if not (torch.isfinite(hidden).all() and torch.isfinite(theirs).all()):
            raise ModelError(
                f"{name} computes NaN or infinite numbers in {hidden.dtype}: its weights are damaged, or too large for float16 "
                "(then dtype='bfloat16' or 'float32' helps)"
            )
        is_exact = hidden.dtype == torch.float32 and getattr(self._model.config, "quantization_config", None) is None
        tolerance = 0.01 if is_exact else 0.1  # 8-bit products depend a little on what else is in the batch
        if not _close(hidden[:, :2], shorter, tolerance):
            raise ModelError(f"{name} sees later tokens; only decoder-only models can be trained")
        self.hidden_size, self._output_type = hidden.shape[-1], type(output)
        self._head_is_all = self._is_head_all()
        ours = self.project(hidden)
        if ours.shape != theirs.shape or not _close(ours, theirs, 0.01):
            raise ModelError(f"{name} makes its logits from more than the last hidden states; such models are not supported")
        self._new_session = self._choose_session(tokens, hidden, tolerance)

    def features(self, tokens: Tensor) -> Tensor:
        return tokens

    def hidden_states(self, features: Tensor) -> Tensor:
        with self._adapter():
            return self._decoder(features, use_cache=False).last_hidden_state

    def project(self, hidden: Tensor) -> Tensor:
        return self._head_logits(hidden) if self._head_is_all else self._model_logits(hidden)

    def _head_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden.to(self._head.weight.dtype) if self._head.weight.is_floating_point() else hidden)

    def _model_logits(self, hidden: Tensor) -> Tensor:
        """Logits by the model's own forward, its decoder skipped: whatever it does before and after the output embeddings is done here."""
        row = hidden.reshape(1, -1, hidden.shape[-1])
        row = row.to(self._head.weight.dtype) if self._head.weight.is_floating_point() else row
        with _answering(self._decoder, self._output_type(last_hidden_state=row)):
            logits = self._model(torch.zeros(row.shape[:2], dtype=torch.int64, device=self.device)).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def _is_head_all(self) -> bool:
        """Whether logits are the output embeddings' and nothing else: some models scale or cap them, or have layers before.

        Seen on random hidden states whose logits are so large (up to 1000) that a soft cap shows.
        """
        if isinstance(self._head, nn.Linear) and self._head.in_features != self.hidden_size:
            return False
        probe = torch.randn((1, 8, self.hidden_size), generator=torch.Generator().manual_seed(0)).to(self.device)
        probe *= 1000 / self._head_logits(probe).float().abs().max().clamp_min(1e-3)
        return torch.equal(self._head_logits(probe).float(), self._model_logits(probe).float())

    @contextmanager
    def session(self, rows: int, max_length: int) -> Iterator[DecodingSession]:
        yield self._new_session()

    def _choose_session(self, tokens: Tensor, hidden: Tensor, tolerance: float):
        """The fastest kind of session that finds `hidden`, the last hidden states of `tokens`, when the last token comes alone."""
        takes = inspect.signature(self._decoder.forward).parameters
        kinds = [True, False] if "position_ids" in takes else [False]  # False too: e.g. RoBERTa's positions begin elsewhere
        reason = "its forward takes no past_key_values"
        for positions in kinds if "past_key_values" in takes else []:
            new = partial(_CachedSession, self, positions)
            try:
                session = new()
                session.step(tokens[:, :-1])
                last = session.step(tokens[:, -1:])
            except Exception as error:  # whatever a model raises at a cache or at positions that it does not expect
                reason = repr(error)
                continue
            if _close(last, hidden[:, -1:], tolerance):
                return new
            reason = "with it the model computes something else"
        logger.warning(
            "%s cannot be used with an attention cache (%s): generation computes the whole sequence anew for every token, which is slow",
            type(self._model).__name__, reason,
        )  # fmt: skip
        return partial(_RecomputingSession, self)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def _adapter(self):
        if self._peft is None:
            raise ModelError("this policy is closed, its adapter is no longer in the model; make a new one with load_policy")
        if self._model.training:  # a user's model.train(): dropout would make another policy of every forward
            self._model.eval()
        return nullcontext() if self._adapter_on else self._peft.disable_adapter()

    def close(self) -> None:
        """Takes the adapter's layers out of the model, which then is as it came."""
        if self._peft is not None:
            self._restore()

    def _restore(self) -> None:
        was_training, self._model.config.return_dict, was_trainable = self._before
        remove_adapter(self._model)
        self._model.train(was_training)
        for parameter in was_trainable:
            parameter.requires_grad_(True)
        for name in (_POLICY, "save_pretrained"):
            vars(self._model).pop(name, None)
        self._peft = None


def _refuse_to_save(*args, **options) -> None:
    raise ModelError(
        "this model has a policy's layers in it and would be saved under names that nothing can load: use policy.save_adapter(directory) "
        "for the adapter, `textrl-swarm export --merge` for a whole model, or policy.close() first for the base model"
    )


def _decoder(model: nn.Module) -> nn.Module:
    """All of a causal language model but its head; where transformers names the whole model or the head, the part that holds the blocks."""
    decoder, (blocks_path, blocks) = model.get_decoder(), find_blocks(model)
    is_right = decoder is not model and any(module is blocks for module in decoder.modules())
    return decoder if is_right else getattr(model, blocks_path.split(".")[0])


@contextmanager
def _answering(module: nn.Module, output) -> Iterator[None]:
    """Inside, the module computes nothing and returns `output`."""
    own = module.__dict__.get("forward")  # accelerate puts its hooks there
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _CachedSession:
    """Keeps the model's own kind of cache. Positions are passed where the model takes them: some do not count what the cache holds."""

    def __init__(self, policy: LocalPolicy, passes_positions: bool):
        self._policy, self._passes_positions, self._cache, self._seen = policy, passes_positions, None, 0

    def step(self, tokens: Tensor) -> Tensor:
        start, self._seen = self._seen, self._seen + tokens.shape[1]
        options = {"position_ids": torch.arange(start, self._seen, device=tokens.device)[None]} if self._passes_positions else {}
        with torch.no_grad(), self._policy._adapter():
            output = self._policy._decoder(tokens, past_key_values=self._cache, use_cache=True, **options)
        self._cache = output.past_key_values
        return output.last_hidden_state


class _RecomputingSession:
    """For models without a cache that works."""

    def __init__(self, policy: LocalPolicy):
        self._policy, self._tokens = policy, None

    def step(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens if self._tokens is None else torch.cat([self._tokens, tokens], dim=1)
        with torch.no_grad():
            return self._policy.hidden_states(self._tokens)[:, -tokens.shape[1] :]


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether no number differs by more than `tolerance` times the largest."""
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())
