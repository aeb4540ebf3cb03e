"""What client and server must agree on: names, metadata keys, how an adapter is laid out in bytes and how it
gets its key.

An adapter is content-addressed: its key is a digest of its header, and the header holds the digest of every
block's tensor. So the same weights always have the same key, pushing twice changes nothing, and forward and
backward that name one key use the same weights.

Knows nothing about processes, sockets or training.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from textrl_swarm.decoders.block import cache_spec
from textrl_swarm.decoders.boundary import Boundary
from textrl_swarm.decoders.planner import Planner
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.errors import (
    AccessDenied,
    AdapterMissing,
    AdapterRejected,
    InputsMissing,
    InputsNotFinite,
    ModelError,
    ServerBusy,
    ShapeError,
)
from textrl_swarm.models.base_model import BaseModel
from textrl_swarm.models.layers import LayerSizes
from textrl_swarm.models.quantization import saved_quantization

# ----------------------------------------------------------------------------------- names and sizes

# Announced among a server's adapters, so that routing can tell who can train, and how. v1 had one layout for
# all blocks; v2 generated through petals' rpc_inference, with rows of equal length; v3 had neither codecs nor
# rows that share prefixes; v4 answered one request of a stream after the other, and gave nothing to other
# servers; v5 gave no sign of life while it computed.
CAPABILITY_PREFIX = "textrl-swarm/lora-v"
CAPABILITY = f"{CAPABILITY_PREFIX}6"
INFO_KEY = "textrl_swarm"  # our entry in the answer of rpc_info; stock clients ignore it
# Metadata key of a request: tell how the answer ended. Of an answer's last message: "" = complete, else the
# error.
ENDING = "textrl_swarm_ending"

# Metadata key of a request: how its hidden states and those of its answer are encoded; see swarm/codec.py.
CODEC = "textrl_swarm_codec"

# Metadata keys: of every tensor and ending of an answer, the number of its request in the stream; of an
# ending, that the server reads no more requests from this stream.
NUMBER = "textrl_swarm_number"
CLOSING = "textrl_swarm_closing"

# Metadata key of a message that says nothing else: one comes whenever a stream has been silent for BEAT_S
# seconds. After SILENCE_S without any, the server is taken for lost.
ALIVE = "textrl_swarm_alive"
BEAT_S = 2.0
SILENCE_S = 8

# Metadata key of an answer to a request with `hand_over`: whether the output went to the next server.
HANDED_OVER = "textrl_swarm_handed_over"

# Metadata key of a request: `weights_key` of the blocks that the client expects to find under the uids.
WEIGHTS = "textrl_swarm_weights"

# What a client that knows the swarm's secret puts before its code: as the uid of a stream's first message, or
# behind a block's uid in rpc_info. And under which key the server's entry in rpc_info has the server's code.
JOINING = "\ntextrl_swarm_joining:"
PROOF = "proof"

MICRO_BATCH_TOKENS = 1024  # rows x tokens of one request for forward or backward, at most
_MIN_MICRO_BATCH_TOKENS = 256  # with fewer, the requests cost more than the blocks
_MICRO_BATCHES = 8  # of one large forward or backward, so that all servers of a chain work
MAX_UNPACKED = (
    4  # of rows that share prefixes, tokens with those prefixes over tokens that a request may have
)
_MAX_RECEIVERS = 256  # servers of a chain
LEAST_BYTES_PER_S = 125_000  # 1 Mbit/s: what a hand-over from server to server is given time for
BATCH_TOKENS = 2048  # petals' --max_batch_size: rows x tokens of one request for forward or backward
ATTENTION_CACHE_TOKENS = 4096  # petals' --attn_cache_tokens: rows x tokens of all generations, per block
ADAPTER_STORE_BYTES = 2 << 30  # --adapter_bytes: pushed adapters of all clients together
ADAPTER_STORE_BYTES_PER_CLIENT = 1 << 30  # --adapter_bytes_per_client
ADAPTER_IDLE_S = 60.0  # --adapter_idle_s: since its last use, an adapter may make room for another client's
KEPT_INPUT_BYTES = 1 << 30  # --kept_input_bytes: inputs of forwards, kept for backwards, of all clients
REQUEST_BYTES = 1 << 30  # --request_bytes: requests of all clients that are read or computed
KEPT_INPUT_SHARE = 8  # one client has at most this part of them


def require_servable(base: BaseModel) -> Boundary:
    """What travels between the model's blocks.

    Raises:
        ModelError: before anything is loaded, for a model whose blocks cannot be served one by one, or whose
            weights are quantised on the disk.
    """
    saved = saved_quantization(base)
    if saved is not None:
        raise ModelError(
            f"the weights of {base} are saved in {saved}, which servers cannot cut into blocks: "
            f"serve the model they were made from with --quant_type {'int8' if saved == '8bit' else 'nf4'}"
        )
    planner = Planner(base.config, torch.float32, "cpu", str(base))
    kinds: set[str] = set()
    for i, block in enumerate(Skeleton(base.config, torch.float32).blocks):
        if repr(block) not in kinds:  # it shows modules and sizes
            kinds.add(repr(block))
            try:
                cache_spec(block, i, planner)
            except ModelError as error:
                raise planner.refusal(str(error)) from error
    return planner.boundary


def micro_batch_tokens(tokens: int, max_tokens: int, prefix: int = 0) -> int:
    """Most tokens of one request, of so many in all; it depends neither on servers nor on what was measured.

    Args:
        max_tokens: that the servers take.
        prefix: tokens that rows share: where each request has them again, they are at most about a quarter.
    """
    wanted = max(_MIN_MICRO_BATCH_TOKENS, -(-tokens // _MICRO_BATCHES))
    return min(max_tokens, max(min(MICRO_BATCH_TOKENS, wanted), 4 * prefix))


@dataclass(frozen=True)
class Receiver:
    """To whom a server hands its output, beside its answer to the client: the server that computes next."""

    peer: str
    """Its id in base58."""

    uid: str
    """Of one of the blocks that it holds."""

    session: str
    """The name that the client gave to the generation, or to the request, that waits for it there."""

    last_only: bool = False
    """Whether the client wants the last tokens alone from there."""

    @staticmethod
    def decode_all(raw: Any) -> list[Receiver]:
        """Reads a stranger's list, the next server first. Raises ShapeError."""
        try:
            receivers = [Receiver(str(p), str(u), str(s), bool(last)) for p, u, s, last in raw or ()]
        except (TypeError, ValueError) as error:
            raise ShapeError(f"malformed receivers of an output: {error!r}") from error
        if len(receivers) > _MAX_RECEIVERS:
            raise ShapeError(f"{len(receivers)} receivers of an output, more than {_MAX_RECEIVERS}")
        return receivers


# -------------------------------------------------------------------------------- errors on the wire

_MISSING = "ADAPTER_MISSING"
_INPUTS_MISSING = "INPUTS_MISSING"
_REJECTED = "ADAPTER_REJECTED"
_BUSY = "SERVER_BUSY"
_DENIED = "ACCESS_DENIED"
_NOT_FINITE = "NOT_FINITE"


def adapter_missing(key: str, block: int) -> AdapterMissing:
    """A server's error for a request that names an adapter which was never pushed, or was evicted."""
    return AdapterMissing(f"{_MISSING}:{key}:{block}")


def adapter_rejected(reason: str) -> AdapterRejected:
    """A server's error for an adapter that it will not store."""
    return AdapterRejected(f"{_REJECTED}: {reason}")


def inputs_missing(name: str) -> InputsMissing:
    """A server's error for a backward whose inputs it was to have kept from the forward."""
    return InputsMissing(f"{_INPUTS_MISSING}:{name}")


def server_busy(reason: str) -> ServerBusy:
    """A server's error for a request that it could take at another time."""
    return ServerBusy(f"{_BUSY}: {reason}")


def access_denied(reason: str) -> AccessDenied:
    """A server's error for a peer that it does not let in."""
    return AccessDenied(f"{_DENIED}: {reason}")


def not_finite(what: str) -> InputsNotFinite:
    """A server's error for inputs with NaN or infinite numbers."""
    return InputsNotFinite(f"{_NOT_FINITE}: {what} with NaN or infinite numbers")


def error_from_wire(
    text: str, server: str
) -> AccessDenied | AdapterMissing | AdapterRejected | InputsMissing | InputsNotFinite | ServerBusy | None:
    """The client's error for the text of a server's error; None when the text is of another kind."""
    if _DENIED in text:
        reason = text.partition(_DENIED)[2].removeprefix(": ")
        reason = reason.removesuffix('")').removesuffix("')")  # what is left of a repr
        return AccessDenied(f"server {server} does not let this client in: {reason}")
    if _NOT_FINITE in text:
        return InputsNotFinite(
            f"server {server} was sent {text.partition(_NOT_FINITE)[2].removeprefix(': ')}"
        )
    if _INPUTS_MISSING in text:
        return InputsMissing(text)
    if _MISSING in text:
        return AdapterMissing(text)
    if _REJECTED in text:
        reason = text.partition(_REJECTED)[2].removeprefix(": ")
        return AdapterRejected(f"server {server} refused the adapter: {reason}")
    if _BUSY in text:
        return ServerBusy(f"server {server} is busy: {text.partition(_BUSY)[2].removeprefix(': ')}")
    return None


# ------------------------------------------------------------------------------------ the base model


@dataclass(frozen=True)
class ServedWeights:
    """What a server computes a block with, as it announces it."""

    digest: str
    """Of the checkpoint's numbers; see models/digests.py."""

    dtype: str
    """In which the server computes, e.g. "bfloat16"."""

    quantization: str | None
    """"int8", "nf4" or None."""

    @property
    def form(self) -> str:
        """Everything but the numbers, for messages: "bfloat16", "float16 (nf4)"."""
        return self.dtype if self.quantization is None else f"{self.dtype} ({self.quantization})"


def read_weights(info: Mapping[str, Any], blocks: Iterable[int]) -> dict[int, ServedWeights] | None:
    """Block -> its weights as a server's rpc_info tells them; None when they are not told for all of them."""
    try:
        return {block: ServedWeights(**info["weights"][str(block)]) for block in blocks}
    except (KeyError, TypeError):
        return None


def held_blocks(info: Mapping[str, Any]) -> range | None:
    """The blocks whose weights a server's rpc_info tells; None when it tells none, or other things."""
    try:
        blocks = sorted(map(int, info["weights"]))
    except (KeyError, TypeError, ValueError):
        return None
    found = range(blocks[0], blocks[-1] + 1) if blocks else range(0)
    return found if blocks == [*found] and blocks and read_weights(info, blocks) else None


def weights_key(blocks: Iterable[ServedWeights]) -> str:
    """The name by which a request refers to the weights of its blocks, in order."""
    return hashlib.sha256(json.dumps([astuple(block) for block in blocks]).encode()).hexdigest()[:40]


# ------------------------------------------------------------------------------------------ adapters

_KEY = re.compile(r"lora-[0-9a-f]{40}")


@dataclass(frozen=True)
class AdapterLayout:
    """How the LoRA matrices of one block lie in one flat fp32 tensor.

    For each target in order: A (r, in) row by row, then B (out, r) row by row; of E routed experts, A is
    (r E, in) and B (out, r E), as PEFT has them.
    """

    r: int

    targets: dict[str, LayerSizes]
    """Path inside a block -> sizes."""

    @property
    def block_numel(self) -> int:
        """Numbers in one block's flat tensor."""
        return sum(self.r * sizes.low_rank for sizes in self.targets.values())

    def views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Target path -> (A, B), sharing the memory of a block's flat tensor (block_numel,)."""
        views: dict[str, tuple[Tensor, Tensor]] = {}
        start = 0
        for path, sizes in self.targets.items():
            a, b = sizes.shapes(self.r)
            a_end = start + math.prod(a)
            b_end = a_end + math.prod(b)
            views[path] = (flat[start:a_end].view(a), flat[a_end:b_end].view(b))
            start = b_end
        return views

    def flatten(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The inverse of `views`: target path -> (A, B) as one flat tensor (block_numel,); differentiable."""
        parts = []
        for path in self.targets:
            a, b = matrices[path]
            parts += [a.flatten(), b.flatten()]
        return torch.cat(parts)


@dataclass(frozen=True)
class AdapterHeader:
    """Everything about an adapter but its numbers."""

    r: int
    alpha: float

    kinds: tuple[dict[str, LayerSizes], ...]
    """The targets of each kind of block: path inside a block -> sizes, in layout order."""

    blocks: dict[int, tuple[int, str]]
    """Block index -> its kind, sha256 of its flat tensor."""

    def encode(self) -> bytes:
        """The header as it travels; `decode` reads it."""
        return json.dumps(asdict(self), sort_keys=False, separators=(",", ":")).encode()

    @staticmethod
    def decode(data: bytes) -> AdapterHeader:
        """Reads a stranger's bytes. Raises ShapeError when they are not a header."""
        try:
            raw = json.loads(data)
            kinds = tuple(_read_targets(kind) for kind in raw["kinds"])
            blocks = {int(block): (int(kind), str(digest)) for block, (kind, digest) in raw["blocks"].items()}
            header = AdapterHeader(int(raw["r"]), float(raw["alpha"]), kinds, blocks)
        except (
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            ValueError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ShapeError(f"malformed adapter header: {error!r}") from error
        numbers_fit = header.r >= 1 and 0 < header.alpha < float("inf")
        kinds_fit = all(kinds) and all(kind in range(len(kinds)) for kind, _ in blocks.values())
        sizes_fit = all(min(sizes.weights, *sizes[:2]) > 0 for kind in kinds for sizes in kind.values())
        if not (numbers_fit and kinds_fit and sizes_fit and blocks):
            raise ShapeError(
                f"adapter header with impossible values: r={header.r}, alpha={header.alpha}, "
                f"{len(kinds)} kinds of blocks, {len(blocks)} blocks"
            )
        return header

    @property
    def key(self) -> str:
        """The name by which requests refer to the adapter."""
        return "lora-" + hashlib.sha256(self.encode()).hexdigest()[:40]

    def layout(self, block: int) -> AdapterLayout:
        """How a block's flat tensor is to be read."""
        return AdapterLayout(self.r, self.kinds[self.blocks[block][0]])

    @property
    def scale(self) -> float:
        """The factor of the low-rank update, alpha / r."""
        return self.alpha / self.r


def _read_targets(raw: Mapping[str, Any]) -> dict[str, LayerSizes]:
    return {str(path): read_sizes(sizes) for path, sizes in raw.items()}


def read_sizes(raw: Sequence[Any]) -> LayerSizes:
    """As they travel: [in, out, number of experts or null]."""
    fan_in, fan_out, experts = raw
    return LayerSizes(int(fan_in), int(fan_out), None if experts is None else int(experts))


def adapter_header(
    layouts: Mapping[int, AdapterLayout], alpha: float, digests: Mapping[int, str]
) -> AdapterHeader:
    """The header of an adapter (block index -> layout, digest); blocks with equal layouts are of one kind."""
    kinds: list[dict[str, LayerSizes]] = []
    blocks = {}
    for block, layout in layouts.items():
        # Dicts of equal contents in another order are equal, but not the same layout.
        known = [list(kind.items()) for kind in kinds]
        if list(layout.targets.items()) not in known:
            kinds.append(layout.targets)
            known.append(list(layout.targets.items()))
        blocks[block] = known.index(list(layout.targets.items())), digests[block]
    (r,) = {layout.r for layout in layouts.values()}
    return AdapterHeader(r, alpha, tuple(kinds), blocks)


@dataclass(frozen=True)
class AdapterSnapshot:
    """An adapter frozen at one optimizer step, as it is pushed to servers."""

    header: AdapterHeader

    blocks: Mapping[int, Tensor]
    """Block index -> flat fp32 (block_numel,), on the CPU."""

    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.header.key)

    @staticmethod
    def take(
        layouts: Mapping[int, AdapterLayout], alpha: float, blocks: Mapping[int, Tensor]
    ) -> AdapterSnapshot:
        """Names the contents of these flat tensors (block index -> layout, tensor)."""
        digests = {block: digest(flat) for block, flat in blocks.items()}
        return AdapterSnapshot(adapter_header(layouts, alpha, digests), blocks)

    def blocks_within(self, blocks: Iterable[int]) -> list[int]:
        """Those of these blocks that the adapter changes."""
        return [block for block in blocks if block in self.blocks]


def digest(flat: Tensor) -> str:
    """sha256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(flat.detach().contiguous().view(torch.uint8).numpy().data).hexdigest()


def is_adapter_key(name: str | None) -> bool:
    """Whether a request's `active_adapter` names a pushed adapter, and not one that the server loaded at
    start.
    """
    return name is not None and _KEY.fullmatch(name) is not None
