"""The demo: a tiny BLOOM learns to speak well of things, through real servers on this machine.

Everything it does can be done with the public names alone; it adds progress, a table, a picture and a summary.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from textrl_swarm.actor import TextRLActor
from textrl_swarm.agent import PPOAgent
from textrl_swarm.config import QUANTIZATIONS, LoraSettings, SamplingConfig
from textrl_swarm.display import status
from textrl_swarm.env import TextRLEnv
from textrl_swarm.errors import ConfigError
from textrl_swarm.export import answers_of_fresh_process, compare
from textrl_swarm.policy import Policy, load_policy
from textrl_swarm.rollout import Collected, collect
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.tiny import DEMO_PROMPTS, RECIPE, make_tiny_bloom, opinion
from textrl_swarm.training import Iteration, train

MAX_NEW_TOKENS = 24


class SpeakWell(TextRLEnv):
    """The reward: 1 for a sentence with only good words about its thing, 0 for one with only bad words."""

    def get_reward(self, input_item, predicted_list, finish):
        if not finish:
            return [0] * len(predicted_list)
        return [opinion(self.tokenizer.convert_tokens_to_string(tokens)) for tokens in predicted_list]


@dataclass(frozen=True)
class DemoSettings:
    """What the command line decides."""

    out: Path
    servers: int = 2  # 0 = no swarm, the model on this machine
    quantization: str | None = None
    iterations: int = 20
    seed: int = 0

    def __post_init__(self):  # before the minute that pretraining takes
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantization must be 8bit or 4bit, got {self.quantization!r}")
        if self.servers > RECIPE["layers"]:
            raise ConfigError(f"the demo's model has {RECIPE['layers']} blocks; ask for at most as many servers, not {self.servers}")


def run_demo(settings: DemoSettings, console: Console) -> dict:
    """Runs the demo from pretraining to the check in a fresh process; returns the summary that it wrote.

    Ctrl-C during training keeps what was learned so far: everything after training is still done.
    """
    started = time.perf_counter()
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    base_model = _make_base_model(out / "base_model", settings.seed, console)
    with _policy(base_model, settings, console) as policy:
        actor_env = _environment(policy)
        actor = TextRLActor(actor_env, policy, seed=settings.seed)
        agent = actor.agent_ppo(update_interval=1, minibatch_size=16 * MAX_NEW_TOKENS, epochs=4, lr=3e-3, kl_coef=0.05)
        console.print("reward: the share of good words among a response's opinion words (SpeakWell.get_reward in textrl_swarm/demo.py)")
        before = _listen(policy, settings.seed)
        console.print(f"before training: score {float(before.scores.mean()):.2f} (share of good opinions)\n")
        training_started = time.perf_counter()
        iterations, interrupted = _train(agent, actor_env, settings.iterations, console)
        training_s = time.perf_counter() - training_started
        if interrupted:
            console.print(f"[yellow]interrupted after iteration {len(iterations)}; keeping what was learned[/]")
        after = _listen(policy, settings.seed)
        kl = agent.ppo.divergence(after.rollout)
        console.print(_table(before, after))
        adapter = out / "adapter"
        policy.save_adapter(adapter)
        console.print(f"adapter saved in {adapter} (PEFT format)")
        same = _check_in_fresh_process(policy, base_model, adapter, console)
    tokens = sum(int(i.collected.rollout.response_mask.sum()) for i in iterations)
    summary = {
        "score_before": float(before.scores.mean()),
        "score_after": float(after.scores.mean()),
        "kl": kl,
        "seconds": training_s,
        "seconds_total": time.perf_counter() - started,
        "servers": settings.servers,
        "quantization": settings.quantization,
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
        f"KL to the base model {kl:.2f} nats per response, training {training_s:.0f} s; summary and picture in {out}"
    )
    return summary


def _make_base_model(directory: Path, seed: int, console: Console) -> Path:
    started = time.perf_counter()
    if not console.is_terminal:
        console.print("pretraining a tiny BLOOM on short opinions, good and bad (at most 90 s) ...")
    with Progress(
        TextColumn("pretraining a tiny BLOOM"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.2f}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("", total=1.0, loss=float("nan"))
        model = make_tiny_bloom(directory, seed=seed, on_progress=lambda done, loss: progress.update(bar, completed=done, loss=loss))
    console.print(f"base model in {model} ({time.perf_counter() - started:.0f} s)")
    return model


@contextlib.contextmanager
def _policy(base_model: Path, settings: DemoSettings, console: Console) -> Iterator[Policy]:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    lora = LoraSettings(r=8, alpha=16)
    if settings.servers == 0:
        with load_policy(base_model, quantization=settings.quantization, lora=lora, seed=settings.seed) as policy:
            console.print(f"the model is on this machine{f', in {settings.quantization}' if settings.quantization else ''}")
            yield policy
        return
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        with status(console, f"starting {settings.servers} Petals server(s)"):
            swarm = stack.enter_context(LocalSwarm(base_model, settings.servers, settings.quantization))
        for server in swarm.servers:
            console.print(f"server (pid {server.pid}) holds blocks {server.span[0]}..{server.span[1] - 1}")
        console.print(f"clients join at {swarm.initial_peers[0]} ({time.perf_counter() - started:.0f} s)", soft_wrap=True)
        with status(console, "joining the swarm"):
            policy = stack.enter_context(
                load_policy(base_model, initial_peers=swarm.initial_peers, dht_prefix=swarm.dht_prefix, lora=lora, seed=settings.seed)
            )
        yield policy


def _environment(policy: Policy) -> SpeakWell:
    prompts = [{"input": prompt} for prompt in DEMO_PROMPTS]
    return SpeakWell(None, policy.tokenizer, prompts, max_length=MAX_NEW_TOKENS, compare_sample=4)


def _listen(policy: Policy, seed: int) -> Collected:
    """Eight samples of every prompt, always with the same random numbers."""
    env = SpeakWell(None, policy.tokenizer, [{"input": prompt} for prompt in DEMO_PROMPTS], max_length=MAX_NEW_TOKENS, compare_sample=8)
    env.seed(seed)
    return collect(policy, env, len(DEMO_PROMPTS), SamplingConfig(max_new_tokens=MAX_NEW_TOKENS, seed=seed + 1))


def _train(agent: PPOAgent, env: TextRLEnv, count: int, console: Console) -> tuple[list[Iteration], bool]:
    done: list[Iteration] = []
    columns = (
        TextColumn("iteration {task.completed}/{task.total}"), BarColumn(bar_width=24),
        TextColumn("score [bold]{task.fields[score]:.2f}[/]  KL {task.fields[kl]:.2f}  {task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=count, score=0.0, kl=0.0, speed=0.0)
            for iteration in train(agent, env, iterations=count, prompts_per_iteration=len(DEMO_PROMPTS)):
                done.append(iteration)
                speed = float(iteration.collected.rollout.response_mask.sum()) / iteration.seconds
                shown = {"score": iteration.metrics["score"], "kl": iteration.metrics["kl"], "speed": speed}
                progress.update(bar, advance=1, **shown)
                if not console.is_terminal:
                    console.print(f"iteration {len(done)}/{count}  score {shown['score']:.2f}  KL {shown['kl']:.2f}  {speed:.0f} tokens/s")
    except KeyboardInterrupt:
        return done, True
    return done, False


def _table(before: Collected, after: Collected) -> Table:
    table = Table(title="the same prompts, the same random numbers", title_justify="left")
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, overflow="fold")
    first = {item["input"]: 8 * p for p, item in enumerate(before.items)}
    for p, item in enumerate(after.items[:10]):
        spoken = (before.rollout.texts[first[item["input"]]], after.rollout.texts[8 * p])
        table.add_row(item["input"], *(escape(text.strip()) for text in spoken))  # a model may say [/] too
    return table


def _check_in_fresh_process(policy: Policy, base_model: Path, adapter: Path, console: Console) -> bool:
    """Greedy continuations and logits of the policy against plain transformers + peft in another process."""
    probes = [policy.tokenizer(prompt)["input_ids"] for prompt in DEMO_PROMPTS]
    with status(console, "loading the adapter with plain transformers + peft in a fresh process"):
        agreement = compare(policy, probes, answers_of_fresh_process(base_model, adapter, probes, MAX_NEW_TOKENS))
    console.print(str(agreement))
    return agreement.same_continuations == agreement.rows


def _draw(summary: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (score, kl) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    steps = range(1, summary["iterations"] + 1)
    score.plot(steps, summary["score_per_iteration"], color="tab:green", marker="o", markersize=3)
    score.set(ylabel="score (0 to 1)", ylim=(0, 1.05), title=f"tiny BLOOM on {summary['servers'] or 'no'} Petals servers")
    kl.plot(steps, summary["kl_per_iteration"], color="tab:blue", marker="o", markersize=3)
    kl.set(ylabel="KL to base\n(nats per response)", xlabel="iteration")
    kl.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (score, kl):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
