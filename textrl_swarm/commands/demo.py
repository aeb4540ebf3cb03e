"""`textrl-swarm demo`: a tiny model learns to speak well of things, through real servers on this machine.

The public names alone can do all of it; the demo adds progress, a table, a picture and a summary.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from textrl_swarm.config import QUANTIZATIONS, LoraSettings, SamplingConfig
from textrl_swarm.display import spinner
from textrl_swarm.errors import ConfigError
from textrl_swarm.export.check import answers_of_fresh_process, compare
from textrl_swarm.learning.loop import Iteration, train
from textrl_swarm.learning.rollout import Collected, collect
from textrl_swarm.models.blocks import blocks_text
from textrl_swarm.models.corpus import DEMO_PROMPTS, opinion
from textrl_swarm.models.texts import encode_prompt
from textrl_swarm.models.tiny import RECIPE, make_tiny_model, require_family
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.textrl.actor import TextRLActor
from textrl_swarm.textrl.agent import PPOAgent
from textrl_swarm.textrl.env import TextRLEnv
from textrl_swarm.types import Item

MAX_NEW_TOKENS = 24
# Most of a mixture's weights are in its experts, which are adapted by name only.
_TARGETS = {"mixtral": ("q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj")}
_SHOWN_SAMPLES = 8  # of each prompt, before and after training


class SpeakWell(TextRLEnv):
    """The reward: 1 for a sentence with only good words about its thing, 0 for one with only bad words."""

    def get_reward(self, input_item: Item, predicted_list: list[list[str]], finish: bool) -> list[float]:
        """See TextRLEnv."""
        if not finish:
            return [0.0] * len(predicted_list)
        return [opinion(self.tokenizer.convert_tokens_to_string(tokens)) for tokens in predicted_list]


@dataclass(frozen=True)
class DemoConfig:
    """What the command line decides."""

    out: Path

    servers: int = 2
    """0 = no swarm: the model is on this machine."""

    quantization: str | None = None
    iterations: int = 20
    seed: int = 0

    family: str = "bloom"
    """Of the model; see `tiny.FAMILIES`."""

    def __post_init__(self) -> None:  # before the minute that pretraining takes
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantization must be 8bit or 4bit, got {self.quantization!r}")
        require_family(self.family)
        if self.servers > RECIPE["layers"]:
            raise ConfigError(
                f"the demo's model has {RECIPE['layers']} blocks; "
                f"ask for at most as many servers, not {self.servers}"
            )


def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Runs the demo from pretraining to the check in a fresh process; returns the summary that it wrote.

    Ctrl-C during training keeps what was learned so far: the steps after training still run.
    """
    started = time.perf_counter()
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    base_model = _make_base_model(out / "base_model", config, console)
    with _policy(base_model, config, console) as policy:
        env = _environment(policy)
        actor = TextRLActor(env, policy, seed=config.seed)
        minibatch_size = 16 * MAX_NEW_TOKENS
        agent = actor.agent_ppo(
            update_interval=1, minibatch_size=minibatch_size, epochs=4, lr=3e-3, kl_coef=0.05
        )
        console.print("reward: the share of good words among a response's opinion words (class SpeakWell)")
        before = _listen(policy, config.seed)
        score_before = float(before.scores.mean())
        console.print(f"before training: score {score_before:.2f} (share of good opinions)\n")
        training_started = time.perf_counter()
        iterations, interrupted = _train(agent, env, config.iterations, console)
        training_s = time.perf_counter() - training_started
        if interrupted:
            console.print(
                f"[yellow]interrupted after iteration {len(iterations)}; keeping what was learned[/]"
            )
        after = _listen(policy, config.seed)
        kl = agent.ppo.divergence(after.rollout)
        console.print(_table(before, after))
        adapter = out / "adapter"
        policy.save_adapter(adapter)
        console.print(f"adapter saved in {adapter} (PEFT format)")
        same = _check_in_fresh_process(policy, base_model, adapter, console)
    tokens = sum(int(i.collected.rollout.response_mask.sum()) for i in iterations)
    summary = {
        "score_before": score_before,
        "score_after": float(after.scores.mean()),
        "kl": kl,
        "seconds": training_s,
        "seconds_total": time.perf_counter() - started,
        "family": config.family,
        "servers": config.servers,
        "quantization": config.quantization,
        "base_model": str(base_model),
        "adapter": str(adapter),
        "iterations": len(iterations),
        "interrupted": interrupted,
        "tokens_per_second": tokens / training_s if iterations else 0.0,
        "bytes_sent": int(sum(i.metrics["bytes_sent"] for i in iterations)),
        "bytes_received": int(sum(i.metrics["bytes_received"] for i in iterations)),
        "plain_peft_agrees": same,
        "score_per_iteration": [i.metrics["score"] for i in iterations],
        "kl_per_iteration": [i.metrics["kl"] for i in iterations],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _draw(summary, out / "curves.png")
    console.print(
        f"\nscore {summary['score_before']:.2f} -> [bold green]{summary['score_after']:.2f}[/], "
        f"KL to the base model {kl:.2f} nats per response, training {training_s:.0f} s; summary and "
        f"picture in {out}"
    )
    return summary


def _make_base_model(directory: Path, config: DemoConfig, console: Console) -> Path:
    started = time.perf_counter()
    what = f"a tiny {config.family} model"
    if not console.is_terminal:
        console.print(f"pretraining {what} on short opinions, good and bad (at most 90 s) ...")
    columns = (
        TextColumn(f"pretraining {what}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.2f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1.0, loss=float("nan"))

        def show(done: float, loss: float) -> None:
            progress.update(bar, completed=done, loss=loss)

        model = make_tiny_model(directory, family=config.family, seed=config.seed, on_progress=show)
    console.print(f"base model in {model} ({time.perf_counter() - started:.0f} s)")
    return model


@contextlib.contextmanager
def _policy(base_model: Path, config: DemoConfig, console: Console) -> Iterator[Policy]:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    lora = LoraSettings(r=8, alpha=16, targets=_TARGETS.get(config.family))
    if config.servers == 0:
        with load_policy(base_model, quantization=config.quantization, lora=lora, seed=config.seed) as policy:
            quantized = f", in {config.quantization}" if config.quantization else ""
            console.print(f"the model is on this machine{quantized}")
            yield policy
        return
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        with spinner(console, f"starting {config.servers} Petals server(s)"):
            swarm = stack.enter_context(LocalSwarm(base_model, config.servers, config.quantization))
        for server in swarm.servers:
            assert server.span is not None, "the server is online"
            console.print(f"server (pid {server.pid}) holds {blocks_text(range(*server.span))}")
        seconds = time.perf_counter() - started
        console.print(f"clients join at {swarm.initial_peers[0]} ({seconds:.0f} s)", soft_wrap=True)
        with spinner(console, "joining the swarm"):
            policy = load_policy(
                base_model,
                initial_peers=swarm.initial_peers,
                dht_prefix=swarm.dht_prefix,
                lora=lora,
                seed=config.seed,
            )
        yield stack.enter_context(policy)


def _environment(policy: Policy, samples: int = 4) -> SpeakWell:
    assert policy.tokenizer is not None, "the demo's model has one"
    prompts = [{"input": prompt} for prompt in DEMO_PROMPTS]
    return SpeakWell(None, policy.tokenizer, prompts, max_length=MAX_NEW_TOKENS, compare_sample=samples)


def _listen(policy: Policy, seed: int) -> Collected:
    """Samples of every prompt, always with the same random numbers."""
    env = _environment(policy, samples=_SHOWN_SAMPLES)
    env.seed(seed)
    return collect(
        policy, env, len(DEMO_PROMPTS), SamplingConfig(max_new_tokens=MAX_NEW_TOKENS, seed=seed + 1)
    )


def _train(agent: PPOAgent, env: TextRLEnv, count: int, console: Console) -> tuple[list[Iteration], bool]:
    """The iterations done, and whether Ctrl-C ended them."""
    done: list[Iteration] = []
    numbers = (
        "score [bold]{task.fields[score]:.2f}[/]  KL {task.fields[kl]:.2f}  {task.fields[speed]:.0f} tokens/s"
    )
    columns = (
        TextColumn("iteration {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TextColumn(numbers),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=count, score=0.0, kl=0.0, speed=0.0)
            for iteration in train(agent, env, iterations=count, prompts_per_iteration=len(DEMO_PROMPTS)):
                done.append(iteration)
                score = iteration.metrics["score"]
                kl = iteration.metrics["kl"]
                speed = float(iteration.collected.rollout.response_mask.sum()) / iteration.seconds
                progress.update(bar, advance=1, score=score, kl=kl, speed=speed)
                if not console.is_terminal:
                    shown = f"score {score:.2f}  KL {kl:.2f}  {speed:.0f} tokens/s"
                    console.print(f"iteration {len(done)}/{count}  {shown}")
    except KeyboardInterrupt:
        return done, True
    return done, False


def _table(before: Collected, after: Collected) -> Table:
    table = Table(title="the same prompts, the same random numbers", title_justify="left")
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, overflow="fold")
    first = {item["input"]: _SHOWN_SAMPLES * p for p, item in enumerate(before.items)}
    for p, item in enumerate(after.items[:10]):
        text_before = before.rollout.texts[first[item["input"]]]
        text_after = after.rollout.texts[_SHOWN_SAMPLES * p]
        # escaped, because a model may say [/] too
        table.add_row(item["input"], escape(text_before.strip()), escape(text_after.strip()))
    return table


def _check_in_fresh_process(policy: Policy, base_model: Path, adapter: Path, console: Console) -> bool:
    """Greedy continuations and logits of the policy against plain transformers + peft in another process."""
    assert policy.tokenizer is not None, "the demo's model has one"
    probes = [encode_prompt(policy.tokenizer, prompt) for prompt in DEMO_PROMPTS]
    with spinner(console, "loading the adapter with plain transformers + peft in a fresh process"):
        answers = answers_of_fresh_process(base_model, adapter, probes, MAX_NEW_TOKENS)
        agreement = compare(policy, probes, answers)
    console.print(str(agreement))
    return agreement.same_continuations == agreement.rows


def _draw(summary: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (score, kl) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    iterations = range(1, summary["iterations"] + 1)
    score.plot(iterations, summary["score_per_iteration"], color="tab:green", marker="o", markersize=3)
    title = f"tiny {summary['family']} model on {summary['servers'] or 'no'} Petals servers"
    score.set(ylabel="score (0 to 1)", ylim=(0, 1.05), title=title)
    kl.plot(iterations, summary["kl_per_iteration"], color="tab:blue", marker="o", markersize=3)
    kl.set(ylabel="KL to base\n(nats per response)", xlabel="iteration")
    kl.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (score, kl):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
