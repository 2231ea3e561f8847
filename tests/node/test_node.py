"""The node's name, namespace and addresses, from a kernel with namespaces of its own."""

from __future__ import annotations

import socket
import subprocess
import time

import pytest

from ebpfproxy.node.addresses import AddressWatcher, read_addresses
from ebpfproxy.node.identity import NodeNameError, netns_cookie, node_name
from tests.lab import Lab


def test_names_as_kube_proxy_makes_them() -> None:
    assert node_name(" Node-A ") == "node-a"
    assert node_name(None) == socket.gethostname().lower()
    with pytest.raises(NodeNameError):
        node_name("  ")


def _read() -> set[str]:
    return {socket.inet_ntop(socket.AF_INET if len(a) == 4 else socket.AF_INET6, a) for a in read_addresses()}


def _follow() -> list[bool]:
    """An address of each family comes and goes, beside one on the loopback device."""
    seen: list[frozenset[bytes]] = []
    watcher = AddressWatcher(seen.append)
    watcher.start()
    time.sleep(0.3)
    results = []
    for address, packed in (
        ("192.0.2.7/32", bytes([192, 0, 2, 7])),
        ("fd00::7/128", b"\xfd" + bytes(14) + b"\x07"),
    ):
        for verb in ("add", "del"):
            subprocess.run(["ip", "address", verb, address, "dev", "lo"], check=True)
            deadline = time.monotonic() + 2
            while (packed in seen[-1]) != (verb == "add") and time.monotonic() < deadline:
                time.sleep(0.01)
            results.append((packed in seen[-1]) == (verb == "add"))
    return results


@pytest.mark.root
def test_addresses_are_read_and_followed_and_cookies_tell_namespaces_apart() -> None:
    with Lab() as lab:
        node = lab.node("node-a")
        pod = node.pod("pod")
        addresses = node.call(_read)
        assert {node.address, node.address6, "10.244.1.1", "fd00:10:244:1::1"} <= addresses
        assert not addresses & {"127.0.0.1", "::1"}
        assert node.call(_follow) == [True] * 4
        assert len({netns_cookie(), node.call(netns_cookie), pod.call(netns_cookie)}) == 3
