"""`LocalSwarm`: a swarm of real servers on this machine, for demos and tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from textrl_swarm.config import QUANTIZATIONS
from textrl_swarm.errors import ConfigError
from textrl_swarm.models.base_model import resolve
from textrl_swarm.models.blocks import BlockSpan, split_evenly
from textrl_swarm.swarm.launch import ServerGroup
from textrl_swarm.swarm.protocol import require_servable

_PETALS_QUANT_TYPES = {None: "none", "8bit": "int8", "4bit": "nf4"}  # our names -> petals'


class LocalSwarm(ServerGroup):
    """A new swarm of fp32 CPU servers on loopback, with the blocks split evenly. Context manager.

    Args:
        model: directory or hub id of a decoder-only model.
        num_servers: 1 to the number of blocks.
        quantization: None, "8bit" or "4bit" (the servers hold quantized blocks).
        dht_prefix: name under which the blocks are announced; None = made from `model`.
        spans: half-open block spans, one per server, instead of the even split (overlaps make replicas).
        server_options: more options of petals' run_server, e.g. ("--attn_cache_tokens", "512").
        start_timeout_s: seconds until all blocks must be online.

    Attributes:
        initial_peers: addresses for clients.
        servers: one `ServerProcess` per server, with `pid` and `span`.

    Raises:
        ModelError, ConfigError, PetalsMissing: before anything is started.
        LaunchError: on entering, when a server does not come online.
    """

    def __init__(
        self,
        model: str | Path,
        num_servers: int = 2,
        quantization: str | None = None,
        *,
        dht_prefix: str | None = None,
        spans: Sequence[BlockSpan] | None = None,
        server_options: Sequence[str] = (),
        start_timeout_s: float = 180.0,
    ):
        if quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantization must be None, '8bit' or '4bit', got {quantization!r}")
        base = resolve(model)
        require_servable(base)
        num_blocks = base.num_blocks
        self.dht_prefix = dht_prefix or base.dht_prefix
        options = {
            "--dht_prefix": self.dht_prefix,
            "--host_maddrs": "/ip4/127.0.0.1/tcp/0",
            "--throughput": "1",
            "--torch_dtype": "float32",
            "--device": "cpu",
            "--quant_type": _PETALS_QUANT_TYPES[quantization],
            "--num_handlers": "2",
            "--update_period": "5",
        }
        pairs = [word for pair in options.items() for word in pair]
        spans = split_evenly(num_blocks, num_servers) if spans is None else _checked_spans(spans, num_blocks)
        super().__init__(
            base.name, spans, [*pairs, "--no_auto_relay", *server_options], start_timeout_s=start_timeout_s
        )


def _checked_spans(spans: Sequence[BlockSpan], num_blocks: int) -> list[BlockSpan]:
    if not spans:
        raise ConfigError("spans is empty; give one span of blocks per server, e.g. [(0, 2), (2, 4)]")
    for start, stop in spans:
        if not 0 <= start < stop <= num_blocks:
            raise ConfigError(f"span ({start}, {stop}) is not within blocks 0..{num_blocks}")
    return list(spans)
