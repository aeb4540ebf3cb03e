"""A real Petals server whose blocks also take and train LoRA adapters: `python -m textrl_swarm.swarm.server MODEL [petals options]`.

Meant to be started by `swarm/local.py` in its own process group. It tells its parent what it does in JSON lines on standard output, logs to
standard error, and ends its whole group when the parent goes away (end of file on standard input).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence

from textrl_swarm.swarm import compat

compat.require_petals()
compat.mend_server_modules()

import petals.cli.run_server as run_server  # noqa: E402
import torch  # noqa: E402
from hivemind.utils.logging import use_hivemind_log_handler  # noqa: E402
from petals.constants import PUBLIC_INITIAL_PEERS  # noqa: E402
from petals.server.server import ModuleContainer, Server  # noqa: E402
from petals.server.task_pool import PrioritizedTaskPool  # noqa: E402

from textrl_swarm.adapters import find_adapter, read_blocks  # noqa: E402
from textrl_swarm.swarm.adapter_store import AdapterStore  # noqa: E402
from textrl_swarm.swarm.backend import LoraBackend, convert_and_hook_block  # noqa: E402
from textrl_swarm.swarm.handler import LoraHandler  # noqa: E402
from textrl_swarm.swarm.protocol import CAPABILITY, AdapterHeader  # noqa: E402

PEERS_FROM_PARENT = "-"  # as --initial_peers: the parent writes them to standard input when they are known


def tell_parent(event: str, **facts) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def _convert_block(*args, adapters=(), **kwargs):
    return convert_and_hook_block(*args, adapters=(), **kwargs)  # the hooks apply them; petals' own way knows only old versions of peft


def _preload(names: Sequence[str], device) -> dict[str, tuple[AdapterHeader, dict[int, torch.Tensor]]]:
    """Adapters of --adapters by the name they are announced under, laid out like pushed ones."""
    loaded = {}
    for name in names:
        directory, announced = find_adapter(name)
        settings, blocks = read_blocks(directory)
        flats = {
            block: torch.cat([part.flatten() for pair in layers.values() for part in pair]).to(device) for block, layers in blocks.items()
        }
        targets = {path: (a.shape[1], b.shape[0]) for path, (a, b) in next(iter(blocks.values())).items()}
        loaded[announced] = (AdapterHeader(settings.r, float(settings.alpha), targets, {}), flats)
    return loaded


class LoraContainer(ModuleContainer):
    """ModuleContainer that makes the adapter store before the blocks, and says when requests can come."""

    @classmethod
    def create(cls, *, dht, block_indices, device, **kwargs):
        store = LoraServer.store = AdapterStore(LoraServer.adapter_bytes, LoraServer.adapter_bytes_per_client)

        def put(_ping, owner: str, header: bytes, blocks: list[int], *flats: torch.Tensor):
            store.put(owner, AdapterHeader.decode(header), dict(zip(blocks, flats, strict=True)), device)
            return (torch.tensor([store.size_bytes]),)

        LoraBackend.store = store
        LoraBackend.preloaded = _preload(LoraServer.adapter_sources, device)
        LoraBackend.store_pool = PrioritizedTaskPool(put, max_batch_size=1 << 62, name="lora_store", device=torch.device("cpu"))
        container = super().create(dht=dht, block_indices=block_indices, device=device, **kwargs)
        tell_parent("online", span=[min(block_indices), max(block_indices) + 1])
        return container


class LoraServer(Server):
    """Petals' Server with a bounded adapter store, announcing that it can train."""

    store: AdapterStore
    adapter_bytes: int
    adapter_bytes_per_client: int
    adapter_sources: Sequence[str] = ()

    def __init__(self, *, initial_peers, adapters=(), **kwargs):
        LoraServer.adapter_sources = tuple(adapters)
        if initial_peers != PUBLIC_INITIAL_PEERS:
            kwargs.setdefault("reachable_via_relay", False)  # spares petals' reachability check, a second libp2p daemon
        super().__init__(initial_peers=initial_peers, **kwargs)
        if getattr(self.block_config, "pretraining_tp", 1) > 1 and getattr(self.block_config, "slow_but_exact", False):
            raise ValueError("this model computes its linear layers in slices (slow_but_exact): LoRA cannot be applied to them")
        if len(self.tensor_parallel_devices) == 1:
            self.server_info.adapters = (*(find_adapter(name)[1] for name in adapters), CAPABILITY)
        elif adapters:
            raise ValueError("--adapters needs a server on one device")
        tell_parent(
            "listening",
            peer_id=self.dht.peer_id.to_base58(),
            addresses=[str(address) for address in self.dht.get_visible_maddrs()],
            dht_prefix=self.dht_prefix,
        )


def _own_options(argv: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--adapter_bytes", type=int, default=2 << 30)
    parser.add_argument("--adapter_bytes_per_client", type=int, default=1 << 30)
    own, petals_options = parser.parse_known_args(argv)
    LoraServer.adapter_bytes, LoraServer.adapter_bytes_per_client = own.adapter_bytes, own.adapter_bytes_per_client
    return petals_options


def _end_with_parent() -> None:
    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: forked handlers would inherit its lock
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


def main() -> None:
    options = _own_options(sys.argv[1:])
    use_hivemind_log_handler("in_root_logger")
    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # petals loads blocks twice, on purpose
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it wants a layer_idx, which a lone block has no use for
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if PEERS_FROM_PARENT in options:
        tell_parent("imported")
        at = options.index(PEERS_FROM_PARENT)
        options[at : at + 1] = sys.stdin.readline().split()
    _end_with_parent()
    compat.use_server_classes(
        server=LoraServer, backend=LoraBackend, handler=LoraHandler, convert_block=_convert_block, container=LoraContainer
    )
    sys.argv[1:] = options
    run_server.main()


if __name__ == "__main__":
    main()
