"""`textrl-swarm status`: who holds which blocks of a swarm's models, whether they can be trained, what to
type if not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from textrl_swarm.config import SwarmAccess
from textrl_swarm.display import bit_rate, spinner
from textrl_swarm.models.blocks import BlockSpan, blocks_text
from textrl_swarm.swarm import compat

if TYPE_CHECKING:
    from textrl_swarm.swarm.client.survey import ModelReport, ServerReport

_MAX_COLUMNS = 70  # of the bar; with its label it fits a terminal of 80
_MARKS = {"trains": ("█", "#", "green"), "holds": ("▒", "o", "yellow"), "missing": ("·", ".", "red")}
_LEGEND = {"trains": "can be trained", "holds": "held, but nobody can train it", "missing": "missing"}


def status_command(
    initial_peers: Sequence[str],
    dht_prefix: str | None,
    console: Console,
    *,
    as_json: bool = False,
    timeout_s: float = 60.0,
    access: SwarmAccess | None = None,
) -> bool:
    """Looks and prints; returns whether all blocks of all models shown can be trained, without conflicts.

    Raises:
        PetalsMissing, AddressError, BlocksUnavailable, ConfigError, SwarmError: see `swarm.survey.survey`.
    """
    compat.require_petals()
    from textrl_swarm.swarm.client.survey import survey

    progress = Console(stderr=True, highlight=False) if as_json else console
    with spinner(progress, "asking the swarm"):
        models = survey(initial_peers, dht_prefix, timeout_s=timeout_s, access=access)
    if as_json:
        print(to_json(models))
    else:
        for model in models:
            show_model(model, initial_peers[0], console)
    return not any(model.untrainable or model.conflicting for model in models)


def to_json(models: Sequence[ModelReport]) -> str:
    """For machines: every field of the reports, and per block how many servers hold and can train it."""
    return json.dumps({"models": [_plain(model) for model in models]}, indent=2)


def _plain(model: ModelReport) -> dict[str, Any]:
    return {
        **dataclasses.asdict(model),
        "copies": model.copies(training=False),
        "trainable_copies": model.copies(training=True),
        "missing": model.missing,
        "untrainable": model.untrainable,
        "conflicting": model.conflicting,
        "can_train": not model.untrainable,
        "can_generate": not model.missing,
    }


def show_model(model: ModelReport, address: str, console: Console) -> None:
    """Coverage, servers and a verdict, within 80 columns but for commands to copy."""
    name = _shown(model.dht_prefix, console)
    where = _shown(f", {model.repository}" if model.repository else "", console)
    console.print(f"[bold]{name}[/]: {_count(model.num_blocks, 'block')}{where}", soft_wrap=True)
    console.print()
    _show_coverage(model, console)
    console.print()
    console.print(_server_table(model.servers, console))
    console.print()
    for line in _layers(model, console.width):
        console.print(_shown(line, console))
    for line in _verdict(model, address):
        console.print(line, soft_wrap=line.startswith("    "))
    console.print()


def _show_coverage(model: ModelReport, console: Console) -> None:
    held = model.copies(training=False)
    trainable = model.copies(training=True)
    per_column = math.ceil(model.num_blocks / _MAX_COLUMNS)
    starts = range(0, model.num_blocks, per_column)
    columns = [range(start, min(start + per_column, model.num_blocks)) for start in starts]
    ascii_only = console.options.ascii_only
    bar = Text()
    kinds = []
    for column in columns:
        if not all(held[block] for block in column):
            kind = "missing"
        elif all(trainable[block] for block in column):
            kind = "trains"
        else:
            kind = "holds"
        kinds.append(kind)
        unicode_mark, ascii_mark, color = _MARKS[kind]
        bar.append(ascii_mark if ascii_only else unicode_mark, style=color)
    ruler = "".join(f"{columns[i].start:<10}" for i in range(0, len(columns), 10))
    copies = "".join(_digit(min(held[block] for block in column)) for column in columns)
    for label, content in (("block", Text(ruler.rstrip())), ("", bar), ("copies", Text(copies))):
        console.print(Text.assemble(f"{label:<9}", content), no_wrap=True, overflow="crop")
    notes = [f"{_MARKS[kind][ascii_only]} {_LEGEND[kind]}" for kind in _MARKS if kind in kinds]
    if per_column > 1:
        notes.append(f"a column is {per_column} blocks, the worst of them")
    console.print(Text(" " * 9 + "   ".join(notes), style="dim"))


def _layers(model: ModelReport, width: int) -> list[str]:
    """What LoRA can adapt, where; blocks of one kind together."""
    kinds: dict[tuple[str, ...], set[int]] = {}
    for server in model.servers:
        for block, names in server.layers.items():
            kinds.setdefault(names, set()).add(block)
    if not kinds:
        return []
    lines = ["Layers that LoRA can adapt:"]
    for names, blocks in kinds.items():
        line = f"  {blocks_text(blocks)}: {', '.join(names) or 'none'}"
        lines += textwrap.wrap(line, width, subsequent_indent="    ")
    return [*lines, ""]


def _digit(copies: int) -> str:
    return str(copies) if copies < 10 else "+"


def _shown(foreign: str, console: Console) -> str:
    """A stranger's text in what this terminal can show."""
    return escape(foreign.encode(console.encoding, "replace").decode(console.encoding))


def _server_table(servers: Sequence[ServerReport], console: Console) -> Table:
    dots = "..." if console.options.ascii_only else "…"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("server", "blocks", "weights", "state"):
        table.add_column(heading, no_wrap=True, overflow="crop", max_width=18)
    for heading in ("answers", "a token", "cache left"):
        table.add_column(heading, justify="right", no_wrap=True, overflow="crop", max_width=18)
    for server in servers:
        table.add_row(
            _shown(f"{dots}{server.peer_id[-6:]} {(server.name or '')[:8]}".rstrip(), console),
            f"{server.start}..{server.stop - 1}",
            _shown(_weights(server), console),
            _state(server),
            _ms(server.answer_ms),
            _ms(server.token_ms),
            "" if server.cache_tokens_left is None else f"{server.cache_tokens_left:,}",
        )
    return table


def _weights(server: ServerReport) -> str:
    dtype = (server.dtype or "?").replace("bfloat16", "bf16").replace("float", "fp")
    return f"{server.quantization}, {dtype}" if server.quantization else dtype


def _state(server: ServerReport) -> str:
    if server.state == "online":
        return "[green]trains[/]" if server.can_train else "[yellow]no training[/]"
    others = {
        "silent": "[red]no answer[/]",
        "closed": "[yellow]lets us not in[/]",
        "joining": "[yellow]loading[/]",
    }
    return others.get(server.state, "[red]leaving[/]")


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.0f} s"


def _verdict(model: ModelReport, address: str) -> list[str]:
    """Sentences, and indented lines to type."""
    trainable = model.copies(training=True)
    closed = _closed_blocks(model)
    not_let_in = (
        f"[yellow]This machine is not let in[/] by the servers of {blocks_text(closed)}: they ask for the "
        "swarm's secret (--secret-file), or for a key whose id is on their list (--identity; "
        "`textrl-swarm peer-id` prints it)."
    )
    if not model.untrainable:
        single = blocks_text(block for block, copies in enumerate(trainable) if copies == 1)
        spare = f"; no copy to spare of {single}" if single else "; every block has a copy to spare"
        lines = [f"[green]A client can train and generate now[/]{spare}."]
        links = model.links()
        if links is not None:
            lines.append(
                f"From here: {1000 * links.round_trip_s:.0f} ms to a server and back, "
                f"{1000 * links.token_s:.0f} ms for a token through all blocks, {bit_rate(links.bits_per_s)} "
                f"to {_count(links.servers, 'server')}. `train run.yaml --dry-run` tells what an iteration "
                "takes."
            )
    elif closed and len(closed) == sum(stop - start for start, stop in model.untrainable):
        return [not_let_in]
    elif not model.missing:
        lines = [
            "[yellow]Nobody can train now[/]: only servers that run stock petals hold "
            f"{_listed(model.untrainable)}. Stock clients can generate."
        ]
    else:
        lines = [f"[red]Nothing can run now[/]: nobody holds {_listed(model.missing)}."]
        held = model.copies(training=False)
        stock = blocks_text(
            block for block in range(model.num_blocks) if held[block] and not trainable[block]
        )
        if stock:
            lines.append(f"Only servers that run stock petals, and cannot train, hold {stock}.")
    if model.conflicting:
        lines.append(
            f"[red]Two models share this name[/]: servers differ in the weights of "
            f"{_listed(model.conflicting)}; a client refuses those that differ from its own. End the wrong "
            "servers, or give them another --dht_prefix."
        )
    forms = sorted({_weights(server) for server in model.servers if server.state == "online"})
    if len(forms) > 1:
        lines.append(
            f"[yellow]The servers do not compute alike[/] ({'; '.join(forms)}): results depend on which of "
            "them answer."
        )
    loading = [(server.start, server.stop) for server in model.servers if server.state == "joining"]
    if loading:
        lines.append(f"Being loaded: {_listed(loading)}.")
    silent = sum(server.state == "silent" for server in model.servers)
    if silent:
        servers = _count(silent, "server")
        lines.append(
            f"{servers} announced blocks and did not answer; stale announcements expire on their own."
        )
    if closed:
        lines.append(not_let_in)
    if model.untrainable:
        name = (model.repository or "MODEL").removeprefix("https://huggingface.co/")
        where = "on any machine" if name != "MODEL" else "on any machine that has the model"
        lines.append(f"To fill the gaps, {where}:")
        for start, stop in model.untrainable:
            options = f"--block_indices {start}:{stop} --initial-peers {address}"
            lines.append(escape(f"    textrl-swarm serve {name} {options}"))
    return lines


def _closed_blocks(model: ModelReport) -> list[int]:
    """Those that nobody but servers which do not let this machine in can train."""
    held = {block for s in model.servers if s.state == "closed" for block in range(s.start, s.stop)}
    return [block for start, stop in model.untrainable for block in range(start, stop) if block in held]


def _listed(spans: Sequence[BlockSpan]) -> str:
    return blocks_text(block for start, stop in spans for block in range(start, stop))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
