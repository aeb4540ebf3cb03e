"""`textrl-swarm serve`: starts servers, prints how to reach them, and waits for Ctrl-C or the end of a
server.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from textrl_swarm.config import SwarmAccess
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.display import spinner
from textrl_swarm.errors import AdapterError, ConfigError, LaunchError, ServerMismatch, SwarmError
from textrl_swarm.models.adapter_files import find_adapter, read_blocks
from textrl_swarm.models.base_model import BaseModel, resolve
from textrl_swarm.models.blocks import BlockSpan, blocks_text, split_evenly
from textrl_swarm.swarm import compat
from textrl_swarm.swarm.launch import ServerGroup
from textrl_swarm.swarm.protocol import require_servable

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 24 * 3600.0  # a hub model may first have to be downloaded; Ctrl-C ends the wait
_LEAVE_S = 5.0
_CHOOSES_BLOCKS = ("--block_indices", "--num_blocks")


def serve_command(
    model: str,
    num_servers: int,
    initial_peers: Sequence[str],
    petals_options: Sequence[str],
    console: Console,
    *,
    allowed_peers: Path | None = None,
    secret_file: Path | None = None,
) -> None:
    """Runs servers in the foreground.

    Args:
        num_servers: with more than one, the blocks are split evenly.
        initial_peers: addresses to join; empty = a new swarm.
        petals_options: options of petals' run_server, which override our defaults.
        allowed_peers: file with the ids of the peers that may come in; None = all.
        secret_file: file with the secret that they must know; None = there is none.

    Raises:
        ModelError, ConfigError, AddressError, AdapterError, PetalsMissing: before anything starts.
        LaunchError: a server did not start, or ended by itself.
        ServerMismatch: the swarm serves another model under this name.
    """
    with spinner(console, "looking at the model"):
        base = resolve(model, **_download_options(petals_options))
        require_servable(base)
        adapters = _check_adapters(base, petals_options)
    compat.require_petals()
    options = [*_options(base, petals_options), *_access_options(allowed_peers, secret_file, petals_options)]
    if initial_peers:
        from textrl_swarm.swarm.client.connection import check_addresses

        check_addresses(initial_peers)
    num_blocks = base.num_blocks
    group = ServerGroup(
        base.name,
        _spans(num_blocks, num_servers, petals_options),
        options,
        initial_peers=initial_peers,
        start_timeout_s=_START_TIMEOUT_S,
    )
    with _sigterm_as_ctrl_c():
        try:
            with spinner(console, f"starting {num_servers} server(s) of {model}"):
                group.__enter__()
                if initial_peers:
                    _require_same_weights(group, initial_peers, secret_file)
            _introduce(group, model, num_blocks, console, secret_file)
            for name in adapters:
                console.print(f"adapter for petals clients: active_adapter={name!r}", soft_wrap=True)
            while all(server.running for server in group.servers):
                time.sleep(0.5)
            ended = next(server for server in group.servers if not server.running)
            raise LaunchError(
                f"server (pid {ended.pid}) ended with exit code {ended.process.returncode}; "
                f"its log ends with:\n{ended.log_tail()}"
            )
        except KeyboardInterrupt:
            console.print("leaving the swarm ...")
        finally:
            group.close(leave_within_s=_LEAVE_S)
    console.print("all servers have ended")


def _download_options(options: Sequence[str]) -> dict[str, str]:
    """Those of petals' options that say which files of the hub to read, and how."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name in ("--revision", "--token", "--cache_dir"):
        parser.add_argument(name)
    found, _ = parser.parse_known_args(list(options))
    return {name: value for name, value in vars(found).items() if value is not None}


def _spans(num_blocks: int, num_servers: int, options: Sequence[str]) -> list[BlockSpan] | None:
    chosen = [option for option in options if option.split("=")[0] in _CHOOSES_BLOCKS]
    if num_servers > 1:
        if chosen:
            raise ConfigError(f"--servers {num_servers} splits the blocks itself; leave out {chosen[0]}")
        return split_evenly(num_blocks, num_servers)
    if chosen or torch.cuda.is_available():
        return None  # petals fills the GPU
    return [(0, num_blocks)]


def _check_adapters(base: BaseModel, options: Sequence[str]) -> list[str]:
    """Names under which servers will announce the adapters of --adapters.

    Raises:
        AdapterError: an adapter does not fit the model, or two would have the same name.
    """
    given = list(options[options.index("--adapters") + 1 :]) if "--adapters" in options else []
    sources = list(itertools.takewhile(lambda option: not option.startswith("--"), given))
    names: list[str] = []
    if not sources:
        return names
    model = Skeleton(base.config, torch.float32).model
    for source in sources:
        directory, name = find_adapter(source)
        read_blocks(directory, model)
        if name in names:
            raise AdapterError(
                f"two adapters would both be announced as {name!r}; rename one of the directories"
            )
        names.append(name)
    return names


def _options(base: BaseModel, given: Sequence[str]) -> list[str]:
    """Our defaults first: petals' parser takes the last of two."""
    dtype = str(base.config.dtype or "float32").removeprefix("torch.")
    return ["--dht_prefix", base.dht_prefix, "--throughput", "1", "--torch_dtype", dtype, *given]


def _access_options(allowed_peers: Path | None, secret_file: Path | None, given: Sequence[str]) -> list[str]:
    """For the servers. Raises ConfigError for files that cannot be used."""
    from textrl_swarm.swarm.access import ensure_identity, read_peers, read_secret

    options = []
    if allowed_peers is not None:
        read_peers(allowed_peers)
        options += ["--allowed_peers", str(allowed_peers)]
    if secret_file is not None:
        read_secret(secret_file)
        options += ["--secret_file", str(secret_file)]
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--identity_path")
    identity = parser.parse_known_args(list(given))[0].identity_path
    if identity is not None:
        ensure_identity(identity)
    return options


def _introduce(
    group: ServerGroup, model: str, num_blocks: int, console: Console, secret_file: Path | None
) -> None:
    for server in group.servers:
        assert server.span is not None, "the server is online"
        held = blocks_text(range(*server.span))
        console.print(f"server (pid {server.pid}) holds {held} of {num_blocks}; log: {server.log_path}")
    console.print(
        f"the swarm serves {group.servers[0].dht_prefix!r}; clients join with one of these addresses:"
    )
    for address in group.initial_peers:
        console.print(f"    {address}", soft_wrap=True)
    reachable = [a for a in group.initial_peers if "/127.0.0.1/" not in a and "/ip6/::1/" not in a]
    address = (reachable or group.initial_peers)[0]
    access = option = ""
    if secret_file is not None:
        access = f", access=SwarmAccess(secret_file={str(secret_file)!r})"
        option = f" --secret-file {secret_file}"
    console.print(
        f'in Python:\n    policy = load_policy({model!r}, initial_peers=["{address}"]{access})',
        soft_wrap=True,
    )
    console.print(
        f"more servers:\n    textrl-swarm serve {model} --initial-peers {address}{option}", soft_wrap=True
    )
    console.print("Ctrl-C ends the servers")


def _require_same_weights(group: ServerGroup, initial_peers: Sequence[str], secret_file: Path | None) -> None:
    """Compares our servers' blocks with those of the servers that were there before."""
    from textrl_swarm.swarm.client.survey import survey

    name = group.servers[0].dht_prefix
    try:
        access = SwarmAccess(secret_file=None if secret_file is None else str(secret_file))
        (report,) = survey(initial_peers, name, access=access)
    except (SwarmError, ConfigError) as error:  # nobody answers now: no reason to end a server that works
        logger.warning("the blocks could not be compared with those of other servers: %s", error)
        return
    peers = {address.rsplit("/", 1)[1] for server in group.servers for address in server.addresses}
    ours: dict[int, str] = {}
    for server in report.servers:
        if server.peer_id in peers:
            ours.update(server.weights)
    for server in report.servers:
        differing = [block for block, digest in server.weights.items() if ours.get(block, digest) != digest]
        if differing:
            raise ServerMismatch(
                f"this swarm serves another model as {name!r}: server ...{server.peer_id[-6:]} has other "
                f"weights in {blocks_text(differing)}; choose another name for yours: --dht_prefix NAME"
            )


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM (a service manager's) ends the servers as Ctrl-C does."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
