"""`textrl-swarm serve`: starts servers, tells how to reach them, and stays until Ctrl-C or until one of them ends."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console

from textrl_swarm.adapters import find_adapter, read_blocks
from textrl_swarm.base_model import default_dht_prefix
from textrl_swarm.errors import AdapterError, ConfigError, LaunchError
from textrl_swarm.estimate import model_sizes
from textrl_swarm.swarm import compat
from textrl_swarm.swarm.local import ServerGroup, check_servable, split_evenly

_START_TIMEOUT_S = 24 * 3600.0  # a hub model may first have to be downloaded; Ctrl-C ends the wait
_LEAVE_S = 5.0
_CHOOSES_BLOCKS = ("--block_indices", "--num_blocks")


def serve(model: str, num_servers: int, initial_peers: Sequence[str], petals_options: Sequence[str], console: Console) -> None:
    """Runs servers in the foreground.

    Args:
        num_servers: with more than one, the blocks are split evenly.
        initial_peers: addresses to join; empty = a new swarm.
        petals_options: options of petals' run_server; they win over our defaults.

    Raises:
        ModelError, ConfigError, AddressError, AdapterError, PetalsMissing: before anything starts.
        LaunchError: a server did not start, or ended by itself.
    """
    config = check_servable(model)
    adapters = _check_adapters(model, config, petals_options)
    compat.require_petals()
    if initial_peers:
        from textrl_swarm.swarm.client import check_addresses

        check_addresses(initial_peers)
    group = ServerGroup(
        model,
        _spans(config.num_hidden_layers, num_servers, petals_options),
        _options(config, model, petals_options),
        initial_peers=initial_peers,
        start_timeout_s=_START_TIMEOUT_S,
    )
    waiting = f"starting {num_servers} server(s) of {model}"
    if not console.is_terminal:
        console.print(waiting + " ...")
    with _terminated_like_ctrl_c():
        try:
            with console.status(waiting + " ...") if console.is_terminal else nullcontext():
                group.__enter__()
            _tell(group, model, config.num_hidden_layers, console)
            for name in adapters:
                console.print(f"adapter for petals clients: active_adapter={name!r}", soft_wrap=True)
            while all(server.running for server in group.servers):
                time.sleep(0.5)
            ended = next(server for server in group.servers if not server.running)
            raise LaunchError(
                f"server (pid {ended.pid}) ended with exit code {ended.process.returncode}; its log ends with:\n{ended.log_tail()}"
            )
        except KeyboardInterrupt:
            console.print("leaving the swarm ...")
        finally:
            group.close(leave_within_s=_LEAVE_S)
    console.print("all servers have ended")


def _spans(num_blocks: int, num_servers: int, options: Sequence[str]) -> list[tuple[int, int]] | None:
    chosen = [option for option in options if option.split("=")[0] in _CHOOSES_BLOCKS]
    if num_servers > 1:
        if chosen:
            raise ConfigError(f"--servers {num_servers} splits the blocks itself; leave out {chosen[0]}")
        return split_evenly(num_blocks, num_servers)
    import torch

    if chosen or torch.cuda.is_available():
        return None  # petals fills the GPU
    return [(0, num_blocks)]


def _check_adapters(model: str, config, options: Sequence[str]) -> list[str]:
    """Names under which the adapters of --adapters will be announced. Raises AdapterError when one does not fit the model."""
    given = list(options[options.index("--adapters") + 1 :]) if "--adapters" in options else []
    sources = list(itertools.takewhile(lambda option: not option.startswith("--"), given))
    names = []
    for source in sources:
        directory, name = find_adapter(source)
        _, blocks = read_blocks(directory)
        linears = model_sizes(config).linears
        layers = next(iter(blocks.values()))
        for path, (a, b) in layers.items():
            if linears.get(path) != (a.shape[1], b.shape[0]):
                raise AdapterError(f"the adapter {source} does not fit {model}: it changes {path} ({a.shape[1]} -> {b.shape[0]})")
        if max(blocks) >= config.num_hidden_layers:
            raise AdapterError(f"the adapter {source} does not fit {model}: it changes block {max(blocks)} of {config.num_hidden_layers}")
        if name in names:
            raise AdapterError(f"two adapters would both be announced as {name!r}; rename one of the directories")
        names.append(name)
    return names


def _options(config, model: str, given: Sequence[str]) -> list[str]:
    """Ours first: of two, petals' parser believes the last."""
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    return ["--dht_prefix", default_dht_prefix(model), "--throughput", "1", "--torch_dtype", dtype, *given]


def _tell(group: ServerGroup, model: str, num_blocks: int, console: Console) -> None:
    for server in group.servers:
        start, stop = server.span
        console.print(f"server (pid {server.pid}) holds blocks {start}..{stop - 1} of {num_blocks}; log: {server.log_path}")
    console.print(f"the swarm serves {group.servers[0].dht_prefix!r}; clients join with one of these addresses:")
    for address in group.initial_peers:
        console.print(f"    {address}", soft_wrap=True)
    address = next((a for a in group.initial_peers if "/127.0.0.1/" not in a and "/ip6/::1/" not in a), group.initial_peers[0])
    console.print(f'in Python:\n    policy = load_policy({model!r}, initial_peers=["{address}"])', soft_wrap=True)
    console.print(f"more servers:\n    textrl-swarm serve {model} --initial-peers {address}", soft_wrap=True)
    console.print("Ctrl-C ends the servers")


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """SIGTERM (a service manager's) ends the servers as Ctrl-C does."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
