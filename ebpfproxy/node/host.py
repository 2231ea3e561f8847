"""What kube-proxy sets on its host beside Services: conntrack's limits, its own standing with the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ebpfproxy.logs import get_logger

log = get_logger(__name__)

_SYSCTLS = Path("/proc/sys/net/netfilter")


def set_oom_score_adj(value: int) -> None:
    """Of this process, -1000 to 1000: see proc(5). A failure is logged."""
    _write(Path("/proc/self/oom_score_adj"), value)


def set_conntrack(limit: int, others: Mapping[str, int]) -> None:
    """nf_conntrack_max, which is only ever raised, and other sysctls of net.netfilter by name.

    The agent keeps flows of its own; netfilter's are of traffic that other rules track. What cannot be set is
    logged: a read-only /proc/sys, or no conntrack in this kernel.
    """
    wanted = dict(others)
    if limit > (_read(_SYSCTLS / "nf_conntrack_max") or 0):
        wanted["nf_conntrack_max"] = limit
    for name, value in wanted.items():
        path = _SYSCTLS / name
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
