"""BIG TCP: segments of more than 64 KiB, whose length is not in the header of IPv4, and of IPv6 in an option."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from ebpfproxy.netlink import codec
from ebpfproxy.netlink.rtnetlink import IFINFOMSG, SETLINK, Rtnetlink
from tests.e2e.outside_client import VARIANTS, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab
from tests.lab.processes import read_line
from tests.lab.spaces import Space

pytestmark = pytest.mark.root

_SIZE = 180_000
#: IFLA_GSO_MAX_SIZE and IFLA_GRO_MAX_SIZE, and those of IPv4 (Linux 6.3).
_ATTRIBUTES = (41, 58, 63, 64)
_LARGEST_IPV4 = 65535


def _allow_big(*devices: str) -> None:
    with Rtnetlink() as netlink:
        for device in devices:
            head = IFINFOMSG.pack(0, 0, socket.if_nametoindex(device), 0, 0)
            for kind in _ATTRIBUTES:
                netlink.change(SETLINK, head + codec.attribute(kind, struct.pack("=I", _SIZE)))


def _wait_for_big(version: int) -> None:
    """Ends with the first packet that comes in by eth0 and is too large for a length in its header."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        sock.bind(("eth0", 3))
        print("ready", flush=True)
        while True:
            data, about = sock.recvfrom(1 << 20)
            if len(data) > _LARGEST_IPV4 and data[0] >> 4 == version and about[2] == socket.PACKET_HOST:
                return


def _is_echoed(host: str, count: int) -> bool:
    """Sends so many megabytes, each at once, while it receives; returns True if all come back unchanged."""
    data = os.urandom(1 << 20)
    with socket.create_connection((host, NODE_PORT), 20) as sock:
        while not sock.recv(4096).endswith(b"\n"):
            pass
        sender = threading.Thread(target=sock.sendall, args=(data * count,))
        sender.start()
        received = bytearray()
        while len(received) < count * len(data):
            received += sock.recv(1 << 20)
        sender.join()
        return received == data * count


@pytest.fixture(scope="module", params=["default", "bypass"])
def cluster(request: pytest.FixtureRequest) -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.write_web(made.w1)
        spaces: list[tuple[Space, tuple[str, ...]]] = [
            (made.a, ("eth0", "p1", "p2")),
            (made.outside, ("eth0",)),
            (made.w1, ("eth0",)),
            (lab.switch, ("n1", "outside", "br0")),
        ]
        for space, devices in spaces:
            space.call(_allow_big, *devices)
        made.agent(*VARIANTS[request.param]).start()
        yield made


@pytest.mark.parametrize("version", [4, 6])
def test_segments_of_more_than_64_kib_arrive(cluster: OutsideClientCluster, version: int) -> None:
    """Data in both directions is whole. Such segments come in at the node; the kernel divides those that it forwards
    with IPv6."""
    if version == 4 and tuple(map(int, os.uname().release.split(".")[:2])) < (6, 3):
        pytest.skip("this kernel has BIG TCP for IPv6 alone")
    address = cluster.a.address if version == 4 else cluster.a.address6
    seen = cluster.a.fork(_wait_for_big, version)
    assert read_line(seen) == "ready"
    try:
        for _ in range(10):
            assert cluster.outside.call(_is_echoed, address, 8)
            if seen.poll() is not None:
                break
        assert seen.poll() is not None, "no segment was as large"
    finally:
        seen.kill()
        seen.wait()
