"""Training loops: what is written where, when evaluation and hooks happen, and that a seed fixes a run."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from architectures import character_tokenizer, tiny_model
from safetensors.torch import load_file

from textrl_swarm.config import LoraSettings, SamplingConfig
from textrl_swarm.errors import ConfigError, RewardError
from textrl_swarm.learning.learner import Learner
from textrl_swarm.learning.loop import train
from textrl_swarm.learning.rollout import collect, collect_env_steps
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.textrl.actor import TextRLActor
from textrl_swarm.textrl.agent import PPOAgent
from textrl_swarm.textrl.env import TextRLEnv
from textrl_swarm.textrl.evaluation import train_agent_with_evaluation

LENGTH = 5
PROMPTS = [{"input": "the soup"}, {"input": "a"}, {"input": "my coffee was"}]
PFRL_COLUMNS = [
    "steps", "episodes", "elapsed", "mean", "median", "stdev", "max", "min",
    "average_value", "average_entropy", "average_value_loss", "average_policy_loss",
    "n_updates", "explained_variance",
]  # fmt: skip


class Ends(TextRLEnv):
    """1 at the end, and a record of how long the responses were then."""

    def get_reward(self, input_item, predicted_list, finish):
        if finish:
            vars(self).setdefault("lengths", []).append(max(map(len, predicted_list)))
        return [float(finish)] * len(predicted_list)


class Vowels(TextRLEnv):
    def get_reward(self, input_item, predicted_list, finish):
        return [
            sum(token in "aeiou" for token in tokens) / len(tokens) if finish else 0
            for tokens in predicted_list
        ]


def make_agent(
    cls=Ends, samples: int = 2, max_length: int = LENGTH, seed: int = 0, **fields
) -> tuple[PPOAgent, TextRLEnv]:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "\n"})  # rarely chosen: most episodes have the full length
    policy = load_policy(tiny_model("gpt2"), lora=LoraSettings(r=2), tokenizer=tokenizer, seed=seed)
    env = cls(None, tokenizer, PROMPTS, max_length=max_length, compare_sample=samples)
    agent = TextRLActor(env, policy, seed=seed).agent_ppo(
        **{"update_interval": 2 * LENGTH, "epochs": 1, **fields}
    )
    return agent, env


def run(agent: PPOAgent, env: TextRLEnv, outdir: Path, **settings):
    settings = {"steps": 40, "eval_n_steps": None, "eval_n_episodes": 2, "eval_interval": 10, **settings}
    return train_agent_with_evaluation(agent, env, outdir=str(outdir), **settings)


def table(outdir: Path) -> tuple[list[str], list[dict[str, float]]]:
    header, *rows = (line.split("\t") for line in (outdir / "scores.txt").read_text().splitlines())
    return header, [dict(zip(header, map(float, row), strict=True)) for row in rows]


def names(outdir: Path) -> set[str]:
    return {path.name for path in outdir.iterdir()}


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


# ----------------------------------------------------------------------------------------------- pfrl's files


@pytest.mark.parametrize("name", ["run", "bloom—test", "a b/c"], ids=["plain", "em dash", "nested"])
def test_files_of_a_run(tmp_path, name):
    agent, env = make_agent()
    outdir = tmp_path / name
    returned, history = run(agent, env, outdir, checkpoint_freq=20)
    assert returned is agent
    steps = (
        40
        if (outdir / "40_finish").is_dir()
        else max(int(p.name.split("_")[0]) for p in outdir.glob("*_finish"))
    )
    header, rows = table(outdir)
    assert header[: len(PFRL_COLUMNS)] == PFRL_COLUMNS
    assert [row["mean"] for row in rows] == [entry["eval_score"] for entry in history] == [1.0] * len(rows)
    assert len(rows) >= 3 and rows[-1]["steps"] == steps
    assert {"best", "scores.txt", f"{steps}_finish"} < names(outdir)
    checkpoints = [p for p in outdir.glob("*_checkpoint")]
    assert len(checkpoints) == 1
    for directory in (outdir / "best", outdir / f"{steps}_finish", *checkpoints):
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "value_head.safetensors",
            "learner.pt",
        } <= names(directory)
        assert json.loads((directory / "adapter_config.json").read_text())["r"] == 2
        make_agent()[0].load(str(directory))


def test_best_is_the_agent_of_the_best_evaluation(tmp_path, monkeypatch):
    agent, env = make_agent(lr=1e-2)
    saved = {}

    def hook(env, agent, evaluator, step, eval_stats, agent_stats, env_stats):
        saved[step] = {name: p.detach().clone() for name, p in agent.policy.adapter_parameters().items()}

    scores = iter([0.5, 2.0, 1.0, 1.5, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(
        "pfrl.experiments.evaluator.eval_performance", lambda *args, **kwargs: scores_of(next(scores))
    )
    run(agent, env, tmp_path, evaluation_hooks=[hook])
    best = adapter(tmp_path / "best")
    second = saved[sorted(saved)[1]]
    assert all(torch.equal(best[name], second[name]) for name in second)
    assert not torch.equal(best[next(iter(best))], saved[sorted(saved)[-1]][next(iter(best))])


def scores_of(mean: float) -> dict[str, float]:
    return {
        "episodes": 1, "mean": mean, "median": mean, "stdev": 0.0, "max": mean, "min": mean,
        "length_mean": 1, "length_median": 1, "length_stdev": 0, "length_max": 1, "length_min": 1,
    }  # fmt: skip


def test_best_exists_even_when_no_evaluation_was_due(tmp_path):
    """README's second recipe: evaluation every 10000 steps of 1000."""
    agent, env = make_agent()
    _, history = run(agent, env, tmp_path, eval_interval=10_000)
    # Nor is one held: it may be the longest part, 1500 episodes in the README.
    assert history == table(tmp_path)[1] == []
    (finish,) = tmp_path.glob("*_finish")
    best, last = adapter(tmp_path / "best"), adapter(finish)
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_no_second_evaluation_of_the_same_agent(tmp_path):
    agent, env = make_agent()
    run(agent, env, tmp_path, eval_interval=1)
    steps = [row["steps"] for row in table(tmp_path)[1]]
    assert len(set(steps)) == len(steps)


def test_best_is_left_out_when_asked(tmp_path):
    agent, env = make_agent()
    run(agent, env, tmp_path, save_best_so_far_agent=False)
    assert "best" not in names(tmp_path)


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), KeyboardInterrupt()], ids=["reward", "ctrl-c"])
def test_an_exception_saves_the_agent_and_is_raised(tmp_path, error):
    class Breaking(TextRLEnv):
        left = 9

        def get_reward(self, input_item, predicted_list, finish):
            self.left -= finish
            if self.left < 0:
                raise error
            return 0

    agent, env = make_agent(Breaking)
    with pytest.raises(RewardError if isinstance(error, Exception) else KeyboardInterrupt):
        run(agent, env, tmp_path, steps=10_000, eval_interval=10_000)
    (directory,) = tmp_path.glob("*_except")
    assert int(directory.name.split("_")[0]) > 0
    assert not list(tmp_path.glob("*_finish"))
    again = make_agent()[0]
    again.load(str(directory))
    assert again.ppo.num_updates == agent.ppo.num_updates == 4  # two prompts per rollout, nine were paid for
    saved = adapter(directory)
    assert all(torch.equal(saved[name], p) for name, p in agent.policy.adapter_parameters().items())


def test_tensorboard(tmp_path):
    agent, env = make_agent()
    run(agent, env, tmp_path, use_tensorboard=True)
    assert list(tmp_path.glob("events.out.tfevents.*"))


# -------------------------------------------------------------------------------------- steps, hooks, lengths


def test_a_hook_is_called_once_per_env_step(tmp_path):
    agent, env = make_agent()
    seen = []
    run(
        agent,
        env,
        tmp_path,
        step_hooks=[lambda env_, agent_, step: seen.append((env_ is env, agent_ is agent, step))],
    )
    (finish,) = tmp_path.glob("*_finish")
    assert seen == [(True, True, step) for step in range(1, int(finish.name.split("_")[0]) + 1)]
    assert 40 <= len(seen) < 40 + 2 * LENGTH


def test_steps_go_on_from_an_offset(tmp_path):
    agent, env = make_agent()
    seen = []
    run(
        agent,
        env,
        tmp_path,
        step_offset=100,
        steps=130,
        step_hooks=[lambda env, agent, step: seen.append(step)],
    )
    assert seen[0] == 101 and 130 <= seen[-1] < 140
    assert all(row["steps"] > 100 for row in table(tmp_path)[1])


@pytest.mark.parametrize(("interval", "prompts"), [(1, 1), (LENGTH, 1), (LENGTH + 1, 2), (4 * LENGTH, 4)])
def test_a_rollout_has_about_update_interval_env_steps(tmp_path, monkeypatch, interval, prompts):
    agent, env = make_agent(update_interval=interval, samples=3)
    learn, rows = agent.learn, []
    monkeypatch.setattr(
        agent, "learn", lambda rollout, rewards: rows.append(len(rollout)) or learn(rollout, rewards)
    )
    run(agent, env, tmp_path, steps=1)
    assert rows == [3 * prompts]


def test_episodes_that_are_cut_short_get_their_final_reward_in_training_and_evaluation(tmp_path):
    """README's second recipe: train_max_episode_len=50 with max_length=100."""
    agent, env = make_agent(max_length=50)
    _, history = run(agent, env, tmp_path, train_max_episode_len=4)
    assert set(env.lengths) <= {1, 2, 3, 4} and 4 in env.lengths
    assert [entry["eval_score"] for entry in history] == [1.0] * len(history)
    assert agent.metrics["score"] == 1.0
    assert env.env_max_length == 50


def test_evaluation_may_have_a_length_and_an_environment_of_its_own(tmp_path):
    agent, env = make_agent(max_length=20)
    other = make_agent(max_length=20)[1]
    run(agent, env, tmp_path, train_max_episode_len=4, eval_max_episode_len=7, eval_env=other)
    assert max(env.lengths) == 4 and max(other.lengths) == 7
    assert env.env_max_length == other.env_max_length == 20


def test_evaluation_for_a_number_of_steps(tmp_path):
    agent, env = make_agent()
    _, history = run(agent, env, tmp_path, eval_n_steps=7, eval_n_episodes=None)
    assert all(math.isfinite(entry["eval_score"]) for entry in history)


@pytest.mark.parametrize("lengths", [(None, None), (3, 3)])
def test_one_measure_of_an_evaluation(tmp_path, lengths):
    agent, env = make_agent()
    with pytest.raises(ConfigError, match="exactly one of eval_n_steps and eval_n_episodes"):
        run(agent, env, tmp_path, eval_n_steps=lengths[0], eval_n_episodes=lengths[1])


def test_a_good_enough_score_ends_the_run(tmp_path):
    agent, env = make_agent()
    _, history = run(agent, env, tmp_path, steps=10_000, successful_score=1.0)
    assert len(history) == 1 and len(list(tmp_path.glob("*_finish"))) == 1


def test_what_is_logged(tmp_path, caplog):
    agent, env = make_agent()
    caplog.set_level(logging.INFO)
    run(agent, env, tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    assert any(m.startswith(f"outdir:{tmp_path} step:") and "R:1.0" in m for m in messages)
    assert any(m.startswith("statistics:[('average_value',") for m in messages)


# --------------------------------------------------------------------------------------------- the plain loop


def test_train_yields_after_each_iteration_and_can_be_left():
    agent, env = make_agent(Vowels)
    iterations = list(itertools.islice(train(agent, env, iterations=10, prompts_per_iteration=3), 2))
    assert [i.index for i in iterations] == [0, 1] and agent.ppo.num_updates == 2
    for i in iterations:
        assert len(i.collected.rollout) == 6 and len(i.collected.items) == 3
        assert i.metrics["score"] == pytest.approx(float(i.collected.scores.mean()))
        assert i.metrics["bytes_sent"] == 0 and i.metrics["rollout_tokens_per_second"] > 0 and i.seconds > 0


class Sometimes(Vowels):
    """The responses to most prompts all score the same."""

    asked = 0

    def get_reward(self, input_item, predicted_list, finish):
        type(self).asked += finish
        scores = super().get_reward(input_item, predicted_list, finish)
        return scores if self.asked % 3 == 0 else [0.0] * len(scores)


def test_prompts_that_teach_nothing_are_replaced(monkeypatch):
    """Three are drawn, of which two are silent; of two more one is, and so is the last."""
    agent, env = make_agent(Sometimes)
    monkeypatch.setattr(Sometimes, "asked", 1)
    drawn = []
    draw = env.draw
    monkeypatch.setattr(env, "draw", lambda count: drawn.append(count) or draw(count))
    (one,) = train(agent, env, iterations=1, prompts_per_iteration=3, resample=2)
    assert drawn == [3, 2, 1]
    collected = one.collected
    assert len(collected.rollout) == 6 and len(collected.items) == 3
    silent = [bool((scores == scores[0]).all()) for scores in collected.scores.view(3, 2)]
    assert sum(silent) == 1
    expected, env_steps = per_token_rewards_of_vowels(env, collected), 0
    for p in range(3):
        rows = slice(2 * p, 2 * p + 2)
        env_steps += int(collected.rollout.response_lengths[rows].max())
        prompt = collected.rollout.tokens[2 * p, : collected.rollout.prompt_lengths[2 * p]].tolist()
        assert list(env.encode(collected.items[p]).ids) == prompt
        if not silent[p]:
            assert torch.equal(collected.rewards[rows], expected[rows])
    assert collected.env_steps == env_steps
    assert (collected.rewards[~collected.rollout.response_mask] == 0).all()


def per_token_rewards_of_vowels(env, collected):
    rewards = torch.zeros(collected.rewards.shape)
    for row, (text, length) in enumerate(
        zip(collected.rollout.texts, collected.rollout.response_lengths.tolist(), strict=True)
    ):
        rewards[row, length - 1] = sum(letter in "aeiou" for letter in text) / length
    return rewards


def run_of(seed: int, global_seed: int, updates: int = 3) -> tuple[list, dict]:
    torch.manual_seed(global_seed)
    agent, env = make_agent(Vowels, seed=seed, lr=1e-2)
    rollouts = [i.collected.rollout for i in train(agent, env, iterations=updates, prompts_per_iteration=3)]
    return rollouts, {name: p.detach().clone() for name, p in agent.policy.trainable_parameters().items()}


def test_the_seed_fixes_a_run_and_every_rollout_has_other_random_numbers():
    (first, parameters), (again, others), (other, _) = run_of(0, 1), run_of(0, 2), run_of(7, 1)
    assert [r.texts for r in first] == [r.texts for r in again]
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)
    assert first[0].texts != other[0].texts
    assert len({r.texts for r in first}) == 3


def test_random_numbers_of_a_rollout_depend_on_the_updates_before_it():
    """So that a run that was interrupted and resumed samples what it would have sampled."""
    agent, _ = make_agent(seed=5)
    seeds = []
    for agent.ppo.num_updates in (0, 1, 8):
        seeds.append(agent.rollout_sampling().seed)
    assert seeds == [5, 6, 13]


def test_without_a_seed_a_reward_that_seeds_torch_does_not_repeat_the_rollouts():
    agent, _ = make_agent(seed=5)
    learner = Learner(agent.policy)

    def seeds(items, texts):
        torch.manual_seed(0)
        return [float(len(text)) for text in texts]

    env = TextRLEnv(None, agent.policy.tokenizer, ["a", "b"], max_length=8, compare_sample=2, reward=seeds)
    torch.manual_seed(3)
    found = [
        iteration.collected.rollout.texts
        for iteration in train(learner, env, iterations=3, prompts_per_iteration=2)
    ]
    assert len(set(found)) == 3
    torch.manual_seed(3)
    assert Learner(agent.policy).rollout_sampling().seed == learner.rollout_sampling().seed - 3


@pytest.mark.parametrize("interval", [1, 12, 40])
def test_an_update_has_update_interval_env_steps_however_short_the_responses(tmp_path, monkeypatch, interval):
    agent, env = make_agent(max_length=30, update_interval=interval)
    env.gen_stop_toks += list("aeioust")  # most responses end after a few tokens
    learn, sizes = agent.learn, []

    def counted(rollout, rewards):
        lengths = rollout.response_lengths.view(-1, env.compare_sample).amax(dim=1)
        sizes.append((int(lengths.sum()), int(lengths.max())))
        assert rewards.shape == rollout.response_mask.shape == rollout.old_logprobs.shape and len(
            rollout.texts
        ) == len(rollout)
        assert (rewards.sum(dim=1) == 1).all() and bool(rewards[~rollout.response_mask].eq(0).all())
        return learn(rollout, rewards)

    monkeypatch.setattr(agent, "learn", counted)
    run(agent, env, tmp_path, steps=3 * interval, eval_interval=10_000)
    assert all(interval <= steps for steps, _ in sizes)
    # No update collects much more than it needs.
    assert sum(steps for steps, _ in sizes) < 3 * interval + len(sizes) * 4 * 30


def test_the_parts_of_a_rollout_add_up(monkeypatch):
    agent, env = make_agent(samples=1, max_length=30)
    env.gen_stop_toks += list("aeioust")
    parts = []

    def collect_seen(*args):
        parts.append(collect(*args))
        return parts[-1]

    monkeypatch.setattr("textrl_swarm.learning.rollout.collect", collect_seen)
    found = collect_env_steps(
        agent.policy, env, 60, SamplingConfig(max_new_tokens=30, seed=0, temperature=0.9)
    )
    assert len(parts) > 1
    assert found.seconds == pytest.approx(sum(part.seconds for part in parts))
    assert found.env_steps == sum(part.env_steps for part in parts) >= 60
    assert found.rollout.texts == tuple(text for part in parts for text in part.rollout.texts)
    assert found.scores.tolist() == [score for part in parts for score in part.scores.tolist()]
    assert found.rollout.temperature == 0.9


def test_the_parts_of_a_rollout_have_random_numbers_of_their_own():
    agent, env = make_agent(samples=1, max_length=30)
    env.gen_stop_toks += list("aeioust")
    env._items = env._items[:1]  # always the same prompt
    env.seed(0)
    found = collect_env_steps(agent.policy, env, 30, SamplingConfig(max_new_tokens=30, seed=0))
    first, second = (
        row[int(n) :].tolist()
        for row, n in list(zip(found.rollout.tokens, found.rollout.prompt_lengths, strict=False))[:2]
    )
    assert len(found.items) > 2 and first != second  # the first part has one response


def test_what_pfrl_users_import_from_textrl():
    import pfrl.experiments.evaluator as theirs

    import textrl_swarm

    assert textrl_swarm.Evaluator is theirs.Evaluator and textrl_swarm.save_agent is theirs.save_agent
