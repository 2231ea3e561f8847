"""A file of lines for log shippers, which is renamed when it is large, as logrotate does."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

#: Others may not read who connects to what.
_MODE = 0o640


class RotatingFile:
    """``path`` has the newest lines, ``path.1`` those before it, and so on. A line is never in two files.

    What somebody else renames or removes is made anew. Raises OSError where a file cannot be written.
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
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _MODE)

    def write(self, lines: Iterable[str]) -> None:
        """Writes whole lines, which have no end of line yet."""
        data = "".join(f"{line}\n" for line in lines).encode()
        if self._is_elsewhere():
            self._open()
        if os.fstat(self._fd).st_size >= self._size:
            self._rotate()
        while data:
            data = data[os.write(self._fd, data) :]

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
