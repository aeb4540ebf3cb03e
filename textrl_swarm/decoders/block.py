"""One block of a decoder, called as its own decoder would call it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from textrl_swarm.decoders.boundary import join_tokens
from textrl_swarm.decoders.caches import CacheSpec, DummyLayer, copy_rows, fresh, planned
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.decoders.planner import Planner
from textrl_swarm.decoders.sharing import PackedRows
from textrl_swarm.errors import ModelError

_PROBE_TOKENS = 13
# Relative difference of hidden states: rounding makes less than 0.01 in bf16, a forgotten past about 1.
_SAME = 0.05


class DecoderBlock(nn.Module):
    """A block with what it needs to run alone.

    Args:
        module: transformers' own block, with weights.
        index: its place in the model.
        planner: of the model.
    """

    def __init__(self, module: nn.Module, index: int, planner: Planner):
        super().__init__()
        self.module = module
        self.index = index
        self.dtype = planner.dtype
        self._planner = planner

    def forward(self, hidden: Tensor, packed: PackedRows | None = None) -> Tensor:
        """Output (B, S, W) for hidden states (B, S, W) from the first token on; W is H for most models, see
        Boundary.

        Args:
            packed: how rows lie in `hidden` (1, n, W) and in the output; None = next to each other.
        """
        if packed is None:
            return self._call(hidden, None, None)
        prefixes, rest = packed.split(hidden)
        layer = copy.deepcopy(self._planner.templates[self.index])
        outputs = [self._call(prefixes, 0, self._cache(layer, 0))]
        packed.reorder(layer)
        outputs.append(self._call(rest, packed.length, self._cache(layer, packed.length)))
        return packed.join(*outputs)

    def _cache(self, layer: Any, past: int) -> Cache:
        """With this layer as the block's own."""
        layers = [planned(template, past) for template in self._planner.templates]
        layers[self.index] = layer
        return Cache(layers=layers)

    def step(self, hidden: Tensor, spec: CacheSpec, tensors: Sequence[Tensor], chunk: Chunk) -> Tensor:
        """Output (B, S, W) for the tokens of a chunk.

        Args:
            tensors: of `spec.tensors`, with the earlier tokens in them; these are added.
        """
        layer = spec.layer(spec.part(tensors, chunk, len(hidden)), chunk.past)
        output = self._call(hidden, chunk.past, self._cache(layer, chunk.past), chunk.padding)
        if chunk.copies > 1:
            copy_rows(tensors, chunk, len(hidden))
        return output

    def _call(
        self, packed: Tensor, past: int | None, cache: Cache | None, padding: tuple[int, ...] = ()
    ) -> Tensor:
        boundary = self._planner.boundary
        hidden, parts = boundary.unpack(packed)
        plan = self._planner.plan(hidden.shape[0], hidden.shape[1], past, padding)
        call = plan.calls[self.index].ready(plan.cache, cache, parts)
        output = self.module(hidden, *call.args, **call.kwargs)
        if not isinstance(output, tuple):
            return output
        return boundary.pack(output[0], dict(zip(boundary.parts, output[1:], strict=False)))


def activations_per_token(hidden_size: int, heads: int, length: int) -> int:
    """Numbers that autograd keeps of one block for each token of a row: equation 1 of Korthikanti et al. 2022
    (arXiv 2205.05198) without dropout.
    """
    return 16 * hidden_size + 2 * heads * length


def cache_spec(module: nn.Module, index: int, planner: Planner) -> CacheSpec:
    """What a block keeps, found by running it; on the meta device, too, before its weights are loaded.

    Raises:
        ModelError: it needs what another block computed, or keeps something that it does not put into the
            cache, e.g. in itself.
    """
    template = planner.templates[index]
    device = next(module.parameters()).device
    if device.type == "meta":
        # Its buffers, too; some blocks replace their buffers while they run.
        module = copy.deepcopy(module).to("meta")
    seen = []
    for length in (1, 2):
        plan = planner.plan(1, length, 0)
        layers = [planned(other, 0) for other in planner.templates]
        layers[index] = layer = fresh(template)
        cache = Cache(layers=layers)
        hidden = torch.zeros(1, length, planner.hidden_size, dtype=planner.dtype)
        hidden, parts = planner.boundary.unpack(planner.boundary.trial(hidden) if index else hidden)
        call = plan.calls[index].ready(plan.cache, cache, parts)
        args, kwargs = tree_map(lambda leaf: _on(device, leaf), (call.args, dict(call.kwargs)))
        try:
            with torch.no_grad():
                module(hidden.to(device), *args, **kwargs)
        except (LookupError, AttributeError, TypeError) as error:
            raise ModelError(
                f"block {index} ({type(module).__name__}) does not run alone: {error!r}; it uses what "
                "another block computed"
            ) from error
        except (NotImplementedError, RuntimeError):  # experts look at numbers, after attention has run
            if device.type != "meta":
                raise
        seen.append(layer)
    if isinstance(template, DummyLayer):
        return CacheSpec()
    try:
        spec = CacheSpec.of(template, *seen)
    except ModelError as error:
        raise ModelError(f"block {index} keeps a cache of its own kind: {error}") from error
    if spec.key is None and not spec.states:
        raise ModelError(
            f"block {index} ({type(module).__name__}) keeps what it has seen outside of the cache, where "
            "generations would mix"
        )
    return spec


def _on(device: torch.device, leaf: Any) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def chunks_are_exact(block: DecoderBlock, spec: CacheSpec) -> bool:
    """Whether a prompt may come in several chunks; transformers' Mamba-1 layers forget the first then.

    Raises:
        ModelError: not even token by token are the results those of the whole prompt.
    """
    planner = block._planner
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, _PROBE_TOKENS, planner.hidden_size), generator=generator)
    hidden = planner.boundary.trial(hidden.to(planner.device, planner.dtype))
    with torch.no_grad():
        whole = block(hidden)
        size = planner.hidden_size
        if not _near(_in_chunks(block, spec, hidden, (_PROBE_TOKENS - 2, 1, 1)), whole, size):
            raise ModelError(
                f"block {block.index} ({type(block.module).__name__}) computes other hidden states token by "
                "token than at once"
            )
        return _near(_in_chunks(block, spec, hidden, (4, 5, 4)), whole, size)


def _in_chunks(block: DecoderBlock, spec: CacheSpec, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
    tensors = _zeros(spec, 1, hidden)
    outputs: list[Tensor] = []
    past = 0
    for chunk in hidden.split(lengths, dim=1):
        outputs.append(block.step(chunk, spec, tensors, Chunk(past)))
        past += chunk.shape[1]
    return join_tokens(outputs)


def padding_is_exact(block: DecoderBlock, spec: CacheSpec) -> bool:
    """Whether rows that begin in different columns come out as each of them alone."""
    planner = block._planner
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn((3, _PROBE_TOKENS, planner.hidden_size), generator=generator)
    plain = plain.to(planner.device, planner.dtype)
    prompts, padding, trial = _PROBE_TOKENS - 2, (0, 2, 5), planner.boundary.trial
    hidden = trial(plain, padding)
    tensors = _zeros(spec, 3, hidden)
    try:
        with torch.no_grad():
            outputs = [block.step(hidden[:, :prompts], spec, tensors, Chunk(0, padding=padding))]
            for past in range(prompts, _PROBE_TOKENS):
                token = hidden[:, past : past + 1]
                outputs.append(block.step(token, spec, tensors, Chunk(past, padding=padding)))
            found = join_tokens(outputs)
            if not torch.isfinite(found).all():
                return False
            for i, empty in enumerate(padding):
                alone = block(trial(plain[i : i + 1, empty:]))
                if not _near(found[i : i + 1, empty:], alone, planner.hidden_size):
                    return False
            return True
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False  # transformers' code for it takes no masks


def sharing_is_exact(block: DecoderBlock) -> bool:
    """Whether prefixes that are computed once give the outputs and gradients of whole rows; some recurrent
    states of transformers' keep no gradients.
    """
    planner = block._planner
    if planner.boundary.parts:
        return False  # as wide as a row is long
    packed = PackedRows(_PROBE_TOKENS - 4, (0, 1, 0))
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn((3, _PROBE_TOKENS, planner.hidden_size), generator=generator)
    rows[2, : packed.length] = rows[0, : packed.length]
    rows = rows.to(planner.device, planner.dtype)
    weights = torch.randn(rows.shape, generator=generator).to(rows)
    try:
        with torch.enable_grad():
            whole = rows.clone().requires_grad_()
            expected = block(whole)
            (gradient,) = torch.autograd.grad(expected, whole, weights)
            shared = packed.pack(rows).requires_grad_()
            found = block(shared, packed)
            (shared_gradient,) = torch.autograd.grad(found, shared, packed.pack_gradient(weights))
    except Exception:  # transformers' code for it takes no such caches
        return False
    expected_gradient = packed.pack_gradient(gradient)
    size = planner.hidden_size
    return _near(packed.unpack(found), expected, size) and _near(shared_gradient, expected_gradient, size)


def _zeros(spec: CacheSpec, rows: int, hidden: Tensor) -> list[Tensor]:
    shapes = spec.tensors(rows, _PROBE_TOKENS, hidden.dtype)
    return [torch.zeros(shape, dtype=dtype, device=hidden.device) for shape, dtype in shapes]


def _near(a: Tensor, b: Tensor, hidden_size: int) -> bool:
    a, b = a[..., :hidden_size], b[..., :hidden_size]
    return bool((a - b).float().norm() < _SAME * b.float().norm())
