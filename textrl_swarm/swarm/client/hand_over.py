"""Which servers give their outputs straight to which others: what the client has seen of it."""

from __future__ import annotations

import logging
import time

from hivemind.p2p import PeerID

from textrl_swarm.swarm.client.rpc import short_id

logger = logging.getLogger(__name__)

_LEAST_ROUND_TRIP_S = 0.01  # a hand-over takes 8 ms of processor time at both ends, on 2 cores
_AGAIN_S = 120.0  # until servers that could not reach each other are asked again


class HandOvers:
    """Pairs of servers, and when a hand-over between them failed.

    Args:
        is_off: the client relays everything.

    Attributes:
        round_trip_s: from the client to a server and back, where it was measured.
        least_round_trip_s: between nearer servers, a hand-over of one token takes longer than it saves.
    """

    def __init__(self, *, is_off: bool = False):
        self._is_off = is_off
        self.round_trip_s: dict[PeerID, float] = {}
        self.least_round_trip_s = _LEAST_ROUND_TRIP_S
        self._failed_until: dict[tuple[PeerID, PeerID], float] = {}

    def can(self, giver: PeerID, taker: PeerID) -> bool:
        """Whether one may be tried."""
        return (
            not self._is_off
            and giver != taker
            and self._failed_until.get((giver, taker), 0.0) < time.monotonic()
        )

    def saves_time(self, giver: PeerID, taker: PeerID) -> bool:
        """Whether one is worth it in each step of a generation."""
        relayed_s = (self.round_trip_s.get(giver, 0.0) + self.round_trip_s.get(taker, 0.0)) / 2
        return relayed_s >= self.least_round_trip_s and self.can(giver, taker)

    def failed(self, giver: PeerID, taker: PeerID) -> None:
        """From now on the client relays between them, for some minutes."""
        if self.can(giver, taker):
            logger.info(
                "server %s cannot reach server %s; their hidden states are relayed",
                short_id(giver), short_id(taker),
            )  # fmt: skip
            self._failed_until[giver, taker] = time.monotonic() + _AGAIN_S
