"""Two nodes and a client outside the cluster, whose connections packet programs translate."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import socket
import struct
from pathlib import Path
from typing import Any

from tests.e2e.two_node_cluster import BALANCER, EXTERNAL, SERVICE_IPS, TwoNodeCluster
from tests.lab import Lab, Outside, clients, manifests
from tests.lab.spaces import Space

#: Options of the agent: default, without tcx, with netfilter bypassed, and with XDP.
VARIANTS = {
    "default": [],
    "clsact": ["--without", "tcx"],
    "bypass": ["--bypass-netfilter"],
    "xdp": ["--xdp", "native"],
}
BALANCER6 = "2001:db8:113::10"
PORTS = [{"name": "http", "port": 80, "protocol": "TCP"}, {"name": "udp", "port": 53, "protocol": "UDP"}]
SLICE_PORTS = [
    {"name": "http", "port": 8080, "protocol": "TCP"},
    {"name": "udp", "port": 8053, "protocol": "UDP"},
]


class OutsideClientCluster(TwoNodeCluster):
    """The client has routes to all frontends through node-a."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.outside: Outside = lab.outside
        for address in (
            EXTERNAL,
            BALANCER,
            BALANCER6,
            SERVICE_IPS["v4"],
            SERVICE_IPS["v6"],
            "203.0.113.0/24",
        ):
            self.outside.route(address, self.a)

    def add(self, name: str, ip: str, endpoints: list[manifests.Document], **spec: Any) -> None:
        """Adds a Service with one cluster IP and the ports of all tests, in a file of its own."""
        service = manifests.service(name, **{"clusterIPs": [ip], "ports": PORTS, **spec})
        self._write(name, service, endpoints)

    def remove(self, name: str) -> None:
        (self.manifests / f"{name}.yaml").unlink()

    def add_load_balancer(self, name: str, ip: str, balancer: str, endpoints: list[Any], **spec: Any) -> None:
        service = manifests.service(
            name, **{"clusterIPs": [ip], "ports": PORTS, "type": "LoadBalancer", **spec}
        )
        service["status"] = {"loadBalancer": {"ingress": [{"ip": balancer}]}}
        self._write(name, service, endpoints)

    def _write(self, name: str, service: manifests.Document, endpoints: list[manifests.Document]) -> None:
        pieces = [manifests.slice_of(name, endpoints, ports=SLICE_PORTS)] if endpoints else []
        manifests.write(self.manifests / f"{name}.yaml", service, *pieces)

    def endpoint_on_a(self, **conditions: bool) -> manifests.Document:
        """The pod w1 as an endpoint."""
        return manifests.endpoint(self.w1.address, "node-a", **conditions)

    def endpoint_on_b(self, **conditions: bool) -> manifests.Document:
        """The pod w2 as an endpoint."""
        return manifests.endpoint(self.w2.address, "node-b", **conditions)


class HeldConnection:
    """A TCP connection that a process in ``space`` keeps open."""

    def __init__(self, space: Space, host: str, port: int) -> None:
        self.process = space.fork(clients.hold, host, port)
        assert self.process.stdout.readline() == b"ready\n"

    def ask(self) -> str:
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().decode().strip()


def ask_by_socat(space: Space, address: str) -> dict[str, Any]:
    process = space.popen(
        ["socat", "-T1", "-", f"TCP:{address},connect-timeout=2"],
        join_cgroup=False,
        stdin=-3,
        stdout=-1,
        stderr=-1,
    )
    text = process.communicate()[0]
    return json.loads(text) if text else {}


def offload_checksums(is_on: bool) -> None:
    """Sets whether the devices of this namespace compute checksums of sent packets, as ``ethtool -K DEVICE tx``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            value = ctypes.create_string_buffer(struct.pack("=II", 0x17, is_on))  # ETHTOOL_STXCSUM
            with contextlib.suppress(OSError):  # the loopback
                fcntl.ioctl(sock, 0x8946, struct.pack("16sQ16x", name.encode(), ctypes.addressof(value)))


def wrong_checksums() -> int:
    """Returns how many TCP segments and datagrams this namespace has dropped for their checksum."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines()]
    heads, values = ({line[0]: line[1:] for line in lines[at::2]} for at in (0, 1))
    return sum(
        int(values[kind][heads[kind].index("InCsumErrors")]) for kind in ("Tcp:", "Udp:") if kind in heads
    )


def refused_datagram(host: str, port: int) -> str:
    """Sends a datagram; returns the error by which it comes back, or ``received``."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.connect((host, port))
        sock.send(b"?")
        try:
            sock.recv(100)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return "received"
