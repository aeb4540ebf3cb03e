"""What tokenizers of four kinds, made on the spot, do at the edges of a text; and what ends a response."""

from __future__ import annotations

import pytest
from architectures import character_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from textrl_swarm.models.texts import decode_response, encode_prompt, encode_text, stop_ids


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


def llama_like(prepend: str = "first") -> PreTrainedTokenizerFast:
    """Puts <s> before every text; <s>, [/INST] and </s> in a text are tokens.

    Its chat template writes <s> itself.
    """
    pieces = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", *(f"▁{c}" for c in "abc"), *"abc:\n", "▁", "U"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", c) for c in "abc"], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
    )  # fmt: skip
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return wrapped


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


def test_special_tokens_of_a_response():
    """Markers are no text, nor is what ended the response; other special tokens are, unless skipped."""
    tokenizer = metaspace()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    prompt = encode_prompt(tokenizer, "a")
    for response, ended, text, skipped in (
        ([6, 3, 6, 0], True, "<think> b<think>", " b"),
        ([6, 3, 6], False, "<think> b<think>", " b"),
        ([6, 3, 6], True, "<think> b", " b"),
        ([3, 0, 1, 4], False, " b c", " b c"),
        ([3, 5], True, " bd", " bd"),  # an ordinary token that ended it
        ([], False, "", ""),
    ):
        assert decode_response(tokenizer, prompt, response, ended=ended) == text
        assert decode_response(tokenizer, prompt, response, ended=ended, skip_special_tokens=True) == skipped


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


# One BOS

CHATS = [
    [{"role": "user", "content": "a b"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c"},
        {"role": "user", "content": "c"},
    ],
]
_PLAIN = "{% for m in messages %}U: {{ m.content }}\n{% endfor %}"  # no special token, and no BOS
_MARKED = "{% for m in messages %}[INST]{{ m.role }}: {{ m.content }}[/INST]{% endfor %}"  # like ChatML
_SYSTEM = "{% if messages[0].role != 'system' %}[INST]a b[/INST]{% endif %}" + _MARKED


@pytest.mark.parametrize("prepend", ["first", "always"])
@pytest.mark.parametrize(
    "template", [None, _PLAIN, _MARKED, _SYSTEM], ids=["its own", "plain", "marked", "system"]
)
def test_a_rendered_chat_is_encoded_as_apply_chat_template_does(template, prepend):
    tokenizer = llama_like(prepend)
    tokenizer.chat_template = template or tokenizer.chat_template
    chats = CHATS if template is None else [*CHATS, [{"role": "system", "content": "b"}, *CHATS[0]]]
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        expected = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["input_ids"]
        assert encode_prompt(tokenizer, text) == expected == encode_text(tokenizer, text)["input_ids"]
        assert tokenizer(text)["input_ids"] != expected, "the tokenizer alone adds a BOS"


def test_a_text_that_begins_with_bos_gets_no_second():
    for tokenizer in (llama_like(), llama_like("always")):
        tokenizer.chat_template = None
        assert encode_prompt(tokenizer, "a b") == [0, 5, 6]
        for text in ("<s>", "<s>a", "<s> a b", "<s><s>a", "<s></s>", "<s>[INST]a"):
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert encode_prompt(tokenizer, text) == encode_text(tokenizer, text)["input_ids"] == expected
        assert encode_prompt(tokenizer, "[INST]a")[0] == 0, "no BOS of its own, and no chat template"


def test_cls_and_sep():
    tokenizer = bert_like()
    assert encode_text(tokenizer, "a b")["input_ids"] == [0, 3, 4, 1]
    assert encode_text(tokenizer, "[CLS] a b")["input_ids"] == [0, 3, 4, 1]
    assert {len(row) for row in encode_text(tokenizer, "[CLS] a b").values()} == {4}
    assert encode_prompt(tokenizer, "[CLS] a b") == [0, 3, 4]
    assert encode_text(tokenizer, "a [CLS] b")["input_ids"] == [0, 3, 0, 4, 1]
    cut = encode_text(tokenizer, "[CLS] a b a", truncation=True, max_length=5)["input_ids"]
    assert cut == [0, 3, 4, 1]


def test_a_template_that_fails_is_none():
    tokenizer = llama_like()
    tokenizer.chat_template = "{{ nobody.knows.this }}"
    assert encode_prompt(tokenizer, "<s>a") == [0, 8] and encode_prompt(tokenizer, "a") == [0, 5]


def test_what_ends_a_response():
    tokenizer = character_tokenizer()
    assert stop_ids(tokenizer) == {0} and stop_ids(bert_like()) == {1}
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[0, 17])) == {0, 17}
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=17)) == {0, 17}
    made_up = GenerationConfig(eos_token_id=17)
    made_up._from_model_config = True  # as for every model without a generation_config.json
    assert stop_ids(tokenizer, made_up) == {0, 17}
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[-1, 17])) == {0, 17}
    assert stop_ids(tokenizer, GenerationConfig()) == {0}
