"""pfrl's `train_agent_with_evaluation`, a rollout at a time, with pfrl's files in its output directory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from textrl_swarm.errors import ConfigError
from textrl_swarm.learning.rollout import collect_env_steps
from textrl_swarm.textrl.agent import PPOAgent
from textrl_swarm.textrl.door import Evaluator as Evaluator
from textrl_swarm.textrl.door import save_agent as save_agent
from textrl_swarm.textrl.env import TextRLEnv


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
    step_hooks: Sequence[Callable[..., Any]] = (),
    evaluation_hooks: Sequence[Callable[..., Any]] = (),
    save_best_so_far_agent: bool = True,
    use_tensorboard: bool = False,
    eval_during_episode: bool = False,
    logger: logging.Logger | None = None,
) -> tuple[PPOAgent, list[dict[str, float]]]:
    """pfrl's function of this name, with its files: `best/`, `scores.txt`, `{t}_checkpoint`, `{t}_finish`,
    `{t}_except`.

    Differences from pfrl: episodes come a rollout of `agent.update_interval` env steps or a little more at a
    time, evaluation happens between rollouts, and `best/` exists at the end. There is a last evaluation,
    unless none was due in all of `steps`; then the agent at the end counts as the best.

    The other arguments are those of pfrl.experiments.train_agent_with_evaluation.

    Args:
        steps: env steps in all (one token of each sample of one prompt).
        eval_n_steps: env steps of one evaluation; give this or `eval_n_episodes`.
        eval_n_episodes: episodes of one evaluation.
        eval_interval: env steps between evaluations.
        train_max_episode_len: env steps after which an episode is cut short; it still gets its final reward.

    Returns:
        The agent, and one dict per evaluation.

    Raises:
        ConfigError: both or none of eval_n_steps and eval_n_episodes.
        RewardError: the reward failed; the agent is saved in `{t}_except` first.
    """
    log = logger or logging.getLogger(__name__)
    if (eval_n_steps is None) == (eval_n_episodes is None):
        raise ConfigError(
            f"give exactly one of eval_n_steps and eval_n_episodes, got {eval_n_steps} and {eval_n_episodes}"
        )
    outdir = os.path.expanduser(outdir)
    Path(outdir).mkdir(parents=True, exist_ok=True)
    evaluation = _Evaluation(
        agent,
        eval_env or env,
        eval_max_episode_len or train_max_episode_len,
        Evaluator(
            agent=agent,
            env=eval_env or env,
            n_steps=eval_n_steps,
            n_episodes=eval_n_episodes,
            eval_interval=eval_interval,
            outdir=outdir,
            step_offset=step_offset,
            evaluation_hooks=evaluation_hooks,
            save_best_so_far_agent=save_best_so_far_agent,
            use_tensorboard=use_tensorboard,
            logger=log,
        ),
    )
    length = min(env.env_max_length, train_max_episode_len or env.env_max_length)
    t, episodes = step_offset, 0
    try:
        while t < steps:
            sampling = dataclasses.replace(agent.rollout_sampling(), max_new_tokens=length)
            collected = collect_env_steps(agent.policy, env, agent.update_interval, sampling)
            agent.learn(collected.rollout, collected.rewards)
            before = t
            t += collected.env_steps
            episodes += len(collected.items)
            log.info("outdir:%s step:%s episode:%s R:%s", outdir, t, episodes, float(collected.scores.mean()))
            log.info("statistics:%s", agent.get_statistics())
            for env_step in range(before + 1, t + 1):
                for hook in step_hooks:
                    hook(env, agent, env_step)
            if checkpoint_freq and t // checkpoint_freq > before // checkpoint_freq and t < steps:
                save_agent(agent, t, outdir, log, suffix="_checkpoint")
            evaluation.evaluate_if_due(t, episodes)
            if successful_score is not None and evaluation.has_reached(successful_score):
                break
        if evaluation.evaluated_at is None:  # none was due
            if save_best_so_far_agent:
                save_agent(agent, "best", outdir, log)
        elif evaluation.evaluated_at != t:
            evaluation.evaluate(t, episodes)
    except (Exception, KeyboardInterrupt):
        save_agent(agent, t, outdir, log, suffix="_except")
        raise
    save_agent(agent, t, outdir, log, suffix="_finish")
    return agent, evaluation.history


class _Evaluation:
    """pfrl's evaluator, on episodes that end with their final reward when they are cut short.

    pfrl's own cut would leave that reward out.
    """

    def __init__(self, agent: PPOAgent, env: TextRLEnv, max_length: int | None, evaluator: Any):
        self._agent = agent
        self._env = env
        self._max_length = max_length
        self._evaluator = evaluator
        self.history: list[dict[str, float]] = []
        self.evaluated_at: int | None = None

    def evaluate_if_due(self, t: int, episodes: int) -> None:
        with self._as_in_training():
            score = self._evaluator.evaluate_if_necessary(t=t, episodes=episodes)
        if score is not None:
            self._note(t, score)

    def evaluate(self, t: int, episodes: int) -> None:
        with self._as_in_training():
            self._note(t, self._evaluator.evaluate_and_update_max_score(t, episodes))

    @contextlib.contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """Inside, episodes end where those of rollouts do."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._env.shortened(self._max_length))
            stop_ids = self._agent.sampling.stop_token_ids
            if stop_ids is None:
                self._env.stop_also_at(self._agent.policy.stop_ids)
            else:
                stack.enter_context(self._env.ending_at(stop_ids))
            yield

    def _note(self, t: int, score: float) -> None:
        self.evaluated_at = t
        self.history.append({**dict(self._agent.get_statistics()), "eval_score": score})

    def has_reached(self, score: float) -> bool:
        return self.evaluated_at is not None and self._evaluator.max_score >= score
