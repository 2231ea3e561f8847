"""Settings that kube-proxy makes, too, conntrack's limits and its own OOM score; and this process's heap."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

from ebpfproxy.logs import get_logger

log = get_logger(__name__)

#: Parameter of mallopt(3).
_M_ARENA_MAX = -8
#: In containers /proc/sys is read-only; this variable names another mount of the host's.
_PROC_SYS_NET = Path(os.environ.get("EBPFPROXY_PROC_SYS_NET", "/proc/sys/net"))


def set_oom_score_adj(value: int) -> None:
    """Sets the OOM score of this process, -1000 to 1000: see proc(5). A failure is logged."""
    _write(Path("/proc/self/oom_score_adj"), value)


def share_heap() -> None:
    """Has all threads of this process allocate from one heap, as far as they do not yet.

    glibc gives a heap to each, which keeps what its thread has freed: a megabyte for each that has read a
    list or loaded programs. Threads of Python mostly wait for each other in any case.
    """
    # Other C libraries have no such heaps.
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, 1)


def set_conntrack(limit: int, others: Mapping[str, int], *, root: Path = _PROC_SYS_NET) -> None:
    """Sets nf_conntrack_max, which is only ever raised, and other sysctls of net.netfilter by name.

    The table gets one bucket per four entries, as in kube-proxy (cmd/kube-proxy/app/conntrack.go). The agent
    tracks its own flows; netfilter tracks other traffic. A failure is logged: a read-only /proc/sys, or a
    network namespace other than the host's.
    """
    wanted = dict(others)
    for name, value in (("nf_conntrack_max", limit), ("nf_conntrack_buckets", limit // 4)):
        if value > (_read(root / "netfilter" / name) or 0):
            wanted[name] = value
    for name, value in wanted.items():
        path = root / "netfilter" / name
        # Without conntrack in the kernel there is nothing to set.
        if path.exists() and _read(path) != value:
            _write(path, value)


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, value: int) -> None:
    try:
        path.write_text(str(value))
    except OSError as error:
        log.warning("cannot be set", path=str(path), value=value, error=error.strerror)
