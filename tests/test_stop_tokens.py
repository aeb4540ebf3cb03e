"""A response ends where transformers' own `generate` ends, wherever that is written, here and in a swarm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, EOS, VOCAB, character_tokenizer, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from textrl_swarm.config import SamplingConfig
from textrl_swarm.errors import ConfigError
from textrl_swarm.learning.learner import Learner
from textrl_swarm.learning.loop import train
from textrl_swarm.learning.rollout import collect
from textrl_swarm.models.texts import stop_ids
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.textrl.actor import TextRLActor
from textrl_swarm.textrl.agent import PPOAgent
from textrl_swarm.textrl.env import TextRLEnv
from textrl_swarm.textrl.evaluation import train_agent_with_evaluation

TOKENIZER = character_tokenizer()
PROMPTS = [[5, 9, 12, 7], [17], [4, 4, 31], [22, 40, 3, 11]]
NEW = 16
GREEDY = SamplingConfig(max_new_tokens=NEW, do_sample=False)


def llama(directory: Path) -> Path:
    """Without a tokenizer, whose own end token would count too."""
    tiny_model("llama").save_pretrained(directory)
    return directory


def with_images(directory: Path) -> Path:
    """A model whose language model has a configuration of its own inside config.json."""
    text = {**CONFIGS["llama"][1], "vocab_size": VOCAB, "head_dim": 8, "pad_token_id": 1}
    vision = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, image_token_index=47, mm_tokens_per_image=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def write(directory: Path, generation: dict | None, **config) -> None:
    """Makes `generation` the generation_config.json (None = none) and changes keys of config.json.

    `text_config` changes keys of the nested configuration.
    """
    path = directory / "generation_config.json"
    path.unlink(missing_ok=True) if generation is None else path.write_text(json.dumps(generation))
    before = json.loads((directory / "config.json").read_text())
    for name, inner in config.items():
        before[name] = {**before[name], **inner} if isinstance(inner, dict) else inner
    (directory / "config.json").write_text(json.dumps(before))


def generated(model, stop: object = None) -> list[list[int]]:
    """transformers' greedy responses, a prompt at a time."""
    options = {} if stop is None else {"eos_token_id": stop}
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=NEW, pad_token_id=1, **options,
        )  # fmt: skip
        rows.append(found[0, len(prompt) :].tolist())
    return rows


def responses(rollout) -> list[list[int]]:
    return [row.response.tolist() for row in rollout.trajectories()]


def chosen_ends(model) -> list[int]:
    """Two ids that cut the greedy responses at different places."""
    first, second = (row for row in generated(model, stop=VOCAB + 1)[:2])
    return [first[2], second[5]]


def rows_of(policy) -> list[list[int]]:
    return responses(policy.generate(PROMPTS, GREEDY))


# ------------------------------------------------------------------------- the same as `generate`

PLACES = {
    "generation_config.json": (llama, lambda ids: ({"eos_token_id": ids}, {})),
    "generation_config.json, one": (llama, lambda ids: ({"eos_token_id": ids[0]}, {})),
    "generation_config.json before config.json": (
        llama,
        lambda ids: ({"eos_token_id": ids}, {"eos_token_id": 44}),
    ),
    "generation_config.json without": (llama, lambda ids: ({"do_sample": False}, {"eos_token_id": ids})),
    "config.json": (llama, lambda ids: (None, {"eos_token_id": ids})),
    "config.json, one": (llama, lambda ids: (None, {"eos_token_id": ids[1]})),
    "config.json, minus one": (llama, lambda ids: ({"eos_token_id": -1}, {})),
    "text_config": (
        with_images, lambda ids: (None, {"eos_token_id": None, "text_config": {"eos_token_id": ids}}),
    ),
    "text_config, one": (
        with_images,
        lambda ids: (None, {"eos_token_id": None, "text_config": {"eos_token_id": ids[0]}}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore")  # transformers on an eos_token_id of -1
def test_responses_end_where_those_of_generate_do(place, tmp_path):
    make, written = PLACES[place]
    directory = make(tmp_path)
    ids = chosen_ends(AutoModelForCausalLM.from_pretrained(directory))
    generation, config = written(ids)
    write(directory, generation, **config)
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = generated(model)
    assert any(len(row) == NEW for row in expected), "some responses are cut"
    with load_policy(directory) as policy:
        assert rows_of(policy) == expected
        assert stop_ids(None, policy.generation_config) == _named(model)
    with load_policy(model) as policy:  # the object
        assert rows_of(policy) == expected


def _named(model) -> set[int]:
    listed = model.generation_config.eos_token_id
    return set(listed if isinstance(listed, list) else [listed]) - {None, -1}


@pytest.mark.parametrize(
    "as_one_of", [list, tuple, torch.tensor, lambda ids: ids[0]], ids=["list", "tuple", "tensor", "int"]
)
def test_the_configuration_of_a_model_object(as_one_of):
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=as_one_of(chosen_ends(model)), pad_token_id=1)
    expected = generated(model)
    assert any(len(row) < NEW for row in expected)
    with load_policy(model, tokenizer=TOKENIZER) as policy:
        assert rows_of(policy) == expected


@pytest.mark.parametrize("eos", ["</s>", ["17"], 3.5, [1, None]])
def test_ends_that_are_no_ids(eos):
    with pytest.raises(ConfigError, match=r"has eos_token_id=.*; write a token id, or a list of token ids"):
        stop_ids(TOKENIZER, GenerationConfig(eos_token_id=eos))


def test_stop_strings_of_a_model_are_single_tokens():
    assert stop_ids(TOKENIZER, GenerationConfig(stop_strings=["b", "<pad>"])) == {0, 1, 4}
    assert stop_ids(TOKENIZER, GenerationConfig(stop_strings="b")) == {0, 4}
    with pytest.raises(ConfigError, match=r"'ab' is not one token: .* splits it into \['a', 'b'\]"):
        stop_ids(TOKENIZER, GenerationConfig(stop_strings=["ab"]))
    with pytest.raises(ConfigError, match="'b' is a text, and there is no tokenizer; give its id"):
        stop_ids(None, GenerationConfig(stop_strings=["b"]))


@pytest.mark.slow  # starts of servers
@pytest.mark.swarm
def test_a_swarm_ends_responses_where_this_machine_does(tiny_bloom, tmp_path):
    directory = tmp_path / "several-ends"
    source = tiny_bloom(seed=7, layers=2)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    ids = [0, 1, *chosen_ends(AutoModelForCausalLM.from_pretrained(directory))]
    sampling = SamplingConfig(max_new_tokens=NEW, num_samples=3, seed=4)
    with LocalSwarm(directory, num_servers=1) as swarm:
        for generation, config in (
            ({"eos_token_id": ids}, {"eos_token_id": 0}),
            (None, {"eos_token_id": ids}),
        ):
            write(directory, generation, **config)
            expected = generated(AutoModelForCausalLM.from_pretrained(directory))
            assert min(map(len, expected)) < NEW
            with (
                load_policy(directory) as local,
                load_policy(directory, swarm.initial_peers, swarm.dht_prefix) as remote,
            ):
                assert local.stop_ids == remote.stop_ids == set(ids)
                assert rows_of(local) == rows_of(remote) == expected
                sampled = [responses(policy.generate(PROMPTS, sampling)) for policy in (local, remote)]
                assert sampled[0] == sampled[1]


# --------------------------------------------------------------------------------- environments

END = 17  # a letter to the tokenizer, an end to the model
UNNAMED = VOCAB - 1  # no token of the tokenizer below


def half_tokenizer():
    """Knows only the first ids of the model's vocabulary."""
    from textrl_swarm.models import tiny

    return tiny._character_tokenizer(UNNAMED)


def policy_ending_at(*ids: int):
    model = tiny_model("llama", eos_token_id=EOS)
    model.generation_config.eos_token_id = list(ids)
    return load_policy(model, tokenizer=half_tokenizer())


def env_of(policy, reward=None, **settings) -> TextRLEnv:
    reward = reward or (lambda items, texts: [float(len(text)) for text in texts])
    return TextRLEnv(None, policy.tokenizer, ["abc", "d"], reward=reward, max_length=24, **settings)


def test_ids_stay_ids():
    """An id without a string became the unknown token, which then ended responses."""
    with policy_ending_at(END, UNNAMED) as policy:
        env = env_of(policy)
        TextRLActor(env, policy, policy.tokenizer)
        assert env.stop_ids == policy.stop_ids == {EOS, END, UNNAMED}
        assert env.gen_stop_toks == ["</s>", policy.tokenizer.convert_ids_to_tokens(END), UNNAMED]


def test_a_learner_gets_the_same_ends_as_an_actor():
    settings = SamplingConfig(max_new_tokens=24, seed=3)
    rollouts = []
    for with_actor in (True, False):
        with policy_ending_at(END, 5, 7) as policy:
            env = env_of(policy, compare_sample=4)
            learner = Learner(policy, sampling=settings)
            if with_actor:
                TextRLActor(env, policy, policy.tokenizer)
            (iteration,) = train(learner, env, iterations=1, prompts_per_iteration=2)
            rollouts.append(iteration.collected.rollout)
            assert env.stop_ids == policy.stop_ids
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens) and rollouts[1].terminated.any()
    last = {row.response[-1].item() for row in rollouts[1].trajectories() if row.terminated}
    assert last - {EOS}


def test_what_the_user_took_out_stays_out():
    with policy_ending_at(END) as policy:
        env = env_of(policy)
        env.gen_stop_toks.clear()  # before any policy: the tokenizer's
        collect(policy, env, 1, SamplingConfig(max_new_tokens=2))
        assert env.stop_ids == {END}
        env.gen_stop_toks.clear()
        collect(policy, env, 1, SamplingConfig(max_new_tokens=2))
        assert env.stop_ids == set()


def test_an_environment_of_evaluations_has_the_models_ends_too(tmp_path):
    with policy_ending_at(END) as policy:
        train_env, eval_env = (env_of(policy, compare_sample=1) for _ in range(2))
        agent = PPOAgent(policy, sampling=SamplingConfig(max_new_tokens=24, seed=0), update_interval=1)
        train_agent_with_evaluation(agent, train_env, 1, None, 1, 1, str(tmp_path), eval_env=eval_env)
        assert train_env.stop_ids == eval_env.stop_ids == {EOS, END}


def test_step_rewards_see_all_of_a_response_whatever_ends_it():
    """The environment's own stop tokens cut what a reward saw of responses that ended at others."""
    asked = []

    def reward(input_item, predicted_list, finish):
        if finish:
            asked.extend(predicted_list)
        return 0.0

    common = list(range(3, 30))
    with policy_ending_at(EOS) as policy:
        env = env_of(policy, reward, compare_sample=4)
        env.gen_stop_toks += common
        collected = collect(policy, env, 2, SamplingConfig(max_new_tokens=12, seed=1, stop_token_ids=(40,)))
    lengths = collected.rollout.response_lengths.tolist()
    assert [len(tokens) for tokens in asked] == lengths and max(lengths) == 12
    assert set(collected.rollout.tokens.flatten().tolist()) & set(common)
    assert env.stop_ids == {EOS, *common}


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("<|im_end|>", r"stop token '<\|im_end\|>' is not one token: the tokenizer splits it into \['<unk>'"),
        ("ab", r"'ab' is not one token: the tokenizer splits it into \['a', 'b'\]; give one known token"),
        ("é", r"'é' is not one token: .*\['<unk>'\]"),
        ("", r"'' is not one token: .*\[\]"),
        (3.5, "a stop token is a token's string or id, got 3.5"),
        (None, "a stop token is a token's string or id, got None"),
    ],
    ids=repr,
)
def test_what_is_no_stop_token(stop, message):
    with policy_ending_at(EOS) as policy:
        env = env_of(policy)
        env.gen_stop_toks.append(stop)
        for use in (
            lambda: TextRLActor(env_of(policy), policy).env.gen_stop_toks.append(stop) or env.stop_ids,
            lambda: collect(policy, env, 1, SamplingConfig(max_new_tokens=2)),
            lambda: TextRLActor(env, policy, policy.tokenizer).predict("a"),
            lambda: env.step([3, 3]),
        ):
            with pytest.raises(ConfigError, match=message):
                use()


def test_a_stop_token_may_be_given_by_its_text():
    """Byte-level tokenizers write a line break as another character."""
    from test_texts import byte_level

    tokenizer = byte_level()
    env = TextRLEnv(None, tokenizer, ["a"], reward=lambda items, texts: [0.0] * len(texts))
    env.gen_stop_toks.append("\n")
    assert (
        env.stop_ids == {0, *tokenizer("\n")["input_ids"]} and tokenizer.convert_tokens_to_ids("\n") is None
    )
    env.gen_stop_toks.append(tokenizer.eos_token_id)
    assert len(env.stop_ids) == 2
