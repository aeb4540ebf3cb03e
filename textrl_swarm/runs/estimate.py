"""Memory, bytes and network time of a run or a server: arithmetic before anything is loaded or sent.

All figures assume full-length responses; responses that end early need less. Knows nothing about weights or
clocks; constants that were measured and not derived say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from textrl_swarm.config import LoraSettings, PPOConfig
from textrl_swarm.decoders.block import activations_per_token
from textrl_swarm.decoders.caches import cache_bytes, server_cache_bytes, tensors_bytes
from textrl_swarm.decoders.sharing import WORTHWHILE
from textrl_swarm.decoders.sizes import (
    FP32_BYTES,
    ModelSizes,
    adapted_layers,
    adapter_parameters,
    block_bytes,
    bytes_per_number,
    first_adapted,
    model_sizes,
    value_head_parameters,
)
from textrl_swarm.learning.ppo import EVALUATION_ROWS
from textrl_swarm.maths.losses import LOGITS_CHUNK_TOKENS
from textrl_swarm.models.blocks import inner_blocks, split_evenly
from textrl_swarm.policies.base import MAX_FEATURE_BYTES
from textrl_swarm.swarm.codec import encoded_bytes
from textrl_swarm.swarm.protocol import (
    ADAPTER_STORE_BYTES,
    ATTENTION_CACHE_TOKENS,
    BATCH_TOKENS,
    KEPT_INPUT_BYTES,
    KEPT_INPUT_SHARE,
    micro_batch_tokens,
)

GIB = 1 << 30

_LOGITS_COPIES = 3  # logits, their log-softmax, and the gradient or the filtered copy; fp32
_HOP_OVERHEAD_S = 0.018  # what petals itself adds to every hop (its sequence_manager.py)


# ------------------------------------------------------------------------------------------ a server


def server_memory_bytes(
    sizes: ModelSizes,
    blocks: int,
    precision: str,
    *,
    cache_tokens: int = ATTENTION_CACHE_TOKENS,
    adapter_bytes: int = ADAPTER_STORE_BYTES,
) -> int:
    """Memory (of the GPU, if it has one) of a server that computes in 16 bits and holds `blocks` blocks,
    each as large as the largest.

        blocks * (weights + caches) + pushed adapters + room for a backward

    Args:
        cache_tokens: rows x tokens of all generations together (--attn_cache_tokens).
        adapter_bytes: the store of pushed adapters, which fills up before old ones go (--adapter_bytes).

    Source of the room for a backward: petals' server/server.py, which measured 2 GiB for BLOOM-176B and
    scales it with H.
    """
    largest = 0
    for block, cache in enumerate(sizes.caches):
        cached = server_cache_bytes(cache_tokens, *cache_bytes([cache], torch.bfloat16))
        largest = max(largest, block_bytes(sizes, block, precision) + cached)
    backward = int(2 * GIB / 14336 * sizes.hidden_size)
    return blocks * largest + adapter_bytes + backward


def blocks_that_fit(sizes: ModelSizes, memory_bytes: int, precision: str, **server_options: int) -> int:
    """The most blocks that a server with this much memory can hold; 0 when not even one fits."""
    empty = server_memory_bytes(sizes, 0, precision, **server_options)
    one = server_memory_bytes(sizes, 1, precision, **server_options)
    return max(0, min(sizes.num_blocks, (memory_bytes - empty) // (one - empty)))


# --------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class RunEstimate:
    """What one iteration (a rollout and its update) needs."""

    trainable_parameters: int
    """Numbers in adapter and value head."""

    total_parameters: int
    """Numbers in the base model, wherever it is."""

    adapter_bytes: int
    """Bytes of the adapter in fp32: sent to servers after every optimizer step, and saved."""

    weight_bytes: int
    """Memory on this machine for the frozen weights it holds."""

    training_bytes: int
    """Memory on this machine for the adapter, its gradient, AdamW's two moments and, in a swarm, the copies
    to push.
    """

    working_bytes: int
    """Memory on this machine for logits and, whichever is larger, activations of a minibatch or caches of a
    rollout.
    """

    sent: Mapping[str, int]
    """Bytes this machine sends per iteration, by Traffic's kinds; empty for a local run."""

    received: Mapping[str, int]
    """Bytes this machine receives per iteration, likewise."""

    round_trips: int
    """Trips to a server and back, per iteration, that must wait for one another."""

    @property
    def memory_bytes(self) -> int:
        """Memory on this machine (of the GPU, if the model is there), without about 1 GiB for CUDA and
        libraries.
        """
        return self.weight_bytes + self.training_bytes + self.working_bytes

    @property
    def bytes_sent(self) -> int:
        """Bytes this machine sends per iteration."""
        return sum(self.sent.values())

    @property
    def bytes_received(self) -> int:
        """Bytes this machine receives per iteration."""
        return sum(self.received.values())

    def network_seconds(self, *, bits_per_second: float, rtt_s: float) -> tuple[float, float]:
        """Least seconds that the network takes per iteration: with perfect full duplex, and one direction at
        a time.

            (max(sent, received) or sent + received) * 8 / bandwidth + round trips * (RTT + 18 ms)

        The servers' computing comes on top. `bits_per_second` is this machine's bandwidth per direction.
        """
        waiting = self.round_trips * (rtt_s + _HOP_OVERHEAD_S)
        duplex = max(self.bytes_sent, self.bytes_received)
        serial = self.bytes_sent + self.bytes_received
        return duplex * 8 / bits_per_second + waiting, serial * 8 / bits_per_second + waiting


def estimate_run(
    config: PretrainedConfig,
    lora: LoraSettings,
    *,
    quantization: str | None,
    swarm_servers: int,
    responses: int,
    prompt_tokens: int,
    response_tokens: int,
    epochs: int,
    minibatch_size: int = PPOConfig.minibatch_size,
    micro_batch_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    wire_bytes: int = 4,
    codec: str | None = None,
    local_blocks: tuple[int, int] = (0, 0),
    has_critic: bool = True,
    samples: int = 1,
    dtype: torch.dtype | str | None = None,
    sizes: ModelSizes | None = None,
) -> RunEstimate:
    """What a run will need.

    Args:
        config: of the base model.
        quantization: None, "8bit" or "4bit", of a local model.
        swarm_servers: servers in the chain, each with an even share of the blocks; 0 = the model is on this
            machine.
        responses: per iteration.
        prompt_tokens, response_tokens: per response; the mean and the limit.
        epochs, minibatch_size, micro_batch_tokens: of the update, as in PPOConfig.
        gradient_checkpointing: of a model on this machine.
        wire_bytes: per number of a hidden state: 4 when the servers compute in fp32, 2 in bf16.
        codec: in which hidden states travel, see swarm/codec.py.
        local_blocks: how many of the first, and of the last, are on this machine instead of the swarm.
        has_critic: whether a value head is trained, too.
        samples: responses to each prompt, which is sent once for them.
        dtype: of the weights on this machine; None = as the checkpoint says.
        sizes: what `model_sizes(config)` returned, to spare another second.
    """
    sizes = sizes or model_sizes(config)
    precision = str(dtype or config.dtype or "float32").removeprefix("torch.")
    number_bytes = int(bytes_per_number(precision))
    adapter = adapter_parameters(sizes, lora)
    trainable = adapter + (value_head_parameters(sizes) if has_critic else 0)
    length = prompt_tokens + response_tokens
    minibatch = min(responses, minibatch_size)
    at_once = minibatch  # rows of one forward with gradients
    if micro_batch_tokens is not None:
        at_once = min(minibatch, max(1, micro_batch_tokens // length))
    kept = responses * length * sizes.hidden_size * number_bytes if first_adapted(sizes, lora) else 0
    kept = kept if kept <= MAX_FEATURE_BYTES else 0
    traffic, copies = _NO_TRAFFIC, 4  # value, gradient and AdamW's two moments
    if swarm_servers:
        inner = inner_blocks(sizes.num_blocks, local_blocks)
        ends = [block for block in range(sizes.num_blocks) if block not in inner]
        weights = (sizes.outside + sum(sizes.blocks[block] for block in ends)) * number_bytes
        traffic = _traffic(
            sizes,
            lora,
            inner,
            swarm_servers,
            responses,
            prompt_tokens,
            response_tokens,
            epochs,
            minibatch_size,
            at_once,
            sizes.hidden_size * wire_bytes if codec is None else encoded_bytes(sizes.hidden_size, codec),
            wire_bytes,
            samples,
        )
        copies += 2  # autograd's flat tensors, and the snapshot that is pushed
        first = first_adapted(sizes, lora)
        adapted_hops = sum(stop > first for _, stop in _spans(inner, swarm_servers))
        hidden = sizes.hidden_size * at_once * length * (2 + adapted_hops) * wire_bytes
        logits = _logits_bytes(sizes, max(LOGITS_CHUNK_TOKENS, responses))
        cached = session_cache_bytes(sizes, responses, length, getattr(torch, precision), ends)
        hidden += sizes.hidden_size * at_once * length * sum(end >= first for end in ends) * number_bytes
        if any(end >= first for end in ends):  # one block of one micro-batch at a time
            computed = activations_per_token(sizes.hidden_size, sizes.num_heads, length)
            hidden += 2 * max(length, BATCH_TOKENS) * computed * number_bytes
        working = max(cached, kept + hidden) + logits
    else:
        weights = sizes.outside * number_bytes
        for block in range(sizes.num_blocks):
            weights += block_bytes(sizes, block, quantization or precision, precision)
        cached = session_cache_bytes(sizes, responses, length, getattr(torch, precision))
        sampling = cached + _logits_bytes(sizes, responses)
        activations = activation_bytes(
            sizes, lora, at_once, length, number_bytes, recomputed=gradient_checkpointing
        )
        working = max(sampling, kept + activations + _logits_bytes(sizes, LOGITS_CHUNK_TOKENS))
    return RunEstimate(
        trainable_parameters=trainable,
        total_parameters=sizes.total,
        adapter_bytes=adapter * FP32_BYTES,
        weight_bytes=weights,
        training_bytes=copies * FP32_BYTES * trainable,
        working_bytes=working,
        sent=traffic.sent,
        received=traffic.received,
        round_trips=traffic.round_trips,
    )


def session_cache_bytes(
    sizes: ModelSizes, rows: int, length: int, dtype: torch.dtype, blocks: Iterable[int] | None = None
) -> int:
    """What the blocks, or some of them, keep for a generation of rows of so many tokens."""
    caches = sizes.caches if blocks is None else [sizes.caches[block] for block in blocks]
    return sum(tensors_bytes(cache.tensors(rows, length, dtype)) for cache in caches)


def _spans(inner: range, servers: int) -> list[tuple[int, int]]:
    return [(inner.start + start, inner.start + stop) for start, stop in split_evenly(len(inner), servers)]


def activation_bytes(
    sizes: ModelSizes,
    lora: LoraSettings,
    rows: int,
    length: int,
    number_bytes: int,
    *,
    recomputed: bool = False,
) -> int:
    """What autograd keeps of one forward of rows x length tokens; an estimate.

        per token and block: `activations_per_token` * bytes per number
                             + 4 bytes * inputs of the adapted layers, if those are not fp32

    The last term is PEFT's fp32 copy of the input of LoRA's A. Measured: within 15 % for BLOOM and GPT-2;
    models with fused attention keep a fifth to a half less. Blocks below the first adapted one keep nothing.

    Args:
        recomputed: with gradient checkpointing, which keeps H numbers per token and block, and in backward
            twice what one block keeps: those activations and their gradients. Measured: 0.8 of it for BLOOM,
            0.4 for Llama.
    """
    blocks = sizes.num_blocks - first_adapted(sizes, lora)
    copies = 0
    if number_bytes < FP32_BYTES:
        copies = FP32_BYTES * sum(own.fan_in for own in adapted_layers(sizes, lora))
    per_block = activations_per_token(sizes.hidden_size, sizes.num_heads, length) * number_bytes
    if recomputed:
        inputs = blocks * sizes.hidden_size * number_bytes
        return rows * length * (inputs + 2 * (per_block + math.ceil(copies / blocks)))
    return rows * length * (blocks * per_block + copies)


def _logits_bytes(sizes: ModelSizes, tokens: int) -> int:
    return _LOGITS_COPIES * tokens * sizes.vocab_size * FP32_BYTES


class _Traffic(NamedTuple):
    sent: Mapping[str, int]
    received: Mapping[str, int]
    round_trips: int


_NO_TRAFFIC = _Traffic({}, {}, 0)


def _traffic(
    sizes: ModelSizes,
    lora: LoraSettings,
    inner: range,
    servers: int,
    responses: int,
    prompt_tokens: int,
    response_tokens: int,
    epochs: int,
    minibatch_size: int,
    at_once: int,
    hidden: int,
    wire_bytes: int,
    samples: int,
) -> _Traffic:
    """Bytes sent and received by kind, and round trips that follow one another.

    Servers hand hidden states to each other; in a rollout those that are some way off, as is assumed here.
    The client sends its prompts to each server and gets every server's output, in an update the last one's.
    With H hops in all, L of them with blocks below the first adapted one and U with adapted blocks, P prompt
    tokens of distinct prompts, R response tokens less one per response, n tokens that travel for all
    responses and their prompts (`_travelling`), m those of a minibatch, and E epochs, in units of one hidden
    state, which takes `hidden` bytes (and m = 0 where minibatches are computed in parts):

        sent      P H + R + n (with L > 0) + (2 n - m) (policy and ref) + E n (1 forward + U backward:
                  gradients; inputs too where servers have no room to keep them from the forward)
        received  R H + n (with L > 0) + (2 n - m) + E n (1 + U - 1: the first returns no gradient; the
                  outputs of all where the next server has no room to keep them), and of P H only each
                  prompt's last token from the last hop

    With local blocks in front, the first server returns a gradient too, where they are adapted; with local
    blocks behind, all of a prompt's tokens come back. Where only they are adapted, nothing travels for
    policy, ref and epochs.

    A pass forward through h servers takes h + 1 trips, one back 2 h.

    The adapter is sent once per optimizer step, and the sum of its gradients (fp32) comes back.
    """
    first = first_adapted(sizes, lora)
    spans = _spans(inner, servers)
    hops = servers
    lower = sum(start < first for start, _ in spans)
    upper = sum(stop > first for _, stop in spans)
    returned = upper - (inner.start <= first < inner.stop)  # hops whose gradient comes back
    length = prompt_tokens + response_tokens
    minibatches = math.ceil(responses / minibatch_size)
    prompts = math.ceil(responses / samples)
    parts = math.ceil(min(responses, minibatch_size) / at_once)
    scored = 2 * responses - (at_once if parts == 1 else 0)

    def travelling(rows: float) -> float:
        return _travelling(rows, responses, samples, prompt_tokens, response_tokens)

    rest = responses - at_once
    trained = responses / at_once * travelling(at_once)
    scored_tokens = travelling(at_once) + 2 * travelling(rest) if parts == 1 else 2 * trained
    adapter = adapter_parameters(sizes, lora, inner) * FP32_BYTES
    chosen = responses * (response_tokens - 1)
    below, above = travelling(responses), (scored_tokens + epochs * trained) * bool(upper)
    put_in = prompts * prompt_tokens * hops + chosen + (below if lower else 0) + above
    in_step = trained / responses * at_once * sizes.hidden_size * wire_bytes  # that a server is to keep
    again = max(0.0, 1 - KEPT_INPUT_BYTES / KEPT_INPUT_SHARE / in_step)
    come_out = chosen * hops + (below if lower else 0) + above
    come_out += again * epochs * trained * max(0, upper - 1)
    ends_here = inner.stop < sizes.num_blocks  # whose blocks want all of a prompt's tokens
    of_prompt = prompt_tokens * (hops - 1) + (prompt_tokens if ends_here else 1)
    sent = {
        "activations": round(hidden * (put_in + (1 + again) * epochs * trained * upper)),
        "adapters": epochs * minibatches * adapter,
    }
    received = {
        "activations": round(hidden * (prompts * of_prompt + come_out)),
        "gradients": round(epochs * (hidden * trained * returned + minibatches * adapter)),
    }
    sessions = math.ceil(responses * length / ATTENTION_CACHE_TOKENS)
    evaluated = EVALUATION_ROWS if parts == 1 else at_once
    forward_trips, back_trips = (upper + 1) / 2 * bool(upper), upper
    scoring = (lower + 1) / 2 * bool(lower) + forward_trips * math.ceil(scored / evaluated)
    # A push for each minibatch, forward and backward for each of its parts, in which micro-batches overlap.
    training = epochs * minibatches * (bool(upper) + parts * (forward_trips + back_trips))
    generation = sessions * response_tokens * (hops + 1) / 2
    return _Traffic(sent, received, math.ceil(generation + scoring + training))


def _travelling(rows: float, responses: int, samples: int, prompt_tokens: int, response_tokens: int) -> float:
    """Tokens that travel for some rows, drawn from all responses: a prompt that several of them have in
    common travels once, or once for each micro-batch over which they are spread.
    """
    if rows == 0:
        return 0
    whole = rows * (prompt_tokens + response_tokens)
    prompts = responses / samples
    distinct = prompts * (1 - (1 - rows / responses) ** samples)
    left = distinct * prompt_tokens + rows * response_tokens
    if left > WORTHWHILE * whole:
        return whole
    most = micro_batch_tokens(math.ceil(left), BATCH_TOKENS, prompt_tokens)
    together = rows / distinct
    fitting = max(1, (most - prompt_tokens) // response_tokens)
    return distinct * math.ceil(together / fitting) * prompt_tokens + rows * response_tokens
