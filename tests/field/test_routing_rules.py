"""Routing rules that tell sources apart (``ip rule add from POD``), as AWS' VPC CNI makes them for its pods.

The replies of a pod leave by a device of its own, whose network takes no packets with an address of another one.
Those of a NodePort have to leave by the device where the requests came in. With netfilter's NAT administrators mark
connections that come to an address of the node (CONNMARK); the tests run with that, too, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.outside_client import SLICE_PORTS, OutsideClientCluster, refused_datagram
from tests.lab import Lab, clients, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: NodePorts of TCP, of UDP, and of UDP where the pod has no server.
CLUSTER, LOCAL = (30080, 30053, 30009), (30180, 30153, 30109)
TARGETS = (("tcp", 8080), ("udp", 8053), ("udp", 8009))
_TABLE, _MARK = 2, 0x80
_OTHER_TABLE, _OTHER_MARK = 3, 0x3
_VIP = "203.0.113.77"


class RulesCluster(OutsideClientCluster):
    """The replies of w1 leave by eth1. What leaves there with an address of eth0 is lost, and so is all the rest."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.is_netfilter = False
        self.addresses = {"v4": self.a.address, "v6": self.a.address6}
        for name, ports, policy in (("cluster", CLUSTER, "Cluster"), ("local", LOCAL, "Local")):
            self._write_node_port(name, ports, policy)

    def _write_node_port(self, name: str, node_ports: tuple[int, ...], policy: str) -> None:
        names = ("http", "udp", "closed")
        ports = [
            {"name": each, "port": port, "protocol": kind.upper(), "nodePort": port}
            for each, (kind, _), port in zip(names, TARGETS, node_ports, strict=True)
        ]
        slice_ports = [*SLICE_PORTS, {"name": "closed", "port": 8009, "protocol": "UDP"}]
        number = node_ports[0] - 30000
        manifests.write(
            self.manifests / f"{name}.yaml",
            manifests.service(
                name,
                type="NodePort",
                clusterIPs=[f"10.96.3.{number}", f"fd00:10:96::3:{number}"],
                ports=ports,
                externalTrafficPolicy=policy,
            ),
            *(
                manifests.slice_of(name, [manifests.endpoint(address, "node-a")], ports=slice_ports)
                for address in (self.w1.address, self.w1.address6)
            ),
        )

    def add_rules(self) -> None:
        commands = [
            "link add eth1 type veth peer name beyond1",
            "link set beyond1 up",
            "link set eth1 up",
            "address add 172.19.0.1/24 dev eth1",
            "address add fd00:172:19::1/64 dev eth1 nodad",
        ]
        for option, pod, gateway in (
            ("-4", self.w1.address, "172.19.0.254"),
            ("-6", self.w1.address6, "fd00:172:19::fe"),
        ):
            commands += [
                f"neigh add {gateway} lladdr 02:00:00:00:00:01 dev eth1 nud permanent",
                f"{option} route add default via {gateway} dev eth1 table {_TABLE}",
                f"{option} rule add pref 512 to {pod} lookup main",
                f"{option} rule add pref 1024 fwmark {_MARK}/{_MARK} lookup main",
                f"{option} rule add pref 1536 from {pod} lookup {_TABLE}",
            ]
        _ip(self, *commands)
        for tool in ("iptables", "ip6tables"):
            for rule in (
                f"-i eth0 -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-mark {_MARK}/{_MARK}",
                f"-i p+ -j CONNMARK --restore-mark --mask {_MARK}",
            ):
                self.a.run([tool, "-t", "mangle", "-A", "PREROUTING", *rule.split()])

    def translate_by_netfilter(self) -> None:
        """Makes the same NodePorts as kube-proxy does."""
        self.a.run(["nft", "add", "table", "inet", "control"])
        for hook, priority in (("prerouting", -100), ("postrouting", 100)):
            chain = f"{{ type nat hook {hook} priority {priority} ; }}"
            self.a.run(["nft", "add", "chain", "inet", "control", hook, chain])
        rules = ["postrouting meta mark & 0x4000 == 0x4000 masquerade"]
        for family, node, pod in (
            ("ip", self.a.address, self.w1.address),
            ("ip6", self.a.address6, f"[{self.w1.address6}]"),
        ):
            for ports, mark in ((CLUSTER, "meta mark set meta mark | 0x4000"), (LOCAL, "")):
                rules += [
                    f"prerouting {family} daddr {node} {kind} dport {port} {mark} dnat {family} to {pod}:{target}"
                    for port, (kind, target) in zip(ports, TARGETS, strict=True)
                ]
        for rule in rules:
            self.a.run(["nft", "add", "rule", "inet", "control", *rule.split()])


def _ip(cluster: RulesCluster, *commands: str) -> None:
    for command in commands:
        cluster.a.run(["ip", *command.split()])


@pytest.fixture(scope="module", params=["ebpfproxy", "clsact", "netfilter"])
def cluster(request: pytest.FixtureRequest) -> Iterator[RulesCluster]:
    with Lab() as lab:
        made = RulesCluster(lab)
        made.is_netfilter = request.param == "netfilter"
        if request.param == "netfilter":
            made.translate_by_netfilter()
            made.add_rules()
        else:
            made.agent(*(["--without", "tcx"] if request.param == "clsact" else [])).start()
            # A CNI adds devices and rules with its pods.
            made.add_rules()
            for address in made.addresses.values():
                until(
                    lambda to=address: (
                        made.outside.call(clients.connect_error, to, CLUSTER[0], 0.5) == "connected"
                    ),  # type: ignore[misc]
                    "replies leave by the wrong device",
                )
        yield made


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("ports", [CLUSTER, LOCAL], ids=["cluster", "local"])
def test_replies_leave_by_the_device_of_the_requests(
    cluster: RulesCluster, ports: tuple[int, ...], family: str
) -> None:
    """TCP, UDP, ICMP errors, and as many bytes as need more than the first packets."""
    tcp, udp, closed = ports
    address, client = cluster.addresses[family], cluster.outside
    for _ in range(3):
        assert client.call(clients.ask_tcp, address, tcp)["name"] == "w1"
        assert client.call(clients.ask_udp, address, udp)["from"] == (address, udp)
    assert client.call(clients.is_echoed, address, tcp, 2_000_000)
    assert client.call(refused_datagram, address, closed) == "ECONNREFUSED"


def _sent_by(device: str) -> int:
    return int(Path("/proc/net/dev").read_text().partition(f"{device}:")[2].split()[9])


@pytest.fixture
def third_device(cluster: RulesCluster) -> Iterator[str]:
    """A device by which the table _OTHER_TABLE leads to the client."""
    other = cluster.lab.switch
    cluster.a.run(["ip", "link", "add", "eth2", "type", "veth", "peer", "name", "n1c", "netns", other.netns])
    other.run(["ip", "link", "set", "n1c", "master", "br0", "up"])
    _ip(
        cluster,
        "link set eth2 up",
        "address add 172.20.0.1/24 dev eth2",
        f"route add {cluster.outside.address}/32 dev eth2 src {cluster.a.address} table {_OTHER_TABLE}",
    )
    yield "eth2"
    _ip(cluster, "link del eth2")


def test_a_route_that_a_mark_has_chosen_stays(cluster: RulesCluster, third_device: str) -> None:
    """Marks of connections whose first packet came in by eth0 lead to a third device."""
    rules = [
        f"-i eth0 -m conntrack --ctstate NEW -j CONNMARK --set-mark {_OTHER_MARK}",
        f"-i p+ -m connmark --mark {_OTHER_MARK} -j MARK --set-mark {_OTHER_MARK}",
    ]
    mangle = ["iptables", "-t", "mangle"]
    _ip(cluster, f"rule add pref 900 fwmark {_OTHER_MARK} lookup {_OTHER_TABLE}")
    try:
        for rule in rules:
            cluster.a.run([*mangle, "-A", "PREROUTING", *rule.split()])
        before = cluster.a.call(_sent_by, third_device)
        assert cluster.outside.call(clients.ask_tcp, cluster.a.address, LOCAL[0])["name"] == "w1"
        assert cluster.a.call(_sent_by, third_device) - before >= 3
    finally:
        for rule in rules:
            cluster.a.run([*mangle, "-D", "PREROUTING", *rule.split()])
        _ip(cluster, "rule del pref 900")


def test_the_address_of_a_load_balancer_may_have_a_route_of_its_own(
    cluster: RulesCluster, third_device: str
) -> None:
    """With netfilter's NAT such a rule is for the node's own sockets alone: replies of pods do not follow it."""
    if cluster.is_netfilter:
        pytest.skip("rules for a frontend do not match there")
    cluster.add_load_balancer(
        "vip", "10.96.3.9", _VIP, [cluster.endpoint_on_a()], externalTrafficPolicy="Local"
    )
    _ip(cluster, f"rule add pref 900 from {_VIP} lookup {_OTHER_TABLE}")
    try:
        until(lambda: "vip" in cluster.a.cli("service", "list"), "the Service is not programmed")
        before = cluster.a.call(_sent_by, third_device)
        assert cluster.outside.call(clients.is_echoed, _VIP, 80, 100_000)
        assert cluster.a.call(_sent_by, third_device) - before >= 3
    finally:
        _ip(cluster, "rule del pref 900")
        cluster.remove("vip")
