"""The command line. Parses, calls the library, prints; errors of ours become one line and exit code 1."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from textrl_swarm.display import accept_any_text
from textrl_swarm.errors import TextRLSwarmError
from textrl_swarm.swarm.compat import explained_changes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Reinforcement learning of language models through a Petals swarm.",
)
console = Console(highlight=False)

_LOADING = "loading torch, transformers and peft ..."
_ADDRESS = "/ip4/192.0.2.7/tcp/31337/p2p/12D3Koo..."


def _examples(*commands: str) -> str:
    return f"Examples:  {'  |  '.join(commands)}"


_SecretFile = Annotated[
    Path | None,
    typer.Option(
        "--secret-file",
        "--secret_file",
        help="File with the swarm's secret; who does not know it is not let in.",
    ),
]


@app.command(
    epilog=_examples(
        "textrl-swarm demo --out runs/demo", "textrl-swarm demo --local --quantization 8bit --out runs/8bit"
    )
)
def demo(
    out: Annotated[Path, typer.Option(help="Directory for base model, adapter, summary and picture.")] = Path(
        "runs/demo"
    ),
    servers: Annotated[int, typer.Option(min=1, help="Petals servers to start on this machine.")] = 2,
    local: Annotated[bool, typer.Option("--local", help="No swarm: the model sits in this process.")] = False,
    quantization: Annotated[
        str | None, typer.Option(help="8bit or 4bit: of the servers' blocks, or of the local model.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Rollouts to train on.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    family: Annotated[str, typer.Option(help="Of the tiny model: bloom, llama or mixtral.")] = "bloom",
) -> None:
    """Train a tiny model, held by real Petals servers, to speak well of things: a minute or two on two
    cores.
    """
    with console.status(_LOADING):
        from textrl_swarm.commands.demo import DemoConfig, run_demo

    chosen = DemoConfig(out, 0 if local else servers, quantization, iterations, seed, family)
    summary = run_demo(chosen, console)
    if summary["interrupted"]:
        raise typer.Exit(130)


@app.command(
    epilog=_examples(
        "textrl-swarm train run.yaml",
        "textrl-swarm train run.yaml --dry-run",
        "textrl-swarm train run.yaml --set ppo.lr=3e-4 --set output=runs/b",
        "textrl-swarm train run.yaml --set swarm.timeouts.request_s=30",
    ),
)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with model, prompts, reward and output.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value instead of the file's, e.g. ppo.lr=3e-4.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the whole configuration and what it needs; start nothing.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="Continue a run although its configuration or prompts changed."
        ),
    ] = False,
) -> None:
    """Train from a file. The same command resumes a run that was stopped or killed."""
    with console.status(_LOADING):
        from textrl_swarm.commands.train import train_command
        from textrl_swarm.runs.config import load_config

    run = load_config(config, overrides or ())
    try:
        summary = train_command(run, console, dry_run=dry_run, accept_changes=accept_changes)
    except KeyboardInterrupt:  # before training began, or after it ended
        message = f"Stopped. Everything saved in {run.output} is intact; rerun the command to resume."
        console.print(escape(message), soft_wrap=True)
        raise typer.Exit(130) from None
    if summary is None and not dry_run:
        raise typer.Exit(130)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=_examples(
        "textrl-swarm serve bigscience/bloom-560m --new-swarm",
        "textrl-swarm serve ./my-bloom --servers 2 --new-swarm",
        f"textrl-swarm serve ./my-bloom --initial-peers {_ADDRESS} --block_indices 4:8",
    ),
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Directory or hub id of a decoder-only model.")],
    servers: Annotated[
        int, typer.Option(min=1, help="Servers to start here, with the blocks split evenly.")
    ] = 1,
    new_swarm: Annotated[
        bool, typer.Option("--new-swarm", "--new_swarm", help="Start a swarm instead of joining one.")
    ] = False,
    initial_peers: Annotated[
        list[str] | None,
        typer.Option(
            "--initial-peers", "--initial_peers", help="Address of a server to join; may be repeated."
        ),
    ] = None,
    allowed_peers: Annotated[
        Path | None,
        typer.Option(
            "--allowed-peers",
            "--allowed_peers",
            help="File with the ids of the peers that may come in, one in each line; default: everybody. It "
            "is read again when it changes.",
        ),
    ] = None,
    secret_file: _SecretFile = None,
) -> None:
    """Serve a model's blocks to clients that generate and train. Every option of petals' run_server can be
    added.

    --adapters DIR: also serve a trained adapter to petals clients, which ask for it with active_adapter=NAME,
    the directory's name.
    """
    with console.status("loading ..."):
        from textrl_swarm.commands.serve import serve_command

    peers, options = _split_addresses(list(initial_peers or []), context.args)
    if new_swarm == bool(peers):
        raise typer.BadParameter("give either --new-swarm (start one) or --initial-peers ADDRESS (join one)")
    serve_command(
        model, servers, peers, options, console, allowed_peers=allowed_peers, secret_file=secret_file
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=_examples(
        f"textrl-swarm status --initial-peers {_ADDRESS}",
        "textrl-swarm status --initial-peers ADDRESS ADDRESS --dht-prefix bigscience/bloom-petals --json",
    ),
)
def status(
    context: typer.Context,
    initial_peers: Annotated[
        list[str],
        typer.Option(
            "--initial-peers", "--initial_peers", help="Address of a server of the swarm; several may follow."
        ),
    ],
    dht_prefix: Annotated[
        str | None,
        typer.Option(
            "--dht-prefix", "--dht_prefix", help="Name of the one model to show; default: all models."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1, help="Seconds for everything together.")
    ] = 60,
    secret_file: _SecretFile = None,
    identity: Annotated[
        Path | None, typer.Option(help="File with this machine's key, for servers with --allowed-peers.")
    ] = None,
) -> None:
    """Show which servers hold which blocks of a swarm, how fast, which can train, and what is missing.

    Exit code: 0 when all blocks of the models shown can be trained, 3 when some cannot, 1 after an error.
    """
    peers, rest = _split_addresses(initial_peers, context.args)
    if rest:
        raise typer.BadParameter(f"unexpected argument: {rest[0]}")
    from textrl_swarm.commands.status import status_command
    from textrl_swarm.config import SwarmAccess

    access = SwarmAccess(
        secret_file=None if secret_file is None else str(secret_file),
        identity=None if identity is None else str(identity),
    )
    if not status_command(peers, dht_prefix, console, as_json=as_json, timeout_s=timeout_s, access=access):
        raise typer.Exit(3)


@app.command(
    "peer-id",
    epilog=_examples("textrl-swarm peer-id laptop.key", "textrl-swarm peer-id server.key >> friends.txt"),
)
def peer_id(
    path: Annotated[Path, typer.Argument(help="File with a private key; made when there is none.")],
) -> None:
    """Print the id of the peer that has a private key, as lists of allowed peers name it.

    The file is given to a run as swarm.access.identity, and to a server as --identity_path.
    """
    from textrl_swarm.swarm.compat import require_petals

    require_petals()
    from textrl_swarm.swarm.access import ensure_identity

    print(ensure_identity(path))


def _split_addresses(peers: list[str], rest: list[str]) -> tuple[list[str], list[str]]:
    """Separates addresses from other arguments: petals lets several addresses follow one --initial_peers.

    A peer's address has a peer id; that of --host_maddrs has none.
    """
    more = [arg for arg in rest if arg.startswith("/") and "/p2p/" in arg]
    return peers + more, [arg for arg in rest if arg not in more]


@app.command(
    epilog=_examples(
        "textrl-swarm export runs/mine adapter",
        "textrl-swarm export runs/mine model --merge",
        "textrl-swarm export runs/mine/best adapter --push-to-hub me/my-adapter",
    ),
)
def export(
    source: Annotated[
        str,
        typer.Argument(
            help="Run of `textrl-swarm train`, OUTDIR/best of train_agent_with_evaluation, or an adapter."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write; replaces an earlier export there.")],
    merge: Annotated[bool, typer.Option("--merge", help="A full model instead of an adapter.")] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: last, or an iteration; default: the finished adapter.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model, instead of the one that the adapter names.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="Repository to upload to, e.g. me/my-adapter.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="Load it back in a fresh process and compare logits (needs memory for two models)."
        ),
    ] = True,
) -> None:
    """Write an adapter in PEFT's format with a model card, or a merged model, and check that it loads
    elsewhere.
    """
    with console.status(_LOADING):
        from textrl_swarm.commands.export import export_command

    export_command(
        source,
        out,
        console,
        merge=merge,
        checkpoint=checkpoint,
        base_model=model,
        push_to=push_to_hub,
        private=private,
        check=verify,
    )


@app.command(
    epilog=_examples(
        "textrl-swarm compare runs/a runs/b", "textrl-swarm compare runs/ppo runs/rloo --out compared.png"
    )
)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="Picture to write: scores and KL over sampled tokens, score over KL.")
    ] = None,
) -> None:
    """Compare runs of `textrl-swarm train`: what they reached, at what KL, and how their configurations
    differ.
    """
    with console.status("reading runs ..."):
        from textrl_swarm.commands.compare import compare_command

    compare_command(runs, out, console)


def _dump(
    model: Annotated[str, typer.Option(help="Directory or hub id of the model before training.")],
    rl: Annotated[str, typer.Option(help="What was trained, e.g. OUTDIR/best.")],
    directory: Annotated[
        Path, typer.Option("--dump", "--dumpdir", help="Directory to write the full model to.")
    ],
) -> None:
    """Write a full model that AutoModelForCausalLM loads, as TextRL's command of this name."""
    with console.status(_LOADING):
        from textrl_swarm.commands.export import export_command

    export_command(rl, directory, console, merge=True, base_model=model)
    console.print("Finish model dump.")


def main() -> None:
    """Entry point of `textrl-swarm`."""
    _run(app)


def dump() -> None:
    """Entry point of `textrl-dump`."""
    dumper = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    example = "textrl-dump --model ./model_before --rl OUTDIR/best --dump ./model_after"
    dumper.command(epilog=f"Example:  {example}")(_dump)
    _run(dumper)


def _complain(message: str) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def _run(command: typer.Typer) -> None:
    accept_any_text()
    try:
        with explained_changes():
            command()
    except TextRLSwarmError as error:
        _complain(str(error))
        sys.exit(1)
    except OSError as error:  # a full disk, a directory without write permission
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror}")
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
