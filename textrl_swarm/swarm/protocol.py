"""What client and server must agree on: names, metadata keys, how an adapter is laid out in bytes and how it gets its key.

An adapter is content-addressed: its key is a digest of its header, and the header holds the digest of every block's tensor. So the same
weights always have the same key, pushing twice changes nothing, and forward and backward that name one key use the same weights.

Layout of one block's tensor: flat fp32; for each target in the header's order A (r, in) row by row, then B (out, r) row by row.
Knows nothing about processes, sockets or training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

CAPABILITY = "textrl-swarm/lora-v1"  # announced among a server's adapters, so that routing can tell who can train
INFO_KEY = "textrl_swarm"  # our entry in the answer of rpc_info; stock clients ignore it
MISSING = "ADAPTER_MISSING"  # starts a server's error text when it does not hold the adapter that a request names
# Metadata key of a request: say how the answer ended. Metadata key of an answer's last message: "" = complete, else the error's text.
ENDING = "textrl_swarm_ending"
REJECTED = "ADAPTER_REJECTED"  # starts a server's error text when it will not store an adapter
_KEY = re.compile(r"lora-[0-9a-f]{40}")


@dataclass(frozen=True)
class AdapterHeader:
    """Everything about an adapter but its numbers."""

    r: int
    alpha: float
    targets: dict[str, tuple[int, int]]  # path of a linear layer inside a block -> (in_features, out_features), in layout order
    digests: dict[int, str]  # block index -> sha256 of its flat tensor

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=False, separators=(",", ":")).encode()

    @staticmethod
    def decode(data: bytes) -> AdapterHeader:
        """Raises ValueError when the bytes are not a header; they come from a stranger."""
        try:
            raw = json.loads(data)
            targets = {str(path): (int(sizes[0]), int(sizes[1])) for path, sizes in raw["targets"].items()}
            digests = {int(block): str(digest) for block, digest in raw["digests"].items()}
            header = AdapterHeader(int(raw["r"]), float(raw["alpha"]), targets, digests)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"malformed adapter header: {error!r}") from error
        sizes_fit = all(fan_in > 0 and fan_out > 0 for fan_in, fan_out in targets.values())
        if header.r < 1 or not 0 < header.alpha < float("inf") or not targets or not sizes_fit or not digests:
            raise ValueError(f"adapter header with impossible values: r={header.r}, alpha={header.alpha}, {len(targets)} targets")
        return header

    @property
    def key(self) -> str:
        return "lora-" + hashlib.sha256(self.encode()).hexdigest()[:40]

    @property
    def block_numel(self) -> int:
        """Numbers in one block's flat tensor."""
        return sum(self.r * (fan_in + fan_out) for fan_in, fan_out in self.targets.values())

    def views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Target path -> (A (r, in), B (out, r)), sharing the memory of a block's flat tensor (block_numel,)."""
        views, start = {}, 0
        for path, (fan_in, fan_out) in self.targets.items():
            a_end, b_end = start + self.r * fan_in, start + self.r * (fan_in + fan_out)
            views[path] = (flat[start:a_end].view(self.r, fan_in), flat[a_end:b_end].view(fan_out, self.r))
            start = b_end
        return views


@dataclass(frozen=True)
class AdapterSnapshot:
    """An adapter frozen at one optimizer step, as it is pushed to servers."""

    header: AdapterHeader
    blocks: Mapping[int, Tensor]  # block index -> flat fp32 (block_numel,), on the CPU
    key: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "key", self.header.key)

    @staticmethod
    def take(r: int, alpha: float, targets: dict[str, tuple[int, int]], blocks: Mapping[int, Tensor]) -> AdapterSnapshot:
        return AdapterSnapshot(AdapterHeader(r, alpha, targets, {block: digest(flat) for block, flat in blocks.items()}), blocks)


def digest(flat: Tensor) -> str:
    """sha256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(flat.detach().contiguous().view(torch.uint8).numpy().data).hexdigest()


def is_adapter_key(name: str | None) -> bool:
    """Whether a request's `active_adapter` names a pushed adapter (and not one that the server loaded at start)."""
    return bool(name) and _KEY.fullmatch(name) is not None
