"""Signs of life: from the process that computes to those that answer, and from them to clients.

An answer may take minutes, so silence alone tells nothing; a stream on which even these signs stop is that of
a server that was killed, frozen or cut off. Knows nothing about what is computed.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from textrl_swarm.swarm.protocol import ALIVE, BEAT_S, CLOSING, ENDING

_TICK_S = 0.5
_DEAD_S = 4.0  # a process that waits for its turn on a busy machine is still alive

FAREWELL_S = 2 * _TICK_S  # in which every stream is told that the server leaves

_BEAT = runtime_pb2.ExpertResponse(metadata=MSGPackSerializer.dumps({ALIVE: True}))


def _last(reason: str) -> runtime_pb2.ExpertResponse:
    return runtime_pb2.ExpertResponse(metadata=MSGPackSerializer.dumps({ENDING: reason, CLOSING: True}))


_STOPPED = _last("the server's computing process has stopped")
_LEAVING = _last("the server leaves the swarm")


class Pulse:
    """Of the process that makes it; other processes, forked later, see whether it still runs."""

    def __init__(self) -> None:
        self._last: Any = multiprocessing.Value(ctypes.c_double, time.monotonic(), lock=False)
        self._is_leaving: Any = multiprocessing.Value(ctypes.c_bool, False, lock=False)
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def _beat(self) -> None:
        while True:
            self._last.value = time.monotonic()
            time.sleep(_TICK_S)

    @property
    def is_leaving(self) -> bool:
        """Whether no stream should be relied on any more."""
        return bool(self._is_leaving.value)

    @is_leaving.setter
    def is_leaving(self, value: bool) -> None:
        self._is_leaving.value = value

    @property
    def is_beating(self) -> bool:
        """Whether the process ran within the last seconds."""
        return time.monotonic() - self._last.value < _DEAD_S  # one clock for all processes of a machine


async def with_signs_of_life(
    responses: AsyncGenerator[runtime_pb2.ExpertResponse, None], pulse: Pulse
) -> AsyncGenerator[runtime_pb2.ExpertResponse, None]:
    """What a stream answers, and a sign whenever it has answered nothing for BEAT_S seconds; ends with an
    error when the pulse stops, or the server leaves.
    """
    following = asyncio.ensure_future(anext(responses))
    try:
        while True:
            silent_s = 0.0
            while not (await asyncio.wait([following], timeout=_TICK_S))[0]:
                silent_s += _TICK_S
                if not pulse.is_beating:
                    yield _STOPPED
                    return
                if pulse.is_leaving:
                    break
                if silent_s >= BEAT_S:
                    yield _BEAT
                    silent_s = 0.0
            if pulse.is_leaving:
                yield _LEAVING
                return
            try:
                response = following.result()
            except StopAsyncIteration:
                return
            yield response
            following = asyncio.ensure_future(anext(responses))
    finally:
        following.cancel()
        await asyncio.wait([following])
        await responses.aclose()
