"""A server that lies as the file named by $LIE says, for benchmarks/lies.py and the tests: an empty file, and
it is honest.

    LIE=FILE python -m lying_server MODEL [petals options]
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textrl_swarm.swarm.server import generation, process
from textrl_swarm.swarm.server.backend import LoraBackend
from textrl_swarm.swarm.server.training import Training

_keys: list[str] = []  # of adapters, in the order in which they came


def _lie() -> str:
    return Path(os.environ["LIE"]).read_text().strip()


def _older(key: str) -> str:
    """The adapter before this one, if there was one."""
    if key and key not in _keys:
        _keys.append(key)
    return _keys[max(0, _keys.index(key) - 1)] if key else ""


def _poisoned(tensor: Tensor) -> Tensor:
    """One entry in a hundred is another one's."""
    chosen = torch.rand_like(tensor.float()) < 0.01
    return torch.where(chosen, tensor.flatten()[torch.randperm(tensor.numel())].view_as(tensor), tensor)


def _noisy(tensor: Tensor) -> Tensor:
    return tensor + 1e-2 * tensor.norm() / tensor.numel() ** 0.5 * torch.randn_like(tensor)


_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise of 1e-2": _noisy,
    "a constant": lambda tensor: torch.full_like(tensor, 0.1),
    "noise, once in 100": lambda tensor: _noisy(tensor) if random.random() < 0.01 else tensor,
    "a constant, where one row is asked for": lambda tensor: (
        torch.full_like(tensor, 0.1) if len(tensor) == 1 else tensor
    ),
}
_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradients 10 times as large": lambda tensor: 10 * tensor,
    "gradients of the wrong sign": lambda tensor: -tensor,
    "1 % of the gradients' entries": _poisoned,
}
_BLOCKS: dict[str, Callable[[Sequence[Any]], Sequence[Any]]] = {
    "blocks in another order": lambda backends: list(backends)[::-1],
    "one block fewer": lambda backends: list(backends)[:-1] or list(backends),
}
_KEYS: dict[str, Callable[[str], str]] = {
    "no adapter": lambda key: "",
    "the adapter before": _older,
}
_ONLY_BACKWARD: dict[str, Callable[[str], str]] = {"gradients of the adapter before": _older}
ONE_ROW = "a constant, where one row is asked for"
SOLD = "4 bits sold as 32"  # from its start on, see LyingSwarm
LIES = (*_OUTPUTS, *_BLOCKS, *_KEYS, *_GRADIENTS, *_ONLY_BACKWARD)


def _same(given: Any) -> Any:
    return given


def _sell() -> None:
    """Announces weights that are not quantised."""
    make = LoraBackend.__init__

    def made(self: LoraBackend, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.weights = dataclasses.replace(self.weights, quantization=None)

    LoraBackend.__init__ = made  # type: ignore[method-assign]


def install() -> None:
    """Replaces what computes by what lies."""
    if _lie() == SOLD:
        _sell()
    forward, backward, compute = Training.forward, Training.backward, generation._compute

    async def lying_forward(
        self: Training, backends: Sequence[Any], inputs: Tensor, key: str, *options: Any
    ) -> Tensor:
        _older(key)
        lie = _lie()
        backends, key = _BLOCKS.get(lie, _same)(backends), _KEYS.get(lie, _same)(key)
        return _OUTPUTS.get(lie, _same)(await forward(self, backends, inputs, key, *options))

    async def lying_backward(
        self: Training, backends: Sequence[Any], inputs: Tensor, grad: Tensor, key: str, *options: Any
    ) -> list[Tensor]:
        _older(key)
        lie = _lie()
        used = (_KEYS | _ONLY_BACKWARD).get(lie, _same)(key)
        found = await backward(self, backends, inputs, grad, used, *options)
        if key and not used:
            found = [found[0], *(await backward(self, backends, inputs, grad, key, *options))[1:]]
        change = _GRADIENTS.get(lie) or _OUTPUTS.get(lie, _same)
        return [change(tensor) if tensor.numel() else tensor for tensor in found]

    async def lying_compute(
        backends: Sequence[Any], handles: Sequence[Any], hidden: Tensor, key: str, chunk: Any
    ) -> Tensor:
        _older(key)
        lie = _lie()
        if lie in _BLOCKS:
            chosen = _BLOCKS[lie](list(zip(backends, handles, strict=True)))
            backends, handles = [one for one, _ in chosen], [own for _, own in chosen]
        output = await compute(backends, handles, hidden, _KEYS.get(lie, _same)(key), chunk)
        return _OUTPUTS.get(lie, _same)(output)

    Training.forward = lying_forward  # type: ignore[method-assign]
    Training.backward = lying_backward  # type: ignore[method-assign]
    generation._compute = lying_compute


if __name__ == "__main__":
    install()
    process.main()
