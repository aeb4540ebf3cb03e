"""One batch's generation through the chain, with the attention caches on the servers. Survives the loss of
any server.

Every input chunk of every span is kept; when a server is lost, its blocks go to others and the chunks are
replayed one by one. The same chunks in the same shapes give the same numbers, so on fp32 servers the outcome
is bit-equal to an undisturbed run. (Stock petals 2.2 fails here: its issue 587.) Knows nothing about tokens,
embeddings or sampling.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from textrl_swarm.decoders.boundary import join_tokens
from textrl_swarm.errors import AdapterMissing, ServerFailed
from textrl_swarm.swarm.client.chain import Attempts, BlockChain, run_in_background
from textrl_swarm.swarm.client.routing import Span
from textrl_swarm.swarm.client.rpc import GenerationStream
from textrl_swarm.swarm.protocol import AdapterSnapshot


@dataclass
class _Leg:
    """One span's part of the session."""

    span: Span

    inputs: list[Tensor] = field(default_factory=list)
    """Every chunk (B, k, H) for this span since the session began."""

    stream: GenerationStream | None = None

    done: int = 0
    """Chunks that the present stream has seen."""


class GenerationSession:
    """Context manager; made by SwarmClient.

    Args:
        max_length: tokens per row, reserved on the servers; the most that may be stepped in all.
    """

    def __init__(self, chain: BlockChain, adapter: AdapterSnapshot | None, *, max_length: int):
        self._chain = chain
        self._adapter = adapter
        self._max_length = max_length
        self._legs: list[_Leg] = []

    def step(self, hidden: Tensor) -> Tensor:
        """Output (B, k, H) of all blocks for the next k tokens of each row."""
        tokens_at_once = max(1, self._chain.limits.max_batch_tokens // hidden.shape[0])
        chunks = hidden.detach().cpu().split(tokens_at_once, dim=1)
        outputs = [run_in_background(self._step(chunk)) for chunk in chunks]
        return join_tokens(outputs).to(device=hidden.device, dtype=hidden.dtype)

    async def _step(self, hidden: Tensor) -> Tensor:
        attempts = Attempts("generation", self._chain.calls.timeouts.recovery_s)
        if not self._legs:
            self._legs = [
                _Leg(span) for span in await self._route(0, self._chain.router.num_blocks, attempts)
            ]
        self._legs[0].inputs.append(hidden.to(self._legs[0].span.dtype))
        i = 0
        while i < len(self._legs):
            leg = self._legs[i]
            try:
                hidden = await self._catch_up(i)
                i += 1
            except AdapterMissing:
                self._chain.forget(leg.span, self._adapter)
                attempts.lost_adapter()
                await self._drop_stream(leg)
            except ServerFailed as error:
                self._chain.router.report_failure(leg.span.peer, error)
                await self._drop_stream(leg)
                await attempts.pause(error)
                spans = await self._route(leg.span.start, leg.span.stop, attempts)
                # The first replacement gets the lost server's inputs; the others get the outputs of the one
                # before.
                self._legs[i : i + 1] = [
                    _Leg(span, leg.inputs if n == 0 else []) for n, span in enumerate(spans)
                ]
        return hidden

    async def _route(self, start: int, stop: int, attempts: Attempts) -> list[Span]:
        return await self._chain.router.route(start, stop, timeout_s=attempts.left_s)

    async def _catch_up(self, i: int) -> Tensor:
        """Sends leg i what its stream has not seen, hands new outputs to leg i + 1, returns the last
        output.
        """
        leg = self._legs[i]
        following = self._legs[i + 1] if i + 1 < len(self._legs) else None
        if leg.stream is None:
            key = await self._chain.ensure_pushed(leg.span, self._adapter)
            uids = self._chain.router.uids[leg.span.start : leg.span.stop]
            leg.stream = await self._chain.calls.open_generation(
                leg.span.peer, uids, max_length=self._max_length, key=key
            )
        while leg.done < len(leg.inputs):
            output = await leg.stream.step(leg.inputs[leg.done])
            if following is not None and len(following.inputs) == leg.done:
                following.inputs.append(output.to(following.span.dtype))
            leg.done += 1
        return output

    async def _drop_stream(self, leg: _Leg) -> None:
        stream = leg.stream
        leg.stream = None
        leg.done = 0
        if stream is not None:
            await stream.close()

    def close(self) -> None:
        """Frees the servers' caches. Safe to call twice."""
        legs = self._legs
        self._legs = []
        if legs:
            run_in_background(self._close(legs))

    async def _close(self, legs: list[_Leg]) -> None:
        for leg in legs:
            await self._drop_stream(leg)

    def __enter__(self) -> GenerationSession:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
