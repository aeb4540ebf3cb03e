"""Counting the bytes of tensors that a client exchanges with a swarm."""

from __future__ import annotations

from collections import Counter


class Traffic:
    """Bytes of tensors sent and received, by kind: "activations", "gradients", "adapters"."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    @property
    def total_sent(self) -> int:
        """Bytes sent, all kinds together."""
        return sum(self.sent.values())

    @property
    def total_received(self) -> int:
        """Bytes received, all kinds together."""
        return sum(self.received.values())
