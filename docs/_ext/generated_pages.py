"""Fills pages with what the code knows: the keys of run.yaml and the options of the commands.

A page asks with a comment, `<!-- generated: run.yaml -->` or `<!-- generated: commands -->`. This extension
puts Markdown in its place before Sphinx parses the page. It also turns indented examples of docstrings into
literal blocks.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from sphinx.application import Sphinx

_PLAIN_TYPES: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "any",
}


# ------------------------------------------------------------------------------------------ run.yaml


def run_yaml() -> str:
    """Markdown with a table of keys per section of a run's configuration."""
    from textrl_swarm.config import Codec, LoraSettings, ServerChecks, SwarmAccess
    from textrl_swarm.runs.config import EvaluationConfig, RewardConfig, RunConfig, SwarmConfig

    smallest = RunConfig(
        model="",
        prompts=["-"],
        reward=(RewardConfig(function="module:name"),),
        output="-",
        swarm=SwarmConfig(initial_peers=(), codec=Codec("fp16"), checks=ServerChecks(), access=SwarmAccess()),
        lora=LoraSettings(),
        evaluation=EvaluationConfig(prompts=["-"]),
    )
    known = smallest.to_dict()  # what a file may hold: the keys, and the defaults as YAML has them
    return "\n".join(_section("", RunConfig, known))


def _section(path: str, cls: type, known: Mapping[str, Any]) -> Iterator[str]:
    from textrl_swarm.config import field_docs

    docs = field_docs(cls)
    hints = typing.get_type_hints(cls)
    if path:
        summary = (cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        yield f"\n(config-{path.replace('.', '-')})=\n## `{path}`\n\n{summary}\n"
    yield "| Key | Type | Default | Meaning |\n|---|---|---|---|"
    nested = []
    for field in dataclasses.fields(cls):
        if field.name not in known:
            continue  # refused in a file: a run has one seed
        section = _dataclass_in(hints[field.name])
        key = f"{path}.{field.name}".lstrip(".")
        if section is not None:
            nested.append((key, section, known[field.name]))
            kind = f"[section](#config-{key.replace('.', '-')})"
            kind = f"list of {kind}s" if isinstance(known[field.name], Sequence) else kind
        else:
            kind = _type(hints[field.name])
        default = _default(field, section, known[field.name])
        yield f"| `{key}` | {kind} | {default} | {_cell(docs.get(field.name, ''))} |"
    for key, section, values in nested:
        yield from _section(key, section, values[0] if isinstance(values, Sequence) else values)


def _dataclass_in(hint: Any) -> type | None:
    """The settings class in a hint such as `A`, `A | None` or `tuple[A, ...]`."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    found = (_dataclass_in(argument) for argument in typing.get_args(hint))
    return next((cls for cls in found if cls is not None), None)


def _type(hint: Any) -> str:
    """A hint as a user of YAML reads it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    return _PLAIN_TYPES.get(hint, f"`{hint}`")


def _default(field: dataclasses.Field[Any], section: type | None, value: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "`null`"
    if section is not None:
        return "its defaults"
    return f"`{yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ------------------------------------------------------------------------------------------ commands


def commands() -> str:
    """Markdown with every command's arguments and options."""
    import typer

    from textrl_swarm import cli

    group: Any = typer.main.get_command(cli.app)
    parts: list[str] = []
    for name, command in group.commands.items():
        parts += _command(f"textrl-swarm {name}", command)
    return "\n".join(parts)


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join([name, *(one.name.upper() for one in arguments), "[OPTIONS]"])
    yield f"\n## `{name}`\n\n```text\n{usage}\n```\n\n{_paragraphs(command.help)}\n"
    yield "| Argument or option | Meaning | Default |\n|---|---|---|"
    for one in command.params:
        is_argument = one.param_type_name == "argument"
        names = one.name.upper() if is_argument else ", ".join([*one.opts, *one.secondary_opts])
        yield f"| `{names}` | {_cell(one.help or '')} | {_option_default(one)} |"
    if command.epilog:
        label, _, examples = command.epilog.partition(":")
        lines = "\n".join(example.strip() for example in examples.split("  |  "))
        yield f"\n{label}:\n\n```text\n{lines}\n```"


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _option_default(one: Any) -> str:
    if one.required:
        return "required"
    if one.is_flag and not one.default:
        return "off"
    if one.is_flag:
        return "on"
    return "" if one.default in (None, [], ()) else f"`{one.default}`"


# ------------------------------------------------------------------------------------------ docstrings


def literal_examples(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Makes literal blocks of indented paragraphs outside sections, such as examples and equations."""
    result: list[str] = []
    in_section = in_block = False
    for number, line in enumerate(lines):
        is_indented = line.startswith("    ")
        if line and not is_indented:
            in_section, in_block = line.endswith(":"), False
        starts = is_indented and not in_section and not in_block and number > 0 and not lines[number - 1]
        if starts:
            result += ["::", ""]
            in_block = True
        result.append(line)
    lines[:] = result


def hide_unknown_arguments(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """Leaves `**unknown: Never` out of signatures: it exists only to name a misspelt argument in an error."""
    return (signature.replace(", **unknown: Never", "") if signature else signature), returned


# ------------------------------------------------------------------------------------------ Sphinx

GENERATED = {"run.yaml": run_yaml, "commands": commands}


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Replaces the comments of a page with what they ask for."""
    for name, make in GENERATED.items():
        mark = f"<!-- generated: {name} -->"
        if mark in source[0]:
            source[0] = source[0].replace(mark, make())


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-signature", hide_unknown_arguments)
    app.connect("autodoc-process-docstring", literal_examples, priority=400)  # before napoleon's, at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
