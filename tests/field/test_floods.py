"""Floods from forged addresses, from a real client through real nodes to a real backend."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP

from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab, clients
from tests.lab.waiting import until

pytestmark = pytest.mark.root

PORTS = 100
FORGED = "198.18.0.0/15"
NOBODY = "203.0.113.50"
DATAGRAMS = 2000


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    """The only backend is on the other node, so that clients are masqueraded."""
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.write_web(made.w2)
        # What the backend answers to forged SYNs ends at the host outside, which does not forward.
        made.a.run(["ip", "route", "add", FORGED, "via", made.outside.address])
        made.add_load_balancer("nobody", "10.96.1.50", NOBODY, [])
        made.agent("--masquerade-ports", f"20000-{20000 + PORTS - 1}").start()
        yield made


def _flood(host: str, count: int) -> None:
    chance = random.Random(count)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for number in range(count):
            forged = f"198.18.{number >> 8}.{number & 255}"
            syn = TCP(sport=chance.randrange(1024, 65536), dport=NODE_PORT, flags="S", seq=number)
            sock.sendto(raw(IP(src=forged, dst=host) / syn), (host, 0))


def _answers(host: str, count: int) -> list[str]:
    """The names of those that answer so many clients at once. A client sends its SYN again after a second."""

    def name(_: int) -> str:
        return str(clients.ask_tcp(host, NODE_PORT, timeout=10)["name"])

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(name, range(count)))


def early_drops(cluster: OutsideClientCluster) -> int:
    _, text = cluster.lab.agents[-1].http("/metrics", 10249)
    found = re.search(r"^ebpfproxy_conntrack_early_dropped_total (\S+)$", text, re.M)
    assert found
    return int(float(found[1]))


def test_new_connections_are_served_in_a_flood_of_half_open_ones_and_old_ones_go_on(
    cluster: OutsideClientCluster,
) -> None:
    """The flood has many times more connections than there are ports towards the backend."""
    node = cluster.a.address
    held = [HeldConnection(cluster.outside, node, NODE_PORT) for _ in range(10)]
    cluster.outside.call(_flood, node, 4 * PORTS)
    assert cluster.outside.call(_answers, node, 20) == ["w2"] * 20
    assert [each.ask() for each in held] == ["alive"] * len(held)
    assert early_drops(cluster) > 0
    for each in held:
        each.process.kill()
        each.process.wait()


def _datagrams(host: str, port: int, count: int) -> tuple[int, float]:
    """Sends so many; returns how many ICMP errors came back, and the seconds until the last of them."""
    began = time.monotonic()
    errors, last = 0, 0.0
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        icmp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        for _ in range(count):
            sock.sendto(b"?", (host, port))
        icmp.settimeout(0.5)
        try:
            while True:
                kind, code = struct.unpack_from("BB", icmp.recv(4096), 20)
                errors += (kind, code) == (3, 3)
                last = time.monotonic() - began
        except TimeoutError:
            return errors, last


def packets(cluster: OutsideClientCluster) -> dict[tuple[str, str], int]:
    status = json.loads(cluster.a.cli("status", "-o", "json"))
    return {(each["action"], each["reason"]): each["packets"] for each in status["packets"]}


def test_no_more_icmp_errors_are_sent_than_the_kernel_sends_itself(cluster: OutsideClientCluster) -> None:
    """Each datagram to a Service without endpoints is rejected or, beyond the limit, dropped; status has both."""
    rejected, limited = ("rejected", "no-endpoint"), ("dropped", "icmp-rate-limit")
    until(lambda: cluster.outside.call(_datagrams, NOBODY, 53, 1)[0] == 1, "no ICMP error comes back")
    before = packets(cluster)
    errors, seconds = cluster.outside.call(_datagrams, NOBODY, 53, DATAGRAMS)
    after = packets(cluster)
    counts = [after.get(each, 0) - before.get(each, 0) for each in (rejected, limited)]
    assert counts == [errors, DATAGRAMS - errors]
    assert 0 < errors <= 50 + 1000 * seconds + 10
