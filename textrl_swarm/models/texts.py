"""Between texts and token ids: prompts in, responses out, and the tokens that end a response. Knows nothing
about models.

What a tokenizer does at the edges of a text is undone here, once: an end token that it appends to every text,
a space that it drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def stop_ids(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Token ids that end a response.

    These are the tokenizer's end and separator, and what a model's own generation_config.json lists, such as
    a chat model's end of turn. A configuration that transformers derived from the model's defaults does not
    count.
    """
    ids: list[int | None] = [getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")]
    if generation_config is not None and not getattr(generation_config, "_from_model_config", False):
        listed = generation_config.eos_token_id
        ids += listed if isinstance(listed, (list, tuple)) else [listed]
    return frozenset(token for token in ids if token is not None)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is to be continued: without the end token that some tokenizers append; what
    stands in the text stays.
    """
    ids, ends = list(tokenizer(text)["input_ids"]), stop_ids(tokenizer)
    if ids and ids[-1] in ends:
        plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        while ids and ids[-1] in ends and ids[-len(plain) :] != plain:
            ids.pop()
    return ids


def decode_response(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Sequence[int], response: Sequence[int]
) -> str:
    """The text that a response adds to its prompt, special tokens left out: prompt and text are together what
    the tokens say.

    Tokenizers of the SentencePiece kind drop the space before a text's first word; decoded alone, a response
    would lose it.
    """
    if tokenizer is None:
        return ""
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *response], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    # The first token changed how the prompt's last one is read.
    return tokenizer.decode(list(response), skip_special_tokens=True)
