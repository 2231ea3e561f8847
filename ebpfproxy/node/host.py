"""What kube-proxy sets on its host beside Services: conntrack's limits, its own standing with the kernel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ebpfproxy.logs import get_logger

log = get_logger(__name__)

#: Where /proc/sys is read-only, as in containers, the host's can be mounted elsewhere and named by this.
_PROC_SYS_NET = Path(os.environ.get("EBPFPROXY_PROC_SYS_NET", "/proc/sys/net"))


def set_oom_score_adj(value: int) -> None:
    """Of this process, -1000 to 1000: see proc(5). A failure is logged."""
    _write(Path("/proc/self/oom_score_adj"), value)


def set_conntrack(limit: int, others: Mapping[str, int], *, root: Path = _PROC_SYS_NET) -> None:
    """nf_conntrack_max, which is only ever raised, and other sysctls of net.netfilter by name.

    The table gets a bucket for each four entries, as kube-proxy sees to (cmd/kube-proxy/app/conntrack.go).
    The agent keeps flows of its own; netfilter's are of traffic that other rules track. What cannot be set
    is logged: a read-only /proc/sys, or another network namespace than the host's.
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
