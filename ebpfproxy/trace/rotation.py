"""A file of lines for log shippers, which is renamed when it is large, as logrotate does."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

#: Others may not read who connects to what.
_MODE = 0o640


class RotatingFile:
    """``path`` has the newest lines, ``path.1`` those before it, and so on. A line is never in two files.

    What somebody else renames or removes is made anew. Raises OSError where a file cannot be written, and
    where the path is a symbolic link.
    """

    def __init__(self, path: Path, size: int, files: int) -> None:
        """``size``: bytes of a file, but for its last lines. ``files``: how many there are, at least 1."""
        self._path = path
        self._size = size
        self._files = files
        self._fd = -1
        self._open()

    def _open(self) -> None:
        self.close()
        # A link could lead to a file of somebody else's choice.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, _MODE)
        mode = os.fstat(self._fd).st_mode
        # Devices keep their mode: /dev/null is everybody's.
        if stat.S_ISREG(mode) and mode & 0o777 & ~_MODE:
            os.fchmod(self._fd, mode & _MODE)

    def write(self, lines: Iterable[str]) -> None:
        """Writes whole lines, which have no end of line yet."""
        data = "".join(f"{line}\n" for line in lines).encode()
        if self._is_elsewhere():
            self._open()
        if os.fstat(self._fd).st_size >= self._size:
            self._rotate()
        start, rest = os.fstat(self._fd).st_size, memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except BaseException:
            self._end_after_whole_line(start, data)
            raise

    def _end_after_whole_line(self, start: int, data: bytes) -> None:
        """Removes a part of a line that was written last, of ``data``, which begins at ``start``."""
        # A pipe cannot be truncated; the error that led here is the one to be told.
        with suppress(OSError):
            # The file itself says what was written: an interrupt may come right after os.write().
            written = os.fstat(self._fd).st_size - start
            if 0 < written < len(data):
                os.ftruncate(self._fd, start + data.rfind(b"\n", 0, written) + 1)

    def _is_elsewhere(self) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        here = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._files))]
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)
        if self._files == 1:
            self._path.unlink()
        self._open()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
