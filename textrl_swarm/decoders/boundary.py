"""What travels between two blocks: hidden states and, in some decoders, tensors beside them.

Everything is one tensor (B, S, W), hidden states first, so that chains, sessions and the wire know nothing of
parts. For most decoders W = H. GLM-5's blocks also hand on which tokens to attend to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from textrl_swarm.errors import ModelError

# Whole numbers travel as digits: 0 to 127 are exact in every dtype, 3 of them count to two million.
_BASE, _DIGITS = 128, 3


@dataclass(frozen=True)
class Boundary:
    """Of one model."""

    hidden_size: int
    """H"""

    parts: tuple[str, ...] = ()
    """The arguments by which a block is handed what the one before returned beside its hidden states."""

    def pack(self, hidden: Tensor, parts: Mapping[str, Tensor | None]) -> Tensor:
        """One tensor (B, S, W) for hidden states (B, S, H) and whole numbers (B, S, n); W depends on n.

        Nothing is added when no block has made a part yet.
        """
        if not any(parts.get(name) is not None for name in self.parts):
            return hidden
        columns = [hidden]
        for name in self.parts:
            numbers = parts.get(name)
            if numbers is None:
                numbers = torch.zeros(*hidden.shape[:2], 0, dtype=torch.int64, device=hidden.device)
            count = torch.full_like(hidden[..., :1], numbers.shape[-1], dtype=torch.int64)
            digits = torch.cat([count, numbers], dim=-1)[..., None]
            powers = _BASE ** torch.arange(_DIGITS, device=hidden.device)
            columns.append((digits // powers % _BASE).flatten(-2).to(hidden.dtype))
        return torch.cat(columns, dim=-1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The inverse: hidden states, int32 numbers by name; None = no block has made them yet.

        Raises:
            ModelError: the tensor is of another boundary.
        """
        hidden, rest = packed[..., : self.hidden_size], packed[..., self.hidden_size :].detach()
        parts: dict[str, Tensor | None] = dict.fromkeys(self.parts)
        if rest.shape[-1] == 0:
            return hidden, parts
        if not self.parts or rest.shape[-1] % _DIGITS:
            raise ModelError(
                f"{packed.shape[-1]} numbers per token are no state between two blocks of this model"
            )
        powers = (_BASE ** torch.arange(_DIGITS, device=packed.device)).to(torch.float32)
        numbers = (rest.float().unflatten(-1, (-1, _DIGITS)) * powers).sum(-1).round().to(torch.int32)
        for name in self.parts:
            count = int(numbers[..., 0].max()) if numbers.shape[-1] else -1
            if not 0 <= count < numbers.shape[-1] or bool((numbers[..., 0] != count).any()):
                raise ModelError(f"what arrived is no state between two blocks of this model: {name} is torn")
            parts[name] = numbers[..., 1 : count + 1] if count else None
            numbers = numbers[..., count + 1 :]
        return hidden, parts

    def trial(self, hidden: Tensor, padding: Sequence[int] = ()) -> Tensor:
        """Packed with parts that any block behind the first one takes: the first token, for every token.

        Args:
            padding: see Chunk.
        """
        first = torch.tensor(padding or [0], device=hidden.device)[:, None, None]
        return self.pack(hidden, dict.fromkeys(self.parts, first.expand(*hidden.shape[:2], 1)))


def join_tokens(chunks: Sequence[Tensor]) -> Tensor:
    """Packed tensors of successive tokens as one, each as wide as the widest."""
    width = max(chunk.shape[-1] for chunk in chunks)
    return torch.cat([F.pad(chunk, (0, width - chunk.shape[-1])) for chunk in chunks], dim=1)
