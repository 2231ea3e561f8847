"""The archive: a tar.gz with a folder for each node, which has no more than :data:`MOST` bytes of it."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from gzip import GzipFile
from types import TracebackType
from typing import IO, Any, cast

import msgspec

from ebpfproxy.operator.sysdump.secrets import Secrets

#: Bytes of one node in the archive, and of one file before it is compressed.
MOST, MOST_OF_FILE = 10 << 20, 4 << 20
#: How much of :data:`MOST` is left for what comes last: heads of files, and the lines about failures.
_RESERVE = 256 << 10
#: With less room a file is left out.
_WORTH = 64 << 10
TOP = "ebpfproxy-sysdump"
ERRORS = "errors.txt"

Source = Callable[[], Iterable[str]]


class Archive:
    """Use it as a context, in one thread. Texts go through ``secrets``."""

    def __init__(self, file: IO[bytes], secrets: Secrets) -> None:
        self._file = _Counted(file)
        self._zip = GzipFile(fileobj=cast(IO[bytes], self._file), mode="wb", compresslevel=6)
        self._tar = tarfile.TarFile(fileobj=self._zip, mode="w")
        self._secrets = secrets

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
        self._zip.close()

    def folder(self, name: str) -> Folder:
        return Folder(self, name)

    def write(self, name: str, text: str) -> int:
        """Returns how many bytes the archive grew by."""
        before = self._file.size
        data = self._secrets.text(text).encode(errors="replace")
        info = tarfile.TarInfo(f"{TOP}/{name}")
        info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
        self._tar.addfile(info, io.BytesIO(data))
        self._zip.flush()
        return self._file.size - before


class Folder:
    """One node's part. :meth:`close` writes what has failed."""

    def __init__(self, archive: Archive, name: str) -> None:
        self._archive, self._name = archive, name
        self._used = 0
        self._errors: list[str] = []

    def add(self, name: str, source: Source) -> None:
        """Adds a file; an empty one is left out. What fails is one line in :data:`ERRORS`."""
        room = min(MOST_OF_FILE, MOST - _RESERVE - self._used)
        if room < _WORTH:
            self.fail(name, f"left out: the archive has {self._used} bytes of this node already")
            return
        parts: list[str] = []
        size = 0
        try:
            for part in source():
                data = part.encode(errors="replace")
                if size + len(data) > room:
                    # Lines are whole.
                    parts += data[: room - size].decode(errors="ignore").rpartition("\n")[:2]
                    parts.append(f"[cut here: a file has {room} bytes at most]\n")
                    self.fail(name, f"cut after {room} bytes")
                    break
                parts.append(part)
                size += len(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # libbpf's absence is a SystemExit.
            self.fail(name, str(error) or type(error).__name__)
        if any(parts):
            self._used += self._archive.write(f"{self._name}/{name}", "".join(parts))

    def fail(self, name: str, error: str) -> None:
        self._errors.append(f"{name}: {' '.join(error.split())}\n")

    def close(self) -> None:
        if self._errors:
            text = "".join(self._errors)
            self._archive.write(f"{self._name}/{ERRORS}", text[: _RESERVE // 2])


class _Counted:
    """A file that may be a pipe, and how much was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size = file, 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def rows(values: Iterable[Any]) -> Iterator[str]:
    """JSON, a line each: so a file that is cut can still be read."""
    for each in values:
        yield f"{msgspec.json.encode(each, enc_hook=str).decode()}\n"


def last(text: str) -> Iterator[str]:
    """The end of a log, which says more than its beginning; lines are whole."""
    room = MOST_OF_FILE // 2
    if len(text) > room:
        text = text[-room:].partition("\n")[2]
        yield f"[cut here: what came before the last {len(text)} characters is left out]\n"
    yield from text.splitlines(keepends=True)


def members(data: bytes) -> Iterator[tuple[str, str]]:
    """Names below a node's folder, and texts, of an archive that another node has sent.

    Raises tarfile.TarError, OSError and EOFError.
    """
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for info in tar:
            file = tar.extractfile(info) if info.isreg() else None
            parts = [part for part in info.name.split("/")[2:] if part not in ("", ".", "..")]
            if file is not None and parts:
                yield "/".join(parts), file.read(2 * MOST_OF_FILE).decode(errors="replace")
