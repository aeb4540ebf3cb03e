"""Inputs of a forward, kept until the backward that needs them again, so that they travel once.

Lives in the handler's process, where all requests of a client's stream arrive. Nothing depends on it: what is
not here any more, the client sends. Knows nothing about blocks or adapters.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from textrl_swarm.swarm.protocol import inputs_missing

_LEAST_BYTES = 1 << 16  # that one counts for, so that their number has a bound too


class KeptInputs:
    """Hidden states by the name that the client gave them.

    Args:
        max_bytes: of all of them; the oldest go first.
        max_bytes_per_client: of one client's; its own oldest go first.
    """

    def __init__(self, max_bytes: int, max_bytes_per_client: int):
        self._max_bytes = max_bytes
        self.max_bytes_per_client = max_bytes_per_client
        self._kept: OrderedDict[str, tuple[str, Tensor]] = OrderedDict()

    def put(self, owner: str, name: str, hidden: Tensor) -> None:
        """Keeps a copy of hidden states (B, S, W) in main memory, if they fit at all."""
        if max(_LEAST_BYTES, hidden.nbytes) > min(self._max_bytes, self.max_bytes_per_client):
            return
        self._kept[name] = owner, hidden.detach().to("cpu", copy=True)
        while self._bytes(owner) > self.max_bytes_per_client:
            del self._kept[next(kept for kept, (whose, _) in self._kept.items() if whose == owner)]
        while self._bytes() > self._max_bytes:
            self._kept.popitem(last=False)

    def take(self, name: str) -> Tensor:
        """Gives them back, and forgets them. Raises InputsMissing."""
        try:
            return self._kept.pop(name)[1]
        except KeyError:
            raise inputs_missing(name) from None

    def _bytes(self, owner: str | None = None) -> int:
        sizes = [hidden.nbytes for whose, hidden in self._kept.values() if owner in (None, whose)]
        return sum(max(_LEAST_BYTES, size) for size in sizes)
