"""What tokenizers of four kinds, made on the spot, do at the edges of a text; and what ends a response."""

from __future__ import annotations

import pytest
from architectures import character_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from textrl_swarm.models.texts import decode_response, encode_prompt, stop_ids


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece's: a word's first piece carries the space before it; decoding drops the first."""
    tokenizer = Tokenizer(
        models.WordLevel(
            {"</s>": 0, "<unk>": 1, **{f"▁{c}": i for i, c in enumerate("abc", 2)}, "d": 5}, "<unk>"
        )
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    vocabulary = {piece: i for i, piece in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def bert_like() -> PreTrainedTokenizerFast:
    """Puts [CLS] before and [SEP] behind every text, as the tokenizers of some GPT-2 models do."""
    tokenizer = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3, "b": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


@pytest.mark.parametrize("prompt", ["a", "a b"])
def test_prompt_and_response_are_together_what_the_tokens_say(prompt):
    tokenizer = metaspace()
    ids = encode_prompt(tokenizer, prompt)
    assert tokenizer.decode([3, 4]) == "b c"  # alone
    assert decode_response(tokenizer, ids, [3, 4]) == " b c"
    assert decode_response(tokenizer, ids, [5, 3]) == "d b"  # goes on in the middle of a word


def test_special_tokens_are_left_out_of_a_response():
    tokenizer = metaspace()
    assert decode_response(tokenizer, encode_prompt(tokenizer, "a"), [3, 0]) == " b"


def test_half_a_character_at_the_border():
    tokenizer = byte_level()
    ids = tokenizer("é")["input_ids"]
    assert len(ids) == 2
    assert decode_response(tokenizer, ids[:1], [ids[1], *tokenizer("ab")["input_ids"]]).endswith("ab")


def test_without_a_tokenizer_there_is_no_text():
    assert decode_response(None, [1], [2]) == "" and stop_ids(None) == frozenset()


def test_an_end_token_that_the_tokenizer_appends_is_left_out():
    tokenizer = bert_like()
    assert tokenizer("a b")["input_ids"] == [0, 3, 4, 1]
    assert encode_prompt(tokenizer, "a b") == [0, 3, 4]


def test_an_end_token_that_stands_in_the_prompt_stays():
    tokenizer = metaspace()
    assert encode_prompt(tokenizer, "a</s>") == [2, 0]


def test_what_ends_a_response():
    tokenizer = character_tokenizer()
    assert stop_ids(tokenizer) == {0} and stop_ids(bert_like()) == {1}
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[0, 17])) == {0, 17}
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=17)) == {0, 17}
    made_up = GenerationConfig(eos_token_id=17)
    made_up._from_model_config = True  # as for every model without a generation_config.json
    assert stop_ids(tokenizer, made_up) == {0}
