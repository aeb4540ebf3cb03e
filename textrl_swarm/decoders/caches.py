"""What a block keeps between the tokens of a generation, in tensors that somebody else allocated.

Transformers' cache layers grow by concatenation, so that each token copies the whole past. These write in
place: keys and values behind the tokens that are there already, windows and states over their old contents.
The numbers are those of transformers' own layers, bit for bit.

Source of the layers' interfaces: transformers/cache_utils.py (5.23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.errors import ModelError

try:
    from transformers.cache_utils import DummyLayer as DummyLayer
except ImportError:  # before 5.21; 5.20 is the last transformers for Python 3.10

    class DummyLayer:  # type: ignore[no-redef]
        """Of a block that keeps nothing."""


Heads: TypeAlias = tuple[int, int]  # heads, numbers per head
State: TypeAlias = tuple[str, int]  # "conv_states" or "recurrent_states", index in the layer

_MIN_ROWS = 16  # whose states fit into a server's caches at least
_TOKENS_PER_ROW = 64  # and else one row for so many tokens

_STATES = ("conv_states", "recurrent_states")


class PlannedLayer(DynamicLayer):
    """A cache of `past` tokens that holds none of them: enough to compute masks and positions."""

    def __init__(self, past: int):
        super().__init__()
        self.past = past

    def get_seq_length(self) -> int:
        """Tokens before this chunk."""
        return self.past


class PlannedWindow(DynamicSlidingWindowLayer):
    """The same with sliding attention."""

    def __init__(self, past: int, window: int):
        super().__init__(sliding_window=window)
        self.cumulative_length = past


class PlannedHybrid(LinearAttentionLayer, PlannedLayer):
    """The same with states beside keys and values."""

    is_compileable = False

    def __init__(self, past: int, number_of_states: int):
        PlannedLayer.__init__(self, past)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.has_previous_state = dict.fromkeys(range(number_of_states), past > 0)


class PlannedStates(LinearAttentionLayer):
    """Nothing but states."""

    def __init__(self, past: int, number_of_states: int):
        super().__init__(number_of_states=number_of_states)
        self.has_previous_state = dict.fromkeys(range(number_of_states), past > 0)


class _InPlace(PlannedLayer):
    """Keys and values (B, heads, max_length, dim) of which the first `past` tokens are there."""

    def __init__(self, keys: Tensor, values: Tensor, past: int):
        super().__init__(past)
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        stop = self.past + key_states.shape[-2]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[..., self.past : stop, :] = new
        self.past = stop
        return self.keys[..., :stop, :], self.values[..., :stop, :]


class _InPlaceIndexed(_InPlace, DynamicIndexedLayer):
    """With the indexer's keys (B, max_length, dim) of sparse attention (DeepSeek V3.2)."""

    def __init__(self, keys: Tensor, values: Tensor, indexer_keys: Tensor, past: int):
        super().__init__(keys, values, past)
        self.indexer_keys, self.indexer_past = indexer_keys, past
        self.indexer_position_ids = None
        self.is_indexer_initialized = True

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        stop = self.indexer_past + indexer_key_states.shape[1]
        self.indexer_keys[:, self.indexer_past : stop] = indexer_key_states
        self.indexer_past = stop
        return self.indexer_keys[:, :stop]


class _InPlaceWindow(DynamicSlidingWindowLayer):
    """Keys and values (B, heads, window - 1, dim) of the last tokens."""

    def __init__(self, keys: Tensor, values: Tensor, past: int, window: int):
        super().__init__(sliding_window=window)
        self.buffers = keys, values
        self.cumulative_length = past
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        held = min(self.cumulative_length, self.sliding_window - 1)
        self.cumulative_length += key_states.shape[-2]
        full = []
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            states = torch.cat([buffer[..., :held, :], new], dim=-2)
            kept = states[..., max(0, states.shape[-2] - self.sliding_window + 1) :, :]
            buffer[..., : kept.shape[-2], :] = kept
            full.append(states)
        return tuple(full)


class _InPlaceHybrid(LinearAttentionLayer, _InPlace):
    """States, and keys and values beside them, in one block (Falcon-H1)."""

    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, past: int, number_of_states: int):
        _InPlace.__init__(self, keys, values, past)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)


@dataclass(frozen=True)
class CacheSpec:
    """The tensors that one block keeps for each row of a generation."""

    key: Heads | None = None

    value: Heads | None = None
    """Differs from `key` where attention keeps a latent (DeepSeek)."""

    window: int | None = None
    """Sliding attention: it looks at so many tokens, the newest included."""

    indexer: int | None = None
    """Numbers per token of the indexer's keys."""

    states: Mapping[State, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    """Shape per row, dtype; their size does not depend on the number of tokens."""

    number_of_states: int = 1

    def tensors(
        self, rows: int, max_length: int, dtype: torch.dtype
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors for `rows` rows of up to `max_length` tokens, in the order that
        `layer` takes them. Their contents may be anything.
        """
        length = max_length if self.window is None else min(max_length, self.window - 1)
        found: list[tuple[tuple[int, ...], torch.dtype]] = []
        for kind in (self.key, self.value):
            if kind is not None:
                found.append(((rows, kind[0], length, kind[1]), dtype))
        if self.indexer is not None:
            found.append(((rows, max_length, self.indexer), dtype))
        found += [((rows, *shape), state_dtype) for shape, state_dtype in self.states.values()]
        return found

    def part(self, tensors: Sequence[Tensor], chunk: Chunk, rows: int) -> list[Tensor]:
        """The views that a chunk of `rows` rows uses; what is left of its columns becomes zeros."""
        stop = chunk.first + rows * chunk.copies
        views = [tensor[chunk.first : stop : chunk.copies] for tensor in tensors]
        if chunk.start:
            for i in range(len(views) - len(self.states)):
                axis = 1 if i == 2 else 2  # the indexer's keys have no heads
                empty = self._held(chunk.width) - self._held(chunk.width - chunk.start)
                if chunk.past == 0:
                    views[i].narrow(axis, 0, empty).zero_()
                views[i] = views[i].narrow(axis, empty, views[i].shape[axis] - empty)
        return views

    def _held(self, columns: int) -> int:
        return columns if self.window is None else min(columns, self.window - 1)

    def layer(self, tensors: Sequence[Tensor], past: int) -> Any:
        """A cache layer over these tensors, which hold `past` tokens; using it writes into them."""
        count = len(tensors) - len(self.states)
        attention, states = tensors[:count], tensors[count:]
        layer = self._attention_layer(attention, past)
        if layer is None:
            layer = LinearAttentionLayer(number_of_states=self.number_of_states) if states else DummyLayer()
        for (name, index), state in zip(self.states, states, strict=True):
            getattr(layer, name)[index] = state
            getattr(layer, f"is_{name}_initialized")[index] = True
            layer.has_previous_state[index] = past > 0
            if name == "conv_states":
                layer.conv_kernel_size[index] = state.shape[-1]
            layer.dtype, layer.device = state.dtype, state.device
        return layer

    def _attention_layer(self, tensors: Sequence[Tensor], past: int) -> Any:
        if not tensors:
            return None
        keys, values = tensors[:2]
        if self.states:
            return _InPlaceHybrid(keys, values, past, self.number_of_states)
        if self.window is not None:
            return _InPlaceWindow(keys, values, past, self.window)
        if self.indexer is not None:
            return _InPlaceIndexed(keys, values, tensors[2], past)
        return _InPlace(keys, values, past)

    @staticmethod
    def of(template: Any, one: Any, two: Any) -> CacheSpec:
        """Read from layers that `fresh(template)` made, after a block ran on one token and on two.

        Raises:
            ModelError: keys or values that do not grow by one entry per token.
        """
        key = value = indexer = None
        if getattr(one, "keys", None) is not None:
            key, value = (_per_token(getattr(one, name), getattr(two, name)) for name in ("keys", "values"))
        if getattr(one, "indexer_keys", None) is not None:
            indexer = one.indexer_keys.shape[-1]
        states = {}
        for name in _STATES:
            for index, state in getattr(one, name, {}).items():
                if state is not None:
                    states[name, index] = tuple(state.shape[1:]), state.dtype
        window = template.sliding_window if is_sliding(template) else None
        return CacheSpec(key, value, window, indexer, states, getattr(template, "number_of_states", 1))


def keep_rows(tensors: Iterable[Tensor], keep: Sequence[int]) -> None:
    """Moves the rows that stay up, in place, to the first ones."""
    for tensor in tensors:
        tensor[: len(keep)] = tensor[torch.tensor(keep, device=tensor.device)]


def copy_rows(tensors: Iterable[Tensor], chunk: Chunk, rows: int) -> None:
    """Gives the other rows with a prompt what was computed for the first of them."""
    stop = chunk.first + rows * chunk.copies
    for tensor in tensors:
        for copy in range(1, chunk.copies):
            computed = tensor[chunk.first : stop : chunk.copies]
            tensor[chunk.first + copy : stop : chunk.copies] = computed


def cache_bytes(specs: Iterable[CacheSpec], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the caches of blocks take together per token, at least 1, and per row beside that."""
    per_token = per_row = 0
    for spec in specs:
        one, two = (tensors_bytes(spec.tensors(1, length, dtype)) for length in (1, 2))
        per_token += two - one
        per_row += 2 * one - two
    return max(1, per_token), per_row


def server_cache_bytes(tokens: int, per_token: int, per_row: int) -> int:
    """Of a server's caches: for so many tokens, and the states of as many rows as may hold them."""
    return tokens * per_token + max(_MIN_ROWS, tokens // _TOKENS_PER_ROW) * per_row


def tensors_bytes(tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of tensors of these shapes and dtypes."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors)


def _per_token(one: Tensor, two: Tensor) -> Heads:
    if one.shape[-2] != 1 or two.shape[-2] != 2:
        shapes = f"{tuple(one.shape)} and {tuple(two.shape)}"
        raise ModelError(f"its keys or values of one and of two tokens have the shapes {shapes}")
    return one.shape[1], one.shape[3]


def is_sliding(layer: Any) -> bool:
    """Whether one of transformers' layers keeps a window of the last tokens."""
    return bool(getattr(layer, "is_sliding", False))


def fresh(template: Any) -> Any:
    """An empty layer that keeps what one of transformers' own keeps (`DynamicCache(config=...).layers`), but
    of a window all tokens.
    """
    if isinstance(template, LinearAttentionCacheLayerMixin):
        options = {"sliding_window": template.sliding_window} if is_sliding(template) else {}
        return type(template)(number_of_states=template.number_of_states, **options)
    return DynamicLayer() if is_sliding(template) else type(template)()


def planned(template: Any, past: int) -> Any:
    """What stands for one of transformers' own layers while arguments are planned."""
    if isinstance(template, LinearAttentionCacheLayerMixin):
        kind = PlannedHybrid if isinstance(template, CacheLayerMixin) else PlannedStates
        return kind(past, template.number_of_states)
    if is_sliding(template):
        return PlannedWindow(past, template.sliding_window)
    return PlannedLayer(past)
