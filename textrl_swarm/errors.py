"""Every error that this package raises on purpose. Knows nothing about where they are raised.

    TextRLSwarmError
    ├── ConfigError             a setting has an impossible value or an unknown name         (ValueError)
    ├── ShapeError              a tensor has the wrong shape, type or contents               (ValueError)
    ├── ModelError              a model cannot be used
    │   └── NumericsError       a model's logits are NaN or infinite                         (ArithmeticError)
    ├── PromptError             a prompt is empty, malformed or too long                     (ValueError)
    ├── RewardError             a reward function failed or returned no reward               (ValueError)
    ├── AdapterError            an adapter cannot be used with this model
    ├── CheckpointError         a run's directory cannot be continued or exported
    ├── ExportError             an export cannot be written, or differs from what was trained
    ├── PetalsMissing           petals is not installed                                      (ImportError)
    ├── IncompatibleLibrary     an installed library changed something we rely on            (ImportError)
    └── SwarmError              everything that comes from the swarm
        ├── AddressError        an initial peer's address is malformed or nobody answers     (ValueError)
        ├── BlocksUnavailable   no server holds some of the model's blocks
        ├── ServerMismatch      a server holds blocks of another model
        ├── ServerFailed        one server did not answer, or answered with an error
        │   ├── ServerBusy      a server has no room now
        │   └── AccessDenied    a server does not let this client in
        ├── RemoteFailure       a request kept failing until its deadline
        │   └── AnswersRefuted  others compute something else than a server answered
        ├── AdapterMissing      a server does not hold the adapter that a request names
        ├── InputsMissing       a server did not keep the inputs that a request names
        ├── InputsNotFinite     a server was sent NaN or infinite numbers
        ├── AdapterRejected     a server refuses to store an adapter
        └── LaunchError         a server process ended or did not come online in time

Each message says what was seen, with numbers and units, and what to do next. Facts that a program may want
are attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TextRLSwarmError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(TextRLSwarmError, ValueError):
    """A setting has an impossible value or an unknown name."""


class ShapeError(TextRLSwarmError, ValueError):
    """A tensor passed to a function has the wrong shape, type or contents, or a number is out of its
    range.
    """


class ModelError(TextRLSwarmError):
    """A model directory, hub id or model object cannot be used."""


class NumericsError(ModelError, ArithmeticError):
    """A model's logits are NaN or infinite, so no token can be drawn from them."""


class PetalsMissing(TextRLSwarmError, ImportError):
    """petals (or a library it needs) is not installed."""


class IncompatibleLibrary(TextRLSwarmError, ImportError):
    """An installed library changed something that the swarm parts rely on."""


class AdapterError(TextRLSwarmError):
    """An adapter directory cannot be read, or its adapter was made for another model."""


class CheckpointError(TextRLSwarmError):
    """A run's directory cannot be continued or exported: damaged, changed, or of another model."""


class ExportError(TextRLSwarmError):
    """An export cannot be written or uploaded, or differs from what was trained."""


class PromptError(TextRLSwarmError, ValueError):
    """A prompt list is empty, or a prompt is empty, malformed or too long."""


class RewardError(TextRLSwarmError, ValueError):
    """The user's reward function raised, or returned something that is not a reward."""


class SwarmError(TextRLSwarmError):
    """Base of the errors that come from the swarm."""


class AddressError(SwarmError, ValueError):
    """An initial peer's address is malformed, or nobody answers there."""


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


class ServerFailed(SwarmError):
    """One server did not answer, answered nonsense, or its computation raised. The client retries elsewhere.

    Attributes:
        answered: True when the server itself reported the error, so that asking again may give the same.
    """

    def __init__(self, message: str, *, answered: bool = False):
        super().__init__(message)
        self.answered = answered


class ServerBusy(ServerFailed):
    """A server is in order and has no room now: others use it. The client looks for another, or waits."""


class RemoteFailure(SwarmError):
    """A request kept failing until its deadline; the last cause is chained."""


class AnswersRefuted(RemoteFailure):
    """Others compute something else than a server answered. It is not used any more; what it may have touched
    must be computed again.
    """


class AdapterMissing(SwarmError):
    """A server does not hold the adapter that a request names. The client pushes it and asks again."""


class InputsMissing(SwarmError):
    """A server did not keep a forward's inputs for the backward. The client sends them and asks again."""


class InputsNotFinite(SwarmError):
    """A server was sent hidden states or gradients that are NaN or infinite; no other would take them."""


class AccessDenied(ServerFailed):
    """A server does not let this client in: it is not on a list, or does not know the swarm's secret."""


class AdapterRejected(SwarmError):
    """A server refuses to store an adapter: too large, not finite, or malformed."""


class LaunchError(SwarmError):
    """A server process ended or did not come online in time."""


def closest(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to an "unknown name" message, followed by all names that exist."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}known: {', '.join(known)}"
