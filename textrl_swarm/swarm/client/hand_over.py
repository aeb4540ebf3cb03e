"""Which servers give their outputs straight to which others: what the client has seen of it."""

from __future__ import annotations

import logging
import time

from hivemind.p2p import PeerID

from textrl_swarm.swarm.client.rpc import short_id

logger = logging.getLogger(__name__)

_AGAIN_S = 120.0  # until servers that could not reach each other are asked again


class HandOvers:
    """Pairs of servers, and when a hand-over between them failed.

    Attributes:
        are_wanted: False = the client relays everything.
    """

    def __init__(self) -> None:
        self.are_wanted = True
        self._failed_until: dict[tuple[PeerID, PeerID], float] = {}

    def can(self, giver: PeerID, taker: PeerID) -> bool:
        """Whether one may be tried."""
        return (
            self.are_wanted
            and giver != taker
            and self._failed_until.get((giver, taker), 0.0) < time.monotonic()
        )

    def failed(self, giver: PeerID, taker: PeerID) -> None:
        """From now on the client relays between them, for some minutes."""
        if self.can(giver, taker):
            logger.info(
                "server %s cannot reach server %s; their hidden states are relayed",
                short_id(giver), short_id(taker),
            )  # fmt: skip
            self._failed_until[giver, taker] = time.monotonic() + _AGAIN_S
