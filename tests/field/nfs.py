"""NFS server and client of the kernel in namespaces of a lab, without the daemons of nfs-utils.

``python -m tests.field.nfs`` is a client: it reads commands, each a JSON list of a method's name and
arguments in one line, and prints a JSON line. It mounts in a mount namespace of its own.
``python -m tests.field.nfs FOLDER CLIENT...`` is a server, which runs until it is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.lab.processes import read_line
from tests.lab.spaces import Space

PORT = 2049
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
#: NFSEXP_INSECURE_PORT, NFSEXP_NOSUBTREECHECK, NFSEXP_FSID (include/uapi/linux/nfsd/export.h).
_EXPORT_FLAGS = 0x2 | 0x400 | 0x2000
_SECONDS = 3600
_libc = ctypes.CDLL(None, use_errno=True)


def lacking() -> str:
    """The reason why this kernel cannot run the tests, or the empty string."""
    known = Path("/proc/filesystems").read_text().split()
    missing = [kind for kind in ("nfs4", "nfsd") if kind not in known]
    return f"this kernel has no {' or '.join(missing)}: make test-kernels" if missing else ""


def _mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), f"mount {source} at {target}")


def _own_mounts() -> None:
    """Unshares the mount namespace: later mounts are visible to this process and its children only."""
    if _libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare mounts")
    _mount("none", "/", "none", _MS_REC | _MS_PRIVATE)


def _control(name: str, value: str) -> None:
    Path("/proc/fs/nfsd", name).write_text(f"{value}\n")


def _cache(name: str, *words: object) -> None:
    """Fills a cache of nfsd in advance by its channel, which rpc.mountd does at the kernel's request."""
    Path("/proc/net/rpc", name, "channel").write_text(" ".join(map(str, words)) + "\n")


def _serve(folder: str, clients: list[str]) -> None:
    _own_mounts()
    # This nfsd belongs to the network namespace of the process; its threads end when it is unmounted.
    _mount("nfsd", "/proc/fs/nfsd", "nfsd")
    _control("versions", "-3 +4 +4.1 +4.2")
    # A new server serves only clients of its previous instance for this time; 10 s is the minimum.
    for name in ("nfsv4leasetime", "nfsv4gracetime"):
        _control(name, "10")
    _control("portlist", f"tcp {PORT}")
    _control("threads", "4")
    until = int(time.time()) + _SECONDS
    for each in clients:
        _cache("auth.unix.ip", "nfsd", each, until, "lab")
    _cache("nfsd.export", "lab", folder, until, _EXPORT_FLAGS, 65534, 65534, 0)
    # The root of NFSv4 is the export with fsid 0 (of type FSID_NUM, 1).
    _cache("nfsd.fh", "lab", 1, r"\x00000000", until, folder)
    print("ready", flush=True)
    signal.pause()


def start(space: Space, folder: Path, clients: Iterable[str]) -> None:
    """Serves ``folder`` to ``clients`` (addresses) as the root of NFSv4 until the lab ends."""
    command = [sys.executable, "-m", "tests.field.nfs", str(folder), *clients]
    process = space.popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


class Client:
    """A process that mounts and uses files. Its methods raise AssertionError with the error."""

    def __init__(self, space: Space) -> None:
        command = [sys.executable, "-m", "tests.field.nfs"]
        self._process = space.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _do(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        good, value = json.loads(read_line(self._process))
        assert good, f"{command}: {value}"
        return value

    def mount(self, host: str, port: int = PORT) -> None:
        self._do("mount", host, port)

    def unmount(self) -> None:
        self._do("unmount")

    def write(self, name: str, text: str) -> None:
        """Writes and syncs a file."""
        self._do("write", name, text)

    def read(self, name: str) -> str:
        return str(self._do("read", name))

    def append(self, text: str) -> None:
        """Appends to the file ``held``, which is kept open."""
        self._do("append", text)


class _Mounted:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: int | None = None

    def mount(self, host: str, port: int) -> None:
        source = f"[{host}]:/" if ":" in host else f"{host}:/"
        proto = "tcp6" if ":" in host else "tcp"
        options = f"vers=4.2,proto={proto},port={port},addr={host},soft,timeo=100,retrans=3,sec=sys"
        # With -i mount does not call mount.nfs4 of nfs-utils, which would add addr=.
        _run("mount", "-i", "-t", "nfs4", "-o", options, source, str(self._folder))

    def unmount(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None
        _run("umount", str(self._folder))

    def write(self, name: str, text: str) -> None:
        with (self._folder / name).open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def read(self, name: str) -> str:
        return (self._folder / name).read_text()

    def append(self, text: str) -> None:
        if self._held is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._held = os.open(self._folder / "held", flags, 0o644)
        os.write(self._held, text.encode())
        os.fsync(self._held)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command} failed ({done.returncode}): {done.stderr}")


def _main() -> None:
    _own_mounts()
    with tempfile.TemporaryDirectory() as folder:
        # The mount on this folder is visible in this mount namespace only.
        mounted = _Mounted(Path(folder))
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            try:
                answer = [True, getattr(mounted, name)(*arguments)]
            except OSError as error:
                answer = [False, str(error)]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _serve(sys.argv[1], sys.argv[2:])
    else:
        _main()
