"""This node's network namespaces, as far as this process can see them."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)
#: Where container runtimes bind namespaces (CNI plugins get their names from there), and all of processes.
FOLDERS = (Path("/run/netns"), Path("/run/docker/netns"))
#: This process's own.
OWN = Path("/proc/self/ns/net")
#: Why pods are not found, where :func:`may_enter` is False.
NO_ENTRY = "this process may not enter pods' network namespaces: CAP_SYS_ADMIN is missing"


def namespaces() -> Iterator[Path]:
    """One path to each network namespace: bound ones, and those of visible processes (the host's /proc).

    A name where nothing is mounted, here or any more, is a plain file that nobody may open (ip-netns(8)).
    """
    seen: set[int] = set()
    nsfs = OWN.stat().st_dev
    for path in _paths():
        with suppress(OSError):
            # Objects for the paths of all threads would take as long as the rest.
            found = os.stat(path)  # noqa: PTH116
            if found.st_dev == nsfs and found.st_ino not in seen:
                seen.add(found.st_ino)
                yield Path(path)


def _paths() -> Iterator[str]:
    yield str(OWN)
    for folder in FOLDERS:
        with suppress(OSError):
            yield from map(str, sorted(folder.iterdir()))
    with os.scandir("/proc") as processes:
        for process in processes:
            if process.name.isdigit():
                # A thread may be in another than its process (setns, unshare).
                with suppress(OSError), os.scandir(f"{process.path}/task") as threads:
                    for thread in threads:
                        yield f"{thread.path}/ns/net"


def may_enter() -> bool:
    """False where this process is refused (setns(2)) in all namespaces but its own, or would be: it may see
    none."""
    is_refused = False
    for path in namespaces():
        if path == OWN:
            continue
        try:
            socket_in(path, socket.AF_INET, socket.SOCK_DGRAM).close()
        except PermissionError:
            is_refused = True
        except OSError:
            continue
        else:
            return True
    return not is_refused and _may_enter_own()


def _may_enter_own() -> bool:
    """setns(2) asks for the capability where it changes nothing, too."""
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(fd)
    except PermissionError:
        return False
    finally:
        os.close(fd)
    return True


def names_by_cookie() -> dict[int, str]:
    """Names by cookie: ``host`` for this process's own, the name in a runtime's folder, or ``pid N``."""
    found = {}
    for path in namespaces():
        with suppress(OSError), socket_in(path, socket.AF_INET, socket.SOCK_DGRAM) as probe:
            name = f"pid {path.parts[2]}"
            if path == OWN:
                name = "host"
            elif path.parent in FOLDERS:
                name = path.name
            found[cookie_of(probe)] = name
    return found


def netlink_in(namespace: Path, protocol: int) -> socket.socket:
    """A netlink socket that belongs to another namespace. Raises OSError as :func:`socket_in`."""
    return socket_in(namespace, socket.AF_NETLINK, socket.SOCK_RAW, protocol)


def socket_in(namespace: Path, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """A socket that belongs to another namespace; this thread is back in its own.

    Raises OSError: the namespace is gone, or this process may not enter it (CAP_SYS_ADMIN).
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Its own needs no capability.
            is_own = os.path.sameopenfile(home, there)
            if not is_own:
                _enter(there)
        finally:
            os.close(there)
        try:
            return socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        finally:
            if not is_own:
                _enter(home)
    finally:
        os.close(home)


def socket_with_cookie(netns: int, family: int, kind: int) -> socket.socket | None:
    """A socket of the network namespace with this cookie; None where this process sees none."""
    for path in namespaces():
        with suppress(OSError):
            found = socket_in(path, family, kind)
            if cookie_of(found) == netns:
                return found
            found.close()
    return None


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


def netns_cookie() -> int:
    """The cookie of this process's network namespace: what bpf_get_netns_cookie gives in programs."""
    with socket.socket() as probe:
        return cookie_of(probe)


def cookie_of(probe: socket.socket) -> int:
    """The cookie of the network namespace that a socket belongs to."""
    return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)
