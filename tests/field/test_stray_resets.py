"""Idle flows to a NodePort survive RSTs with wrong sequence numbers."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.flows.sweeper import Sweeper
from ebpfproxy.datapath.kernel.maps import open_pinned
from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: Sequence numbers far from each other, so that at least two are outside the receive window.
STRAY = (12345, 12345 + (1 << 30), 12345 + (1 << 31))
CLIENT = """
import json, socket, struct, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)
s.recv(4096)
print(s.getsockname()[1], flush=True)
for line in sys.stdin:
    if line == "reset\\n":
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()
        break
    s.sendall(b"x")
    print("alive" if s.recv(10) else "closed", flush=True)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.agent().start()
        yield made


def send_reset(source: str, sport: int, destination: str, dport: int, seq: int) -> None:
    """Sends an RST by a raw socket, with any sequence number."""
    kind, family = (IPv6, socket.AF_INET6) if ":" in source else (IP, socket.AF_INET)
    packet = kind(src=source, dst=destination) / TCP(sport=sport, dport=dport, flags="R", seq=seq)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(raw(packet), (destination, 0))


def flow_of(cluster: OutsideClientCluster, port: int) -> dict[str, Any] | None:
    flows = json.loads(cluster.a.cli("conntrack", "list", "-o", "json", "--service", "shop/web"))
    return next((flow for flow in flows if flow["client"].endswith(f":{port}")), None)


def sweep(cluster: OutsideClientCluster) -> None:
    """Sweeps as the agent does, but deletes closed flows without a timeout."""
    maps = open_pinned(next((cluster.a.bpf_root / "ebpfproxy").glob("v*")))
    sweeper = Sweeper(maps, Timeouts(tcp_reset=0.0), next(maps.folder.glob("progs-*")))
    sweeper.sweep()
    sweeper.close()
    maps.close()


@pytest.mark.parametrize("version", [4, 6])
def test_rst_with_a_wrong_sequence_number_closes_no_idle_flow_and_a_right_one_does(
    cluster: OutsideClientCluster, version: int
) -> None:
    """An RST with a wrong sequence number from either side does not change the state. In netfilter's conntrack,
    too, only one with the exact number closes an established connection."""
    node = cluster.a.address if version == 4 else cluster.a.address6
    here = cluster.outside.address if version == 4 else cluster.outside.address6
    command = [sys.executable, "-c", CLIENT, node, str(NODE_PORT)]
    process = cluster.outside.popen(command, stdin=-1, stdout=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    port = int(process.stdout.readline())
    flow = flow_of(cluster, port)
    assert flow is not None
    backend, _, target = flow["backend"].rpartition(":")
    snat_address, _, snat_port = flow["masquerade"].rpartition(":")
    pods: dict[str, Space] = {f"{pod.address}": pod for pod in (cluster.w1, cluster.w2)}
    pods |= {f"[{pod.address6}]": pod for pod in (cluster.w1, cluster.w2)}
    for seq in STRAY:
        cluster.outside.call(send_reset, here, port, node, NODE_PORT, seq)
        pods[backend].call(
            send_reset, backend.strip("[]"), int(target), snat_address.strip("[]"), int(snat_port), seq
        )
    sweep(cluster)
    found = flow_of(cluster, port)
    assert found is not None
    assert found["state"] == "ESTABLISHED"
    process.stdin.write(b"send\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"alive\n"

    process.stdin.write(b"reset\n")
    process.stdin.flush()
    assert process.wait(10) == 0
    until(lambda: (flow_of(cluster, port) or {}).get("state") == "CLOSE")
