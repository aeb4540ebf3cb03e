"""Every error a user of this library can meet. Knows nothing about where they are raised.

Each message says what was seen (with numbers and units) and what to do next; facts a program may want stand as attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TextRLSwarmError(Exception):
    """Base of all errors raised on purpose by textrl_swarm."""


class ConfigError(TextRLSwarmError, ValueError):
    """A setting has an impossible value or an unknown name."""


class ModelError(TextRLSwarmError):
    """A model directory, hub id or model object cannot be used."""


class PetalsMissing(TextRLSwarmError, ImportError):
    """petals (or a library it needs) is not installed."""


class IncompatibleLibrary(TextRLSwarmError, ImportError):
    """An installed library changed something the swarm parts rely on."""


class AdapterError(TextRLSwarmError):
    """An adapter directory is unusable, or was made for another model."""


class CheckpointError(TextRLSwarmError):
    """A run's directory cannot be continued or exported: damaged, of another model, changed, or without a finished iteration."""


class ExportError(TextRLSwarmError):
    """An export cannot be written, is not what was trained, or cannot be uploaded."""


class PromptError(TextRLSwarmError, ValueError):
    """A prompt list is empty, or a prompt is empty, malformed or too long."""


class RewardError(TextRLSwarmError, ValueError):
    """The user's reward function raised, or returned something that is not a reward."""


class SwarmError(TextRLSwarmError):
    """Base of the errors that come from the swarm."""


class AddressError(SwarmError, ValueError):
    """An initial peer's address is malformed or nobody answers there."""


class BlocksUnavailable(SwarmError):
    """No server holds some of the model's blocks.

    Attributes:
        missing: indices of the blocks that nobody serves.
    """

    def __init__(self, message: str, missing: tuple[int, ...] = ()):
        super().__init__(message)
        self.missing = missing


class ServerMismatch(SwarmError):
    """A server holds blocks of another model than the client's."""


class RemoteFailure(SwarmError):
    """A request kept failing until its deadline; the last cause is chained."""


class AdapterRejected(SwarmError):
    """A server refused to store an adapter (too large, not finite, or malformed)."""


class LaunchError(SwarmError):
    """A server process ended or did not come online in time."""


def closest(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to an "unknown name" message; lists what exists."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}known: {', '.join(known)}"
