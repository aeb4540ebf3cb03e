"""How many answers a lying server gives until it is found, what looking for it costs, and how far honest
servers are from being taken for liars.

    python benchmarks/lies.py [--answers 10000] [--trials 3] [--most 1500] [--lie LIE ...]

Each attack is a server that lies and two that do not, all with all blocks; the client prefers the liar and
trains. Honest servers compute in fp32, bf16, 8 and 4 bits beside each other (in fp16 petals' servers do not
compute on CPUs); each is used in turn, and every answer is compared with another's.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import LyingSwarm, report
from lying_server import LIES, ONE_ROW, SOLD
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LocalSwarm, LoraSettings, PPOConfig, SamplingConfig, ServerChecks, load_policy
from textrl_swarm.learning.ppo import PPO
from textrl_swarm.models.tiny import random_bloom
from textrl_swarm.policies.base import Policy
from textrl_swarm.swarm.client import checks as checks_module
from textrl_swarm.swarm.client.rpc import GenerationStream, ServerCalls

KINDS = ("forward", "generation", "backward", "gradient")
WHOLE = [(0, 4)] * 3
PROMPTS = [[5 + i, 6, 7 + i, 8, 9, 10][: 3 + i % 4] for i in range(8)]
SAMPLING = SamplingConfig(max_new_tokens=12, num_samples=2, stop_token_ids=())
PPO_CONFIG = PPOConfig(epochs=2, minibatch_size=8, kl_coef=0.05, lr=1e-2)
FORMS: dict[str, Sequence[str]] = {
    "fp32": (),
    "bf16": ("--torch_dtype", "bfloat16"),
    "another in bf16": ("--torch_dtype", "bfloat16"),
    "8 bits": ("--quant_type", "int8"),
    "another in 8 bits": ("--quant_type", "int8"),
    "4 bits": ("--quant_type", "nf4"),
    "another in 4 bits": ("--quant_type", "nf4"),
}


class Trainer:
    """A policy that learns from made-up rewards."""

    def __init__(self, swarm: LocalSwarm, checks: ServerChecks | None, lora: LoraSettings | None = None):
        self.policy: Policy = load_policy(
            swarm.model, initial_peers=swarm.initial_peers, lora=lora or LoraSettings(r=4), checks=checks
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in sorted(self.policy.trainable_parameters().items()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        self._ppo = PPO(self.policy, PPO_CONFIG)
        self._rounds = 0

    def round(self) -> None:
        self._rounds += 1
        rollout = self.policy.generate(PROMPTS, SamplingConfig(**{**vars(SAMPLING), "seed": self._rounds}))
        rewards = torch.zeros(rollout.response_mask.shape)
        rewards[:, -1] = (rollout.tokens % 7).float().mean(1)
        self._ppo.update(rollout, rewards)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.policy.close()


# ------------------------------------------------------------------------------------------ honest ones


class MixedSwarm(LocalSwarm):
    """One server of each form, all with all blocks."""

    def __init__(self, model: Path):
        super().__init__(model, 1)
        assert self._spans is not None
        self._spans = [*self._spans] * len(FORMS)

    def _launch(self, i: int, peers: Sequence[str], addresses: Sequence[str] = ()) -> Any:
        common, self._options = self._options, [*self._options, *list(FORMS.values())[i]]
        try:
            return super()._launch(i, peers, addresses)
        finally:
            self._options = common


@contextmanager
def differences() -> Iterator[dict[tuple[str, str, str], list[float]]]:
    """Form, form and kind -> shares of the limit by which answers differed."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    original = checks_module.Checks._excess

    def excess(self: Any, claim: Any, first: Any, second: Any) -> float:
        value = original(self, claim, first, second)
        forms = sorted(next(iter(self._all_weights(answer, None))).form for answer in (first, second))
        found[forms[0], forms[1], claim.what].append(value)
        return value

    with mock.patch.object(checks_module.Checks, "_excess", excess):
        yield found


def honest(model: Path, answers: int) -> tuple[list[list[object]], int, int]:
    """Rows of the largest differences; how many answers were compared; how many servers were refuted."""
    refuted = 0
    with MixedSwarm(model) as swarm, differences() as found:
        peers = [address.rsplit("/", 1)[-1] for server in swarm.servers for address in server.addresses]
        used = itertools.cycle(peers)
        while sum(map(len, found.values())) < answers:
            with Trainer(swarm, ServerChecks(rate=1.0)) as trainer:
                peer = next(used)
                router = trainer.policy._client.router
                for other in router._spans:
                    if str(other.peer) != peer:
                        router._busy_until[other.peer] = math.inf
                for _ in range(4):
                    trainer.round()
                refuted += len(router._refuted)
            print(f"{sum(map(len, found.values()))}/{answers} answers compared", file=sys.stderr, flush=True)
    rows: list[list[object]] = []
    for first, second in sorted({(first, second) for first, second, _ in found}):
        row: list[object] = [f"{first}, {second}"]
        for kind in KINDS:
            own = found.get((first, second, kind), [])
            row.append(f"{statistics.median(own):.2g} ({max(own):.2g})" if own else "-")
        rows.append([*row, sum(len(found.get((first, second, k), [])) for k in KINDS)])
    return rows, sum(map(len, found.values())), refuted


# ---------------------------------------------------------------------------------------------- attacks


def attacked(swarm: LyingSwarm, lie: str, rate: float, most: int, honest_rounds: int = 0) -> tuple[int, bool]:
    """How many answers the liar gave since it began to lie, and whether it was found."""
    (address,) = swarm.servers[0].addresses
    liar = address.rsplit("/", 1)[-1]
    with Trainer(swarm, ServerChecks(rate=rate)) as trainer:
        client = trainer.policy._client
        checks, router = client.chain.checks, client.router

        def answers() -> int:
            """The liar's own, or those of others about which it may have been asked."""
            if lie == ONE_ROW:
                return sum(checks.examined.values())
            return sum(count for (name, _), count in checks.seen.items() if name == liar)

        if lie == ONE_ROW:
            (span,) = (span for span in router._spans if str(span.peer) == liar)
            router._busy_until[span.peer] = math.inf  # others work, and it is asked about them
        for _ in range(honest_rounds):
            trainer.round()
        before = answers()
        swarm.tell(lie)
        try:
            while not router.is_refuted(liar) and answers() - before < most:
                trainer.round()
                assert router._refuted.keys() <= {liar}
        finally:
            swarm.tell("")
        return answers() - before, router.is_refuted(liar)


class Work:
    """Counts what the servers are asked to compute, and what travels."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        forward, backward, send = ServerCalls.forward, ServerCalls.backward, GenerationStream.send

        async def counted_forward(calls: Any, peer: Any, uids: Any, hidden: Any, *args: Any, **options: Any):
            self.tokens["work"] += hidden.shape[:2].numel()
            return await forward(calls, peer, uids, hidden, *args, **options)

        async def counted_backward(calls: Any, peer: Any, uids: Any, inputs: Any, grad: Any, *args: Any):
            self.tokens["work"] += 3 * grad.shape[:2].numel()  # the forward once more, and twice as much
            return await backward(calls, peer, uids, inputs, grad, *args)

        async def counted_send(stream: Any, hidden: Any, *args: Any, **options: Any):
            self.tokens["work"] += hidden.shape[:2].numel()
            return await send(stream, hidden, *args, **options)

        with (
            mock.patch.object(ServerCalls, "forward", counted_forward),
            mock.patch.object(ServerCalls, "backward", counted_backward),
            mock.patch.object(GenerationStream, "send", counted_send),
        ):
            yield


def cost(swarm: LyingSwarm, rate: float, rounds: int) -> tuple[float, float]:
    """Extra computation and extra bytes, as shares, behind the first round."""
    found = []
    for checks in (None, ServerChecks(rate=rate)):
        work = Work()
        with Trainer(swarm, checks) as trainer, work.counting():
            trainer.policy._client.chain.hand_overs._is_off = True
            trainer.round()
            traffic = trainer.policy.traffic
            before = work.tokens["work"], traffic.sent.total() + traffic.received.total()
            for _ in range(rounds):
                trainer.round()
            after = work.tokens["work"], traffic.sent.total() + traffic.received.total()
            found.append([b - a for a, b in zip(before, after, strict=True)])
    (work_before, bytes_before), (work_after, bytes_after) = found
    return work_after / work_before - 1, bytes_after / bytes_before - 1


# ------------------------------------------------------------------------------------------- the tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=10000, help="of honest servers to compare")
    parser.add_argument("--trials", type=int, default=3, help="of each attack")
    parser.add_argument(
        "--most", type=int, default=1500, help="answers of a liar until it counts as not found"
    )
    parser.add_argument("--honest-rounds", type=int, default=2, help="before lies that begin later")
    parser.add_argument("--rate", type=float, default=ServerChecks().rate)
    parser.add_argument("--rounds", type=int, default=150, help="in which the cost is measured")
    parser.add_argument("--hidden", type=int, default=64, help="of the model")
    parser.add_argument("--lie", action="append", choices=[*LIES, SOLD], help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.getLogger("textrl_swarm").setLevel("CRITICAL")
    lies = options.lie or [*LIES, SOLD]
    with tempfile.TemporaryDirectory() as directory:
        model = random_bloom(directory + "/bloom", seed=4, hidden=options.hidden)
        if options.trials:
            with LyingSwarm(model, WHOLE) as swarm:
                extra_work, extra_bytes = cost(swarm, options.rate, options.rounds)
                rows = [_row(swarm, lie, options) for lie in lies if lie != SOLD]
            if SOLD in lies:
                with LyingSwarm(model, WHOLE, SOLD) as swarm:
                    rows.append(_row(swarm, SOLD, options))
            report(
                f"rate {options.rate:g}: {extra_work:.1%} more computation, {extra_bytes:.1%} more bytes",
                ["lie", "found", "answers until then", "begun later", "answers until then"],
                rows,
            )
        if options.answers:
            table, compared, refuted = honest(model, options.answers)
            report(
                f"{compared} answers of honest servers, {refuted} refuted; share of the limit: median (most)",
                ["forms", *KINDS, "compared"],
                table,
            )


def _row(swarm: LyingSwarm, lie: str, options: argparse.Namespace) -> list[object]:
    """Lies from the first answer on, and lies that begin after some rounds of honest work."""
    row: list[object] = [lie]
    for rounds in (0, options.honest_rounds):
        if rounds and lie == SOLD:
            return [*row, "-", "-"]
        trials = [attacked(swarm, lie, options.rate, options.most, rounds) for _ in range(options.trials)]
        given = [answers for answers, _ in trials]
        row += [f"{sum(found for _, found in trials)} of {len(trials)}", _spread(given)]
    print(*row, file=sys.stderr, flush=True)
    return row


def _spread(numbers: Sequence[int]) -> str:
    return f"{statistics.median(numbers):.0f} ({max(numbers)})"


if __name__ == "__main__":
    main()
