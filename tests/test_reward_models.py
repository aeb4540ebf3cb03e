"""Classifiers as rewards: the label's probability as by plain transformers, whatever shares the batch."""

from __future__ import annotations

import pytest
import torch
from architectures import VOCAB, character_tokenizer
from test_texts import llama_like
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    FeatureExtractionPipeline,
    TextClassificationPipeline,
)

from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.rewards.classifiers import reward_model
from textrl_swarm.rewards.functions import is_sentence_reward
from textrl_swarm.textrl.env import TextRLEnv

TEXTS = ["a good soup", "x", "", "the phone is bad and the camera too", "good", "bad bad"]
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
SIZES = {"bert": BERT, "roberta": BERT, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}}
OTHERS = {
    "mpnet": BERT,
    "longformer": {**BERT, "attention_window": 4},
    "data2vec-text": BERT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
}
TINY = {**BERT, "vocab_size": VOCAB}


def classifier(directory, model_type: str = "bert", labels: dict[int, str] | None = LABELS, **settings):
    """An untrained classifier with weights large enough for clear opinions, saved with its tokenizer."""
    labels = labels or {0: "LABEL_0"}
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCAB, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        id2label=labels, label2id={n: i for i, n in labels.items()}, num_labels=len(labels),
        **{**SIZES, **OTHERS}[model_type], **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def alone(directory, text: str, keep: int = 40) -> torch.Tensor:
    """Logits of one text by plain transformers, without padding; the last `keep` tokens of it."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    ids = character_tokenizer()(text)["input_ids"][-keep:] or [1]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64)
        ).logits[0]


@pytest.mark.parametrize("model_type", sorted(SIZES))
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_probability_of_the_named_label(tmp_path, model_type, batch_size):
    directory = classifier(tmp_path, model_type)
    texts = [text for text in TEXTS if text]
    for label, index in (("negative", 0), ("positive", 2), ("LABEL_1", 1), (2, 2)):
        found = reward_model(directory, label, batch_size=batch_size).score(texts)
        expected = [float(alone(directory, text).softmax(0)[index]) for text in texts]
        assert found == pytest.approx(expected, abs=1e-5)
    assert max(found) - min(found) > 0.05, "the classifier has no opinions, so this test shows nothing"


def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own(tmp_path):
    # As most toxicity classifiers.
    directory = classifier(tmp_path, problem_type="multi_label_classification")
    pipeline = TextClassificationPipeline(
        model=AutoModelForSequenceClassification.from_pretrained(directory),
        tokenizer=character_tokenizer(),
        top_k=None,
    )
    texts = [text for text in TEXTS if text]
    expected = {label: [] for label in LABELS.values()}
    for text in texts:
        for found in pipeline([text])[0]:
            expected[found["label"]].append(found["score"])
    for label in LABELS.values():
        assert reward_model(directory, label).score(texts) == pytest.approx(expected[label], abs=1e-5)
        assert reward_model(pipeline, label).score(texts) == pytest.approx(expected[label], abs=1e-5)
    assert not 0.9 < sum(scores[0] for scores in expected.values()) < 1.1, (
        "they add up to 1 as exclusive labels do: this shows nothing"
    )


@pytest.mark.parametrize("model_type", sorted(SIZES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_begins_with_cls_or_is_a_rendered_chat_is_read_once(tmp_path, model_type, side):
    """As the model was trained on it: without a second [CLS] or BOS."""
    directory = classifier(tmp_path, model_type)
    tokenizer = llama_like()
    tokenizer.add_special_tokens({"pad_token": "<unk>"})
    tokenizer.padding_side = side
    chat = [{"role": "user", "content": "a b c"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([row])).logits[0].softmax(0)[2].item() for row in (ids, [0, 5, 6])
        ]
    reward = reward_model(directory, "positive", tokenizer=tokenizer)
    plain = tokenizer.decode([5, 6])
    assert reward.score([rendered, plain]) == pytest.approx(expected, abs=1e-5)
    items, texts = [{"input": rendered[:10]}], [rendered[10:]]
    assert reward(items, texts) == pytest.approx(expected[:1], abs=1e-5)


@pytest.mark.parametrize("model_type", sorted(SIZES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_shares_the_batch_changes_nothing(tmp_path, model_type, side):
    tokenizer = character_tokenizer()
    tokenizer.padding_side = side
    reward = reward_model(classifier(tmp_path, model_type), "positive", tokenizer=tokenizer)
    assert reward.score(TEXTS) == pytest.approx([reward.score([text])[0] for text in TEXTS], abs=1e-5)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == (side, "right")  # it may be the policy's


def test_one_output_is_a_raw_score(tmp_path):
    directory = classifier(tmp_path, labels=None)
    found = reward_model(directory).score(TEXTS[:2])
    assert found == pytest.approx([float(alone(directory, text)[0]) for text in TEXTS[:2]], abs=1e-5)


def test_an_empty_response_gets_a_number(tmp_path):
    reward = reward_model(classifier(tmp_path), "positive")
    assert all(0 < value < 1 for value in reward.score(["", "good"]) + reward.score([""]))


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "mpnet", "longformer", "data2vec-text", "bloom", "xlnet", "distilbert"]
)
def test_long_texts_are_cut_to_what_the_model_reads(tmp_path, model_type):
    reward = reward_model(classifier(tmp_path, model_type), "positive")
    (long,), (longer,) = (
        reward.score(["bad " * 300 + "a story" * 300]),
        reward.score(["good " * 300 + "a story" * 300]),
    )
    assert 0 < long == pytest.approx(longer, abs=1e-6)


def test_long_texts_keep_their_end(tmp_path):
    directory = classifier(tmp_path)
    reward = reward_model(directory, "positive")
    text = "a long story " * 10 + "good"
    assert reward.score([text]) == pytest.approx([float(alone(directory, text).softmax(0)[2])], abs=1e-5)
    assert reward.score([text]) != pytest.approx(reward.score([text[:-4] + "evil"]), abs=1e-4)


def test_a_pipeline(tmp_path):
    directory = classifier(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    pipeline = TextClassificationPipeline(model=model, tokenizer=character_tokenizer())
    for label in ("negative", "positive"):  # the top label's score would be the same number for both
        assert reward_model(pipeline, label).score(TEXTS) == reward_model(directory, label).score(TEXTS)


def test_it_is_a_sentence_reward_with_or_without_the_prompt(tmp_path):
    directory = classifier(tmp_path)
    items = [{"input": "the soup is"}, {"input": "my phone is"}]
    reward = reward_model(directory, "positive")
    assert is_sentence_reward(reward)
    assert reward(items, [" good", " bad"]) == reward.score(["the soup is good", "my phone is bad"])
    assert reward_model(directory, "positive", with_prompt=False)(items, ["good", "bad"]) == reward.score(
        ["good", "bad"]
    )
    assert "positive" in reward.name and reward_model(directory, "positive", name="mine").name == "mine"
    env = TextRLEnv(None, character_tokenizer(), items, max_length=4, reward=reward)
    assert env.sentence_rewards(items, ["a", "b"]) == reward(items, ["a", "b"])


def test_the_users_pipeline_is_left_as_it_was(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(classifier(tmp_path))
    pipeline = TextClassificationPipeline(model=model, tokenizer=character_tokenizer())
    reward_model(pipeline, "positive").score(TEXTS)
    assert pipeline.tokenizer.truncation_side == "right" and all(
        parameter.requires_grad for parameter in model.parameters()
    )
    with pytest.raises(ConfigError, match="leave device out"):
        reward_model(pipeline, "positive", device="cpu")


def test_one_text_is_no_list_of_texts(tmp_path):
    with pytest.raises(ConfigError, match=r"takes a list of texts.*'good'"):
        reward_model(classifier(tmp_path), "positive").score("good")


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (
            None,
            "this model has 3 labels: choose the one whose probability is the reward with label=; "
            "known: negative, neutral, positive",
        ),
        ("positiv", "this model has no label 'positiv'; did you mean 'positive'?"),
        (3, "label 3 is not one of 0..2"),
        ("LABEL_9", "no label 'LABEL_9'"),
    ],
)
def test_labels_that_are_refused(tmp_path, label, told):
    with pytest.raises(ConfigError) as caught:
        reward_model(classifier(tmp_path), label)
    assert told in str(caught.value)


def test_a_label_for_a_model_with_one_output_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="leave label out"):
        reward_model(classifier(tmp_path, labels=None), "positive")


OWN_CODE = (
    b'"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}'
)


def damaged(tmp_path, name: str, damage):
    directory = classifier(tmp_path / f"damaged {len(list(tmp_path.iterdir()))}")
    path = directory / name
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    return directory


def test_models_that_are_refused(tmp_path, tiny_bloom):
    for model, told in (
        (tmp_path / "nowhere", "there is no directory"),
        ("nobody/nothing-like-this", "cannot be loaded as a sequence-classification model"),
        (tiny_bloom(seed=1), "is no trained classifier: its checkpoint lacks score.weight"),
        (len, "neither a model's name nor a text-classification pipeline"),
        (
            FeatureExtractionPipeline(model=BertModel(BertConfig(**TINY)), tokenizer=character_tokenizer()),
            "FeatureExtractionPipeline is neither",
        ),
        (BertForSequenceClassification(BertConfig(**TINY)), "BertForSequenceClassification is neither"),
        ("", "there is no directory ''"),
        (
            damaged(tmp_path, "config.json", lambda data: data.replace(b'"model_type": "bert"', OWN_CODE)),
            "cannot be loaded as a sequence-classification model: it comes with code of its own, which is",
        ),
        (
            damaged(tmp_path, "model.safetensors", lambda data: data[:1000]),
            "cannot be loaded as a sequence-classification model",
        ),
        (
            damaged(
                tmp_path, "config.json", lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": 64')
            ),
            "cannot be loaded as a",
        ),
        (
            damaged(tmp_path, "config.json", lambda data: b"{"),
            "cannot be loaded as a sequence-classification model",
        ),
    ):
        with pytest.raises(ModelError) as caught:
            reward_model(model, 0)
        assert told in str(caught.value)


def test_decoders_whose_configuration_pads_otherwise_than_the_tokenizer(tmp_path):
    """They find a text's last token by the configuration's padding; the rest of the batch must not matter."""
    directory = classifier(tmp_path, "gpt2")
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    model.config.pad_token_id = 7
    pipeline = TextClassificationPipeline(model=model, tokenizer=character_tokenizer())
    reward = reward_model(pipeline, "positive")
    assert reward.score(TEXTS) == pytest.approx([reward.score([text])[0] for text in TEXTS], abs=1e-5)
    assert reward.score(["good"]) == pytest.approx([float(alone(directory, "good").softmax(-1)[2])], abs=1e-5)
    assert model.config.pad_token_id == 7  # the user's pipeline stays as it was
