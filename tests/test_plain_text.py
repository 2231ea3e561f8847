"""What others name is shown as it is, but a terminal obeys none of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from io import StringIO

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy import logs
from ebpfproxy.cli import main
from ebpfproxy.cli.output import console, table
from ebpfproxy.plain_text import escaped_json, plain, plain_lines
from tests.examples import examples

#: An escape sequence, one that begins with a single character, a mark that reorders letters, half a pair.
EVIL = "\x1b[31mred\x9b2J\u202e\ud800\x7f"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web-1 ü → 网", "web-1 ü → 网"),
        ("\x1b[2Jx", "\N{REPLACEMENT CHARACTER}[2Jx"),
        ("a\nb\tc\r", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}"),
        ("\x9b\u202e\u2028", "\N{REPLACEMENT CHARACTER}" * 3),
    ],
)
def test_a_line_has_nothing_that_a_terminal_obeys(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_lines_stay_lines() -> None:
    assert plain_lines("a\x07\nb") == "a\N{REPLACEMENT CHARACTER}\nb"


@settings(max_examples=examples(50))
@given(
    st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_json_keeps_its_meaning(value: object) -> None:
    for indent in (None, 2):
        written = escaped_json(json.dumps(value, ensure_ascii=False, indent=indent))
        assert json.loads(written) == value
        assert all(each.isprintable() or each == "\n" for each in written)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "say",
    [
        lambda log: log.warning("ignoring object", object=EVIL),
        lambda log: log.warning("ignoring objects", objects=[EVIL, "b"]),
        lambda log: log.warning(f"an event of a library: {EVIL}"),
        lambda log: log.warning("nested", values={EVIL: [EVIL]}),
    ],
)
def test_a_line_of_the_log_is_a_line(form: str, say: Callable[[logs.Logger], None]) -> None:
    """Names come from the API, manifests, files and the kernel; half a surrogate pair ends no line either."""
    handler = logging.StreamHandler(stream := StringIO())
    handler.setFormatter(logs.JsonFormatter() if form == "json" else logs.TextFormatter())
    logger = logging.getLogger("ebpfproxy.test_plain_text")
    logger.addHandler(handler)
    # pytest would report the line, and its workers cannot send half a surrogate pair.
    logger.propagate = False
    try:
        say(logs.get_logger(logger.name))
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
    line = stream.getvalue()
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert "Logging error" not in line
    if form == "json":
        json.loads(line)


def test_errors_of_commands_are_printed_as_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("status")
    def fails() -> None:
        raise click.ClickException(f"no Service {EVIL[:-2]}\nin these maps")

    monkeypatch.setattr("ebpfproxy.cli.status.command", fails)
    said = CliRunner().invoke(main, ["status"]).output
    assert said.splitlines()[-1] == "in these maps"
    assert all(line.isprintable() for line in said.splitlines())


def test_cells_and_lines_of_tables_are_printed_as_they_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table("name")
    rows.add_row(EVIL[:-2])
    console().print(rows)
    console().print(EVIL[:-2])
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))
