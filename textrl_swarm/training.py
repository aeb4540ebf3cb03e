"""Training loops: `train` yields one iteration after another; `train_agent_with_evaluation` is pfrl's, a rollout at a time.

An iteration is one rollout and one update. Knows nothing about terminals or files beyond pfrl's output directory.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from textrl_swarm.agent import PPOAgent  # first: it silences gym's banner
from textrl_swarm.env import TextRLEnv
from textrl_swarm.errors import ConfigError
from textrl_swarm.rollout import Collected, Sampled, collect_env_steps, reward_responses, sample_responses

from pfrl.experiments.evaluator import Evaluator, save_agent  # isort: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Iteration:
    """What happened in one iteration."""

    index: int  # from 0
    collected: Collected
    metrics: dict[str, float]  # of the update, plus speed and bytes
    seconds: float


def train(
    agent: PPOAgent,
    env: TextRLEnv,
    *,
    iterations: int,
    prompts_per_iteration: int,
    start: int = 0,
    sampled: Sampled | None = None,
    on_sampled: Callable[[int, Sampled], None] | None = None,
) -> Iterator[Iteration]:
    """Yields after each iteration; stop early by leaving the loop.

    Args:
        iterations: how many in all.
        prompts_per_iteration: prompts per rollout; each gets `env.compare_sample` responses.
        start: iterations that are already done.
        sampled: responses for the first iteration, when it has them already.
        on_sampled: called with the iteration's index and its responses before they are rewarded.
    """
    for index in range(start, iterations):
        started, before = time.perf_counter(), _bytes(agent)
        if sampled is None:
            sampled = sample_responses(agent.policy, env, prompts_per_iteration, agent.rollout_sampling())
            if on_sampled is not None:
                on_sampled(index, sampled)
        collected, sampled = reward_responses(env, sampled), None
        metrics = dict(agent.learn(collected.rollout, collected.rewards))
        metrics["rollout_tokens_per_second"] = collected.tokens_per_second
        for name, total, then in zip(("bytes_sent", "bytes_received"), _bytes(agent), before, strict=True):
            metrics[name] = float(total - then)
        yield Iteration(index, collected, metrics, time.perf_counter() - started)


def _bytes(agent: PPOAgent) -> tuple[int, int]:
    traffic = agent.policy.traffic
    return (0, 0) if traffic is None else (traffic.total_sent, traffic.total_received)


def train_agent_with_evaluation(
    agent: PPOAgent,
    env: TextRLEnv,
    steps: int,
    eval_n_steps: int | None,
    eval_n_episodes: int | None,
    eval_interval: int,
    outdir: str,
    checkpoint_freq: int | None = None,
    train_max_episode_len: int | None = None,
    step_offset: int = 0,
    eval_max_episode_len: int | None = None,
    eval_env: TextRLEnv | None = None,
    successful_score: float | None = None,
    step_hooks: Sequence[Callable] = (),
    evaluation_hooks: Sequence[Callable] = (),
    save_best_so_far_agent: bool = True,
    use_tensorboard: bool = False,
    eval_during_episode: bool = False,
    logger: logging.Logger | None = None,
) -> tuple[PPOAgent, list[dict]]:
    """pfrl's function of this name, with its files: `best/`, `scores.txt`, `{t}_checkpoint`, `{t}_finish`, `{t}_except`.

    Differences: episodes are collected a rollout of `agent.update_interval` env steps or a little more at a time; evaluation happens
    between rollouts; and `best/` exists at the end: there is a last evaluation, unless none was due in all of `steps`, where the agent as
    it is in the end is the best.

    Args:
        steps: env steps in all (one token of each sample of one prompt).
        eval_n_steps, eval_n_episodes: length of one evaluation; exactly one of them.
        eval_interval: env steps between evaluations.
        train_max_episode_len: env steps after which an episode is cut short (it still gets its final reward).
        See pfrl.experiments.train_agent_with_evaluation for the rest.

    Returns:
        the agent, and one dict per evaluation.
    """
    log = logger or logging.getLogger(__name__)
    if (eval_n_steps is None) == (eval_n_episodes is None):
        raise ConfigError(f"give exactly one of eval_n_steps and eval_n_episodes, got {eval_n_steps} and {eval_n_episodes}")
    Path(outdir).mkdir(parents=True, exist_ok=True)
    eval_env = eval_env or env
    evaluator = Evaluator(
        agent=agent, env=eval_env, n_steps=eval_n_steps, n_episodes=eval_n_episodes, eval_interval=eval_interval, outdir=outdir,
        step_offset=step_offset, evaluation_hooks=evaluation_hooks, save_best_so_far_agent=save_best_so_far_agent,
        use_tensorboard=use_tensorboard, logger=log,
    )  # fmt: skip
    eval_length = eval_max_episode_len or train_max_episode_len
    length = min(env.env_max_length, train_max_episode_len or env.env_max_length)
    history: list[dict] = []
    t, episodes, evaluated_at = step_offset, 0, None
    try:
        while t < steps:
            sampling = dataclasses.replace(agent.rollout_sampling(), max_new_tokens=length)
            collected = collect_env_steps(agent.policy, env, agent.update_interval, sampling)
            agent.learn(collected.rollout, collected.rewards)
            before, t, episodes = t, t + collected.env_steps, episodes + len(collected.items)
            log.info("outdir:%s step:%s episode:%s R:%s", outdir, t, episodes, float(collected.scores.mean()))
            log.info("statistics:%s", agent.get_statistics())
            for step in range(before + 1, t + 1):
                for hook in step_hooks:
                    hook(env, agent, step)
            if checkpoint_freq and t // checkpoint_freq > before // checkpoint_freq and t < steps:
                save_agent(agent, t, outdir, log, suffix="_checkpoint")
            with eval_env.shortened(eval_length):  # with their final reward; pfrl's evaluator would cut them off without one
                score = evaluator.evaluate_if_necessary(t=t, episodes=episodes)
            if score is not None:
                evaluated_at = t
                history.append(_evaluation(agent, score))
                if successful_score is not None and evaluator.max_score >= successful_score:
                    break
        if evaluated_at is None:  # none was due
            if save_best_so_far_agent:
                save_agent(agent, "best", outdir, log)
        elif evaluated_at != t:
            with eval_env.shortened(eval_length):
                history.append(_evaluation(agent, evaluator.evaluate_and_update_max_score(t, episodes)))
    except (Exception, KeyboardInterrupt):
        save_agent(agent, t, outdir, log, suffix="_except")
        raise
    save_agent(agent, t, outdir, log, suffix="_finish")
    return agent, history


def _evaluation(agent: PPOAgent, score: float) -> dict:
    return {**dict(agent.get_statistics()), "eval_score": score}
