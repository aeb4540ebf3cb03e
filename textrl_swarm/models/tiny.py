"""Tiny models made on the spot, for the demo and the tests. Knows nothing about policies, rewards or swarms.

`make_tiny_model` pretrains for about a minute on short opinions, half of them good and half bad, so that the
model speaks recognisable English and reinforcement learning has something to choose between. `random_bloom`
is untrained and instant.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import logging
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from textrl_swarm.errors import ConfigError, ModelError, closest
from textrl_swarm.files import published
from textrl_swarm.models.corpus import build_corpus

logger = logging.getLogger(__name__)

EOS, PAD, UNKNOWN = "</s>", "<pad>", "<unk>"
LABEL_IGNORED = -100  # torch's cross entropy leaves these targets out
RECORD = "tiny_model.json"  # written last; its presence says that this module made the directory


# Tokenizers.


def _wrap(tokenizer: Tokenizer, unk_token: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=unk_token,
        clean_up_tokenization_spaces=False,
    )


def _train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips, and the corpus's common words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _character_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per character, exactly `vocab_size` entries; the least common characters are the first to be
    left out.
    """
    common = string.ascii_lowercase + " .,'!?\n" + string.ascii_uppercase + string.digits + string.punctuation
    rare = filter(str.isprintable, map(chr, range(0xA1, sys.maxunicode)))
    characters = itertools.chain(dict.fromkeys(common), rare)
    entries = itertools.islice(itertools.chain((EOS, PAD, UNKNOWN), characters), vocab_size)
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(entries)}, merges=[], unk_token=UNKNOWN)
    )
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token=UNKNOWN)


# Directories: whole or absent.


def _recorded(directory: Path) -> dict[str, Any] | None:
    """What this module wrote about a model it made there; None if it did not make it."""
    try:
        return json.loads((directory / RECORD).read_text())
    except (OSError, ValueError):
        return None


def _require_usable(directory: Path) -> None:
    if (
        directory.exists()
        and _recorded(directory) is None
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise ModelError(
            f"{directory} holds something other than a tiny model of ours; name an empty or a new directory"
        )


@contextmanager
def _published(directory: Path) -> Iterator[Path]:
    """`files.published` that replaces a tiny model of ours and nothing else."""
    _require_usable(directory)
    with published(directory) as staging:
        yield staging
        _require_usable(directory)  # somebody may have put a file there in the meantime


# Models.


# What a family's configuration has beside the sizes that all have.
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_dropout": 0.0},
    "llama": {"num_key_value_heads": 2, "intermediate_size": 192},
    "mixtral": {  # a mixture of experts
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def _model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    layers: int,
    hidden: int,
    heads: int,
    family: str = "bloom",
) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        initializer_range=0.08,  # the usual 0.02 is for wide models; a narrow one learns more slowly from it
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        dtype="float32",
        **FAMILIES[family],
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are left alone
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float()


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    *,
    prefix: str = "transformer.h",
    **record: Any,
) -> None:
    """Writes what `save_pretrained` writes, without its progress bar and with either style of keys, then our
    record.
    """
    dropped = "transformer." if prefix == "h" else ""
    weights = {}
    for name, weight in model.named_parameters():  # without the tied head
        weights[name.removeprefix(dropped)] = weight.detach()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def random_bloom(
    directory: str | Path,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    vocab: int = 128,
    prefix: str = "transformer.h",
) -> Path:
    """An untrained BLOOM whose every weight matters, and a tokenizer of single characters; for tests that
    need no English.

    Weights are larger than BLOOM's own start, biases are not zero and layer norms not the identity, so that
    leaving any of them out shows in the logits.

    Args:
        directory: new, empty, or made by this module (then it is replaced).
        seed: of the weights; the tokenizer does not depend on it.
        vocab: entries of the tokenizer and rows of the embedding; at least 40, so that lower-case English
            fits.
        prefix: names of the checkpoint's keys: "transformer.h" as transformers saves BLOOM, or "h" as on the
            hub.

    Raises:
        ConfigError: impossible sizes. ModelError: `directory` holds something else.
    """
    if prefix not in ("transformer.h", "h"):
        raise ConfigError(f'prefix must be "transformer.h" or "h", got {prefix!r}')
    if layers < 1 or heads < 1 or hidden < 1 or hidden % heads or vocab < 40:
        got = f"layers={layers}, hidden={hidden}, heads={heads}, vocab={vocab}"
        raise ConfigError(f"need layers >= 1, hidden a multiple of heads and vocab >= 40, got {got}")
    tokenizer = _character_tokenizer(vocab)
    model = _model(tokenizer, seed, layers=layers, hidden=hidden, heads=heads)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(0.2 * noise + (1.0 if is_norm_scale else 0.0))
    with _published(Path(directory)) as staging:
        _save(
            model,
            tokenizer,
            staging,
            settings={"kind": "random", "seed": seed, "prefix": prefix},
            prefix=prefix,
        )
    return Path(directory)


RECIPE: dict[str, Any] = {
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "vocab": 768,
    "steps": 1200,
    "batch": 16,
    "lr": 1e-2,
    "warmup": 50,
}
REPORT_EVERY_S = 0.3
LOSS_WINDOW = 50  # optimizer steps that a reported loss is the mean of

ProgressCallback = Callable[[float, float], None]


def make_tiny_bloom(directory: str | Path, **options: Any) -> Path:
    """`make_tiny_model` of BLOOM's family."""
    return make_tiny_model(directory, family="bloom", **options)


def make_tiny_model(
    directory: str | Path,
    *,
    family: str = "bloom",
    seed: int = 0,
    time_limit_s: float = 90.0,
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Pretrains a tiny model with its own tokenizer on the opinions above; about 45 s on one slow core.

    A fixed number of optimizer steps, so the same seed gives the same model on the same machine with the same
    number of threads. On a
    machine so slow that `time_limit_s` comes first, pretraining is cut there, with a warning: the model then
    speaks less well.

    Args:
        directory: new, empty, or made by this module. A model made there with the same settings is reused,
            unless it was cut by a shorter time limit; any other tiny model is replaced. It appears under this
            name only when it is whole.
        family: a key of FAMILIES.
        seed: of corpus, weights and order of the texts.
        time_limit_s: > 0, seconds of wall time for pretraining.
        on_progress: called a few times per second, and at the end, with the fraction done in [0, 1] and the
            recent mean loss in nats per token.

    Raises:
        ConfigError: impossible time limit, or another family. ModelError: `directory` holds something else.
    """
    if not time_limit_s > 0:
        raise ConfigError(f"time_limit_s must be > 0 seconds, got {time_limit_s!r}")
    require_family(family)
    directory = Path(directory)
    _require_usable(directory)
    texts = build_corpus(seed)
    corpus = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    settings = {"kind": "pretrained", "family": family, "seed": seed, **RECIPE, "corpus": corpus}
    record = _recorded(directory)
    if record is None or not _is_reusable(record, settings, time_limit_s):
        tokenizer = _train_tokenizer(texts, RECIPE["vocab"])
        sizes = {name: RECIPE[name] for name in ("layers", "hidden", "heads")}
        model = _model(tokenizer, seed, family=family, **sizes)
        steps_done, loss = _pretrain(
            model, _batches(*_encode(texts, tokenizer), seed), time_limit_s, on_progress
        )
        record = {"settings": settings, "steps_done": steps_done, "time_limit_s": time_limit_s, "loss": loss}
        with _published(directory) as staging:
            _save(model, tokenizer, staging, **record)
    if on_progress:
        on_progress(1.0, record["loss"])
    return directory


def require_family(family: str) -> None:
    """Raises ConfigError for a family of which no tiny model can be made."""
    if family not in FAMILIES:
        raise ConfigError(f"there is no tiny model of {family!r}; {closest(family, FAMILIES)}")


def _is_reusable(record: dict[str, Any], settings: dict[str, Any], time_limit_s: float) -> bool:
    if record.get("settings") != settings:
        return False
    return record["steps_done"] == settings["steps"] or record["time_limit_s"] >= time_limit_s


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Each text, the end token, then padding: tokens (N, S) int64, lengths (N,) with the end token
    counted.
    """
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens, lengths


def _batches(tokens: Tensor, lengths: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless passes over the rows in random order: tokens (B, S) cut to the longest row, mask (B, S), True
    on text.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(tokens), generator=generator).split(RECIPE["batch"]):
            longest = int(lengths[rows].max())
            yield tokens[rows, :longest], torch.arange(longest) < lengths[rows, None]


def _pretrain(
    model: PreTrainedModel,
    batches: Iterator[tuple[Tensor, Tensor]],
    time_limit_s: float,
    on_progress: ProgressCallback | None,
) -> tuple[int, float]:
    """Next-token prediction with AdamW, a warm-up and a linear decay; returns the optimizer steps done and
    the recent mean loss.
    """
    started_s = reported_s = time.monotonic()
    steps = RECIPE["steps"]
    warmup = RECIPE["warmup"]

    def factor(i: int) -> float:
        return min((i + 1) / warmup, (steps - i) / (steps - warmup))

    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: collections.deque[float] = collections.deque(maxlen=LOSS_WINDOW)
    for done, (tokens, mask) in enumerate(itertools.islice(batches, steps), start=1):
        labels = tokens.masked_fill(~mask, LABEL_IGNORED)
        loss = model(input_ids=tokens, attention_mask=mask.long(), labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        now_s = time.monotonic()
        if now_s - started_s > time_limit_s and done < steps:
            logger.warning(
                "pretraining cut after %.0f s at %d of %d optimizer steps (loss %.2f)",
                time_limit_s,
                done,
                steps,
                losses[-1],
            )
            break
        if on_progress and now_s - reported_s > REPORT_EVERY_S:
            on_progress(max(done / steps, (now_s - started_s) / time_limit_s), statistics.fmean(losses))
            reported_s = now_s
    return done, statistics.fmean(losses)
