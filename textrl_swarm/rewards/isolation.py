"""What keeps a user's code from changing anything for anybody else: copies of what it gets, and process-wide
settings of its own. Knows nothing about what rewards are.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from textrl_swarm.errors import PromptError

# -------------------------------------------------------------------------------------------- copies

_CONSTANT = frozenset({type(None), bool, int, float, complex, str, bytes})


def private_copy(value: Any) -> Any:
    """A copy that shares nothing changeable with `value`, however deep: containers, arrays, tensors, images
    and other objects are copied.

    Two kinds are shared instead, while the containers around them are copied: callables (functions, models,
    tokenizers), which are no data, and what `copy.deepcopy` refuses (locks, open files, generators).

    Raises:
        PromptError: containers are nested too deep.
    """
    try:
        return _copied(value, {})
    except RecursionError as error:
        raise PromptError("the values of a prompt are nested too deep to be copied; flatten them") from error


def _copied(value: Any, twins: dict[int, Any]) -> Any:
    """`twins`: id -> copy, so that what is there twice stays one object and loops end."""
    kind = type(value)
    if kind in _CONSTANT:
        return value
    if id(value) in twins:
        return twins[id(value)]
    if kind in (dict, list):
        return _refilled(value, kind(), twins)
    if kind in (tuple, set, frozenset):
        return kind([_copied(entry, twins) for entry in value])
    if callable(value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        return _copied_in_part(value, twins)


def _copied_in_part(value: Any, twins: dict[int, Any]) -> Any:
    """For what deepcopy refuses."""
    if isinstance(value, Tensor):  # in the middle of an autograd graph
        return value.detach().clone()
    if isinstance(value, (dict, list)):  # a subclass that holds such a thing
        return _refilled(value, copy.copy(value), twins)
    if isinstance(value, tuple):
        entries = [_copied(entry, twins) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def _refilled(value: Any, twin: Any, twins: dict[int, Any]) -> Any:
    twins[id(value)] = twin
    if isinstance(value, dict):
        for key, entry in value.items():
            dict.__setitem__(twin, key, _copied(entry, twins))
    else:
        list.__setitem__(twin, slice(None), [_copied(entry, twins) for entry in value])
    return twin


# ------------------------------------------------------------------------------ process-wide settings


def _directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


# How to read and to set what a user's code may change and what training depends on. Not among them: the
# random generators, which belong to rewards (training has its own) and are part of a run's checkpoints.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")),
    (partial(torch.is_autocast_enabled, "cuda"), partial(torch.set_autocast_enabled, "cuda")),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_num_threads, torch.set_num_threads),
    (_cuda_device, torch.cuda.set_device),
    (_directory, os.chdir),
)


class OwnSettings:
    """Process-wide settings that belong to one user's code: torch's default dtype and device, gradients,
    autocast, deterministic algorithms, threads and CUDA device, and the current directory.
    """

    def __init__(self, own: Mapping[int, Any] | None = None):
        self._own: dict[int, Any] = dict(own or {})  # index into _SETTINGS -> what the code has set

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, what the code has set the last time holds; what it changes is kept for the next time, and
        undone outside.
        """
        trainers = [read() for read, _ in _SETTINGS]
        for i, setting in self._own.items():
            _apply(i, setting)
        try:
            yield
        finally:
            for i, before in enumerate(trainers):
                after = _SETTINGS[i][0]()
                if after == before:
                    self._own.pop(i, None)
                else:
                    self._own[i] = after
                    _apply(i, before)

    def copy(self) -> OwnSettings:
        """For another use of the same code."""
        return OwnSettings(self._own)


def _apply(i: int, setting: Any) -> None:
    if setting is not None:
        with contextlib.suppress(FileNotFoundError):  # a directory that was removed
            _SETTINGS[i][1](setting)


_LEFT_BY_IMPORT: dict[int, tuple[object, OwnSettings]] = {}  # id of a reward -> the reward, its settings


def keep_settings(reward: object, settings: OwnSettings) -> None:
    """Notes what the module of a reward set when it was imported."""
    _LEFT_BY_IMPORT.setdefault(id(reward), (reward, settings))


def settings_of(reward: object) -> OwnSettings:
    """What the module of a reward set when `load_reward` imported it; nothing for other rewards."""
    _, settings = _LEFT_BY_IMPORT.get(id(reward), (None, OwnSettings()))
    return settings.copy()
