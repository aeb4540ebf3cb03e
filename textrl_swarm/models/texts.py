"""Between texts and token ids: prompts in, responses out, and the tokens that end a response. Knows nothing
about weights.

What a tokenizer does at the edges of a text is undone here, once: a BOS before a text that has one, an end
token that it appends to every text, a space that it drops.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from textrl_swarm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_MARKERS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_CONTENT = "textrl-swarm"  # of a message whose place in a chat template is looked for


# ---------------------------------------------------------------------------- what ends a response


def generation_config(model: Any) -> GenerationConfig:
    """What a transformers model's `generate` goes by: its generation_config.json, or else its config.json
    with the text_config inside.
    """
    from transformers import GenerationConfig

    found: GenerationConfig | None = getattr(model, "generation_config", None)
    return GenerationConfig.from_model_config(model.config) if found is None else found


def stop_ids(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Token ids that end a response: all at which the model's `generate` ends one, and the tokenizer's end
    and separator, which end TextRL's.

    Raises:
        ConfigError: the model's generation configuration lists something else than token ids, or a stop
            string that is not one token.
    """
    ids = {getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")}
    if generation_config is not None:
        ids |= _listed_ids(generation_config.eos_token_id)
        strings = generation_config.stop_strings or []
        ids |= {token_id(tokenizer, text) for text in ([strings] if isinstance(strings, str) else strings)}
    return frozenset(token for token in ids if token is not None and token >= 0)  # -1 stands for "none"


def _listed_ids(listed: Any) -> set[int]:
    listed = listed.tolist() if hasattr(listed, "tolist") else listed
    if listed is None:
        return set()
    try:
        return {
            operator.index(token) for token in (listed if isinstance(listed, (list, tuple)) else [listed])
        }
    except TypeError:
        raise ConfigError(
            f"the model's generation configuration has eos_token_id={listed!r}; write a token id, or a list "
            "of token ids, into its generation_config.json"
        ) from None


def token_id(tokenizer: PreTrainedTokenizerBase | None, stop: str | int) -> int:
    """The id of a stop token that is given by its id, its string in the vocabulary, or its text.

    Raises:
        ConfigError: it is not one known token; shows how the tokenizer splits it.
    """
    if not isinstance(stop, str):
        try:
            return operator.index(stop)
        except TypeError:
            raise ConfigError(f"a stop token is a token's string or id, got {stop!r}") from None
    if tokenizer is None:
        raise ConfigError(f"the stop token {stop!r} is a text, and there is no tokenizer; give its id")
    known = tokenizer.convert_tokens_to_ids(stop)
    if known is not None and tokenizer.convert_ids_to_tokens(known) == stop:
        return known
    ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    raise ConfigError(
        f"the stop token {stop!r} is not one token: the tokenizer splits it into "
        f"{tokenizer.convert_ids_to_tokens(ids)}; give one known token, or token ids as "
        "sampling.stop_token_ids"
    )


# ------------------------------------------------------------------------------------ texts to ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> dict[str, list[int]]:
    """What the tokenizer makes of one text, without a second BOS ([CLS], ...) before a text that begins with
    one. A text that begins as the tokenizer's chat template does is encoded as
    `apply_chat_template(tokenize=True)` would.

    Args:
        options: more arguments of the tokenizer, such as truncation.
    """
    before, after = _added_tokens(tokenizer)
    if (before or after) and _begins_like_a_chat(tokenizer, text):
        return dict(tokenizer(text, add_special_tokens=False, **options))
    encoded = dict(tokenizer(text, **options))
    count = len(before)
    if before and encoded["input_ids"][count : 2 * count] == before:
        return {name: row[count:] for name, row in encoded.items()}
    return encoded


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text."""
    ids = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = (i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare)
    start = next(starts, 0)
    return ids[:start], ids[start + len(bare) :]


def _begins_like_a_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text may be a conversation that the tokenizer's chat template rendered."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    user, system = ({"role": role, "content": _CONTENT} for role in ("user", "system"))
    for conversation in ([user], [system, user]):
        try:
            rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
        except Exception:  # templates refuse conversations in ways of their own
            continue
        head = rendered.partition(_CONTENT)[0]
        if head.strip() and text.startswith(head):
            return True
    return False


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is to be continued: as `encode_text`, without the end token that some
    tokenizers append; what stands in the text stays.
    """
    ids, ends = list(encode_text(tokenizer, text)["input_ids"]), stop_ids(tokenizer)
    if ids and ids[-1] in ends:
        plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        while ids and ids[-1] in ends and ids[-len(plain) :] != plain:
            ids.pop()
    return ids


# ------------------------------------------------------------------------------------ ids to texts


def decode_response(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    ended: bool = True,
    skip_special_tokens: bool = False,
) -> str:
    """The text that a response adds to its prompt: prompt and text are together what the tokens say. Tokens
    that only mark something for the model (end, padding, unknown, ...) are no text.

    Tokenizers of the SentencePiece kind drop the space before a text's first word; decoded alone, a response
    would lose it.

    Args:
        ended: whether the last token ended the response; a special token that did is no text either.
        skip_special_tokens: leave out every special token, such as <think> where that is one.
    """
    if tokenizer is None:
        return ""
    special = special_ids(tokenizer)
    if ended and response and response[-1] in special:
        response = response[:-1]
    markers = {getattr(tokenizer, f"{name}_token_id", None) for name in _MARKERS}
    hidden = special if skip_special_tokens else markers

    def text_of(ids: Sequence[int]) -> str:
        return tokenizer.decode([token for token in ids if token not in hidden])

    before = text_of(prompt)
    whole = text_of([*prompt, *response])
    if whole.startswith(before):
        return whole[len(before) :]
    # The first token changed how the prompt's last one is read.
    return text_of(response)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that `decode(..., skip_special_tokens=True)` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = getattr(tokenizer, "all_special_ids", ())
    return frozenset([*named, *(i for i, token in added.items() if token.special)])
