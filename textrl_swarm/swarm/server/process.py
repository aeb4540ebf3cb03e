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
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from textrl_swarm.swarm import compat

compat.require_petals()
compat.mend_server_modules()

import petals.cli.run_server as run_server  # noqa: E402
import torch  # noqa: E402
from hivemind.utils.logging import use_hivemind_log_handler  # noqa: E402
from petals.constants import PUBLIC_INITIAL_PEERS  # noqa: E402
from petals.server.server import ModuleContainer, Server  # noqa: E402
from petals.server.task_pool import PrioritizedTaskPool  # noqa: E402

from textrl_swarm.errors import ConfigError, ModelError  # noqa: E402
from textrl_swarm.models.adapter_files import find_adapter, read_blocks  # noqa: E402
from textrl_swarm.swarm.launch import GROUP_DIRECTORY, PEERS_FROM_PARENT  # noqa: E402
from textrl_swarm.swarm.protocol import (  # noqa: E402
    ADAPTER_STORE_BYTES,
    ADAPTER_STORE_BYTES_PER_CLIENT,
    CAPABILITY,
    AdapterHeader,
)
from textrl_swarm.swarm.server.adapter_store import AdapterStore  # noqa: E402
from textrl_swarm.swarm.server.backend import LoraBackend, convert_and_hook_block, note_loaded  # noqa: E402
from textrl_swarm.swarm.server.handler import LoraHandler  # noqa: E402


def tell_parent(event: str, **facts: Any) -> None:
    """Writes one event for `launch.ServerProcess.wait_for`."""
    print(json.dumps({"event": event, **facts}), flush=True)


def _preload(
    names: Sequence[str], device: torch.device | str
) -> dict[str, tuple[AdapterHeader, Mapping[int, torch.Tensor]]]:
    """Adapters of --adapters by the name they are announced under, laid out like pushed ones."""
    loaded: dict[str, tuple[AdapterHeader, Mapping[int, torch.Tensor]]] = {}
    for name in names:
        directory, announced = find_adapter(name)
        settings, blocks = read_blocks(directory)
        any_block = next(iter(blocks.values()))
        targets = {path: (a.shape[1], b.shape[0]) for path, (a, b) in any_block.items()}
        header = AdapterHeader(settings.r, float(settings.alpha), targets, {})
        flats = {block: header.layout.flatten(matrices).to(device) for block, matrices in blocks.items()}
        loaded[announced] = (header, flats)
    return loaded


class LoraContainer(ModuleContainer):
    """ModuleContainer that makes the adapter store before the blocks, and reports when requests can come."""

    @classmethod
    def create(cls, *, dht: Any, block_indices: Sequence[int], device: Any, **kwargs: Any) -> LoraContainer:
        """As petals' own."""
        store = LoraServer.store = AdapterStore(LoraServer.adapter_bytes, LoraServer.adapter_bytes_per_client)

        def put(_ping: Any, owner: str, header: bytes, blocks: list[int], *flats: torch.Tensor) -> Any:
            store.put(owner, AdapterHeader.decode(header), dict(zip(blocks, flats, strict=True)), device)
            return (torch.tensor([store.size_bytes]),)

        LoraBackend.store = store
        quant_type = kwargs["quant_type"].name.lower()
        LoraBackend.quantization = None if quant_type == "none" else quant_type
        LoraBackend.preloaded = _preload(LoraServer.adapter_sources, device)
        LoraBackend.store_pool = PrioritizedTaskPool(
            put, max_batch_size=1 << 62, name="lora_store", device=torch.device("cpu")
        )
        container = super().create(dht=dht, block_indices=block_indices, device=device, **kwargs)
        tell_parent("online", span=[min(block_indices), max(block_indices) + 1])
        return container


class LoraServer(Server):
    """Petals' Server with a bounded adapter store, announcing that it can train."""

    store: ClassVar[AdapterStore]
    adapter_bytes: ClassVar[int]
    adapter_bytes_per_client: ClassVar[int]
    adapter_sources: ClassVar[Sequence[str]] = ()

    def __init__(self, *, initial_peers: Sequence[str], adapters: Sequence[str] = (), **kwargs: Any):
        LoraServer.adapter_sources = tuple(adapters)
        if initial_peers != PUBLIC_INITIAL_PEERS:
            # Spares petals' reachability check, a second p2p daemon.
            kwargs.setdefault("reachable_via_relay", False)
        super().__init__(initial_peers=initial_peers, **kwargs)
        config = self.block_config
        if getattr(config, "pretraining_tp", 1) > 1 and getattr(config, "slow_but_exact", False):
            raise ModelError(
                "this model computes its linear layers in slices (slow_but_exact): LoRA cannot be applied "
                "to them"
            )
        if len(self.tensor_parallel_devices) == 1:
            self.server_info.adapters = (*(find_adapter(name)[1] for name in adapters), CAPABILITY)
        elif adapters:
            raise ConfigError("--adapters needs a server on one device")
        tell_parent(
            "listening",
            peer_id=self.dht.peer_id.to_base58(),
            addresses=[str(address) for address in self.dht.get_visible_maddrs()],
            dht_prefix=self.dht_prefix,
        )


def _take_own_options(argv: list[str]) -> list[str]:
    """Keeps the options that are ours; returns petals'."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--adapter_bytes", type=int, default=ADAPTER_STORE_BYTES)
    parser.add_argument("--adapter_bytes_per_client", type=int, default=ADAPTER_STORE_BYTES_PER_CLIENT)
    own, petals_options = parser.parse_known_args(argv)
    LoraServer.adapter_bytes = own.adapter_bytes
    LoraServer.adapter_bytes_per_client = own.adapter_bytes_per_client
    return petals_options


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
    # petals loads blocks twice.
    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
    # transformers asks for a layer_idx, which a lone block does not need.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if PEERS_FROM_PARENT in options:
        tell_parent("imported")
        at = options.index(PEERS_FROM_PARENT)
        options[at : at + 1] = sys.stdin.readline().split()
    _end_with_parent()
    compat.use_server_classes(
        server=LoraServer,
        backend=LoraBackend,
        handler=LoraHandler,
        convert_block=convert_and_hook_block,
        container=LoraContainer,
        on_block_read=note_loaded,
    )
    sys.argv[1:] = options
    run_server.main()


if __name__ == "__main__":
    main()
