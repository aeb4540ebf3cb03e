"""Forward and backward through the blocks of a server, with the gradients of adapters.

Blocks that follow each other are one task for the compute process, as many as their activations have room
for: each task costs milliseconds, and a backward runs again what it does not have. Between tasks come those
of others, generation first. Knows nothing about requests, or where adapters come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.swarm.low_rank import applied
from textrl_swarm.swarm.server.accounts import FairTaskPool
from textrl_swarm.swarm.server.adapter_store import AdapterStore
from textrl_swarm.swarm.server.backend import LoraBackend
from textrl_swarm.swarm.server.gradient_sums import GradientSums

Sum = tuple[str, int, int]  # its name, the index of this micro-batch, and their number


class Training:
    """One for all blocks of a server, made before the handlers' processes are forked: `forward` and
    `backward` are called there, and what they submit is computed in the server's own.

    Args:
        max_tokens: rows x tokens of one task.
        max_activation_bytes: of the blocks of one task.

    Attributes:
        backends: the blocks by their names; set before the first request.
    """

    def __init__(
        self,
        store: AdapterStore,
        sums: GradientSums,
        *,
        max_tokens: int,
        max_activation_bytes: int,
        device: torch.device,
    ):
        self._store = store
        self._sums = sums
        self._max_activation_bytes = max_activation_bytes
        self.backends: Mapping[str, LoraBackend] = {}
        self._forward_pool = FairTaskPool(self._forward, max_tokens, "lora_forward", device=device)
        self._backward_pool = FairTaskPool(self._backward, max_tokens, "lora_backward", device=device)
        self.pools = self._forward_pool, self._backward_pool

    async def forward(
        self, backends: Sequence[LoraBackend], inputs: Tensor, key: str, packed: PackedRows | None
    ) -> Tensor:
        """Output (B, S, H) of blocks that follow each other.

        Args:
            key: of the adapter; "" = none.
            packed: how rows lie in inputs and output.
        """
        hidden = inputs
        for group in self._groups(backends, inputs):
            hidden = await self._submit_forward(group, hidden, key, packed)
        return hidden

    async def backward(
        self,
        backends: Sequence[LoraBackend],
        inputs: Tensor,
        grad_outputs: Tensor,
        key: str,
        need_input_grad: bool,
        summed: Sum | None,
        packed: PackedRows | None,
    ) -> list[Tensor]:
        """Gradient of the inputs (B, S, H), or empty when not needed; and of each block's flat tensor of the
        adapter (fp32): empty for a block that the adapter does not change, and with `summed` while
        micro-batches are missing.

        Args:
            inputs, grad_outputs: (B, S, H).
            key: of a pushed adapter; "" = none.
            packed: how rows lie in both.
        """
        groups = self._groups(backends, inputs)
        group_inputs = [inputs]
        for group in groups[:-1]:
            group_inputs.append(await self._submit_forward(group, group_inputs[-1], key, packed))
        grad = grad_outputs
        flats: list[Tensor] = []
        for position in reversed(range(len(groups))):
            needed = need_input_grad or position > 0
            names = [backend.name for backend in groups[position]]
            grad, *own = await self._backward_pool.submit_task(
                group_inputs[position], grad, key, needed, summed, packed, names
            )
            flats = [*own, *flats]
        return [grad, *flats]

    def _groups(self, backends: Sequence[LoraBackend], inputs: Tensor) -> list[Sequence[LoraBackend]]:
        """As many blocks in each as have room, counted from the last: a backward runs those before the last
        group twice.
        """
        rows, length, _ = inputs.shape
        size = max(1, self._max_activation_bytes // backends[0].activation_bytes(rows, length))
        return [backends[max(0, stop - size) : stop] for stop in range(len(backends), 0, -size)][::-1]

    async def _submit_forward(
        self, group: Sequence[LoraBackend], inputs: Tensor, key: str, packed: PackedRows | None
    ) -> Tensor:
        names = [backend.name for backend in group]
        (output,) = await self._forward_pool.submit_task(inputs, key, packed, names)
        return output

    def _forward(
        self, hidden: Tensor, key: str, packed: PackedRows | None, names: Sequence[str]
    ) -> tuple[Tensor, ...]:
        hidden = hidden.to(self.backends[names[0]].dtype)
        for name in names:
            (hidden,) = self.backends[name].forward(hidden, key, packed)
        return (hidden,)

    def _backward(
        self,
        inputs: Tensor,
        grad_outputs: Tensor,
        key: str,
        need_input_grad: bool,
        summed: Sum | None,
        packed: PackedRows | None,
        names: Sequence[str],
    ) -> tuple[Tensor, ...]:
        """As `backward`, for the blocks of one task; runs their forward again."""
        backends = [self.backends[name] for name in names]
        leaves: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.enable_grad():
            inputs = inputs.to(backends[0].dtype).detach().clone().requires_grad_(need_input_grad)
            hidden = inputs
            for backend in backends:
                header, flat = self._store.get(key, backend.block_index) if key else (None, None)
                if header is None or flat is None:
                    hidden = backend.served.block(hidden, packed)
                    continue
                leaf = leaves[backend.block_index] = flat.detach().requires_grad_(True)
                with applied(header, backend.block_index, leaf):
                    hidden = backend.served.block(hidden, packed)
            wanted = [*([inputs] if need_input_grad else []), *leaves.values()]
            grads = list(torch.autograd.grad(hidden, wanted, grad_outputs.to(hidden.dtype)) if wanted else [])
        grad_inputs = grads.pop(0) if need_input_grad else torch.empty(0)
        of_leaves = dict(zip(leaves, grads, strict=True))
        flats = [self._summed(of_leaves.get(backend.block_index), backend, summed) for backend in backends]
        return (grad_inputs, *flats)

    def _summed(self, gradient: Tensor | None, backend: LoraBackend, summed: Sum | None) -> Tensor:
        if gradient is not None and summed is not None:
            name, index, count = summed
            gradient = self._sums.add((name, backend.block_index), index, count, gradient.cpu())
        return torch.empty(0) if gradient is None else gradient
