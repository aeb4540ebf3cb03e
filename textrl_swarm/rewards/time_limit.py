"""Calling somebody's function for at most so many seconds. Knows nothing about what it does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class TookTooLong(BaseException):
    """Not an Exception: the function's own `except Exception` must not swallow it."""


def within(timeout_s: float | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns or raises.

    In the main thread, a signal interrupts a slow function. Signals do not reach other threads: there the
    function keeps running in a thread of its own.

    Raises:
        TookTooLong: after `timeout_s`; None = wait for ever.
    """
    if timeout_s is None:
        return function(*arguments)
    if threading.current_thread() is threading.main_thread():
        return _until_alarm(timeout_s, function, *arguments)
    return _in_a_thread(timeout_s, function, *arguments)


def _until_alarm(timeout_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Interrupts code that never lets another thread run, too, such as a regular expression that
    backtracks.
    """
    rang = False

    def ring(*_: object) -> None:
        nonlocal rang
        rang = True
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        result = function(*arguments)
    except BaseException as error:
        if rang:  # whatever the function made of the interruption
            raise TookTooLong from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if rang:
        raise TookTooLong
    return result


def _in_a_thread(timeout_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
    outcome: list[tuple[bool, Any]] = []

    def ask() -> None:
        try:
            outcome.append((True, function(*arguments)))
        except BaseException as error:
            outcome.append((False, error))

    # A daemon, because it may still hang when the program ends.
    thread = threading.Thread(target=ask, daemon=True, name="time limit")
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise TookTooLong
    succeeded, result = outcome[0]
    if not succeeded:
        raise result
    return result
