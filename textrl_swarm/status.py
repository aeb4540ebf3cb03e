"""`textrl-swarm status`: who holds which blocks of a swarm's models, whether one can train now, and what to type if not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from textrl_swarm.display import status as waiting
from textrl_swarm.swarm import compat

if TYPE_CHECKING:
    from textrl_swarm.swarm.survey import ModelReport, ServerReport

_MAX_COLUMNS = 70  # of the bar; with its label it fits a terminal of 80
_MARKS = {"trains": ("█", "#", "green"), "holds": ("▒", "o", "yellow"), "missing": ("·", ".", "red")}
_LEGEND = {"trains": "can be trained", "holds": "held, but nobody can train it", "missing": "missing"}


def status_command(
    initial_peers: Sequence[str], dht_prefix: str | None, console: Console, *, as_json: bool = False, timeout_s: float = 60.0
) -> bool:
    """Looks and prints; returns whether all blocks of all models shown can be trained.

    Raises:
        PetalsMissing, AddressError, BlocksUnavailable, ConfigError, SwarmError: see `swarm.survey.survey`.
    """
    compat.require_petals()
    from textrl_swarm.swarm.survey import survey

    told_on = Console(stderr=True, highlight=False) if as_json else console
    with waiting(told_on, "asking the swarm"):
        models = survey(initial_peers, dht_prefix, timeout_s=timeout_s)
    if as_json:
        print(to_json(models))
    else:
        for model in models:
            show_model(model, initial_peers[0], console)
    return all(not model.untrainable for model in models)


def to_json(models: Sequence[ModelReport]) -> str:
    """For machines: every field of the reports, and per block how many servers hold and can train it."""
    return json.dumps({"models": [_plain(model) for model in models]}, indent=2)


def _plain(model: ModelReport) -> dict:
    return {
        **dataclasses.asdict(model),
        "copies": model.copies(training=False),
        "trainable_copies": model.copies(training=True),
        "missing": model.missing,
        "untrainable": model.untrainable,
        "can_train": not model.untrainable,
        "can_generate": not model.missing,
    }


def show_model(model: ModelReport, address: str, console: Console) -> None:
    """Coverage, servers and a verdict, within 80 columns but for commands to copy."""
    name, where = _shown(model.dht_prefix, console), _shown(f", {model.repository}" if model.repository else "", console)
    console.print(f"[bold]{name}[/]: {_count(model.num_blocks, 'block')}{where}", soft_wrap=True)
    console.print()
    _show_coverage(model, console)
    console.print()
    console.print(_server_table(model.servers, console))
    console.print()
    for line in _verdict(model, address):
        console.print(line, soft_wrap=line.startswith("    "))
    console.print()


def _show_coverage(model: ModelReport, console: Console) -> None:
    held, trainable = model.copies(training=False), model.copies(training=True)
    per_column = math.ceil(model.num_blocks / _MAX_COLUMNS)
    groups = [range(start, min(start + per_column, model.num_blocks)) for start in range(0, model.num_blocks, per_column)]
    ascii_only = console.options.ascii_only
    bar, kinds = Text(), []
    for group in groups:
        kind = "missing" if not all(held[block] for block in group) else "trains" if all(trainable[block] for block in group) else "holds"
        kinds.append(kind)
        bar.append(_MARKS[kind][ascii_only], style=_MARKS[kind][2])
    ruler = "".join(f"{groups[column].start:<10}" for column in range(0, len(groups), 10))
    copies = "".join(_digit(min(held[block] for block in group)) for group in groups)
    for label, content in (("block", Text(ruler.rstrip())), ("", bar), ("copies", Text(copies))):
        console.print(Text.assemble(f"{label:<9}", content), no_wrap=True, overflow="crop")
    notes = [f"{_MARKS[kind][ascii_only]} {_LEGEND[kind]}" for kind in _MARKS if kind in kinds]
    if per_column > 1:
        notes.append(f"a column is {per_column} blocks, the worst of them")
    console.print(Text(" " * 9 + "   ".join(notes), style="dim"))


def _digit(copies: int) -> str:
    return str(copies) if copies < 10 else "+"


def _shown(foreign: str, console: Console) -> str:
    """A stranger's text in what this terminal can show."""
    return escape(foreign.encode(console.encoding, "replace").decode(console.encoding))


def _server_table(servers: Sequence[ServerReport], console: Console) -> Table:
    dots = "..." if console.options.ascii_only else "…"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, right in (("server", 0), ("blocks", 0), ("weights", 0), ("state", 0), ("answers", 1), ("a token", 1), ("cache left", 1)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True, overflow="crop", max_width=18)
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
    return {"silent": "[red]no answer[/]", "joining": "[yellow]loading[/]"}.get(server.state, "[red]leaving[/]")


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.0f} s"


def _verdict(model: ModelReport, address: str) -> list[str]:
    """Sentences, and indented lines to type."""
    if not model.untrainable:
        alone = _ranges_text([(b, b + 1) for b, copies in enumerate(model.copies(training=True)) if copies == 1])
        spare = f"; no copy to spare of {alone}" if alone else "; every block has a copy to spare"
        lines = [f"[green]A client can train and generate now[/]{spare}."]
    elif not model.missing:
        lines = [
            f"[yellow]Nobody can train now[/]: only servers that run stock petals hold {_ranges_text(model.untrainable)}. "
            "Stock clients can generate."
        ]
    else:
        lines = [f"[red]Nothing can run now[/]: nobody holds {_ranges_text(model.missing)}."]
        copies, trainable = model.copies(training=False), model.copies(training=True)
        stock = [(block, block + 1) for block in range(model.num_blocks) if copies[block] and not trainable[block]]
        if stock:
            lines.append(f"Only servers that run stock petals, and cannot train, hold {_ranges_text(stock)}.")
    loading = [(s.start, s.stop) for s in model.servers if s.state == "joining"]
    if loading:
        lines.append(f"Being loaded: {_ranges_text(loading)}.")
    silent = sum(server.state == "silent" for server in model.servers)
    if silent:
        lines.append(f"{_count(silent, 'server')} announced blocks and did not answer; a dead server's entry goes by itself.")
    if model.untrainable:
        name = (model.repository or "MODEL").removeprefix("https://huggingface.co/")
        lines.append("To fill the gaps, on any machine:" if name != "MODEL" else "To fill the gaps, on any machine that has the model:")
        for start, stop in model.untrainable:
            lines.append(escape(f"    textrl-swarm serve {name} --block_indices {start}:{stop} --initial-peers {address}"))
    return lines


def _ranges_text(ranges: Sequence[tuple[int, int]]) -> str:
    """blocks 0..3, 7"""
    merged: list[list[int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    text = ", ".join(f"{start}..{stop - 1}" if stop - start > 1 else str(start) for start, stop in merged)
    single = len(merged) == 1 and merged[0][1] - merged[0][0] == 1
    return f"block {text}" if single else f"blocks {text}" if text else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
