"""The tiny models: loadable by plain transformers, repeatable, whole or absent, and (slow) able to speak."""

import collections
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from textrl_swarm.errors import ConfigError, ModelError
from textrl_swarm.models import corpus, tiny


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def logits(directory):
    model, _ = load(directory)
    return model(input_ids=torch.arange(20)[None]).logits


# random_bloom


def test_random_bloom_repeats_per_seed_and_differs_between_seeds(tmp_path):
    first, again, other = (
        logits(tiny.random_bloom(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.shape == (1, 20, 128)
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.1


def test_random_bloom_sizes(tmp_path):
    model, tokenizer = load(tiny.random_bloom(tmp_path / "model", layers=2, hidden=24, heads=3, vocab=300))
    assert (model.config.n_layer, model.config.hidden_size, model.config.n_head) == (2, 24, 3)
    assert len(tokenizer) == model.config.vocab_size == 300


def test_every_vector_of_random_bloom_matters(tmp_path):
    for name, weight in load_file(tiny.random_bloom(tmp_path / "model") / "model.safetensors").items():
        assert weight.std() > 0.1, name


def test_both_key_styles_hold_the_same_model(tmp_path):
    long, short = tiny.random_bloom(tmp_path / "long"), tiny.random_bloom(tmp_path / "short", prefix="h")
    assert "transformer.h.0.mlp.dense_h_to_4h.weight" in load_file(long / "model.safetensors")
    assert "h.0.mlp.dense_h_to_4h.weight" in load_file(short / "model.safetensors")
    assert torch.equal(logits(long), logits(short))


def test_no_weight_is_missing_or_left_over(tmp_path):
    for prefix in ("transformer.h", "h"):
        directory = tiny.random_bloom(tmp_path / prefix, prefix=prefix)
        _, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_character_tokenizer_round_trips(tmp_path):
    _, tokenizer = load(tiny.random_bloom(tmp_path / "model"))
    text = "Hello,  World! 3 + 4 = 7\n\n(it's {fine})"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text)
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.bos_token_id is None


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.random_bloom(tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"prefix": "blocks"}, 'prefix must be "transformer.h" or "h"'),
        ({"hidden": 30, "heads": 4}, "hidden a multiple of heads"),
        ({"layers": 0}, "layers >= 1"),
        ({"vocab": 8}, "vocab >= 40"),
    ],
)
def test_random_bloom_refuses(tmp_path, bad, message):
    with pytest.raises(ConfigError, match=message):
        tiny.random_bloom(tmp_path / "model", **bad)
    assert list(tmp_path.iterdir()) == []


# Opinions and the corpus


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The soup is warm and delicious. I would order it again.", 1.0),
        ("The soup was cold and I did not like it.", 0.0),
        ("The soup is delicious, and I think it is stale too.", 0.5),
        ("Great! GREAT, lovely. Awful", 0.75),
        ("The soup is on the table.", 0.5),
        ("goodness, a badger", 0.5),  # whole words only
        ("", 0.5),
    ],
)
def test_opinion_by_hand(text, expected):
    assert corpus.opinion(text) == expected


def test_the_corpus_is_balanced_for_every_beginning():
    counts = collections.defaultdict(collections.Counter)
    for text in corpus.build_corpus():
        beginning = re.match(r".*? (is|was)\b", text)[0]
        counts[beginning][corpus.opinion(text)] += 1
    assert len(counts) == 4 * 3 * 8 * 2  # topics, determiners, things, tenses
    assert all(count == {1.0: 10, 0.0: 10} for count in counts.values())
    assert set(corpus.DEMO_PROMPTS) <= set(counts)


def test_the_corpus_is_repeatable_and_varied():
    texts = corpus.build_corpus(3)
    assert texts == corpus.build_corpus(3) != corpus.build_corpus(4)
    assert len(set(texts)) > 0.95 * len(texts) > 2000
    assert not [text for text in texts if "{" in text or "  " in text or not text.endswith(".")]


def test_opinion_words_are_on_one_side_and_not_in_prompts():
    assert not corpus.GOOD_WORDS & corpus.BAD_WORDS
    assert {corpus.opinion(prompt) for prompt in corpus.DEMO_PROMPTS} == {0.5}
    assert len(set(corpus.DEMO_PROMPTS)) == 16


# make_tiny_bloom


def test_a_short_time_limit_still_makes_a_whole_model(tmp_path, caplog):
    progress = []
    directory = tiny.make_tiny_bloom(
        tmp_path / "tiny", time_limit_s=0.01, on_progress=lambda *report: progress.append(report)
    )
    assert "pretraining cut" in caplog.text and "of 1200" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert progress[-1][0] == 1.0
    model, tokenizer = load(directory)
    assert model.config.vocab_size == len(tokenizer) <= 1000
    assert (
        model.config.eos_token_id
        == tokenizer.eos_token_id
        != tokenizer.pad_token_id
        == model.config.pad_token_id
    )
    assert "transformer.h.0.mlp.dense_h_to_4h.weight" in load_file(directory / "model.safetensors")
    for text in ("The soup is warm.", "naïve 汤, \n\t two  spaces"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_finished_model_is_reused_and_another_seed_replaces_it(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.RECIPE, "steps", 3)
    directory = tmp_path / "tiny"

    def weights(seed):
        tiny.make_tiny_bloom(directory, seed=seed)
        return directory.joinpath("model.safetensors")

    first = weights(0)
    content, made = first.read_bytes(), first.stat().st_mtime_ns
    assert weights(0).stat().st_mtime_ns == made
    assert weights(1).read_bytes() != content
    assert weights(0).read_bytes() == content  # made anew, and the same
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_model_cut_by_time_is_reused_unless_more_time_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.RECIPE, "steps", 60)

    def steps_done(time_limit_s):
        directory = tiny.make_tiny_bloom(tmp_path / "tiny", time_limit_s=time_limit_s)
        return json.loads((directory / tiny.RECORD).read_text())["steps_done"]

    assert steps_done(0.001) == steps_done(0.001) == 1
    assert steps_done(60) == steps_done(0.001) == 60


def test_an_interrupted_pretraining_leaves_nothing(tmp_path):
    def interrupt(fraction, loss):
        assert not (tmp_path / "tiny").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.make_tiny_bloom(tmp_path / "tiny", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing_and_keeps_the_old_model(tmp_path, monkeypatch):
    tiny.random_bloom(tmp_path / "tiny")
    before = logits(tmp_path / "tiny")

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(tiny.PreTrainedTokenizerFast, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        tiny.random_bloom(tmp_path / "tiny", seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert torch.equal(logits(tmp_path / "tiny"), before)


def test_other_peoples_files_are_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for make in (tiny.make_tiny_bloom, tiny.random_bloom):
        with pytest.raises(ModelError, match="holds something other than a tiny model"):
            make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_impossible_time_limit_is_refused(tmp_path):
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="time_limit_s must be > 0"):
            tiny.make_tiny_bloom(tmp_path / "tiny", time_limit_s=bad)


def skeleton(text):
    """What is left of a text without its thing, adjectives and adverbs: the same for texts of one shape."""
    text = re.sub(r"^.*? (is|was)\b", r"\1", text)
    text = re.sub("|".join(corpus.ADVERBS), "ADVERB", text)
    return re.sub(r"\b(" + "|".join(corpus.GOOD_WORDS | corpus.BAD_WORDS) + r")\b", "ADJECTIVE", text)


@pytest.mark.slow
def test_the_pretrained_model_speaks_and_has_no_opinion_of_its_own(tmp_path):
    directory = tiny.make_tiny_bloom(tmp_path / "tiny", time_limit_s=300.0)
    record = json.loads((directory / tiny.RECORD).read_text())
    assert record["steps_done"] == record["settings"]["steps"]
    assert record["loss"] < 1.1  # nats per token; chance is log(619) = 6.4

    model, tokenizer = load(directory)
    torch.manual_seed(0)
    texts, ended = [], 0
    for prompt in corpus.DEMO_PROMPTS:
        ids = tokenizer([prompt] * 32, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        rows = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=24
        )
        ended += (rows[:, ids.shape[1] :] == tokenizer.eos_token_id).any(dim=1).sum().item()
        said = tokenizer.batch_decode(rows, skip_special_tokens=True)
        assert {0.0, 1.0} <= set(map(corpus.opinion, said)), prompt  # there is something to choose between
        texts += said
    opinions = [corpus.opinion(text) for text in texts]
    assert 0.35 < sum(opinions) / len(opinions) < 0.65  # 512 samples: a standard error of 0.02
    assert ended > 0.95 * len(texts)
    shapes = {skeleton(text) for text in corpus.build_corpus()}
    assert sum(skeleton(text) in shapes for text in texts) > 0.9 * len(texts)
