"""Rewards from Hugging Face classifiers: sentiment, toxicity, a trained reward model. Knows nothing about
where prompts come from.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from textrl_swarm.errors import ConfigError, ModelError, closest
from textrl_swarm.models.base_model import looks_like_path, reason_of
from textrl_swarm.models.texts import encode_text
from textrl_swarm.types import Item

if TYPE_CHECKING:
    from transformers import Pipeline, PretrainedConfig, PreTrainedTokenizerBase

_DEFAULT_MAX_TOKENS = 512  # for models that do not say how long a text may be


def reward_model(
    model: str | Path | Pipeline,
    label: str | int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_prompt: bool = True,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    name: str | None = None,
) -> RewardModel:
    """A sentence reward that asks a sequence-classification model.

    Args:
        model: directory, hub id, or a text-classification pipeline.
        label: whose probability is the reward: a name of the model's, "LABEL_1", or its index. Labels exclude
            each other (softmax), unless the model's configuration says multi-label (sigmoid). None for models
            with one output, whose raw score is then the reward.
        tokenizer: instead of the model's own.
        with_prompt: the model reads prompt and response, not the response alone.
        batch_size: texts per forward.
        device: None = CUDA when there is one; not for pipelines, whose model stays where it is.
        name: for logs and model cards; None = the model's and the label's.

    Raises:
        ModelError: no such model, or one that does not classify texts. ConfigError: an unknown or missing
            label.
    """
    from transformers import TextClassificationPipeline

    if isinstance(model, (str, Path)):
        default_device = "cuda" if torch.cuda.is_available() else "cpu"
        classifier, tokenizer = _load(model, tokenizer, device or default_device)
    elif not isinstance(model, TextClassificationPipeline):
        raise ModelError(
            f"{type(model).__name__} is neither a model's name nor a text-classification pipeline; "
            'make one with pipeline("text-classification", model=..., tokenizer=...)'
        )
    elif device is not None:
        raise ConfigError(
            f"a pipeline's model stays where it is ({model.device}): leave device out (got {device!r})"
        )
    else:
        classifier, tokenizer = model.model, tokenizer or model.tokenizer
    index = _label_index(classifier.config, label)
    names = classifier.config.id2label
    default_name = f"{Path(str(classifier.name_or_path)).name}[{'score' if index is None else names[index]}]"
    return RewardModel(classifier, tokenizer, index, with_prompt, batch_size, name or default_name)


def _load(
    model: str | Path, tokenizer: PreTrainedTokenizerBase | None, device: torch.device | str
) -> tuple[Any, PreTrainedTokenizerBase]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not str(model) or (looks_like_path(model) and not Path(model).is_dir()):
        raise ModelError(f"there is no directory {str(model)!r}")
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        classifier, found = AutoModelForSequenceClassification.from_pretrained(
            model, output_loading_info=True, trust_remote_code=False
        )
        classifier.to(device)
    except Exception as error:  # four libraries raise many kinds
        raise ModelError(
            f"{str(model)!r} cannot be loaded as a sequence-classification model: {reason_of(error, model)}"
        ) from error
    if found["missing_keys"]:  # transformers would go on with a random classifier
        lacking = ", ".join(sorted(found["missing_keys"])[:3])
        raise ModelError(f"{str(model)!r} is no trained classifier: its checkpoint lacks {lacking}")
    return classifier, tokenizer


def _label_index(config: PretrainedConfig, label: str | int | None) -> int | None:
    names = {int(index): str(name) for index, name in config.id2label.items()}
    listed = ", ".join(names.values())
    if config.num_labels == 1:
        if label is not None:
            raise ConfigError(f"this model has one output, a score: leave label out (got {label!r})")
        return None
    if label is None:
        raise ConfigError(
            f"this model has {config.num_labels} labels: choose the one whose probability is the reward "
            "with label=; "
            f"known: {listed}"
        )
    if isinstance(label, int) and not isinstance(label, bool):
        if label not in names:
            raise ConfigError(f"label {label} is not one of 0..{config.num_labels - 1} ({listed})")
        return label
    by_name = {
        **{f"LABEL_{index}": index for index in names},
        **{name: index for index, name in names.items()},
    }
    if label not in by_name:
        raise ConfigError(f"this model has no label {label!r}; {closest(str(label), names.values())}")
    return by_name[label]


class RewardModel:
    """A sentence reward; `reward_model` makes one.

    Attributes:
        name: for logs and model cards.
    """

    def __init__(
        self,
        classifier: Any,
        tokenizer: PreTrainedTokenizerBase,
        index: int | None,
        with_prompt: bool,
        batch_size: int,
        name: str,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {batch_size}")
        tokenizer = copy.deepcopy(tokenizer)  # the user's own, or the policy's, keeps its settings
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ModelError(f"the tokenizer of {name} has neither a padding token nor an end token")
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.truncation_side = "left"  # the response, which is to be judged, stands at the end
        if classifier.config.model_type != "xlnet":  # XLNet reads its answer off the last position
            tokenizer.padding_side = "right"
        self._max_tokens = min(tokenizer.model_max_length, _positions(classifier))
        self._blank = "" if tokenizer("")["input_ids"] else tokenizer.pad_token  # replaces an empty text
        self._exclusive = classifier.config.problem_type != "multi_label_classification"
        self._classifier = classifier.eval()
        self._tokenizer = tokenizer
        self._index = index
        self._with_prompt = with_prompt
        self._batch_size = batch_size
        self.name = name

    def __call__(self, items: Sequence[Item], texts: Sequence[str]) -> list[float]:
        """One reward per response."""
        if self._with_prompt:
            texts = [item["input"] + text for item, text in zip(items, texts, strict=True)]
        return self.score(texts)

    def score(self, texts: Sequence[str]) -> list[float]:
        """One score per text, for use inside `get_reward`: the label's probability, or the model's one
        output.
        """
        if isinstance(texts, str):
            raise ConfigError(f"score takes a list of texts, got one text: {texts[:40]!r}; wrap it in [ ]")
        # Similar lengths together need little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._batch([texts[i] for i in rows])
            for row, value in zip(rows, batch.tolist(), strict=True):
                scores[row] = value
        return scores

    @torch.no_grad()
    def _batch(self, texts: list[str]) -> Tensor:
        texts = [text or self._blank for text in texts]
        limits = {"truncation": True, "max_length": self._max_tokens}
        encoded = [encode_text(self._tokenizer, text, **limits) for text in texts]
        inputs = self._tokenizer.pad(encoded, return_tensors="pt")
        with self._pads_alike():
            logits = self._classifier(**inputs.to(self._classifier.device)).logits.float()
        if self._index is None:
            return logits[:, 0].cpu()
        probabilities = logits.softmax(dim=-1) if self._exclusive else logits.sigmoid()
        return probabilities[:, self._index].cpu()

    @contextlib.contextmanager
    def _pads_alike(self) -> Iterator[None]:
        """Inside, the model's configuration names the tokenizer's padding token; a user's pipeline keeps its
        own.

        Decoders take the token before their configuration's padding for a text's last one.
        """
        config = self._classifier.config
        before = config.pad_token_id
        config.pad_token_id = self._tokenizer.pad_token_id
        try:
            yield
        finally:
            config.pad_token_id = before


def _positions(classifier: Any) -> int:
    """How many tokens a text may have: RoBERTa's kind counts positions from padding_idx + 1, so its tables
    are longer.
    """
    rows = getattr(classifier.config, "max_position_embeddings", None) or 0
    skipped = []
    for name, module in classifier.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            skipped.append(module.padding_idx + 1)
    return rows - max(skipped, default=0) if rows > 0 else _DEFAULT_MAX_TOKENS
