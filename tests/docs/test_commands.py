"""Command lines in the documents are accepted, and every command and option has a help text."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from ebpfproxy.cli import main
from tests.docs.pages import WRITTEN, blocks, spans
from tools.docs.commands import walk

#: A command line ends at operators of the shell.
_END = re.compile(r"\s(?:\||&&|;|>|>>|#)(?:\s|$)|\s&$")
#: It is called directly, in a pod or in a container; its output and the package's folders are not calls.
_CALL = re.compile(
    r"^(?:\$ |sudo )?(?:\S*/bin/)?ebpfproxy\s+(\S.*)"
    r"|^kubectl .* -- ebpfproxy\s+(\S.*)"
    r"|^docker run .*? \S+/ebpfproxy:\S+\s+(\S.*)"
)
#: This matches placeholders: FILE, NAMESPACE/NAME, ADDRESS[:PORT].
_PLACEHOLDER = re.compile(r"^\[?[A-Z]{2,}[\w/:.\[\]-]*$")


class Line(NamedTuple):
    page: str
    text: str
    #: A mention in a sentence may lack arguments.
    whole: bool


def _lines() -> Iterator[Line]:
    for page in WRITTEN:
        for block in blocks(page):
            if block.language in ("", "sh", "bash", "console"):
                for text in re.sub(r"\\\n\s*", "", block.text).splitlines():
                    yield Line(page.name, text, True)
        for text in spans(page):
            yield Line(page.name, text, False)


def calls() -> list[Line]:
    """The words after ``ebpfproxy``. A sentence may also mention the program without calling it."""
    known = main.list_commands(click.Context(main))
    found = []
    for line in _lines():
        match = _CALL.match(_END.split(line.text)[0].strip())
        words = next(filter(None, match.groups())) if match else ""
        if words and (line.whole or words.split()[0] in known):
            found.append(line._replace(text=words))
    return found


def check(text: str, *, whole: bool) -> str:
    """Returns the error of the words after ``ebpfproxy``, empty if there is none."""
    words = shlex.split(text)
    # plan|run|rollback stands for each of them.
    choices = [word.split("|") if "|" in word and not word.startswith("-") else [word] for word in words]
    for chosen in itertools.product(*choices):
        message = _parse(list(chosen), whole=whole and all(len(each) == 1 for each in choices))
        if message:
            return message
    return ""


def _parse(words: list[str], *, whole: bool) -> str:
    command: click.Command = main
    ctx = click.Context(main, info_name="ebpfproxy")
    if words[:1] == ["--end-with-input"] and len(words) > 1:
        # It is an option of the program, before the command.
        words = words[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(ctx, words[0])
        if found is None:
            return f"no command {words[0]}"
        command, ctx = found, click.Context(found, info_name=words[0], parent=ctx)
        words = words[1:]
    if isinstance(command, click.Group):
        return "" if not whole or words in (["--help"], ["--version"]) else "a group, not a command"
    try:
        # It takes from the list what it parses.
        command.make_context(ctx.info_name or "", [*words])
    except click.exceptions.Exit:
        return ""  # --help
    except click.MissingParameter as error:
        return str(error) if whole else ""
    except click.BadParameter as error:
        if any(_PLACEHOLDER.match(word.rpartition("=")[2]) for word in words):
            return ""
        return str(error)
    except click.UsageError as error:
        return error.message
    return ""


def test_documents_have_command_lines() -> None:
    pages = {line.page for line in calls()}
    assert {"README.md", "install.md", "migrate.md", "troubleshooting.md", "configuration.md"} <= pages
    assert len(calls()) > 60


@pytest.mark.parametrize("line", calls(), ids=lambda line: f"{line.page}: {line.text}")
def test_command_lines_are_accepted(line: Line) -> None:
    assert check(line.text, whole=line.whole) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("status --output xml", "'xml' is not one of"),
        ("status --nothing", "--nothing"),
        ("stats", "no command stats"),
        ("migrate plan|go", "no command go"),
        ("backend drain", "address"),
        ("backend drain ADDRESS[:PORT]", ""),
        ("config validate|defaults", ""),
        ("service", "a group"),
    ],
)
def test_the_check_finds_errors(text: str, message: str) -> None:
    found = check(text, whole=True)
    assert message in found and bool(message) == bool(found)


@pytest.mark.parametrize("ctx", list(walk()), ids=lambda ctx: ctx.command_path)
def test_every_command_and_option_has_a_help_text(ctx: click.Context) -> None:
    assert ctx.command.help
    options = [p for p in ctx.command.params if isinstance(p, click.Option) and not p.hidden]
    assert [option.opts for option in options if not option.help] == []


def test_images_have_no_registry_host() -> None:
    hosts = re.compile(r"\b(?:[a-z0-9-]+\.)+(?:io|com|org|dev)/[\w./-]+:[\w.-]+")
    found = [
        match[0] for page in WRITTEN for match in hosts.finditer(Path(page.parent, page.name).read_text())
    ]
    assert found == []
