"""Reverse path filtering (rp_filter) of the kernel, strict and loose, drops no replies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from tests.e2e.outside_client import OutsideClientCluster, ask_by_socat
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import Lab, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import READY_SECONDS, until

pytestmark = pytest.mark.root

BALANCER = "203.0.113.60"


@pytest.fixture(scope="module", params=["1", "2"], ids=["strict", "loose"])
def cluster(request: pytest.FixtureRequest) -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.a.run(
            ["sh", "-c", f"for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo {request.param} >$f; done"]
        )
        made.agent().start()
        yield made


def test_host_client_without_a_hook_reaches_every_backend(cluster: OutsideClientCluster) -> None:
    """The client is in the kernel or outside the agent's cgroup; one backend is local."""
    for address in (f"{SERVICE_IPS['v4']}:80", f"[{SERVICE_IPS['v6']}]:80"):
        found = [ask_by_socat(cluster.a, address).get("name") for _ in range(24)]
        assert set(found) == {"w1", "w2"}


def test_host_client_reaches_a_load_balancer_with_source_ranges(cluster: OutsideClientCluster) -> None:
    """Source ranges are applied in packets; replies of a local backend are not dropped."""
    ranges = {"loadBalancerSourceRanges": [f"{cluster.a.address}/32"]}
    cluster.add_load_balancer("ranged", "10.96.1.60", BALANCER, [cluster.endpoint_on_a()], **ranges)
    until(lambda: "ranged" in cluster.a.cli("service", "list"), "the Service is not programmed")
    assert [ask_by_socat(cluster.a, f"{BALANCER}:80").get("name") for _ in range(6)] == ["w1"] * 6


def test_pod_without_a_hook_reaches_a_local_pod_and_itself(cluster: OutsideClientCluster) -> None:
    """Packets of pods are forwarded, masqueraded or not."""
    cluster.add("mirror", "10.96.1.61", [manifests.endpoint(cluster.w1.address, "node-a")])
    until(lambda: "mirror" in cluster.a.cli("service", "list"), "the Service is not programmed")
    for pod in (cluster.client, cluster.w1):
        assert [ask_by_socat(pod, "10.96.1.61:80").get("name") for _ in range(4)] == ["w1"] * 4


def _connect_to_backend_beyond_tun(services: tuple[str, str], backends: tuple[str, str]) -> list[int]:
    """Adds a tun device that leads to the backends; returns the errors of connections to their Services."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"far0", 0x0001 | 0x1000))  # TUNSETIFF
    subprocess.run(["ip", "link", "set", "far0", "up"], check=True)
    for backend in backends:
        subprocess.run(["ip", "route", "add", backend, "dev", "far0"], check=True)
    try:
        return [_connect(tun, *pair) for pair in zip(services, backends, strict=True)]
    finally:
        os.close(tun)


def _connect(tun: int, service: str, backend: str) -> int:
    """Connects to a Service, and accepts the connection as the backend."""
    ip = IPv6 if ":" in service else IP
    with socket.socket(socket.AF_INET6 if ip is IPv6 else socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((service, 80))
        # Until the agent has attached its programs to the new device, the client's SYNs and the replies end there.
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            readable, writable, _ = select.select([tun], [client], [], 1)
            if writable:
                return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            data = os.read(tun, 2048) if readable else b""
            if not data or data[0] >> 4 != (6 if ip is IPv6 else 4):
                continue
            packet = ip(data)
            if TCP in packet and packet.dst == backend and packet[TCP].flags == "S":
                reply = TCP(
                    sport=packet[TCP].dport, dport=packet[TCP].sport, flags="SA", ack=packet[TCP].seq + 1
                )
                os.write(tun, raw(ip(src=backend, dst=packet.src) / reply))
    return errno.ETIMEDOUT


def test_replies_by_a_device_without_a_link_layer_reach_a_host_client_without_a_hook(
    cluster: OutsideClientCluster,
) -> None:
    """The kernel expects them at the Ethernet device of the route to the Service."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("this kernel has no tun device")
    services, backends = ("10.96.1.62", "fd00:10:96::162"), ("10.244.9.9", "fd00:10:244:9::9")
    for name, service, backend in zip(("far4", "far6"), services, backends, strict=True):
        cluster.add(name, service, [manifests.endpoint(backend, "node-b")])
        until(lambda each=name: each in cluster.a.cli("service", "list"), "the Service is not programmed")  # type: ignore[misc]
    unhooked = Space(cluster.a.netns, None)
    errors = unhooked.call(_connect_to_backend_beyond_tun, services, backends, timeout=2 * READY_SECONDS)
    assert errors == [0, 0]
