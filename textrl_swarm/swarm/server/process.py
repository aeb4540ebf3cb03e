"""A real Petals server whose blocks also take and train LoRA adapters.

    python -m textrl_swarm.swarm.server.process MODEL [petals options]

Meant to be started by `swarm/launch.py` in its own process group. The server reports events to its parent in
JSON lines on standard output, logs to standard error, and ends its whole group when the parent goes away (end
of file on standard input).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from typing import Any, ClassVar

from textrl_swarm.swarm import compat

compat.require_petals()

import petals.cli.run_server as run_server  # noqa: E402
import torch  # noqa: E402
from hivemind.utils.logging import use_hivemind_log_handler  # noqa: E402
from petals.constants import PUBLIC_INITIAL_PEERS  # noqa: E402
from petals.server.server import ModuleContainer, Server  # noqa: E402
from petals.utils.convert_block import QuantType  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from textrl_swarm.decoders.caches import server_cache_bytes  # noqa: E402
from textrl_swarm.errors import ConfigError, ModelError, TextRLSwarmError  # noqa: E402
from textrl_swarm.models.base_model import resolve  # noqa: E402
from textrl_swarm.models.layers import layers_of  # noqa: E402
from textrl_swarm.models.quantization import warn_of_misread_rows  # noqa: E402
from textrl_swarm.swarm.access import AllowList, read_secret  # noqa: E402
from textrl_swarm.swarm.launch import GROUP_DIRECTORY, PEERS_FROM_PARENT  # noqa: E402
from textrl_swarm.swarm.memory import free_bytes  # noqa: E402
from textrl_swarm.swarm.node import end_group, start_server_node  # noqa: E402
from textrl_swarm.swarm.protocol import (  # noqa: E402
    ADAPTER_IDLE_S,
    ADAPTER_STORE_BYTES,
    ADAPTER_STORE_BYTES_PER_CLIENT,
    ATTENTION_CACHE_TOKENS,
    CAPABILITY,
    KEPT_INPUT_BYTES,
    REQUEST_BYTES,
    AdapterHeader,
    AdapterLayout,
    adapter_header,
)
from textrl_swarm.swarm.records import guard_records  # noqa: E402
from textrl_swarm.swarm.server.accounts import Accounts, FairTaskPool  # noqa: E402
from textrl_swarm.swarm.server.adapter_store import AdapterStore  # noqa: E402
from textrl_swarm.swarm.server.backend import LoraBackend  # noqa: E402
from textrl_swarm.swarm.server.gradient_sums import GradientSums  # noqa: E402
from textrl_swarm.swarm.server.handler import LoraHandler  # noqa: E402
from textrl_swarm.swarm.server.pulse import FAREWELL_S, Pulse  # noqa: E402
from textrl_swarm.swarm.server.served_model import ServedModel, block_config  # noqa: E402
from textrl_swarm.swarm.server.training import Training  # noqa: E402

logger = logging.getLogger(__name__)


def tell_parent(event: str, **facts: Any) -> None:
    """Writes one event for `launch.ServerProcess.wait_for`."""
    print(json.dumps({"event": event, **facts}), flush=True)


def _preload(
    names: Sequence[str], device: torch.device | str
) -> dict[str, tuple[AdapterHeader, Mapping[int, torch.Tensor]]]:
    """Adapters of --adapters by the name they are announced under, laid out like pushed ones."""
    if not names:
        return {}
    from textrl_swarm.models.adapter_files import (  # imports peft and bitsandbytes: 2 s
        find_adapter,
        read_blocks,
    )

    loaded: dict[str, tuple[AdapterHeader, Mapping[int, torch.Tensor]]] = {}
    skeleton = LoraServer.model.skeleton
    for name in names:
        directory, announced = find_adapter(name)
        settings, blocks = read_blocks(directory, skeleton.model)
        layouts, flats = {}, {}
        for block, matrices in blocks.items():
            sizes = layers_of(skeleton.blocks[block])
            layouts[block] = AdapterLayout(settings.r, {path: sizes[path] for path in matrices})
            flats[block] = layouts[block].flatten(matrices).to(device)
        header = adapter_header(layouts, settings.scale * settings.r, dict.fromkeys(blocks, ""))
        loaded[announced] = (header, flats)
    return loaded


def _announced_names(adapters: Sequence[str]) -> list[str]:
    if not adapters:
        return []
    from textrl_swarm.models.adapter_files import find_adapter

    return [find_adapter(name)[1] for name in adapters]


class LoraContainer(ModuleContainer):
    """ModuleContainer that makes the adapter store before the blocks, and reports when requests can come."""

    def __init__(
        self,
        dht: Any,
        dht_prefix: str,
        module_backends: Mapping[str, LoraBackend],
        *,
        dht_announcer: Any,
        **kwargs: Any,
    ):
        # petals' own formula knows one kind of attention; its constructor announces the server.
        blocks = (int(uid.rpartition(".")[2]) for uid in dht_announcer.module_uids)
        dht_announcer.bytes_per_token = LoraServer.model.cache_bytes(blocks)[0]
        LoraHandler.training.backends = module_backends
        super().__init__(dht, dht_prefix, module_backends, dht_announcer=dht_announcer, **kwargs)

    @classmethod
    def create(cls, *, dht: Any, block_indices: Sequence[int], device: Any, **kwargs: Any) -> LoraContainer:
        """As petals' own."""
        store = LoraServer.store = AdapterStore(
            LoraServer.adapter_bytes, LoraServer.adapter_bytes_per_client, LoraServer.adapter_idle_s
        )

        def put(_ping: Any, owner: str, header: bytes, blocks: list[int], *flats: torch.Tensor) -> Any:
            store.put(owner, AdapterHeader.decode(header), dict(zip(blocks, flats, strict=True)), device)
            return (torch.tensor([store.size_bytes]),)

        LoraBackend.store = store
        training = LoraHandler.training = Training(
            store,
            GradientSums(LoraServer.adapter_bytes_per_client),
            max_tokens=kwargs["max_batch_size"],
            max_activation_bytes=kwargs["max_chunk_size_bytes"],
            device=torch.device(device),
        )
        quant_type = kwargs["quant_type"].name.lower()
        LoraBackend.quantization = None if quant_type == "none" else quant_type
        LoraBackend.preloaded = _preload(LoraServer.adapter_sources, device)
        LoraHandler.store_pool = FairTaskPool(
            put, max_batch_size=1 << 62, name="lora_store", device=torch.device("cpu")
        )
        LoraBackend.shared_pools = *training.pools, LoraHandler.store_pool
        LoraHandler.pulse.is_leaving = False
        container = super().create(dht=dht, block_indices=block_indices, device=device, **kwargs)
        threading.Thread(target=_end_with_handlers, args=(container.conn_handlers,), daemon=True).start()
        tell_parent("online", span=[min(block_indices), max(block_indices) + 1])
        return container

    def shutdown(self) -> None:
        """Clients hear of it before their streams end, which they would take seconds to notice."""
        LoraHandler.pulse.is_leaving = True
        time.sleep(FAREWELL_S)
        super().shutdown()


def _end_with_handlers(handlers: Sequence[LoraHandler]) -> None:
    """Petals would start new ones, beside which the daemon goes on giving streams to the dead: they hang."""
    connection.wait([handler.sentinel for handler in handlers])
    if not LoraHandler.pulse.is_leaving:
        logger.error("a process that answers requests has ended, and so does this server")
        end_group()


class LoraServer(Server):
    """Petals' Server with a bounded adapter store, announcing that it can train."""

    store: ClassVar[AdapterStore]
    starting: ClassVar[LoraServer]
    """The one that petals measures before its constructor ends."""

    model: ClassVar[ServedModel]
    adapter_bytes: ClassVar[int]
    adapter_bytes_per_client: ClassVar[int]
    adapter_idle_s: ClassVar[float]
    adapter_sources: ClassVar[Sequence[str]] = ()

    def __init__(self, *, initial_peers: Sequence[str], adapters: Sequence[str] = (), **kwargs: Any):
        LoraServer.adapter_sources = tuple(adapters)
        if initial_peers != PUBLIC_INITIAL_PEERS:
            # Spares petals' reachability check, a second p2p daemon.
            kwargs.setdefault("reachable_via_relay", False)
        LoraServer.starting = self
        self._attn_cache_tokens: int | None = kwargs.get("attn_cache_tokens")
        self._download = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
        super().__init__(initial_peers=initial_peers, **kwargs)
        config = self.block_config
        if getattr(config, "pretraining_tp", 1) > 1 and getattr(config, "slow_but_exact", False):
            raise ModelError(
                "this model computes its linear layers in slices (slow_but_exact): LoRA cannot be applied "
                "to them"
            )
        if len(self.tensor_parallel_devices) > 1:
            raise ConfigError(
                "--tensor_parallel_devices is not supported: start one server per device, with --device and "
                "--block_indices"
            )
        self._require_room()
        self._require_quantizable()
        self.server_info.adapters = (*_announced_names(adapters), CAPABILITY)
        self.attn_cache_bytes = self._cache_bytes(self._cache_tokens())
        tell_parent(
            "listening",
            peer_id=self.dht.peer_id.to_base58(),
            addresses=[str(address) for address in self.dht.get_visible_maddrs()],
            dht_prefix=self.dht_prefix,
        )

    def _held(self) -> Sequence[int]:
        """The blocks of this server, or as many of the largest, from which petals will choose."""
        if self.strict_block_indices is not None:
            return self.strict_block_indices
        model = self._served_model()
        by_size = sorted(
            range(model.skeleton.num_blocks), key=lambda block: -model.block_bytes(block, self.quant_type)
        )
        return by_size[: self.num_blocks]

    def _require_room(self) -> None:
        """Raises ConfigError, before weights are loaded, when they do not fit into what is free."""
        model, blocks = self._served_model(), self._held()
        needed = sum(model.block_bytes(block, self.quant_type) for block in blocks)
        free = free_bytes(self.device)
        if needed > free:
            raise ConfigError(
                f"{len(blocks)} block(s) of this model need {needed / 2**30:.1f} GiB for their weights, and "
                f"{self.device} has {free / 2**30:.1f} GiB left: hold fewer (--block_indices, --num_blocks), "
                "or quantise (--quant_type nf4)"
            )

    def _require_quantizable(self) -> None:
        if self.quant_type == QuantType.NONE:
            return
        model = self._served_model()
        least = min(self._held(), key=model.quantized_share)
        share = model.quantized_share(least)
        if share == 0:
            raise ConfigError(
                f"--quant_type {self.quant_type.name.lower()} reaches no weight of block {least} (unusual "
                "kinds of layers): leave it out"
            )
        if self.quant_type == QuantType.NF4:
            block = model.skeleton.blocks[least]
            warn_of_misread_rows(block, self.device, self.converted_model_name_or_path)
        if share < 0.5:
            logger.warning(
                "--quant_type leaves %.0f %% of the weights of block %d unchanged", 100 - 100 * share, least
            )

    def _cache_bytes(self, tokens: int) -> int:
        """For so many tokens in all blocks of this server, and the states of as many rows as may hold
        them.
        """
        model = self._served_model()
        if self.strict_block_indices is not None:
            per_token, per_row = model.cache_bytes(self.strict_block_indices)
        else:  # petals chooses among all
            every = [model.cache_bytes([block]) for block in range(model.skeleton.num_blocks)]
            per_token, per_row = (self.num_blocks * max(kind) for kind in zip(*every, strict=True))
        return server_cache_bytes(tokens, per_token, per_row)

    def _choose_num_blocks(self) -> int:
        """What fits into a GPU beside the adapter store."""
        if self.device.type != "cuda":
            raise ConfigError(
                "say which blocks this server holds: --block_indices START:STOP, or how many: --num_blocks N"
            )
        memory = torch.cuda.get_device_properties(self.device).total_memory
        model = self._served_model()
        count = model.blocks_within(memory - LoraServer.adapter_bytes, self.quant_type, self._cache_tokens())
        if count == 0:
            raise ConfigError(
                f"{self.device} has {memory / 2**30:.1f} GiB, too little for one block of this model: "
                "quantise (--quant_type nf4), or lower --attn_cache_tokens or --adapter_bytes"
            )
        return count

    def _cache_tokens(self) -> int:
        return self._attn_cache_tokens or _default_cache_tokens(self.block_config)

    def _served_model(self) -> ServedModel:
        if not hasattr(LoraServer, "model"):
            download = {name: value for name, value in self._download.items() if value is not None}
            base = resolve(self.converted_model_name_or_path, **download)
            LoraServer.model = ServedModel(base, self.torch_dtype, self.device, **download)
        return LoraServer.model


def _default_cache_tokens(config: Any) -> int:
    return 16384 if config.num_key_value_groups > 1 else ATTENTION_CACHE_TOKENS  # petals' own


def _read_config(name: str, **options: Any) -> Any:
    asked = {"revision": options.get("revision"), "token": options.get("use_auth_token")}
    return block_config(resolve(name, **{name: value for name, value in asked.items() if value is not None}))


def _load_block(name: str, index: int, **options: Any) -> Any:
    block = LoraServer.model.load(index)
    logger.info("loaded block %d of %s", index, name)
    return block


def _make_ready(block: Any, index: int, *args: Any, **options: Any) -> Any:
    quant_type = options["quant_type"] if "quant_type" in options else args[3]
    return LoraServer.model.make_ready(block, index, quant_type)


def _measure_speed(
    config: Any,
    device: Any,
    dtype: torch.dtype,
    *,
    quant_type: Any,
    n_tokens: int,
    n_steps: int,
    inference: bool,
    **options: Any,
) -> float:
    """Tokens per second of one block, in the place of petals' `measure_compute_rps`."""
    server = LoraServer.starting
    index = 0 if server.strict_block_indices is None else server.strict_block_indices[0]
    return server._served_model().tokens_per_second(
        index, quant_type, tokens=n_tokens, steps=n_steps, inference=inference
    )


def _take_own_options(argv: list[str]) -> list[str]:
    """Keeps the options that are ours; returns petals'."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--adapter_bytes", type=int, default=ADAPTER_STORE_BYTES)
    parser.add_argument("--adapter_bytes_per_client", type=int, default=ADAPTER_STORE_BYTES_PER_CLIENT)
    parser.add_argument("--adapter_idle_s", type=float, default=ADAPTER_IDLE_S)
    parser.add_argument("--kept_input_bytes", type=int, default=KEPT_INPUT_BYTES)
    parser.add_argument("--request_bytes", type=int, default=REQUEST_BYTES)
    parser.add_argument("--allowed_peers")
    parser.add_argument("--secret_file")
    own, petals_options = parser.parse_known_args(argv)
    LoraServer.adapter_bytes = own.adapter_bytes
    LoraServer.adapter_bytes_per_client = own.adapter_bytes_per_client
    LoraServer.adapter_idle_s = own.adapter_idle_s
    LoraHandler.kept_input_bytes = own.kept_input_bytes
    LoraHandler.request_bytes = own.request_bytes
    LoraHandler.allowed = None if own.allowed_peers is None else AllowList(own.allowed_peers)
    LoraHandler.secret = read_secret(own.secret_file)
    guard_records(LoraHandler.allowed, LoraHandler.secret)
    return petals_options


class _OneLine(logging.Filter):
    """Shortens the tracebacks of what a client is told, such as an adapter that is missing."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], TextRLSwarmError):
            record.exc_info = None
        return True


def _end_with_parent() -> None:
    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: forked handlers would inherit its lock
            pass
        directory = tempfile.gettempdir()  # the group's: whoever was to remove it is gone
        if os.path.basename(directory).startswith(GROUP_DIRECTORY):
            shutil.rmtree(directory, ignore_errors=True)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


def main() -> None:
    """Runs a server until it is interrupted."""
    # A shell's background jobs, and their children, ignore SIGINT; `launch` asks with it to leave the swarm.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = _take_own_options(sys.argv[1:])
    use_hivemind_log_handler("in_root_logger")
    disable_progress_bar()  # one per block
    logging.getLogger("hivemind.moe.server.runtime").addFilter(_OneLine())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if PEERS_FROM_PARENT in options:
        tell_parent("imported")
        at = options.index(PEERS_FROM_PARENT)
        options[at : at + 1] = sys.stdin.readline().split()
    _end_with_parent()
    LoraHandler.pulse = Pulse()
    LoraHandler.accounts = FairTaskPool.accounts = Accounts()
    compat.use_server_classes(
        server=LoraServer,
        backend=LoraBackend,
        handler=LoraHandler,
        container=LoraContainer,
        task_pool=FairTaskPool,
        start_node=start_server_node,
        read_config=_read_config,
        load_block=_load_block,
        convert_block=_make_ready,
        measure_speed=_measure_speed,
    )
    sys.argv[1:] = options
    run_server.main()


if __name__ == "__main__":
    main()
