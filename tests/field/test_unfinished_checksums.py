"""Rejections of packets whose checksum their sender has left to a device, as VMs, pods and GRO do.

The kernel keeps in mind that such a packet is not finished. The reply that is made of it leaves by a device that
computes no checksums, so that the kernel computes those that it takes for unfinished.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import (
    OutsideClientCluster,
    offload_checksums,
    refused_datagram,
    wrong_checksums,
)
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab, clients
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: The frontends of a Service without endpoints.
EMPTY = ("10.96.0.20", "fd00:10:96::20")


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    """The client's device computes checksums, and the node's does not."""
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        for address in EMPTY:
            made.outside.route(address, made.a)
        made.agent("--stale-tcp-seconds", "0.5").start()
        made.a.call(offload_checksums, False)
        yield made


def upload(host: str, port: int) -> None:
    """Sends data that a server echoes, as fast as it does, and prints what has ended that."""
    with socket.create_connection((host, port), 3) as sock:
        while not sock.recv(4096).endswith(b"\n"):
            pass
        print("ready", flush=True)
        sock.settimeout(20)
        try:
            while True:
                sock.sendall(bytes(50_000))
                left = 50_000
                while left:
                    left -= len(sock.recv(left))
        except OSError as error:
            print(type(error).__name__, flush=True)


@pytest.mark.parametrize("address", EMPTY)
def test_segment_and_datagram_to_a_service_without_endpoints_are_refused(
    cluster: OutsideClientCluster, address: str
) -> None:
    """The client drops a reset and an ICMP error with a wrong checksum, and would wait."""
    assert cluster.outside.call(clients.connect_error, address, 80) == "ECONNREFUSED"
    assert cluster.outside.call(refused_datagram, address, 53) == "ECONNREFUSED"
    assert cluster.outside.call(wrong_checksums) == 0


@pytest.mark.parametrize("is_v6", [False, True], ids=["v4", "v6"])
def test_upload_is_reset_when_its_endpoint_is_removed(cluster: OutsideClientCluster, is_v6: bool) -> None:
    """Its segments are merged ones."""
    address = cluster.a.address6 if is_v6 else cluster.a.address
    cluster.write_web(cluster.w1)
    until(
        lambda: set(cluster.outside.call(clients.spread_tcp, address, NODE_PORT, 5)) == {"w1"},
        "not all connections reach the endpoint",
    )
    uploading = cluster.outside.fork(upload, address, NODE_PORT)
    assert uploading.stdout.readline() == b"ready\n"
    cluster.write_web(cluster.w2)
    assert uploading.stdout.readline() == b"ConnectionResetError\n"
    assert cluster.outside.call(wrong_checksums) == 0
