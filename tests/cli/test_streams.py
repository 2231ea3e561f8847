"""Standard streams that are closed, full, without a reader or not UTF-8, and commands that are interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click
import pytest
from click.testing import CliRunner

from ebpfproxy.cli.output import emit_watching
from ebpfproxy.cli.plain_errors import PlainErrorsGroup

#: A program of our class, which prints as commands do: by rich, and by click.
_PROGRAM = """
import click
from ebpfproxy.cli.output import console, echo
from ebpfproxy.cli.plain_errors import PlainErrorsGroup

main = PlainErrorsGroup()
main.command("table")(lambda: console().print("a → b ✗ …\N{LATIN SMALL LETTER E WITH ACUTE}"))
main.command("lines")(lambda: echo("a → b ✗ …\N{LATIN SMALL LETTER E WITH ACUTE}"))
main()
"""

_PRINTS = pytest.mark.parametrize("command", ["table", "lines", "--help"])


def run(
    command: str, stdout: int | IO[Any] = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, command],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        check=False,
        timeout=60,
    )


@_PRINTS
def test_output_without_a_reader_is_no_answer(command: str) -> None:
    """`ebpfproxy explain … | head -1`: exit code 1 would say that the connection does not work."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run(command, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@_PRINTS
def test_output_to_a_full_file_system_is_one_line(command: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run(command, full)
    assert done.returncode == 2
    assert done.stderr == b"Error: the output cannot be written: No space left on device\n"


@_PRINTS
def test_closed_streams_are_no_failure(command: str) -> None:
    """Some supervisors start jobs without any."""
    shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", _PROGRAM, command]
    assert subprocess.run(shell, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("command", "encoding", "shown"),
    [
        # click takes ASCII for UTF-8 that was not declared.
        ("table", "ascii", rb"a -> b x ...\u00e9"),
        ("table", "latin-1", b"a -> b x ...\xe9"),
        ("lines", "latin-1", b"a -> b x ...\xe9"),
        ("table", "utf-8", "a → b ✗ …é".encode()),
    ],
)
def test_encodings_that_lack_our_marks_have_words(command: str, encoding: str, shown: bytes) -> None:
    """Locales of nodes are old, too; what is not ours is escaped as in JSON."""
    done = run(command, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout.rstrip(), done.stderr) == (0, shown, b"")


def test_interrupted_command_has_given_no_answer() -> None:
    """It ends as a shell says it of SIGINT: 1 would be an answer of `check`."""
    group = PlainErrorsGroup()

    @group.command("wait")
    def wait() -> None:
        raise KeyboardInterrupt

    assert CliRunner().invoke(group, ["wait"]).exit_code == 130


def test_interrupt_is_how_watching_ends(capsys: pytest.CaptureFixture[str]) -> None:
    values: Iterator[int] = iter([1])

    def read() -> int:
        for each in values:
            return each
        raise KeyboardInterrupt

    try:
        emit_watching(read, "json", click.echo, watch=True)
    except KeyboardInterrupt:
        pytest.fail("it ended with an error")
    assert capsys.readouterr().out == "1\n"
    with pytest.raises(KeyboardInterrupt):
        emit_watching(read, "json", click.echo, watch=False)
