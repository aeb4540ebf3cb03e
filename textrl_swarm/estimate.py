"""How large, how many bytes, how long: arithmetic on a model's configuration, before anything is loaded or sent.

A model without memory (torch's meta device) is built to count parameters, so that every architecture counts itself. All figures are those
of full-length responses: responses that end early need less. Knows nothing about servers, weights or clocks; what is measured instead of
derived says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from textrl_swarm.adapters import choose_targets, find_blocks, first_adapted_block, linear_layers
from textrl_swarm.config import LoraSettings, PPOConfig
from textrl_swarm.errors import ConfigError, ModelError, closest

GIB = 1 << 30
PRECISIONS = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}  # bytes per number of a linear layer
# 8bit: bitsandbytes adds an fp32 scale per row, counted apart. 4bit (nf4): an fp32 scale per 64 numbers; petals' servers compress these
# scales again and need 8 % less than counted here.

_FP32 = 4
_MICRO_BATCH_TOKENS = 1024  # as in swarm/chain.py: an answer to a backward holds the gradients of one micro-batch
_IN_FLIGHT = 4  # likewise: micro-batches that travel at the same time
_CACHE_TOKENS = 4096  # petals' --attn_cache_tokens
_ADAPTER_STORE = 2 * GIB  # --adapter_bytes of our servers
_LOGITS_CHUNK = 512  # tokens whose logits exist at the same time (losses.chunked_logprobs)
_LOGITS_COPIES = 3  # logits, their log-softmax, and the gradient or the filtered copy; fp32
_HOP_OVERHEAD_S = 0.018  # what petals itself adds to every hop (its sequence_manager.py)


@dataclass(frozen=True)
class ModelSizes:
    """Numbers (not bytes) in the parts of a model. What is said of one block is the mean of all."""

    num_blocks: int
    hidden_size: int  # H, numbers per token between two blocks
    head_size: int  # numbers per token that output embeddings and value head read; other than H only in models such as opt-350m
    vocab_size: int
    num_heads: int  # 0 in models without attention
    key_size: int  # numbers per token that one block's cache keeps for the keys, and again for the values
    block: int  # parameters of one block
    outside: int  # parameters of embeddings, final norm and output embeddings (tied ones once): all that a client of a swarm holds
    linears: Mapping[str, tuple[int, int]]  # path of a linear layer inside a block -> (in_features, out_features); those of all blocks
    block_linears: tuple[Mapping[str, tuple[int, int]], ...]  # those of each block

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.num_blocks * self.block + self.outside

    @property
    def block_linear(self) -> int:
        """Parameters of one block that quantization reaches: the weights of its linear layers."""
        return sum(fan_in * fan_out for layers in self.block_linears for fan_in, fan_out in layers.values()) // self.num_blocks


def model_sizes(config: PretrainedConfig) -> ModelSizes:
    """Counts the parameters of a decoder-only causal language model. Raises ModelError for anything else."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ModelError(f"a {config.model_type} model is no causal language model that transformers knows: {error}") from error
    blocks = find_blocks(model)[1]
    block = sum(p.numel() for p in blocks.parameters()) // len(blocks)
    text = config.get_text_config(decoder=True)  # of models that see images too
    block_linears = tuple(linear_layers(one) for one in blocks)
    return ModelSizes(
        num_blocks=len(blocks),
        hidden_size=text.hidden_size,
        head_size=model.get_output_embeddings().weight.shape[1],
        vocab_size=text.vocab_size,
        num_heads=getattr(text, "num_attention_heads", 0),
        key_size=_key_size(text),
        block=block,
        outside=sum(p.numel() for p in model.parameters()) - len(blocks) * block,
        linears={path: sizes for layers in block_linears for path, sizes in layers.items()},
        block_linears=block_linears,
    )


def _key_size(config: PretrainedConfig) -> int:
    heads = getattr(config, "num_attention_heads", 0)
    if heads == 0:  # e.g. RWKV and Mamba: their state does not grow with the sequence
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):  # the latter: Falcon 40B
        return head_dim
    return head_dim * (getattr(config, "num_key_value_heads", None) or heads)


def _adapted(sizes: ModelSizes, lora: LoraSettings) -> list[tuple[int, int]]:
    """(in_features, out_features) of every linear layer that is adapted."""
    targets = choose_targets(sizes.linears, lora.targets)
    adapted_blocks = sizes.block_linears[_first(sizes, lora) :]
    return [fans for layers in adapted_blocks for path, fans in layers.items() if path in targets]


def adapter_parameters(sizes: ModelSizes, lora: LoraSettings) -> int:
    """Numbers in the LoRA tensors: sum over adapted layers of r (in + out). Source: Hu et al. 2021, arXiv 2106.09685, 4.1."""
    return sum(lora.r * (fan_in + fan_out) for fan_in, fan_out in _adapted(sizes, lora))


def value_head_parameters(sizes: ModelSizes) -> int:
    """One linear layer to a number."""
    return sizes.head_size + 1


def block_bytes(sizes: ModelSizes, precision: str, rest: str = "bfloat16") -> int:
    """Memory of one block's weights.

        linear weights * bytes per number (+ 4 bytes per output row in 8 bits) + (norms and biases) * bytes of `rest`

    Args:
        precision: a key of PRECISIONS, of the linear layers.
        rest: precision of what is not quantised, when `precision` is 8bit or 4bit.
    """
    per_number = PRECISIONS[_known(precision)]
    if precision not in ("8bit", "4bit"):
        return int(sizes.block * per_number)
    rows = sum(fan_out for layers in sizes.block_linears for _, fan_out in layers.values()) // sizes.num_blocks
    scales = _FP32 * rows if precision == "8bit" else 0
    return int(sizes.block_linear * per_number) + scales + int((sizes.block - sizes.block_linear) * PRECISIONS[rest])


def _known(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; {closest(precision, PRECISIONS)}")
    return precision


def server_memory_bytes(
    sizes: ModelSizes, blocks: int, precision: str, *, cache_tokens: int = _CACHE_TOKENS, adapter_bytes: int = _ADAPTER_STORE
) -> int:
    """Memory (of the GPU, if it has one) of a server that computes in 16 bits and holds `blocks` blocks.

        blocks * (weights + 2 * key_size * cache_tokens * 2 bytes) + pushed adapters + room for a backward

    Args:
        cache_tokens: rows x tokens of all generations together (--attn_cache_tokens).
        adapter_bytes: the store of pushed adapters, which fills up before old ones go (--adapter_bytes).

    Source of the room for a backward: petals' server/server.py, which measured 2 GiB for BLOOM-176B and scales it with H.
    """
    cache = 2 * sizes.key_size * cache_tokens * 2
    backward = int(2 * GIB / 14336 * sizes.hidden_size)
    return blocks * (block_bytes(sizes, precision) + cache) + adapter_bytes + backward


def blocks_that_fit(sizes: ModelSizes, memory_bytes: int, precision: str, **server_options: int) -> int:
    """The most blocks that a server with this much memory can hold; 0 when not even one."""
    empty, one = (server_memory_bytes(sizes, n, precision, **server_options) for n in (0, 1))
    return max(0, min(sizes.num_blocks, (memory_bytes - empty) // (one - empty)))


@dataclass(frozen=True)
class RunEstimate:
    """What one iteration (a rollout and its update) needs."""

    trainable_parameters: int  # numbers in adapter and value head
    total_parameters: int  # numbers in the base model, wherever it is
    adapter_bytes: int  # of the adapter in fp32: what servers are sent after every optimizer step, and what is saved
    weight_bytes: int  # memory on this machine: the frozen weights it holds
    training_bytes: int  # memory on this machine: adapter, its gradient and AdamW's two moments; in a swarm also the copies to push
    working_bytes: int  # memory on this machine: activations of a minibatch or caches of a rollout, whichever is larger, and logits
    sent: Mapping[str, int]  # bytes this machine sends per iteration, by Traffic's kinds; empty for a local run
    received: Mapping[str, int]  # bytes this machine receives per iteration, likewise
    round_trips: int  # requests per iteration that must wait for the answer to another

    @property
    def memory_bytes(self) -> int:
        """Memory on this machine (of the GPU, if the model is there); CUDA and the libraries' own (about 1 GiB) not counted."""
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
        """Least seconds that the network takes per iteration: with perfect full duplex, and with one direction at a time.

            (max(sent, received) or sent + received) * 8 / bandwidth + round trips * (RTT + 18 ms)

        The servers' computing comes on top. `bits_per_second` is this machine's bandwidth per direction.
        """
        waiting = self.round_trips * (rtt_s + _HOP_OVERHEAD_S)
        duplex, serial = max(self.bytes_sent, self.bytes_received), self.bytes_sent + self.bytes_received
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
    wire_bytes: int = 4,
    dtype: torch.dtype | str | None = None,
) -> RunEstimate:
    """What a run will need.

    Args:
        config: of the base model.
        quantization: None, "8bit" or "4bit", of a local model.
        swarm_servers: servers in the chain, each with an even share of the blocks; 0 = the model is on this machine.
        responses: per iteration.
        prompt_tokens, response_tokens: per response; the mean and the limit.
        epochs, minibatch_size: of the update, as in PPOConfig.
        wire_bytes: per number of a hidden state, 4 when the servers compute in fp32, 2 in bf16.
        dtype: of the weights on this machine; None = as the checkpoint says.
    """
    sizes = model_sizes(config)
    name = str(dtype or config.dtype or "float32").removeprefix("torch.")
    adapter = adapter_parameters(sizes, lora)
    trainable = adapter + value_head_parameters(sizes)
    length, minibatch = prompt_tokens + response_tokens, min(responses, minibatch_size)
    per_number = int(PRECISIONS[_known(name)])
    sent, received, round_trips, copies = {}, {}, 0, 4
    if swarm_servers:
        weights = sizes.outside * per_number
        sent, received, round_trips = _traffic(
            sizes, lora, swarm_servers, responses, prompt_tokens, response_tokens, epochs, minibatch_size, wire_bytes
        )
        copies += 2  # the flat tensors of autograd, and the snapshot that is pushed
        adapted_hops = sum(stop > _first(sizes, lora) for _, stop in _spans(sizes, swarm_servers))
        hidden = sizes.hidden_size * (responses * per_number + minibatch * (1 + adapted_hops) * wire_bytes) * length
        working = hidden + _logits_bytes(sizes, max(_LOGITS_CHUNK, responses))
    else:
        weights = sizes.num_blocks * block_bytes(sizes, quantization or name, name) + sizes.outside * per_number
        cache = 2 * sizes.key_size * sizes.num_blocks * responses * length * per_number + _logits_bytes(sizes, responses)
        working = max(cache, activation_bytes(sizes, lora, minibatch, length, per_number) + _logits_bytes(sizes, _LOGITS_CHUNK))
    return RunEstimate(
        trainable_parameters=trainable, total_parameters=sizes.total, adapter_bytes=adapter * _FP32, weight_bytes=weights,
        training_bytes=copies * _FP32 * trainable, working_bytes=working, sent=sent, received=received, round_trips=round_trips,
    )  # fmt: skip


def activation_bytes(sizes: ModelSizes, lora: LoraSettings, rows: int, length: int, per_number: int) -> int:
    """What autograd keeps of one forward of rows x length tokens, without gradient checkpointing; an estimate.

        per token and block: (16 H + 2 heads * length) * bytes per number + 4 bytes * inputs of the adapted layers, if those are not fp32

    The first term is eq. 1 of Korthikanti et al. 2022 (arXiv 2205.05198) without dropout, the last PEFT's fp32 copy of what LoRA's A sees.
    Measured: within 15 % for BLOOM and GPT-2; models with fused attention keep a fifth to a half less. Blocks below the first adapted one
    keep nothing.
    """
    blocks = sizes.num_blocks - _first(sizes, lora)
    copies = _FP32 * sum(fan_in for fan_in, _ in _adapted(sizes, lora)) if per_number < _FP32 else 0
    return rows * length * (blocks * (16 * sizes.hidden_size + 2 * sizes.num_heads * length) * per_number + copies)


def _logits_bytes(sizes: ModelSizes, tokens: int) -> int:
    return _LOGITS_COPIES * tokens * sizes.vocab_size * _FP32


def _first(sizes: ModelSizes, lora: LoraSettings) -> int:
    return first_adapted_block(sizes.num_blocks, lora.layers)


def _spans(sizes: ModelSizes, servers: int) -> list[tuple[int, int]]:
    """The even split of `LocalSwarm` and `textrl-swarm serve`."""
    if servers > sizes.num_blocks:
        raise ConfigError(f"{sizes.num_blocks} blocks can be split over 1 to {sizes.num_blocks} servers, not {servers}")
    edges = [round(i * sizes.num_blocks / servers) for i in range(servers + 1)]
    return list(itertools.pairwise(edges))


def _traffic(
    sizes: ModelSizes, lora: LoraSettings, servers: int, responses: int, prompt_tokens: int, response_tokens: int, epochs: int,
    minibatch_size: int, wire_bytes: int,
) -> tuple[dict[str, int], dict[str, int], int]:  # fmt: skip
    """Bytes sent and received by kind, and round trips that follow one another.

    The client relays every hop. With H hops in all, L of them with blocks below the first adapted one and U with adapted blocks, n response
    and prompt tokens, and E epochs, in units of one hidden state:

        sent      (n - 1) H + n L + 2 n U (policy and ref scored) + E n (U forward + 2 U backward: inputs and gradients)
        received  (n - 1) H + n L + 2 n U                         + E n (U forward + (U - 1) backward: the first hop returns none)

    The adapter is sent once per optimizer step; its gradient (fp32) comes back once per micro-batch, which for a large adapter and a small
    hidden size weighs more than all activations.
    """
    first, spans = _first(sizes, lora), _spans(sizes, servers)
    hops, lower, upper = servers, sum(start < first for start, _ in spans), sum(stop > first for _, stop in spans)
    length, minibatches = prompt_tokens + response_tokens, math.ceil(responses / minibatch_size)
    scored = lower + 2 * upper
    hidden = responses * sizes.hidden_size * wire_bytes
    adapter = adapter_parameters(sizes, lora) * _FP32
    micro_batches = sum(_micro_batches(min(minibatch_size, responses - i * minibatch_size), length) for i in range(minibatches))
    sent = {
        "activations": hidden * ((length - 1) * hops + length * (scored + epochs * 3 * upper)),
        "adapters": epochs * minibatches * adapter,
    }
    received = {
        "activations": hidden * ((length - 1) * hops + length * (scored + epochs * upper)),
        "gradients": epochs * (hidden * length * (upper - 1) + micro_batches * adapter),
    }
    sessions = math.ceil(responses * length / _CACHE_TOKENS)
    in_turn = math.ceil(_micro_batches(responses, length) / _IN_FLIGHT) * scored
    in_turn += epochs * minibatches * upper + epochs * math.ceil(micro_batches / _IN_FLIGHT) * 2 * upper  # pushes, forward and backward
    return sent, received, sessions * response_tokens * hops + in_turn


def _micro_batches(rows: int, length: int) -> int:
    return math.ceil(rows / max(1, _MICRO_BATCH_TOKENS // length))
