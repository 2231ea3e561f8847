"""Sysctls that kube-proxy sets, in files that stand for /proc/sys and in a namespace of the test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebpfproxy.agent.from_config import conntrack_sysctls
from ebpfproxy.config.kube_proxy import Conntrack, KubeProxyConfiguration, complete
from ebpfproxy.node.host import set_conntrack


@pytest.fixture
def netfilter(tmp_path: Path) -> Path:
    made = tmp_path / "netfilter"
    made.mkdir()
    for name, value in (
        ("nf_conntrack_max", 200_000),
        ("nf_conntrack_buckets", 65_536),
        ("nf_conntrack_tcp_timeout_established", 432_000),
        ("nf_conntrack_tcp_timeout_close_wait", 60),
    ):
        (made / name).write_text(f"{value}\n")
    return made


def test_defaults_of_kube_proxy_are_set_and_limits_only_raised(netfilter: Path) -> None:
    defaults = complete(KubeProxyConfiguration()).conntrack
    assert isinstance(defaults, Conntrack)

    def after(cpus: int) -> dict[str, int]:
        set_conntrack(*conntrack_sysctls(defaults, cpus), root=netfilter.parent)
        return {
            path.name.removeprefix("nf_conntrack_"): int(path.read_text()) for path in netfilter.iterdir()
        }

    timeouts = {"tcp_timeout_established": 86_400, "tcp_timeout_close_wait": 3600}
    assert after(2) == {"max": 200_000, "buckets": 65_536, **timeouts}, (
        "131072 is less than the current limit"
    )
    assert after(16) == {"max": 524_288, "buckets": 131_072, **timeouts}
    assert after(2)["max"] == 524_288


def test_sysctls_that_the_kernel_lacks_are_skipped(tmp_path: Path) -> None:
    set_conntrack(524_288, {"nf_conntrack_udp_timeout": 9}, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_failed_sysctls_are_logged_and_others_set() -> None:
    """In a network namespace the limit is read-only and timeouts are writable."""
    program = (
        "from ebpfproxy import logs; from ebpfproxy.node.host import set_conntrack; logs.configure('text', 0);"
        "set_conntrack(2**30, {'nf_conntrack_udp_timeout': 77});"
        "print(open('/proc/sys/net/netfilter/nf_conntrack_udp_timeout').read())"
    )
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.strip() == "77"
    assert "nf_conntrack_max" in done.stderr


_HEAPS = """
import ctypes, sys, threading
from ebpfproxy.node.host import share_heap
if sys.argv[1] == "shared":
    share_heap()
barrier = threading.Barrier(4)
def allocate():
    barrier.wait()
    kept = [bytes(2000) for _ in range(1000)]
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for each in threads:
    each.start()
for each in threads:
    each.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_threads_share_a_heap(kind: str) -> None:
    """Without that each has its own, which keeps what it has freed."""
    done = subprocess.run([sys.executable, "-c", _HEAPS, kind], capture_output=True, text=True, check=True)
    heaps = done.stdout.count("<heap nr=")
    assert heaps == 1 if kind == "shared" else heaps > 1
