"""Classifiers as rewards: the named label's probability, whatever shares the batch; compared with plain transformers, text by text."""

from __future__ import annotations

import pytest
import torch
from architectures import VOCAB, character_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, TextClassificationPipeline

from textrl_swarm.env import TextRLEnv
from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.reward_models import reward_model
from textrl_swarm.rewards import is_sentence_reward

TEXTS = ["a good soup", "x", "", "the phone is bad and the camera too", "good", "bad bad"]
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
SIZES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40},
    "roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
}


def classifier(directory, model_type: str = "bert", labels: dict[int, str] | None = LABELS, **settings):
    """An untrained classifier with weights large enough for clear opinions, saved with its tokenizer."""
    labels = labels or {0: "LABEL_0"}
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCAB, id2label=labels, label2id={n: i for i, n in labels.items()}, num_labels=len(labels), pad_token_id=1,
        bos_token_id=None, eos_token_id=0, **SIZES[model_type], **settings,
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
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64)).logits[0]


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


def test_one_output_is_a_raw_score(tmp_path):
    directory = classifier(tmp_path, labels=None)
    found = reward_model(directory).score(TEXTS[:2])
    assert found == pytest.approx([float(alone(directory, text)[0]) for text in TEXTS[:2]], abs=1e-5)


def test_an_empty_response_gets_a_number(tmp_path):
    reward = reward_model(classifier(tmp_path), "positive")
    assert all(0 < value < 1 for value in reward.score(["", "good"]) + reward.score([""]))


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
    assert reward_model(directory, "positive", with_prompt=False)(items, ["good", "bad"]) == reward.score(["good", "bad"])
    assert "positive" in reward.name and reward_model(directory, "positive", name="mine").name == "mine"
    env = TextRLEnv(None, character_tokenizer(), items, max_length=4, reward=reward)
    assert env.reward_function.of_sentences(items, ["a", "b"]) == reward(items, ["a", "b"])


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (None, "this model has 3 labels: say whose probability is the reward with label=; known: negative, neutral, positive"),
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


def test_models_that_are_refused(tmp_path, tiny_bloom):
    for model, told in (
        (tmp_path / "nowhere", "there is no directory"),
        ("nobody/nothing-like-this", "cannot be loaded as a sequence-classification model"),
        (tiny_bloom(seed=1), "is no trained classifier: its checkpoint lacks score.weight"),
        (len, "neither a model's name nor a text-classification pipeline"),
    ):
        with pytest.raises(ModelError) as caught:
            reward_model(model, 0)
        assert told in str(caught.value)
