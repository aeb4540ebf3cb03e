"""Held-out prompts: scores of sampled and most likely responses every so often, and the best adapter so far.

A run learns the same with evaluations and without: they have random numbers of their own. Knows nothing about
updates or terminals.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from textrl_swarm.errors import CheckpointError
from textrl_swarm.files import published, write_text
from textrl_swarm.learning.env import PromptEnv
from textrl_swarm.learning.rollout import collect
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.generation import check_lengths
from textrl_swarm.rewards.functions import SentenceReward, StepReward
from textrl_swarm.runs.checkpoint import random_state, restore_random_state
from textrl_swarm.runs.config import EvaluationConfig, RunConfig
from textrl_swarm.runs.digest import content_digest
from textrl_swarm.types import Item

EVALUATIONS = "evaluations.jsonl"
BEST = "best"


class Evaluations:
    """Of one run.

    Args:
        config: of the run; it has the section `evaluation`.
        prompts: that are held out.
        start: iterations that are done; what was evaluated later will be evaluated again.

    Raises:
        PromptError: a prompt that does not fit the model.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Item],
        reward: StepReward | SentenceReward,
        policy: Policy,
        directory: Path,
        start: int,
    ):
        assert config.evaluation is not None, "what calls this looks first"
        assert policy.tokenizer is not None, "a run needs one"
        self.settings: EvaluationConfig = config.evaluation
        self._config, self._policy, self._directory = config, policy, directory
        self._kind = content_digest(
            {
                "prompts": list(prompts),
                "samples": self.settings.samples,
                "sampling": {**asdict(config.sampling), "num_samples": 1},
                "reward": [asdict(part) for part in config.reward],
            }
        )  # what scores must have in common to be compared
        self._count = len(prompts)
        self._envs = {}
        for name, samples in (("greedy", 1), ("sampled", self.settings.samples)):
            if samples == 0:
                continue
            self._envs[name] = PromptEnv(
                policy.tokenizer,
                prompts,
                reward,
                max_length=config.sampling.max_new_tokens,
                compare_sample=samples,
                reward_timeout_s=config.train.reward_timeout_s,
                skip_special_tokens=config.train.skip_special_tokens,
            )
        ids = [prompt.ids for prompt in self._envs["greedy"].prompts()]
        check_lengths(policy, ids, config.sampling.max_new_tokens)
        self.lines = [
            line
            for line in read_evaluations(directory)
            if line["iteration"] <= start and line.get("kind") == self._kind
        ]

    def is_due(self, done: int) -> bool:
        """Whether the policy is evaluated after so many iterations: none, every n-th and the last."""
        is_known = any(line["iteration"] == done for line in self.lines)
        is_last = done == self._config.train.iterations
        return not is_known and (is_last or done % self.settings.every == 0)

    def run(self, done: int) -> dict[str, float]:
        """Mean scores by kind, as metrics. Keeps the adapter when it is the best so far.

        Raises:
            RewardError: the reward failed.
            CheckpointError: the adapter cannot be written.
        """
        before = random_state()
        try:
            scores = {name: self._score(name, env) for name, env in self._envs.items()}
        finally:
            restore_random_state(before)
        line = {"iteration": done, **scores, "kind": self._kind}
        best = self.best
        self.lines.append(line)
        if best is None or self._score_of(line) > self._score_of(best):
            self._keep()
        text = "".join(json.dumps(one) + "\n" for one in self.lines)
        write_text(self._directory / EVALUATIONS, text)
        return {f"evaluation/{name}": score for name, score in scores.items()}

    def _score(self, name: str, env: PromptEnv) -> float:
        env.seed(self._config.seed)
        sampling = replace(self._config.sampling, do_sample=name == "sampled", seed=self._config.seed)
        return float(collect(self._policy, env, self._count, sampling).scores.mean())

    def _keep(self) -> None:
        try:
            with published(self._directory / BEST) as staging:
                self._policy.save_adapter(staging)
        except OSError as error:
            raise CheckpointError(f"{self._directory / BEST} cannot be written: {error}") from error

    def _score_of(self, line: dict[str, Any]) -> float:
        return float(line[self.settings.by])

    @property
    def best(self) -> dict[str, Any] | None:
        """The first of the evaluations with the best score."""
        return max(self.lines, key=self._score_of, default=None)

    @property
    def is_over(self) -> bool:
        """Whether the last evaluations, as many as the run has patience for, were no better."""
        patience, best = self.settings.patience, self.best
        if patience is None or best is None:
            return False
        return len(self.lines) - 1 - self.lines.index(best) >= patience


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl; foreign ones are skipped."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for text in (run / EVALUATIONS).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                line["iteration"] + line["greedy"] + line.get("sampled", 0)
                found.append(line)
    return found
