"""How often and for how long a request to the swarm is tried again."""

from __future__ import annotations

import asyncio
import logging
import time

from textrl_swarm.errors import RemoteFailure, ServerBusy, ServerFailed

logger = logging.getLogger(__name__)

_MAX_ANSWERED_FAILURES = 3  # errors that servers report themselves before a request is given up
_MAX_LOST_ADAPTERS = 20  # times servers may lose the adapter of one request before it is given up
_MAX_BACKOFF_S = 8.0
_ROOM_AGAIN_S = 1.0


class Attempts:
    """Bounds the retries of one request: by time since it first failed, and by errors that servers report
    themselves.
    """

    def __init__(self, what: str, recovery_s: float):
        self._what = what
        self._recovery_s = recovery_s
        self._count = 0
        self._answered = 0
        self._lost_adapters = 0
        self._deadline: float | None = None

    @property
    def left_s(self) -> float:
        """Seconds until the request is given up."""
        return self._recovery_s if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def lost_adapter(self) -> None:
        """Counts that a server no longer held the adapter. Raises RemoteFailure when that happens too
        often.
        """
        self._lost_adapters += 1
        if self._lost_adapters > _MAX_LOST_ADAPTERS:
            raise RemoteFailure(
                f"{self._what} failed: a server does not keep the adapter ({self._lost_adapters} times), "
                "probably "
                "because too many clients push theirs; start the servers with a larger --adapter_bytes"
            )

    async def pause(self, error: ServerFailed) -> None:
        """Waits before the next attempt. Raises RemoteFailure when the attempts are used up."""
        self._deadline = self._deadline or time.monotonic() + self._recovery_s
        if isinstance(error, ServerBusy):
            await self._wait_for_room(error)
            return
        self._answered += error.answered
        if self._answered >= _MAX_ANSWERED_FAILURES or self.left_s == 0:
            raise RemoteFailure(
                f"{self._what} failed {self._count + 1} times, last: {error}; look at that server's log, "
                "then run again"
            ) from error
        backoff_s = 0.0 if self._count == 0 else 0.5 * 2 ** (self._count - 1)
        delay_s = min(self.left_s, _MAX_BACKOFF_S, backoff_s)
        logger.warning("%s (retry %d in %.1f s)", error, self._count + 1, delay_s)
        self._count += 1
        await asyncio.sleep(delay_s)

    async def _wait_for_room(self, error: ServerBusy) -> None:
        if self.left_s == 0:
            raise RemoteFailure(
                f"{self._what} waited {self._recovery_s:.0f} s: {error}; run again when others are done, or "
                "start more servers"
            ) from error
        logger.warning("%s; waiting for room, for another %.0f s at most", error, self.left_s)
        await asyncio.sleep(min(self.left_s, _ROOM_AGAIN_S))
