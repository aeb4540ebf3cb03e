"""Finds servers that answer wrong numbers: a share of their work is computed again by others, chosen at
random and unknown to them.

What is compared is what the client sent and got, so it relays everything between servers. Two that contradict
each other are judged by a third or by this machine, never by who came first. Who is refuted is not used any
more, and what it may have touched is thrown away. Where nobody else can compute the blocks, it is said. Knows
nothing about training.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hivemind.p2p import PeerID
from torch import Tensor

from textrl_swarm.config import ServerChecks
from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.errors import AnswersRefuted, BlocksUnavailable, ConfigError, ServerFailed, SwarmError
from textrl_swarm.models.blocks import blocks_text
from textrl_swarm.swarm.client.agreement import comparable, difference_of_tokens, difference_of_vectors, limit
from textrl_swarm.swarm.client.backward import MicroBatchBackward, Piece, Trail
from textrl_swarm.swarm.client.hand_over import HandOvers
from textrl_swarm.swarm.client.own_blocks import HERE, OwnBlocks
from textrl_swarm.swarm.client.passes import Passes
from textrl_swarm.swarm.client.pushed import PushedAdapters
from textrl_swarm.swarm.client.routing import Router, Span
from textrl_swarm.swarm.client.rpc import ServerCalls, short_id
from textrl_swarm.swarm.protocol import AdapterSnapshot, ServedWeights

logger = logging.getLogger(__name__)

_RANDOM = random.SystemRandom()  # servers shall not be able to tell
_LOOKED_AT = 0.1  # least share of the adapters that are checked: who checks must be sent them
_MAX_REMEMBERED = 1000  # of these decisions
_OWN_WEIGHTS = ServedWeights("", "float32", None)  # of OwnBlocks


@dataclass(frozen=True)
class _Answer:
    """What somebody computed."""

    tensors: Sequence[Tensor]
    parts: Trail  # who computed which blocks

    @property
    def peers(self) -> set[PeerID]:
        return {piece.span.peer for piece in self.parts}

    @property
    def boundaries(self) -> set[int]:
        """Blocks whose inputs came from elsewhere."""
        return {piece.span.start for piece in self.parts}


@dataclass(frozen=True)
class _Claim:
    """A server's answer, and how others answer the same."""

    what: str  # "forward", "backward", "gradient" or "generation"
    span: Span
    tensors: Sequence[Tensor]
    ask: Callable[[Passes | OwnBlocks], Awaitable[_Answer]]
    difference: Callable[[Sequence[Tensor], Sequence[Tensor]], float]

    rounded: torch.dtype | None = None
    """To what the client rounded the answer before it was compared."""

    @property
    def is_of_gradients(self) -> bool:
        return self.what in ("backward", "gradient")

    def __str__(self) -> str:
        return f"the {self.what} of {blocks_text(range(self.span.start, self.span.stop))}"


class _Others:
    """All servers but some, and nobody is waited for."""

    def __init__(self, router: Router, but: set[PeerID]):
        self._router = router
        self._but = but
        self.uids = router.uids

    def report_failure(self, peer: PeerID, error: ServerFailed | None = None) -> None:
        """See Router."""
        self._router.report_failure(peer, error)

    def report_success(self, peer: PeerID) -> None:
        """See Router."""
        self._router.report_success(peer)

    async def route(self, start: int, stop: int, *, timeout_s: float) -> list[Span]:
        spans = await self._router.others(start, stop, self._but)
        if spans is None:
            raise BlocksUnavailable(f"nobody else holds {blocks_text(range(start, stop))}")
        return spans


class Checks:
    """Made by BlockChain. The `saw_*` methods are told of what servers answered; `settle` waits for what is
    being checked.

    Attributes:
        seen, examined: answers by (peer id, kind).
        worst: kind -> the largest difference from others' answers, as a share of the limit, that was no lie.
    """

    def __init__(
        self,
        router: Router,
        calls: ServerCalls,
        pushed: PushedAdapters,
        settings: ServerChecks,
        own: OwnBlocks | None,
    ):
        self._router, self._calls, self._pushed = router, calls, pushed
        self._own = own
        self.rate = settings.rate
        self._record = None if settings.record is None else Path(settings.record)
        self._tasks: list[asyncio.Task[None]] = []
        self._refuted: list[str] = []
        self._looked_at: dict[str, bool] = {}  # by the adapter's key
        self._told: set[str] = set()
        self._unproven: Counter[str] = Counter()  # answers of a server since others last agreed with one
        self._agreed: Counter[tuple[str, str]] = Counter()  # answers by (peer id, kind)
        self.seen: Counter[tuple[str, str]] = Counter()
        self.examined: Counter[tuple[str, str]] = Counter()
        self.worst: dict[str, float] = {}
        for peer, reason in _read(self._record):
            router.refute(peer, reason)
            logger.warning("server …%s was refuted before (%s) and is not used", peer[-6:], self._record)

    # ------------------------------------------------------------------------------- what servers answer

    def saw_forward(
        self,
        span: Span,
        inputs: Tensor,
        outputs: Tensor,
        adapter: AdapterSnapshot | None,
        packed: PackedRows | None,
    ) -> None:
        """Outputs (b, S, W) of a span."""
        part = self._sample("forward", span, adapter, inputs, packed)
        if part is None:
            return
        given, claimed = part.of(inputs), part.of(outputs)

        async def ask(passes: Passes | OwnBlocks) -> _Answer:
            found, trail = await passes.forward(given, span.start, span.stop, adapter, part.packed)
            return _Answer([found], trail)

        self._examine(_Claim("forward", span, [claimed], ask, self._of_tokens(given)))

    def saw_backward(
        self, piece: Piece, grad_inputs: Tensor, adapter: AdapterSnapshot, packed: PackedRows | None
    ) -> None:
        """The gradient (b, S, W) of a span's inputs."""
        assert piece.inputs is not None and piece.grad is not None, "the client relays them"
        span = piece.span
        part = self._sample("backward", span, adapter, piece.inputs, packed)
        if part is None:
            return
        claimed, grad = part.of(grad_inputs), part.of(piece.grad)
        own = Piece(span, part.of(piece.inputs), grad=grad)

        async def ask(passes: Passes | OwnBlocks) -> _Answer:
            found, _, trail = await _backward(passes, own, adapter, part.packed, need_input_grad=True)
            assert found is not None, "it was asked for"
            return _Answer([found], trail)

        self._examine(_Claim("backward", span, [claimed], ask, self._of_tokens(grad)))

    def saw_gradients(
        self,
        pieces: Sequence[Piece],
        sums: dict[int, Tensor],
        adapter: AdapterSnapshot,
        packed: Sequence[PackedRows | None],
    ) -> None:
        """One span's gradients of an adapter: block -> sum over the micro-batches in which `pieces` were."""
        span = pieces[0].span
        blocks = adapter.blocks_within(range(span.start, span.stop))
        if not blocks or not self._takes("gradient", span, adapter, of=1):
            return

        async def ask(passes: Passes | OwnBlocks) -> _Answer:
            totals: dict[int, Tensor] = {}
            trails: Trail = []
            for piece, own in zip(pieces, packed, strict=True):
                _, flats, trail = await _backward(passes, piece, adapter, own, need_input_grad=False)
                trails += trail
                for block in blocks:
                    totals[block] = totals[block] + flats[block] if block in totals else flats[block]
            return _Answer([totals[block] for block in blocks], trails)

        claimed = [sums[block] for block in blocks]
        self._examine(_Claim("gradient", span, claimed, ask, difference_of_vectors))

    def rows_of_generation(self, span: Span, adapter: AdapterSnapshot | None, rows: int) -> list[int]:
        """Which rows of a generation shall be checked; see `saw_generated`."""
        return sorted(_RANDOM.sample(range(rows), self._takes("generation", span, adapter, of=rows)))

    def saw_generated(
        self,
        span: Span,
        inputs: Tensor,
        outputs: Tensor,
        at: Sequence[int],
        adapter: AdapterSnapshot | None,
        rounded: torch.dtype,
    ) -> None:
        """One row, whose tokens went in one after the other.

        Args:
            inputs: (S, W) of a span.
            outputs: (n, W) of the tokens `at`.
            rounded: to what the client rounded the outputs.
        """

        async def ask(passes: Passes | OwnBlocks) -> _Answer:
            found, trail = await passes.forward(inputs[None], span.start, span.stop, adapter)
            return _Answer([found[0, at]], trail)

        self._examine(_Claim("generation", span, [outputs], ask, self._of_tokens(inputs[at]), rounded))

    async def settle(self) -> None:
        """Waits until all that was seen is checked.

        Raises:
            AnswersRefuted: a server was refuted, or some contradict each other.
        """
        tasks, self._tasks = self._tasks, []
        await asyncio.gather(*tasks)
        if self._refuted:
            reasons, self._refuted = self._refuted, []
            raise AnswersRefuted("; ".join(reasons))

    # ---------------------------------------------------------------------------------- what is checked

    def _takes(self, what: str, span: Span, adapter: AdapterSnapshot | None, of: int) -> int:
        """How many of so many equal parts of an answer to check."""
        peer = str(span.peer)
        self.seen[peer, what] += 1
        self._unproven[peer] += 1
        rate = self.rate
        if adapter is not None and adapter.blocks_within(range(span.start, span.stop)):
            looked_at = max(_LOOKED_AT, rate)
            looks = self._looked_at.setdefault(adapter.key, _RANDOM.random() < looked_at)
            if len(self._looked_at) > _MAX_REMEMBERED:
                self._looked_at = {adapter.key: looks}
            rate = rate / looked_at if looks else 0.0
        expected = rate * of
        count = int(expected) + (_RANDOM.random() < expected % 1)
        if self._agreed[peer, what] == 0:
            count = max(1, count)
        return min(of, count)

    def _sample(
        self,
        what: str,
        span: Span,
        adapter: AdapterSnapshot | None,
        tensor: Tensor,
        packed: PackedRows | None,
    ) -> _Part | None:
        of = len(tensor) if packed is None else packed.prefixes
        count = self._takes(what, span, adapter, of)
        return _Part(sorted(_RANDOM.sample(range(of), count)), packed) if count else None

    def _examine(self, claim: _Claim) -> None:
        self.examined[str(claim.span.peer), claim.what] += 1
        self._tasks.append(asyncio.ensure_future(self._judge(claim)))

    async def _ask_others(self, claim: _Claim, but: set[PeerID]) -> _Answer | None:
        others = Passes(
            _Others(self._router, but | self._unlike(claim)),
            self._calls,
            self._pushed,
            HandOvers(is_off=True),
            recovery_s=0.0,
        )
        try:
            answer = await claim.ask(others)
            return None if answer.peers & self._unlike(claim) else answer
        except SwarmError as error:
            logger.debug("%s was not checked: %s", claim, error)
            return None

    async def _ask_here(self, claim: _Claim) -> _Answer | None:
        own = self._weights(claim.span)
        if self._own is None or own is None or not comparable(own, _OWN_WEIGHTS):
            return None
        try:
            return await claim.ask(self._own)
        except Exception as error:  # whatever a server's answer may make a block do
            logger.warning("%s could not be computed here: %r", claim, error)
            return None

    async def _judge(self, claim: _Claim) -> None:
        accused = claim.span.peer
        mine = _Answer(claim.tensors, [Piece(claim.span, None)])
        second = await self._ask_others(claim, {accused}) or await self._ask_here(claim)
        if second is None:
            self._tell_unchecked(claim.span)
            return
        excess = self._excess(claim, mine, second)
        if excess <= 1:
            self._unproven[str(accused)] = 0
            self._agreed[str(accused), claim.what] += 1
            self.worst[claim.what] = max(excess, self.worst.get(claim.what, 0.0))
            return
        if HERE in second.peers:
            self._refute({accused}, claim, excess, "this machine computes another")
            return
        names = ", ".join(sorted(map(short_id, second.peers)))
        third = await self._ask_here(claim) or await self._ask_others(claim, {accused, *second.peers})
        seconds_lie = third is not None and self._excess(claim, second, third) > 1
        firsts_lie = third is not None and self._excess(claim, mine, third) > 1
        is_here = third is not None and HERE in third.peers  # and right, even against both of them
        if third is None or (firsts_lie == seconds_lie and not (is_here and firsts_lie)):
            both = f"{short_id(accused)} and {names}"
            reason = f"servers {both} contradict each other, and no third can tell who is wrong"
            self._refute({accused, *second.peers}, claim, excess, reason, is_proven=False)
            return
        judges = "this machine" if is_here else ", ".join(sorted(map(short_id, third.peers)))
        if firsts_lie:
            others = judges if seconds_lie else f"servers {names} and {judges}"
            self._refute({accused}, claim, excess, f"{others} agree on another")
        if seconds_lie and len(second.peers) == 1:
            others = judges if firsts_lie else f"servers {short_id(accused)} and {judges}"
            self._refute(second.peers, claim, excess, f"{others} agree on another")
        elif seconds_lie:
            logger.warning("one of servers %s answers wrong; each is checked when it is used", names)

    def _tell_unchecked(self, span: Span) -> None:
        text = blocks_text(range(span.start, span.stop))
        if text not in self._told:
            self._told.add(text)
            logger.warning(
                "nobody else computes %s with such weights now: what server %s answers cannot be checked; "
                "start another server for these blocks, let this machine compute them (checks: {here: "
                "true}), or trust it",
                text, short_id(span.peer),
            )  # fmt: skip

    def _excess(self, claim: _Claim, first: _Answer, second: _Answer) -> float:
        """Their difference as a share of the limit."""
        blocks = claim.span.stop - claim.span.start
        codec, is_elsewhere = self._calls.codec, first.boundaries != second.boundaries
        largest = max(
            limit(
                one,
                other,
                blocks,
                of_gradients=claim.is_of_gradients,
                codec=codec,
                is_elsewhere=is_elsewhere,
            )
            for one in self._all_weights(first, claim.rounded)
            for other in self._all_weights(second, None)
        )
        return claim.difference(first.tensors, second.tensors) / largest

    def _of_tokens(self, given: Tensor) -> Callable[[Sequence[Tensor], Sequence[Tensor]], float]:
        """Without what travels beside hidden states: which tokens are attended to may be a close call."""
        boundary = self._calls.boundary
        width = given.shape[-1] if boundary is None else boundary.hidden_size

        def difference(claimed: Sequence[Tensor], found: Sequence[Tensor]) -> float:
            (one,), (other,) = claimed, found
            return difference_of_tokens(one[..., :width], other[..., :width], given[..., :width])

        return difference

    def _unlike(self, claim: _Claim) -> set[PeerID]:
        """Servers that compute with weights of another form, as far as they were asked for it."""
        own = self._weights(claim.span)
        found = set()
        for span in self._router.spans:
            held = self._weights(span)
            if own is not None and held is not None and not comparable(own, held):
                found.add(span.peer)
        return found

    def _weights(self, span: Span) -> ServedWeights | None:
        if span.peer == HERE:
            return _OWN_WEIGHTS
        return self._calls.weights_of(span.peer, self._router.uids[span.start])

    def _all_weights(self, answer: _Answer, rounded: torch.dtype | None) -> set[ServedWeights]:
        found = set()
        for piece in answer.parts:
            held = self._weights(piece.span)
            assert held is not None, "who answers was asked for it before"
            dtypes = {held.dtype, held.dtype if rounded is None else str(rounded).removeprefix("torch.")}
            found |= {replace(held, dtype=dtype) for dtype in dtypes}
        return found

    def _refute(
        self, peers: set[PeerID], claim: _Claim, excess: float, why: str, *, is_proven: bool = True
    ) -> None:
        for peer in sorted(map(str, peers)):
            if self._router.is_refuted(peer):
                continue  # by another of its answers
            answers = sum(count for (name, _), count in self.seen.items() if name == peer)
            reason = (
                f"server …{peer[-6:]} is not used any more: {claim} differs by {excess:,.1f} times what "
                f"rounding explains; {why} (it gave {answers} answers, {self._unproven[peer]} since one was "
                "found right)"
            )
            logger.error("%s", reason)
            self._router.refute(peer, reason)
            self._refuted.append(reason)
            if self._record is not None and is_proven:
                with self._record.open("a", encoding="utf-8") as file:
                    entry = {"time": time.time(), "peer": peer, "reason": reason}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class _Part:
    """Some rows of a micro-batch, or some of its prefixes with all rows that share them."""

    chosen: list[int]
    whole: PackedRows | None

    def of(self, tensor: Tensor) -> Tensor:
        """(b', S', W) of (b, S, W)."""
        if self.whole is None:
            return tensor[self.chosen]
        prefixes, rest = self.whole.split(tensor)
        return self.whole.join(prefixes[self.chosen], rest[self._rows])

    @property
    def packed(self) -> PackedRows | None:
        if self.whole is None:
            return None
        return PackedRows(
            self.whole.length, tuple(self.chosen.index(self.whole.index[row]) for row in self._rows)
        )

    @property
    def _rows(self) -> list[int]:
        assert self.whole is not None, "then all rows are what travels"
        return [row for row, prefix in enumerate(self.whole.index) if prefix in self.chosen]


async def _backward(
    passes: Passes | OwnBlocks,
    piece: Piece,
    adapter: AdapterSnapshot,
    packed: PackedRows | None,
    *,
    need_input_grad: bool,
) -> tuple[Tensor | None, dict[int, Tensor], Trail]:
    """Gradients of a piece's inputs and of each block's flat tensor, and who computed them."""
    assert piece.inputs is not None and piece.grad is not None, "the client relays them"
    trail = await passes.way_back(piece.inputs, piece.span.start, piece.span.stop, adapter, packed)
    task = MicroBatchBackward(piece.grad, trail, packed)
    found, flats = await passes.backward(task, adapter, need_input_grad, None)
    return found, flats, trail


def _read(record: Path | None) -> list[tuple[str, str]]:
    """Servers that were refuted before. Raises ConfigError."""
    if record is None:
        return []
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a+", encoding="utf-8") as file:
            file.seek(0)
            entries = [json.loads(line) for line in file if line.strip()]
        return [(str(entry["peer"]), str(entry["reason"])) for entry in entries]
    except OSError as error:
        raise ConfigError(
            f"checks.record: {record} cannot be written ({error}); name another file"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"checks.record: {record} is not a list of refuted servers ({error!r})") from error
