"""Route lookups in a network namespace."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator

import pytest

from ebpfproxy.netlink.routes import Routes, Way
from tests.lab import Lab, LabNode

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def node() -> Iterator[LabNode]:
    with Lab() as lab:
        made = lab.node("node-a")
        made.pod("client")
        made.run(["ip", "route", "add", "blackhole", "198.51.100.0/24"])
        yield made


def _ways(*texts: str) -> list[tuple[bool, str, bool]]:
    with Routes() as routes:
        found = [routes.to(ipaddress.ip_address(text).packed) for text in texts]
    return [
        (bool(way.ifindex), str(ipaddress.ip_address(way.source)) if way.source else "", way.by_gateway)
        for way in found
    ]


def test_routes_equal_those_of_the_kernel(node: LabNode) -> None:
    assert node.call(_ways, "172.18.0.9", "8.8.8.8", "fd00:172:18::9", "2001:db8::1") == [
        (True, "172.18.0.1", False),
        (True, "172.18.0.1", True),
        (True, "fd00:172:18::1", False),
        (True, "fd00:172:18::1", True),
    ]
    found = node.call(_ways, node.pods[0].address, node.pods[0].address6)
    assert [(there, by_gateway) for there, _, by_gateway in found] == [(True, False)] * 2


def test_local_addresses_and_unroutable_ones_have_no_device(node: LabNode) -> None:
    assert node.call(_ways, "172.18.0.1", "fd00:172:18::1") == [
        (False, "172.18.0.1", False),
        (False, "fd00:172:18::1", False),
    ]
    assert node.call(_ways, "198.51.100.1") == [(False, "", False)]
    assert Way() == Way(0, b"", False)


def test_lookups_for_a_thousand_frontends_with_source_ranges_are_fast(node: LabNode) -> None:
    """The reconciler's thread looks up all of them whenever a pod's device is added or removed."""
    assert node.call(_cpu_of, 1000) < 0.5


def _cpu_of(count: int) -> float:
    began = time.process_time()
    with Routes() as routes:
        for number in range(count):
            assert routes.source_towards((0xCB007100 + number).to_bytes(4, "big"))
    return time.process_time() - began
