"""Unallocated addresses of ServiceCIDRs, with a default gateway that accepts connections to all of them."""

from __future__ import annotations

import errno
import json
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.lab import Lab, clients, manifests, servers
from tests.lab.lab import OUTSIDE, OUTSIDE6
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

UNALLOCATED = {4: "10.96.200.200", 6: "fd00:10:96::c8c8"}
CIDRS = ["10.96.0.0/16", "fd00:10:96::/112"]
#: An external host has these addresses.
EXTERNAL = {4: "10.96.150.1", 6: "fd00:10:96::9601"}


class ServiceCidrCluster:
    """node-a with an agent and two pods. ``outside`` is the gateway, which accepts connections to all addresses."""

    def __init__(self, lab: Lab, *options: str) -> None:
        self.lab = lab
        self.a, self.b = lab.node("node-a"), lab.node("node-b")
        self.client, self.web = self.a.pod("client"), self.a.pod("web")
        servers.start(self.web, "web", 8080)
        for destination in ("10.96.0.0/16", "fd00:10:96::/112"):
            lab.outside.run(["ip", "route", "add", "local", destination, "dev", "lo"])
            # node-b sends all packets to these CIDRs to node-a, which forwards them.
            self.b.run(
                [
                    "ip",
                    "route",
                    "add",
                    destination,
                    "via",
                    self.a.address6 if ":" in destination else self.a.address,
                ]
            )
        for address in EXTERNAL.values():
            lab.outside.run(
                ["ip", "addr", "add", address, "dev", "lo", *(["nodad"] if ":" in address else [])]
            )
        servers.start(lab.outside, "gateway", 80)
        self.folder = lab.folder / "manifests"
        self.put()
        self.agent = self.a.agent(*options, manifests=self.folder).start()

    def put(self, *, cidrs: list[str] = CIDRS, service: bool = True, proxy: str = "") -> None:
        made = manifests.service("web", clusterIPs=["10.96.0.10", "fd00:10:96::10"])
        if proxy:
            made["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": proxy}
        documents = [
            manifests.slice_of("web", [manifests.endpoint(address, "node-a")])
            for address in (self.web.address, self.web.address6)
        ]
        documents.append(
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "ServiceCIDR",
                "metadata": {"name": "kubernetes"},
                "spec": {"cidrs": cidrs},
            }
        )
        manifests.write(self.folder / "all.yaml", *documents, *([made] if service else []))

    def unhooked(self, space: Space, address: str, protocol: str = "TCP") -> str:
        """The name of the server that a process without a socket hook reaches, or the empty string."""
        shown = f"[{address}]" if ":" in address else address
        option = ",connect-timeout=0.4" if protocol == "TCP" else ""
        process = space.popen(
            ["socat", "-T0.4", "-", f"{protocol}:{shown}:80{option}"],
            join_cgroup=False,
            stdin=-3 if protocol == "TCP" else -1,
            stdout=-1,
            stderr=-1,
        )
        text = process.communicate(None if protocol == "TCP" else b"?")[0]
        return str(json.loads(text)["name"]) if text else ""

    def counted(self, path: str, version: int) -> int:
        label = f'{{ip_family="IPv{version}",path="{path}"}}'
        text = self.agent.http("/metrics", 10249)[1]
        name = f"ebpfproxy_unallocated_service_addresses_total{label}"
        return int(sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)))


@pytest.fixture(scope="module", params=["tcx", "clsact"])
def cluster(request: pytest.FixtureRequest) -> Iterator[ServiceCidrCluster]:
    with Lab() as lab:
        yield ServiceCidrCluster(lab, *(["--without", "tcx"] if request.param == "clsact" else []))


@pytest.fixture(params=[4, 6], ids=["v4", "v6"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_adding_a_service_cidr_stops_forwarding_to_the_gateway(
    cluster: ServiceCidrCluster, version: int
) -> None:
    """ServiceCIDRs may change while the agent runs, without compiling programs again."""
    address = UNALLOCATED[version]
    programs = sorted((cluster.a.bpf_root / "ebpfproxy").glob("v*/progs-*"))
    cluster.put(cidrs=["192.0.2.0/24"])
    until(
        lambda: cluster.unhooked(cluster.client, address) == "gateway",
        "packets are not forwarded to the gateway",
    )
    assert cluster.client.call(clients.ask_tcp, address, 80)["name"] == "gateway"
    cluster.put()
    until(lambda: not cluster.unhooked(cluster.client, address), "packets are still forwarded to the gateway")
    assert cluster.client.call(clients.connect_error, address, 80) == "EHOSTUNREACH"
    assert sorted((cluster.a.bpf_root / "ebpfproxy").glob("v*/progs-*")) == programs


def test_connect_and_send_to_an_unallocated_address_fail(cluster: ServiceCidrCluster, version: int) -> None:
    """connect() of UDP sends nothing and succeeds, as resolvers require (RFC 6724)."""
    before = cluster.counted("socket", version)
    for space in (cluster.client, cluster.a):
        assert space.call(clients.connect_error, UNALLOCATED[version], 80) == "EHOSTUNREACH"
        assert space.call(clients.send_error, UNALLOCATED[version], 80) == "EHOSTUNREACH"
        assert space.call(_udp_connect, UNALLOCATED[version]) == "connected, no reply"
    assert cluster.counted("socket", version) >= before + 4


def _udp_connect(host: str) -> str:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.3)
        sock.connect((host, 80))
        sock.send(b"?")
        try:
            return sock.recv(100).decode()
        except TimeoutError:
            return "connected, no reply"


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_packets_to_an_unallocated_address_are_dropped_for_pods_host_and_forwarded_clients(
    cluster: ServiceCidrCluster, version: int, protocol: str
) -> None:
    """Clients are a pod and the host, without a socket hook, and a host whose packets are forwarded."""
    before = cluster.counted("packet", version)
    for space in (cluster.client, cluster.a, cluster.b):
        assert cluster.unhooked(space, UNALLOCATED[version], protocol) == ""
    assert cluster.counted("packet", version) >= before + 3


def test_icmp_echo_to_an_unallocated_address_is_dropped(cluster: ServiceCidrCluster, version: int) -> None:
    for space in (cluster.client, cluster.a, cluster.b):
        assert space.call(_ping, UNALLOCATED[version]) == "no reply"
    assert cluster.client.call(_ping, {4: OUTSIDE, 6: OUTSIDE6}[version]) == "reply", (
        "echo to the address of the gateway"
    )


def _ping(host: str, source: str = "") -> str:
    is_v4 = ":" not in host
    protocol = socket.IPPROTO_ICMP if is_v4 else socket.IPPROTO_ICMPV6
    with socket.socket(socket.AF_INET if is_v4 else socket.AF_INET6, socket.SOCK_RAW, protocol) as sock:
        echo = struct.pack(">BBHHH", 8 if is_v4 else 128, 0, 0, 1, 1)
        if is_v4:
            echo = struct.pack(">BBHHH", 8, 0, 0xFFFF - 0x0802, 1, 1)
        sock.settimeout(0.4)
        if source:
            sock.bind((source, 0))
        try:
            # With IPv6 a raw socket of the host gets ENOBUFS for a dropped packet.
            sock.sendto(echo, (host, 0))
            while True:
                data, peer = sock.recvfrom(1000)
                kind = data[(data[0] & 15) * 4] if is_v4 else data[0]
                if peer[0] == host and kind == (0 if is_v4 else 129):
                    return "reply"
        except OSError as error:
            if isinstance(error, TimeoutError) or error.errno == errno.ENOBUFS:
                return "no reply"
            raise


def test_deleted_service_is_refused_and_not_forwarded_to_the_gateway(
    cluster: ServiceCidrCluster, version: int
) -> None:
    """Otherwise a gateway may respond in its place, for example with 404."""
    address = {4: "10.96.0.10", 6: "fd00:10:96::10"}[version]
    until(
        lambda: cluster.client.call(clients.connect_error, address, 80) == "connected",
        "the Service is not served",
    )
    cluster.put(service=False)
    until(
        lambda: cluster.client.call(clients.connect_error, address, 80) == "EHOSTUNREACH",
        "the deleted Service is not refused",
    )
    assert cluster.unhooked(cluster.client, address) == ""
    cluster.put()
    until(
        lambda: cluster.client.call(clients.connect_error, address, 80) == "connected",
        "the restored Service is not served",
    )


def test_service_with_service_proxy_name_is_left_to_netfilter_rules_and_dropped_without(
    cluster: ServiceCidrCluster,
) -> None:
    """Netfilter rules of the proxy that the label service.kubernetes.io/service-proxy-name selects apply."""
    cluster.put(proxy="other")
    until(
        lambda: cluster.client.call(clients.connect_error, "10.96.0.10", 80, 0.4) == "TimeoutError",
        "packets are not dropped",
    )
    assert cluster.unhooked(cluster.a, "10.96.0.10") == ""
    for chain in ("prerouting", "output"):
        rules = f"add table ip other; add chain ip other {chain} {{ type nat hook {chain} priority -100; }}; "
        rule = (
            f"add rule ip other {chain} ip daddr 10.96.0.10 tcp dport 80 dnat to {cluster.web.address}:8080"
        )
        cluster.a.run(["nft", rules + rule])
    for space in (cluster.client, cluster.a):
        until(
            lambda s=space: cluster.unhooked(s, "10.96.0.10") == "web",  # type: ignore[misc]
            "rules of the other proxy do not apply",
        )
        assert space.call(clients.ask_tcp, "10.96.0.10", 80)["name"] == "web"
    cluster.a.run(["nft", "delete table ip other"])
    cluster.put()
    until(
        lambda: cluster.client.call(clients.connect_error, "10.96.0.10", 80) == "connected",
        "the Service is not served",
    )


def test_local_address_of_the_node_in_the_service_cidr_is_not_dropped(cluster: ServiceCidrCluster) -> None:
    cluster.a.run(["ip", "addr", "add", "10.96.77.7/32", "dev", "lo"])
    servers.start(cluster.a, "node", 80)
    for space in (cluster.client, cluster.a):
        until(
            lambda s=space: s.call(clients.connect_error, "10.96.77.7", 80, 0.5) == "connected",  # type: ignore[misc]
            "the local address is refused",
        )
        assert space.call(clients.ask_tcp, "10.96.77.7", 80)["name"] == "node"
    cluster.a.run(["ip", "addr", "del", "10.96.77.7/32", "dev", "lo"])


def test_service_cidrs_persist_across_an_agent_restart(cluster: ServiceCidrCluster) -> None:
    cluster.agent.kill()
    assert cluster.client.call(clients.connect_error, UNALLOCATED[4], 80) == "EHOSTUNREACH"
    cluster.agent.start()
    assert cluster.client.call(clients.connect_error, UNALLOCATED[4], 80) == "EHOSTUNREACH"


def test_external_client_with_an_address_of_the_service_cidr_gets_replies(
    cluster: ServiceCidrCluster, version: int
) -> None:
    """Other networks overlap with 10.96.0.0/12: their hosts reach the node and pods.

    As with kube-proxy (ct state new), only packets that would create a flow to such an address are dropped.
    """
    source = EXTERNAL[version]
    node = {4: cluster.a.address, 6: cluster.a.address6}[version]
    pod = {4: cluster.web.address, 6: cluster.web.address6}[version]
    servers.start(cluster.a, "node", 7000 + version)
    for host, port in ((node, 7000 + version), (pod, 8080)):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            reply = cluster.lab.outside.call(_ask_from, source, host, port, kind)
            assert json.loads(reply.splitlines()[0])["peer"] == source
        assert cluster.lab.outside.call(_ping, host, source) == "reply"
    for space in (cluster.client, cluster.a):
        assert space.call(clients.connect_error, source, 80) == "EHOSTUNREACH"
        assert cluster.unhooked(space, source) == ""
    assert cluster.a.call(clients.send_error, UNALLOCATED[version], 80) == "EHOSTUNREACH"


def _ask_from(source: str, host: str, port: int, kind: int) -> str:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as sock:
        sock.settimeout(1)
        sock.bind((source, 0))
        sock.connect((host, port))
        sock.send(b"?\n")
        return sock.recv(4096).decode()
