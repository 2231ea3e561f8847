"""A command in a pseudo-terminal: what it shows, and keys."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from types import TracebackType

from tests.lab.interrupts import take_interrupts
from tests.lab.waiting import until

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_HOME, _ALTERNATE = b"\x1b[H", b"\x1b[?1049"


def _take_terminal() -> None:
    """In the child."""
    take_interrupts()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A context manager, at whose end the command is killed if it still runs."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 100,
        rows: int = 30,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._own, other = pty.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(other)
        # Modes are read from this side's descriptor after the command has ended.
        self._other = other
        self.output = b""
        # readline, which pytest imports, sets these two in what its workers inherit.
        inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env={**inherited, "TERM": "xterm-256color", **(env or {})},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._own)
        os.close(self._other)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._own, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._own, keys.encode())

    def _read(self) -> None:
        while select.select([self._own], [], [], 0)[0]:
            self.output += os.read(self._own, 65536)

    @property
    def page(self) -> list[str]:
        """The lines of the last whole refresh of the screen, without colours."""
        self._read()
        *_, last, _ = [b"", b"", *self.output.split(_HOME)]
        return [line.rstrip() for line in _CONTROL.sub("", last.decode(errors="replace")).split("\r\n")]

    def wait_for(self, text: str) -> list[str]:
        """The first page that has the text."""
        until(lambda: any(text in line for line in self.page), f"{text!r} is not shown")
        return self.page

    def wait(self, seconds: float = 30) -> int:
        """The command's exit code. Its output is read meanwhile."""

        def is_over() -> bool:
            self._read()
            return self.process.poll() is not None

        until(is_over, "the command does not end", seconds)
        self._read()
        return self.process.wait()

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends the signal."""
        self.type("\x03")

    def kill(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def is_restored(self) -> bool:
        """True if the terminal has its modes, its cursor and its first screen again."""
        self._read()
        entered, left = self.output.count(_ALTERNATE + b"h"), self.output.count(_ALTERNATE + b"l")
        shown = self.output.rfind(b"\x1b[?25h") > self.output.rfind(b"\x1b[?25l")
        return entered == left and shown and termios.tcgetattr(self._other) == self.before
