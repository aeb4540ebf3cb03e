"""The agent in others' loops (TextRL's, pfrl's), its episodes, what it saves; and the actor that makes it."""

from __future__ import annotations

import collections
import math
import pickle
from contextlib import contextmanager

import numpy as np
import pfrl
import pytest
import torch
from architectures import VOCAB, character_tokenizer, tiny_model
from pfrl.experiments import train_agent_with_evaluation as pfrl_train_agent_with_evaluation
from pfrl.experiments.evaluator import Evaluator
from plain_peft import fill
from torch import Tensor

from textrl_swarm.config import LoraSettings, SamplingConfig
from textrl_swarm.errors import AdapterError, ConfigError, PromptError, RewardError
from textrl_swarm.learning.rollout import collect, per_token_rewards, sample_responses
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.textrl.actor import TextRLActor
from textrl_swarm.textrl.agent import PPOAgent
from textrl_swarm.textrl.env import TextRLEnv

PROMPTS = [{"input": "the soup"}, {"input": "a"}, {"input": "my coffee was"}]
LENGTH = 6


class Vowels(TextRLEnv):
    """Counts calls; pays for vowels, some of it per token."""

    calls = 0

    def get_reward(self, input_item, predicted_list, finish):
        self.calls += 1
        return [float(tokens[-1] in "aeiou") + 2.0 * finish * ("e" in tokens) for tokens in predicted_list]


def make_actor(
    cls=Vowels,
    architecture: str = "gpt2",
    samples: int = 2,
    often_ending: bool = False,
    max_length: int = LENGTH,
    **settings,
) -> TextRLActor:
    """On a Hugging Face model object; `often_ending` makes a common token the end token."""
    tokenizer = character_tokenizer()
    policy = load_policy(tiny_model(architecture), lora=LoraSettings(r=2), tokenizer=tokenizer)
    if often_ending:
        free = policy.generate(
            [p["input"] for p in PROMPTS], SamplingConfig(max_new_tokens=LENGTH, num_samples=16, seed=0)
        )
        (token, _), *_ = collections.Counter(
            free.tokens[:, -LENGTH:][free.tokens[:, -LENGTH:] > 2].tolist()
        ).most_common(1)
        tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(token)})
    env = cls(None, tokenizer, PROMPTS, max_length=max_length, compare_sample=samples)
    return TextRLActor(env, policy, tokenizer, **settings)


def play(agent: PPOAgent, env: TextRLEnv, episodes: int, max_episode_len: int = LENGTH) -> list[float]:
    """The loop of TextRL's README; scores of the episodes."""
    scores = []
    for _ in range(episodes):
        obs = env.reset()
        R = 0
        t = 0
        while True:
            action = agent.act(obs)
            obs, reward, done, pred = env.step(action)
            assert len(pred["predicted_str"]) == env.compare_sample
            R += reward
            t += 1
            reset = t == max_episode_len
            agent.observe(obs, reward, done, reset)
            if done or reset:
                break
        scores.append(R)
    return scores


def parameters_of(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def learned_from(agent: PPOAgent, monkeypatch) -> list[tuple]:
    """Every (rollout, rewards) that the agent learns from, from now on."""
    learn, seen = agent.learn, []
    monkeypatch.setattr(
        agent, "learn", lambda rollout, rewards: seen.append((rollout, rewards)) or learn(rollout, rewards)
    )
    return seen


def rollout_of(actor: TextRLActor) -> tuple:
    collected = collect(actor.policy, actor.env, 2, actor.sampling)
    return collected.rollout, collected.rewards


# --------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_the_loop_of_the_readme_trains(samples):
    actor = make_actor(samples=samples)
    agent = actor.agent_ppo(update_interval=10, minibatch_size=2000, epochs=20)
    before = parameters_of(agent.policy)
    scores = play(agent, actor.env, 4)
    assert all(type(score) is float for score in scores)
    assert agent.ppo.num_updates >= 1
    assert agent.ppo.num_steps == 20 * agent.ppo.num_updates  # one minibatch holds all, and nothing twice
    assert not same(parameters_of(agent.policy), before)


def test_an_update_waits_for_the_end_of_an_episode():
    actor = make_actor()
    agent, env = actor.agent_ppo(update_interval=2 * LENGTH + 1, epochs=1), actor.env
    collected, updates = 0, 0
    for _ in range(7):
        obs = env.reset()
        done = False
        while not done:
            assert agent.ppo.num_updates == updates
            obs, reward, done, _ = env.step(agent.act(obs))
            collected += 1
            agent.observe(obs, reward, done, False)
        if collected >= 2 * LENGTH + 1:
            collected, updates = 0, updates + 1
        assert agent.ppo.num_updates == updates
    assert updates >= 2


@pytest.mark.parametrize("samples", [1, 3])
def test_what_is_learned_from_is_what_was_chosen_and_earned(monkeypatch, samples):
    actor = make_actor(samples=samples, often_ending=True, temperature=0.9)
    fill(actor.policy, 1)
    agent, env = actor.agent_ppo(update_interval=1000, epochs=1), actor.env
    items, earned = [], []
    for _ in range(8):
        obs, done = env.reset(), False
        while not done:
            obs, reward, done, _ = env.step(agent.act(obs))
            agent.observe(obs, reward, done, False)
        items.append(env.input_item)
        earned.append([(env._prompt_ids + ids) for ids in env.predicted_ids])
    seen = learned_from(agent, monkeypatch)
    agent.update_interval = 1
    play(agent, env, 1)
    rollout, rewards = seen[0]
    count = 8 * samples
    lengths = (rollout.prompt_lengths + rollout.response_lengths).tolist()
    assert [row[:n].tolist() for row, n in zip(rollout.tokens[:count], lengths, strict=False)] == [
        row for rows in earned for row in rows
    ]
    assert len(set(rollout.response_lengths.tolist())) > 2  # samples did end at different times
    assert 0 < int(rollout.terminated.sum()) < len(rollout)
    last = rollout.tokens[torch.arange(len(rollout)), torch.tensor(lengths) - 1]
    assert torch.equal(rollout.terminated, last == env.tokenizer.eos_token_id)
    items.append(env.input_item)
    expected, _ = per_token_rewards(env, items, rollout)  # rewards of whole rollouts, tested in test_env
    assert torch.allclose(rewards, expected)


def test_the_chosen_tokens_scores_and_values_are_those_of_a_plain_forward(monkeypatch):
    actor = make_actor(often_ending=True, temperature=0.7, top_k=8, repetition_penalty=1.3)
    fill(actor.policy, 1)
    agent = actor.agent_ppo(update_interval=30, epochs=1, lr=1e-9)
    seen = learned_from(agent, monkeypatch)
    while not seen:
        play(agent, actor.env, 1)
    (rollout, _), *_ = seen
    with torch.no_grad():
        out = agent.policy(rollout.tokens)
    for row, (p, n) in enumerate(
        zip(rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist(), strict=True)
    ):
        logprobs = (
            (out.logits[row, p - 1 : p + n - 1] / 0.7)
            .log_softmax(-1)
            .gather(1, rollout.tokens[row, p : p + n, None])[:, 0]
        )
        assert torch.allclose(rollout.old_logprobs[row, :n], logprobs, atol=1e-4)
        assert torch.allclose(rollout.values[row, :n], out.values[row, p - 1 : p + n - 1], atol=1e-4)
    assert agent.metrics["ratio_first_pass_max_deviation"] < 1e-4
    assert abs(agent.metrics["sampler_kl"]) < 1e-4


def test_an_episode_that_was_cut_short_did_not_terminate(monkeypatch):
    actor = make_actor()
    agent = actor.agent_ppo(update_interval=1, epochs=1)
    seen = learned_from(agent, monkeypatch)
    play(agent, actor.env, 3, max_episode_len=2)
    for rollout, rewards in seen:
        assert rollout.response_mask.shape == rewards.shape and rewards.shape[1] <= 2
        full = rollout.response_lengths == 2
        ended = (
            rollout.tokens.gather(
                1, (rollout.prompt_lengths + 1)[:, None].clamp(max=rollout.tokens.shape[1] - 1)
            )[:, 0]
            == 0
        )
        assert torch.equal(rollout.terminated[full], ended[full])
    assert len(seen) == 3


def count_sessions(policy: Policy, monkeypatch) -> list[dict]:
    """Every session of the policy from now on: its rows, the tokens stepped per row, whether it is over."""
    make, sessions = policy.session, []

    @contextmanager
    def session(rows, max_length):
        with make(rows, max_length) as inner:
            record = {"rows": rows, "reserved": max_length, "tokens": 0, "closed": False}
            sessions.append(record)

            class Counted:
                def step(self, tokens):
                    record["tokens"] += tokens.shape[1]
                    return inner.step(tokens)

            yield Counted()
            record["closed"] = True

    monkeypatch.setattr(policy, "session", session)
    return sessions


def test_one_session_per_episode_and_each_token_goes_through_it_once(monkeypatch):
    actor = make_actor(samples=3, often_ending=True)
    agent, env = actor.agent_ppo(update_interval=1000), actor.env
    sessions = count_sessions(agent.policy, monkeypatch)
    for episode in range(6):
        obs, done, steps = env.reset(), False, 0
        while not done:
            obs, reward, done, _ = env.step(agent.act(obs))
            steps += 1
            agent.observe(obs, reward, done, False)
        assert len(sessions) == episode + 1
        prompt = len(env._prompt_ids)
        # the last token chosen ends the episode and is never fed
        assert sessions[-1] == {
            "rows": 3,
            "reserved": prompt + LENGTH,
            "tokens": prompt + steps - 1,
            "closed": True,
        }


def test_an_episode_that_was_left_is_forgotten(monkeypatch):
    actor = make_actor()
    agent, env = actor.agent_ppo(update_interval=1, epochs=1), actor.env
    sessions, seen = count_sessions(agent.policy, monkeypatch), learned_from(agent, monkeypatch)
    obs = env.reset(PROMPTS[0])
    for _ in range(2):
        obs, *_ = env.step(agent.act(obs))
    obs = env.reset(PROMPTS[2])
    for _ in range(2):
        obs, reward, *_ = env.step(agent.act(obs))
        agent.observe(obs, reward, False, False)
    agent.observe(*env.step(agent.act(obs))[:2], False, True)
    assert [session["closed"] for session in sessions] == [True, True]
    ((rollout, _),) = seen
    assert (
        rollout.prompt_lengths.tolist() == [len(env._prompt_ids)] * 2 and rollout.response_mask.shape[1] == 3
    )


@pytest.mark.parametrize("act_deterministically", [True, False])
def test_evaluation_inside_a_training_episode_does_not_disturb_it(monkeypatch, act_deterministically):
    def learned(evaluate: bool) -> tuple[list, dict]:
        actor = make_actor(often_ending=True, act_deterministically=act_deterministically)
        agent, env = actor.agent_ppo(update_interval=12, epochs=2, lr=1e-2), actor.env
        other = Vowels(None, env.tokenizer, PROMPTS, max_length=LENGTH, compare_sample=2)
        seen = learned_from(agent, monkeypatch)
        for _ in range(5):
            obs, done = env.reset(), False
            while not done:
                obs, reward, done, _ = env.step(agent.act(obs))
                if evaluate:
                    with agent.eval_mode():
                        play(agent, other, 1)
                agent.observe(obs, reward, done, False)
        return seen, parameters_of(agent.policy)

    (plain, parameters), (disturbed, other_parameters) = learned(False), learned(True)
    assert len(plain) == len(disturbed) >= 1
    for (rollout, rewards), (other_rollout, other_rewards) in zip(plain, disturbed, strict=True):
        assert torch.equal(rollout.tokens, other_rollout.tokens) and torch.equal(rewards, other_rewards)
    assert same(other_parameters, parameters)


def test_evaluation_takes_the_most_likely_token_or_samples(monkeypatch):
    def chosen(act_deterministically: bool) -> set[tuple]:
        actor = make_actor(samples=4, act_deterministically=act_deterministically)
        agent = actor.agent_ppo()
        with agent.eval_mode():
            return {tuple(agent.act(actor.env.reset(PROMPTS[1])).tolist()) for _ in range(4)}

    ((first, *others),) = chosen(True)
    assert all(token == first for token in others)
    assert len(chosen(False)) > 1


def test_misuse_is_told():
    actor = make_actor()
    agent = actor.agent_ppo()
    with pytest.raises(ConfigError, match=r"observe\(\) without act\(\)"):
        agent.observe([[5], [5]], [0, 0], True, False)
    with pytest.raises(ConfigError, match="same prompt for every sample"):
        agent.act([[5, 6], [5, 7]])
    with pytest.raises(ConfigError, match="update_interval must be >= 1"):
        actor.agent_ppo(update_interval=0)


# --------------------------------------------------------------------------------------- files and statistics


def test_save_and_load_go_on_where_it_was(tmp_path, monkeypatch):
    def agent_and_env():
        actor = make_actor()
        return actor.agent_ppo(update_interval=1, epochs=2, lr=1e-2), actor.env

    agent, env = agent_and_env()
    play(agent, env, 2)
    agent.save(str(tmp_path / "saved"))
    again, _ = agent_and_env()
    again.load(str(tmp_path / "saved"))
    assert same(parameters_of(again.policy), parameters_of(agent.policy))
    assert (again.ppo.num_updates, again.ppo.num_steps) == (2, 4)
    seen = learned_from(agent, monkeypatch)
    play(agent, env, 1)
    again.learn(*seen[0])
    assert same(parameters_of(again.policy), parameters_of(agent.policy))


def test_an_adapter_alone_is_enough_to_load(tmp_path):
    actor = make_actor()
    fill(actor.policy, 3)
    actor.policy.save_adapter(tmp_path)
    agent = make_actor().agent_ppo()
    agent.load(str(tmp_path))
    assert same(parameters_of(agent.policy), parameters_of(actor.policy))


def test_loading_what_is_not_there_lists_what_is(tmp_path):
    agent = make_actor().agent_ppo()
    with pytest.raises(AdapterError, match=rf"no checkpoint .*best; {tmp_path} has no checkpoints"):
        agent.load(str(tmp_path / "best"))
    agent.save(str(tmp_path / "20_finish"))
    agent.save(str(tmp_path / "10_checkpoint"))
    (tmp_path / "other").mkdir()
    with pytest.raises(AdapterError, match=r"has 10_checkpoint, 20_finish$"):
        agent.load(str(tmp_path / "best"))


def test_statistics_have_pfrls_names_first():
    actor = make_actor()
    agent = actor.agent_ppo(update_interval=1, epochs=3)
    assert [name for name, _ in agent.get_statistics()] == [
        "average_value", "average_entropy", "average_value_loss", "average_policy_loss",
        "n_updates", "explained_variance", "kl", "clip_fraction", "score",
    ]  # fmt: skip
    before = dict(agent.get_statistics())
    assert before["n_updates"] == 0 and math.isnan(before["score"])
    play(agent, actor.env, 1)
    after = dict(agent.get_statistics())
    assert after["n_updates"] == 3
    assert all(math.isfinite(value) for value in after.values())


# ------------------------------------------------------------------------------------------- pfrl's own loops


def test_pfrls_training_loop_and_evaluator(tmp_path):
    actor = make_actor(samples=1)
    agent = actor.agent_ppo(update_interval=8, epochs=2, lr=1e-2)
    before = parameters_of(agent.policy)
    pfrl_train_agent_with_evaluation(
        agent, actor.env, steps=40, outdir=str(tmp_path), train_max_episode_len=LENGTH,
        eval_n_steps=None, eval_n_episodes=2, eval_interval=10,
    )  # fmt: skip
    assert agent.ppo.num_updates >= 2 and not same(parameters_of(agent.policy), before)
    header, *rows = (tmp_path / "scores.txt").read_text().splitlines()
    assert header.split("\t")[:4] == ["steps", "episodes", "elapsed", "mean"] and len(rows) >= 2
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "40_finish" / "adapter_model.safetensors").is_file()
    evaluator = Evaluator(
        agent, actor.env, n_steps=5, n_episodes=None, eval_interval=1, outdir=str(tmp_path / "best")
    )
    assert math.isfinite(evaluator.evaluate_and_update_max_score(t=0, episodes=0))


# -------------------------------------------------------------------------------------------------- the actor


@pytest.mark.parametrize(
    "prompt",
    ["the soup", {"input": "the soup", "more": 1}, ["the soup", "a reference"]],
    ids=["str", "dict", "list"],
)
@pytest.mark.parametrize("samples", [1, 3])
def test_predict_says_something_and_asks_for_no_reward(prompt, samples):
    actor = make_actor(samples=samples)
    before = actor.predict(prompt)
    agent = actor.agent_ppo(update_interval=1, epochs=1)
    obs = actor.env.reset()
    obs, reward, done, _ = actor.env.step(agent.act(obs))
    calls, episode = actor.env.calls, [list(ids) for ids in actor.env.predicted_ids]
    assert actor.predict(prompt) == before  # greedy, and nothing was trained yet
    assert actor.env.calls == calls and actor.env.predicted_ids == episode
    agent.observe(obs, reward, done, False)
    assert len(before) == samples and len(set(before)) == 1 and all(type(text) is str for text in before)


def test_predict_samples_anew_unless_deterministic():
    actor = make_actor(samples=4, act_deterministically=False)
    assert len({*actor.predict("the soup"), *actor.predict("the soup")}) > 4


def test_settings_of_the_update():
    actor = make_actor(samples=3, seed=4)
    config = actor.agent_ppo(
        minibatch_size=5 * LENGTH + 1, epochs=7, lr=2e-3, gamma=0.9, kl_coef=0.1
    ).ppo.config
    assert (config.minibatch_size, config.epochs, config.lr, config.gamma, config.kl_coef, config.seed) == (
        15,
        7,
        2e-3,
        0.9,
        0.1,
        4,
    )
    # Never less than the samples of a prompt.
    assert actor.agent_ppo(minibatch_size=1).ppo.config.minibatch_size == 3
    agent = actor.agent_ppo(update_interval=5, minibatch_size=3)
    assert (agent.update_interval, agent.sampling.max_new_tokens) == (5, LENGTH)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda a: a.agent_ppo(gama=0.9), "unknown setting 'gama' of PPOConfig; did you mean 'gamma'"),
        (lambda a: a.agent_ppo(kl_coeff=1), "did you mean 'kl_coef'"),
        (lambda a: a.agent_ppo(minibatch_size=0), "minibatch_size must be a whole number >= 1"),
        (lambda a: a.agent_ppo(lr=-1), "lr must be > 0"),
        (
            lambda a: TextRLActor(a.env, a.policy, compare_sample=3),
            "compare_sample=3, but the environment was made with 2",
        ),
        (
            lambda a: TextRLActor(a.env, a.policy, optimizer="sdg"),
            "unknown optimizer 'sdg'; did you mean 'sgd'",
        ),
        (lambda a: TextRLActor(a.env, "m", lora=LoraSettings(), unfreeze_layer_from_past=1), "not both"),
        (lambda a: TextRLActor(a.env, a.policy, top_p=2), "top_p must be in"),
    ],
)
def test_wrong_settings_are_told(make, told):
    with pytest.raises(ConfigError, match=told):
        make(make_actor())


def test_optimizers():
    assert type(make_actor().agent_ppo().ppo.optimizer) is torch.optim.AdamW
    sgd = make_actor(optimizer="sgd").agent_ppo(lr=0.5).ppo.optimizer
    assert type(sgd) is torch.optim.SGD and sgd.defaults["lr"] == 0.5
    actor = make_actor(optimizer=lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3))
    agent = actor.agent_ppo(update_interval=1, epochs=1)
    before = parameters_of(agent.policy)
    play(agent, actor.env, 1)
    assert type(agent.ppo.optimizer) is torch.optim.RMSprop and not same(parameters_of(agent.policy), before)


@pytest.mark.parametrize("where", ["env", "actor"])
def test_unfreezing_the_last_blocks_is_lora_on_them(where):
    tokenizer = character_tokenizer()
    env = Vowels(
        None, tokenizer, PROMPTS, max_length=LENGTH, unfreeze_layer_from_past=2 if where == "env" else 0
    )
    actor = TextRLActor(
        env, tiny_model("gpt2"), tokenizer, unfreeze_layer_from_past=2 if where == "actor" else 0
    )
    blocks = {name.split(".h.")[1].split(".")[0] for name in actor.policy.adapter_parameters()}
    assert blocks == {"1", "2"}  # of three


def test_a_hugging_face_gpt2_object(tmp_path):
    """README's second step: a model and a tokenizer that the user loaded."""
    model, tokenizer = tiny_model("gpt2"), character_tokenizer()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    env = Vowels(model, tokenizer, observation_input=PROMPTS, max_length=LENGTH, compare_sample=2)
    actor = TextRLActor(
        env,
        model,
        tokenizer,
        act_deterministically=False,
        temperature=1.0,
        top_k=10,
        top_p=1.0,
        repetition_penalty=2.0,
    )
    agent = actor.agent_ppo(update_interval=2, minibatch_size=2, epochs=10)
    play(agent, env, 2)
    assert agent.ppo.num_updates == 2 and agent.ppo.num_skipped == 0
    assert len(actor.predict(PROMPTS[0])) == 2
    agent.save(str(tmp_path))
    actor.policy.close()
    assert same(model.state_dict(), weights)


@pytest.mark.swarm
def test_a_distributed_bloom_object(two_servers):
    """README's third example: the model that petals gives."""
    from petals import DistributedBloomForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(two_servers.model)
    model = DistributedBloomForCausalLM.from_pretrained(
        str(two_servers.model),
        initial_peers=two_servers.initial_peers,
        dht_prefix=two_servers.dht_prefix,
        show_route=False,
    )
    assert tokenizer.vocab_size > VOCAB
    env = Vowels(model, tokenizer, observation_input=PROMPTS, max_length=LENGTH, compare_sample=2)
    actor = TextRLActor(env, model, tokenizer, top_k=10, repetition_penalty=2.0)
    local = TextRLActor(env, str(two_servers.model), tokenizer)
    try:
        assert actor.predict("the soup") == TextRLActor(env, local.policy, repetition_penalty=2.0).predict(
            "the soup"
        )
        agent = actor.agent_ppo(update_interval=2, minibatch_size=2, epochs=2)
        before = parameters_of(agent.policy)
        play(agent, env, 2)
        assert agent.ppo.num_updates == 2 and agent.ppo.num_skipped == 0
        assert not [
            name for name, tensor in parameters_of(agent.policy).items() if torch.equal(tensor, before[name])
        ]
    finally:
        actor.policy.close()
        shut_down(model.transformer.h.sequence_manager)


def shut_down(manager) -> None:
    """The user's own petals model outlives the policy."""
    from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker

    RemoteExpertWorker.run_coroutine(manager.state.p2p.shutdown())
    manager.dht.shutdown()
    manager.dht.join()


# ------------------------------------------------------------------------- several environments, cut episodes


def test_several_environments_at_once(monkeypatch):
    """pfrl's BatchAgent: every environment has its own episodes, and an update waits for the end of one."""
    actor = make_actor(samples=2, often_ending=True)
    agent = actor.agent_ppo(update_interval=12, epochs=1)
    fill(agent.policy, 1)
    envs = [actor.env, make_actor(samples=2, often_ending=True).env]
    seen, played, used = learned_from(agent, monkeypatch), [], []
    obs = [env.reset(prompt) for env, prompt in zip(envs, PROMPTS, strict=False)]
    while not seen:
        steps = [env.step(action) for env, action in zip(envs, agent.batch_act(obs), strict=True)]
        obs, rewards, dones, _ = zip(*steps, strict=True)
        played += [row for env, done in zip(envs, dones, strict=True) if done for row in env._observation()]
        used += [len(env.predicted_ids[0]) for env, done in zip(envs, dones, strict=True) if done]
        agent.batch_observe(obs, rewards, dones, [False, False])
        obs = [env.reset() if done else o for env, o, done in zip(envs, obs, dones, strict=True)]
    ((rollout, _),) = seen
    lengths = (rollout.prompt_lengths + rollout.response_lengths).tolist()
    assert [row[:n].tolist() for row, n in zip(rollout.tokens, lengths, strict=True)] == played
    assert sum(used) >= 12 > 0 and len({tuple(row[:3]) for row in played}) > 1


def test_an_episode_that_is_cut_short_gets_its_final_reward(monkeypatch):
    """TextRL gave none when max_episode_len came before max_length: finish was never True."""
    actor = make_actor(samples=2)
    agent, env = actor.agent_ppo(update_interval=1, epochs=1), actor.env
    monkeypatch.setattr(
        env, "get_reward", lambda item, predicted, finish: [len(p) if finish else 100 for p in predicted]
    )
    seen = learned_from(agent, monkeypatch)
    obs = env.reset()
    for t in range(3):
        obs, reward, done, _ = env.step(agent.act(obs))
        assert not done, "ended by itself: choose another seed"
        agent.observe(obs, reward, done, t == 2)
    ((rollout, rewards),) = seen
    assert rewards.tolist() == [[100.0, 100.0, 3.0]] * 2
    assert not rollout.terminated.any()


def test_an_episode_of_any_environment_that_is_cut_short_gets_that_ones_final_reward(monkeypatch):
    """Not that of the environment the actor was made with."""
    agent, other = make_actor(samples=2).agent_ppo(update_interval=1, epochs=1), make_actor(samples=2).env
    monkeypatch.setattr(other, "get_reward", lambda item, predicted, finish: [7.0 * finish, 8.0 * finish])
    seen = learned_from(agent, monkeypatch)
    obs = other.reset()
    obs, reward, done, _ = other.step(agent.act(obs))
    agent.observe(obs, reward, done, True)
    assert seen[0][1].tolist() == [[7.0], [8.0]]


def test_observations_that_know_no_environment_keep_what_was_earned(monkeypatch):
    """Those that came from another process, or that a wrapper has changed."""
    actor = make_actor(samples=1)
    agent, env = actor.agent_ppo(update_interval=1, epochs=1), actor.env
    seen = learned_from(agent, monkeypatch)
    for known in (pickle.loads(pickle.dumps(env.reset())), list(env.reset())):
        obs, _, _, _ = env.step(agent.act(known))
        agent.observe(
            type(known)(obs) if type(known) is list else pickle.loads(pickle.dumps(obs)), 5.0, False, True
        )
    assert [rewards.tolist() for _, rewards in seen] == [[[5.0]], [[5.0]]]


def test_an_episode_longer_than_its_session_is_an_error_that_says_so():
    actor = make_actor(samples=1)
    agent, env = PPOAgent(actor.policy, sampling=SamplingConfig(max_new_tokens=2)), actor.env
    obs = env.reset()
    for _ in range(2):
        obs, reward, done, _ = env.step(agent.act(list(obs)))
        assert not done
        agent.observe(obs, reward, done, False)
    with pytest.raises(ConfigError, match=r"continues after 2 tokens.*SamplingConfig\(max_new_tokens"):
        agent.act(list(obs))


def test_an_environment_may_have_longer_episodes_than_the_one_the_actor_was_made_with():
    actor = make_actor(samples=1, max_length=2)
    agent, other = actor.agent_ppo(), make_actor(samples=1, max_length=5).env
    other.gen_stop_toks.clear()
    obs, done, steps = other.reset(), False, 0
    with agent.eval_mode():
        while not done:
            obs, reward, done, _ = other.step(agent.act(obs))
            agent.observe(obs, reward, done, False)
            steps += 1
    assert steps == 5
    actor.env.env_max_length = 4
    actor.env.gen_stop_toks.clear()
    assert all(len(text) == 4 for text in actor.predict("abc"))


def test_a_prompt_that_leaves_no_room_is_told_before_the_first_token():
    actor = make_actor(samples=1)
    limit = actor.policy.max_length
    agent, env = actor.agent_ppo(), actor.env
    with pytest.raises(
        PromptError, match=f"that makes {limit + env.env_max_length}, but the model allows {limit}"
    ):
        agent.act(env.reset("a" * limit))


@pytest.mark.parametrize("reward", [[1.0, 2.0, 3.0], float("nan"), [1.0, float("inf")]], ids=repr)
def test_observed_rewards_that_are_none(reward):
    actor = make_actor(samples=2)
    agent, env = actor.agent_ppo(), actor.env
    obs, _, done, _ = env.step(agent.act(env.reset()))
    with pytest.raises(RewardError, match=r"observe\(\) takes a finite number, or one per sample \(2\)"):
        agent.observe(obs, reward, done, False)


@pytest.mark.parametrize(
    "reward", [1.0, np.array(1.0), torch.tensor(1.0), torch.tensor([[1.0], [1.0]])], ids=repr
)
def test_observed_rewards_of_numpy_and_torch(reward, monkeypatch):
    actor = make_actor(samples=2)
    agent, env = actor.agent_ppo(update_interval=1, epochs=1), actor.env
    seen = learned_from(agent, monkeypatch)
    obs, _, done, _ = env.step(agent.act(env.reset()))
    agent.observe(list(obs), reward, done, True)
    assert seen[0][1].tolist() == [[1.0], [1.0]]


def test_stop_tokens_of_the_environment_end_acting_and_rollouts_alike(monkeypatch):
    actor = make_actor(samples=4)
    agent, env = actor.agent_ppo(update_interval=1, epochs=1), actor.env
    chosen = [env.token_string(int(t)) for t in agent.act(env.reset("abc"))]
    agent._acting.clear()
    env.gen_stop_toks.append(chosen[1])  # as users of TextRL did; the second sample's first token
    agent = actor.agent_ppo(update_interval=1, epochs=1)
    seen = learned_from(agent, monkeypatch)
    obs, done = env.reset("abc"), False
    while not done:
        obs, reward, done, _ = env.step(agent.act(obs))
        agent.observe(obs, reward, done, False)
    (rollout, _), stop = seen[0], env.stop_ids
    assert rollout.response_lengths[1] == 1 and rollout.terminated[1]
    sampled = sample_responses(agent.policy, env, 2, SamplingConfig(max_new_tokens=6, seed=3)).rollout
    for row in range(len(sampled)):
        n = int(sampled.response_lengths[row])
        tokens = sampled.tokens[row, sampled.prompt_lengths[row] :][:n].tolist()
        assert bool(sampled.terminated[row]) == (tokens[-1] in stop) and not stop & set(tokens[:-1])


def test_hooks_reach_the_optimizer():
    """pfrl's LinearInterpolationHook, as its documentation has it."""
    agent = make_actor().agent_ppo(lr=1.0)

    def set_lr(env, agent, value):
        for group in agent.optimizer.param_groups:
            group["lr"] = value

    pfrl.experiments.LinearInterpolationHook(10, 1.0, 0.25, set_lr)(None, agent, 10)
    assert agent.ppo.optimizer.param_groups[0]["lr"] == 0.25


def test_a_checkpoint_of_another_optimizer_is_loaded_without_its_state(tmp_path, caplog):
    one, other = make_actor(), make_actor(optimizer="SGD")
    agent = one.agent_ppo(update_interval=1, epochs=1)
    agent.learn(*rollout_of(one))
    agent.save(str(tmp_path))
    agent = other.agent_ppo(update_interval=1, epochs=1)
    agent.load(str(tmp_path))
    assert "written with the optimizer AdamW; SGD begins afresh" in caplog.text
    assert agent.learn(*rollout_of(other))["optimizer_steps"] == 1 and agent.ppo.num_updates == 2


def test_settings_that_a_policy_cannot_take_are_refused():
    actor = make_actor()
    with pytest.raises(ConfigError, match="give other LoRA settings to load_policy"):
        TextRLActor(actor.env, actor.policy, unfreeze_layer_from_past=1)
    TextRLActor(actor.env, actor.policy, lora=actor.policy.lora)


def test_a_directory_of_textrl_itself_is_told_apart(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"was saved by TextRL itself \(model\.pt"):
        make_actor().agent_ppo().load(str(tmp_path))


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimizer_of_the_users_is_made_anew_for_the_adapter(cls):
    theirs = cls([torch.nn.Parameter(torch.zeros(3))], lr=0.0123, weight_decay=0.01)
    agent = make_actor(optimizer=theirs).agent_ppo(update_interval=5, epochs=1)
    ours = agent.ppo.optimizer
    assert type(ours) is cls and ours is not theirs
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["weight_decay"]) == (0.0123, 0.01)
    assert {id(p) for p in ours.param_groups[0]["params"]} == {
        id(p) for p in agent.policy.trainable_parameters().values()
    }


def test_an_optimizer_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="optimizer must be a name"):
        make_actor(optimizer=3)
