"""Standard streams as a command finds them: closed, full, without a reader, or not in UTF-8."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from ebpfproxy.plain_text import escaped

#: As a shell says it of a command that SIGINT, or SIGPIPE, has ended: 1 is an answer of `explain`.
INTERRUPTED, NO_READER = 130, 141

_IN_WORDS = "ebpfproxy.in-words"
#: Marks of our own output, where the encoding has none of them.
_WORDS = {"→": "->", "⇒": "=>", "✗": "x", "…": "...", "↓": "v", "µ": "u", "≥": ">="}
#: What writing to a file may end with, beside a reader that has gone.
_UNWRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF}


class UnwrittenError(click.ClickException):
    """Standard output cannot be written. What commands answer by exit code 1 is not known to anybody then."""

    exit_code = 2


def prepare() -> None:
    """Changes this process' streams, so that no print fails for an encoding or a closed stream."""
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    codecs.register_error(_IN_WORDS, _in_words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors=_IN_WORDS)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Gives a command that is interrupted, or cannot print, an exit code of its own."""
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno == errno.EPIPE:
            _drop_output()
            raise click.exceptions.Exit(NO_READER) from None
        if error.errno not in _UNWRITTEN:
            raise
        _drop_output()
        raise UnwrittenError(f"the output cannot be written: {error.strerror}") from error


def _nowhere() -> io.TextIOWrapper:
    return Path(os.devnull).open("w", encoding="utf-8")


def _drop_output() -> None:
    """The interpreter would write what is left at its end, and complain."""
    with suppress(OSError, ValueError):
        output = os.open(os.devnull, os.O_WRONLY)
        os.dup2(output, sys.stdout.fileno())
        os.close(output)


def _in_words(error: UnicodeError) -> tuple[str, int]:
    """What the encoding lacks, in its letters; as JSON escapes it, so that JSON keeps its meaning."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_WORDS.get(each) or escaped(each) for each in lacking), error.end
