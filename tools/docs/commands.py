"""docs/commands.md: every command and option, from click."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from ebpfproxy.cli import kubectl, main
from tools.docs.tables import table

_HEAD = """# Commands

`python -m tools.docs` generates this page from the commands' help; `--help` prints the same.

"""


def walk(
    command: click.Command = main, parent: click.Context | None = None, name: str = "ebpfproxy"
) -> Iterator[click.Context]:
    """A context for every command and group, in the order of the help."""
    ctx = click.Context(
        command, info_name=name, parent=parent, **(main.context_settings if not parent else {})
    )
    # click keeps the first help option that it makes, whatever the names were then.
    command._help_option = None
    yield ctx
    if isinstance(command, click.Group):
        for each in command.list_commands(ctx):
            found = command.get_command(ctx, each)
            assert found is not None
            yield from walk(found, ctx, each)


def page() -> str:
    of_plugin = list(walk(kubectl.main, name="kubectl ebpfproxy"))
    contexts = [*walk(), *of_plugin[1:]]
    listed = (
        (
            f"[`{ctx.command_path}`](#{ctx.command_path.replace(' ', '-')})",
            ctx.command.get_short_help_str(200),
        )
        for ctx in contexts
        if not isinstance(ctx.command, click.Group)
    )
    # What the program is, the overview has.
    general = _prose(main.help or "").partition("\n\n")[2]
    return (
        _HEAD + table(("command", "what"), listed) + f"\n{general}\n" + "".join(map(_section, contexts[1:]))
    )


def _section(ctx: click.Context) -> str:
    command = ctx.command
    level = "##" if ctx.parent is not None and ctx.parent.parent is None else "###"
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    text = f"\n{level} {ctx.command_path}\n\n{_prose(command.help or '')}\n"
    if isinstance(command, click.Group):
        return text
    options = [record for param in command.get_params(ctx) if (record := _record(param, ctx)) is not None]
    return f"{text}\n```\n{usage}\n```\n\n" + table(("option", "what"), options)


def _prose(text: str) -> str:
    r"""Paragraphs as they are; one behind a ``\b`` keeps its lines."""
    parts = []
    for part in inspect.cleandoc(text).split("\n\n"):
        kept = part.removeprefix("\b\n")
        parts.append(kept if kept == part else f"```\n{kept}\n```")
    return "\n\n".join(parts)


def _record(param: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
    record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
    return (f"`{record[0]}`", record[1]) if record else None
