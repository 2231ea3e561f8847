"""Roles of devices and addresses of the node: second networks, kinds of uplinks, addresses on lo."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from ebpfproxy.datapath.kernel import probe
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs.devices import filter_attachments, link_attachments
from tests.e2e.outside_client import OutsideClientCluster, ask_by_socat
from tests.e2e.two_node_cluster import BALANCER, NODE_PORT
from tests.field import test_same_ports as same_ports
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

ON_LO, ON_LO6 = "198.51.100.1", "2001:db8:51::1"


class Neighbour(Space):
    """A host on a second network of node-a, without its default route."""

    def __init__(self, cluster: OutsideClientCluster, kind: str, number: int) -> None:
        super().__init__(f"{cluster.lab.id}-{kind}", cluster.outside.cgroup)
        self.kind, self.number, self.device = kind, number, f"{kind}0"
        #: The addresses of the node on that network.
        self.address, self.address6 = f"10.20.{number}.1", f"fd00:20:{number}::1"
        cluster.lab.namespace(self.netns).close()
        # A device is created after the one that it is on.
        made = {
            "veth": f"link add veth0 type veth peer name eth0 netns {self.netns}",
            "bridge": f"link add port7 type veth peer name eth0 netns {self.netns}\nlink add bridge0 type bridge\n"
            "link set port7 master bridge0 up",
            "macvlan": f"link add low7 type veth peer name eth0 netns {self.netns}\nlink set low7 up\n"
            "link add link low7 macvlan0 type macvlan mode bridge",
        }[kind]
        ip(
            cluster.a,
            made,
            f"link set {self.device} up",
            f"address add {self.address}/24 dev {self.device}",
            f"address add {self.address6}/64 dev {self.device} nodad",
        )
        ip(
            self,
            "link set eth0 up",
            f"address add 10.20.{number}.9/24 dev eth0",
            f"address add fd00:20:{number}::9/64 dev eth0 nodad",
            f"route add default via {self.address}",
            f"route add default via {self.address6}",
        )


def ip(space: Space, *commands: str) -> None:
    for command in "\n".join(commands).splitlines():
        space.run(["ip", *command.split()])


class DevicesCluster(OutsideClientCluster):
    """node-a with a network of each kind; there is no Node object before :meth:`write_node`."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.neighbours = {
            kind: Neighbour(self, kind, number)
            for number, kind in enumerate(("veth", "bridge", "macvlan"), 1)
        }
        ip(self.a, f"address add {ON_LO}/32 dev lo", f"address add {ON_LO6}/128 dev lo")
        self.outside.route(f"{ON_LO}/32", self.a)
        self.outside.route(f"{ON_LO6}/128", self.a)

    def write_node(self, *internal: str, external: tuple[str, ...] = (), **spec: Any) -> None:
        addresses = [{"type": "Hostname", "address": "node-a"}]
        addresses += [{"type": "InternalIP", "address": text} for text in internal]
        addresses += [{"type": "ExternalIP", "address": text} for text in external]
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}}
        manifests.write(
            self.manifests / "node.yaml", {**node, "spec": spec, "status": {"addresses": addresses}}
        )

    def forget_node(self) -> None:
        (self.manifests / "node.yaml").unlink(missing_ok=True)

    def devices(self) -> dict[str, tuple[str, str]]:
        """The role of each device and its reason, from ``status``."""
        status = json.loads(self.a.cli("status", "-o", "json"))
        return {each["device"]: (each["role"], each["why"]) for each in status["devices"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevicesCluster]:
    with Lab() as lab:
        yield DevicesCluster(lab)


@pytest.fixture(scope="module")
def agent(cluster: DevicesCluster) -> Agent:
    """The agent with default options; no other one runs at the same time."""
    return cluster.agent().start()


@pytest.fixture
def running(cluster: DevicesCluster, agent: Agent) -> Iterator[Agent]:
    if agent.process is None or agent.process.poll() is not None:
        agent.start()
    yield agent
    cluster.forget_node()


def is_served(space: Space, address: str) -> bool:
    """Returns True if the NodePort is served there for TCP and UDP; asserts the source of replies."""
    if space.call(clients.connect_error, address, NODE_PORT, 0.3) != "connected":
        return False
    tcp, udp = (
        space.call(clients.ask_tcp, address, NODE_PORT)["getpeername"],
        space.call(clients.ask_udp, address, 30053)["from"],
    )
    assert (tcp, udp) == ((address, NODE_PORT), (address, 30053))
    return True


KINDS = pytest.mark.parametrize("kind", ["veth", "bridge", "macvlan"])


@KINDS
def test_node_port_is_served_at_an_internal_ip_on_a_device_without_a_default_route(
    cluster: DevicesCluster, running: Agent, kind: str
) -> None:
    """NodePorts are served at the Node's InternalIPs of both families, on any device."""
    neighbour = cluster.neighbours[kind]
    cluster.write_node(neighbour.address, neighbour.address6, podCIDRs=["10.244.1.0/24"])
    because = f"has the Node's InternalIP {neighbour.address}"
    until(
        lambda: cluster.devices().get(neighbour.device) == ("uplink", because),
        "the device does not become an uplink",
    )
    assert is_served(neighbour, neighbour.address)
    assert is_served(neighbour, neighbour.address6)


@pytest.mark.parametrize("address", [ON_LO, ON_LO6])
def test_node_port_is_served_at_an_address_on_lo(
    cluster: DevicesCluster, running: Agent, address: str
) -> None:
    """Nodes have addresses on lo that they announce by BGP."""
    assert is_served(cluster.outside, address)
    assert is_served(cluster.client, address)


@pytest.mark.parametrize("kind", ["veth", "macvlan"])
def test_clients_on_an_unnamed_second_network_are_masqueraded(
    cluster: DevicesCluster, running: Agent, kind: str
) -> None:
    """A client of a load-balancer IP on a second network is external: it is masqueraded and gets replies.

    No Node address and no route refers to the network; only devices that lead to pods are local.
    """
    neighbour = cluster.neighbours[kind]
    assert cluster.devices()[neighbour.device][0] in ("uplink", "outside")
    _check_masqueraded(cluster, neighbour)


@KINDS
@pytest.mark.parametrize("end", ["open", "udp"])
def test_client_uses_one_source_port_for_a_service_and_its_backend(
    cluster: DevicesCluster, running: Agent, kind: str, end: str
) -> None:
    """Replies have the addresses of both, with each kind of device of the client."""
    neighbour = cluster.neighbours[kind]
    cluster.write_web(cluster.w1)
    try:
        until(lambda: all(ask_by_socat(cluster.client, f"{BALANCER}:80")["name"] == "w1" for _ in range(8)))
        targets = same_ports.targets(BALANCER, cluster.w1, "udp" if end == "udp" else "tcp")
        assert same_ports.ask_unhooked(neighbour, targets, end) == "w1"
    finally:
        cluster.write_web(cluster.w1, cluster.w2)


def test_clients_behind_a_bridge_with_a_node_address_are_masqueraded(
    cluster: DevicesCluster, running: Agent
) -> None:
    """A bridge with an address of the Node is an uplink; other bridges with veth ports belong to a CNI."""
    neighbour = cluster.neighbours["bridge"]
    assert cluster.devices()["bridge0"] == ("pods", "a bridge of pods")
    cluster.write_node("172.18.0.1", external=(neighbour.address,))
    until(lambda: cluster.devices()["bridge0"][0] == "uplink", "the device does not become an uplink")
    _check_masqueraded(cluster, neighbour)
    cluster.forget_node()
    until(lambda: cluster.devices()["bridge0"][0] == "pods", "the device remains an uplink")


def _check_masqueraded(cluster: DevicesCluster, neighbour: Neighbour) -> None:
    found = {}
    for _ in range(clients.ENOUGH):
        reply = neighbour.call(clients.ask_tcp, BALANCER, 80)
        found[reply["name"]] = reply["peer"]
    assert found == {"w1": "10.244.1.1", "w2": cluster.a.address}
    assert neighbour.call(clients.ask_udp, BALANCER, 53)["from"] == (BALANCER, 53)


def test_pods_are_not_masqueraded_with_and_without_a_node_object(
    cluster: DevicesCluster, running: Agent
) -> None:
    """Packets from devices that lead to pods are not masqueraded."""
    for write in (cluster.forget_node, lambda: cluster.write_node("172.18.0.1", podCIDRs=["10.244.1.0/24"])):
        write()
        seen = {ask_by_socat(cluster.client, f"{BALANCER}:80")["peer"] for _ in range(8)}
        assert seen == {cluster.client.address}
        assert cluster.devices()["p1"] == ("pods", "a veth to a pod")


def test_bridge_is_an_uplink_while_it_has_routes_with_a_gateway(
    cluster: DevicesCluster, running: Agent
) -> None:
    """A route with a gateway leads to other machines. The agent follows netlink events of routes."""
    ip(cluster.a, "route add 10.77.0.0/16 via 10.20.2.9 dev bridge0")
    until(
        lambda: cluster.devices()["bridge0"] == ("uplink", "has routes by a gateway"),
        "the device does not become an uplink",
    )
    _check_masqueraded(cluster, cluster.neighbours["bridge"])
    ip(cluster.a, "route del 10.77.0.0/16")
    until(
        lambda: cluster.devices()["bridge0"] == ("pods", "a bridge of pods"), "the device remains an uplink"
    )
    # A gateway that is an address of the node, as Cilium has it, does not lead to other machines.
    ip(cluster.a, "route add 10.77.0.0/16 via 172.18.0.254", "route add 10.78.0.0/16 dev bridge0")
    assert cluster.devices()["bridge0"] == ("pods", "a bridge of pods")
    ip(cluster.a, "route del 10.77.0.0/16", "route del 10.78.0.0/16")


def test_external_ip_of_the_node_that_no_device_has_is_ignored(
    cluster: DevicesCluster, running: Agent
) -> None:
    """Cloud providers write addresses that a router translates; NodePorts are served as before."""
    cluster.write_node("203.0.113.200", external=("203.0.113.201",))
    assert is_served(cluster.outside, cluster.a.address)
    assert is_served(cluster.outside, ON_LO)


# -- nodePortAddresses


@pytest.fixture
def start_agent(cluster: DevicesCluster, agent: Agent) -> Iterator[Callable[..., Agent]]:
    """Starts an agent with options and a configuration file, in place of the default one."""
    if agent.process is not None and agent.process.poll() is None:
        agent.stop()
    started: list[Agent] = []

    def start(*arguments: str, config: dict[str, Any] | None = None) -> Agent:
        if config is not None:
            path = cluster.lab.folder / "kube-proxy.yaml"
            head = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}
            path.write_text(yaml.safe_dump({**head, **config}))
            arguments = ("--config", str(path), *arguments)
        started.append(cluster.agent(*arguments).start())
        return started[-1]

    yield start
    for each in started:
        if each.process is not None and each.process.poll() is None:
            each.stop()
    cluster.forget_node()


PRIMARY, POD_GATEWAY = "172.18.0.1", "10.244.1.1"


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({}, {PRIMARY, ON_LO, POD_GATEWAY, "127.0.0.1"}),
        ({"mode": "nftables"}, {PRIMARY}),
        ({"mode": "nftables", "nodePortAddresses": ["primary", "localhost"]}, {PRIMARY, "127.0.0.1"}),
        ({"mode": "ipvs", "nodePortAddresses": ["all"]}, {PRIMARY, ON_LO, POD_GATEWAY}),
        ({"nodePortAddresses": ["primary", "198.51.100.0/24"]}, {PRIMARY, ON_LO}),
    ],
)
def test_node_port_addresses_are_those_of_kube_proxy_in_each_mode(
    cluster: DevicesCluster, start_agent: Callable[..., Agent], config: dict[str, Any], where: set[str]
) -> None:
    """Empty means all addresses of the node in modes iptables and ipvs, and primary ones in nftables. The
    keywords of 1.37 can be combined with each other and with CIDRs."""
    cluster.write_node(PRIMARY, cluster.a.address6)
    start_agent(config=config)
    addresses = (PRIMARY, ON_LO, POD_GATEWAY, "127.0.0.1")
    errors = {
        address: cluster.a.call(clients.connect_error, address, NODE_PORT, 0.3) for address in addresses
    }
    assert {address for address, error in errors.items() if error == "connected"} == where
    assert {errors[address] for address in set(addresses) - where} <= {"ECONNREFUSED"}


def test_primary_address_is_the_internal_ip_and_follows_the_node_object(
    cluster: DevicesCluster, start_agent: Callable[..., Agent]
) -> None:
    """The InternalIP may be on a device without a default route, and may be set after the agent's start."""
    neighbour = cluster.neighbours["veth"]
    start_agent("--nodeport-addresses", "primary")
    assert is_served(cluster.outside, cluster.a.address)
    assert not is_served(neighbour, neighbour.address)
    cluster.write_node(neighbour.address, neighbour.address6)
    until(lambda: is_served(neighbour, neighbour.address), "the NodePort is not served at the InternalIP")
    assert is_served(neighbour, neighbour.address6)
    until(
        lambda: not is_served(cluster.outside, cluster.a.address),
        "the NodePort is still served at another address",
    )
    # The kubelet updates the address.
    cluster.write_node(ON_LO)
    until(lambda: is_served(cluster.outside, ON_LO), "the NodePort is not served at the new InternalIP")


# -- detectLocalMode


@pytest.mark.parametrize(
    ("mode", "kept"),
    [
        (["BridgeInterface", "--pod-bridge-interface", "bridge0"], True),
        (["InterfaceNamePrefix", "--pod-interface-name-prefix", "bridge"], True),
        (["InterfaceNamePrefix", "--pod-interface-name-prefix", "port"], False),
        (["Devices"], True),
    ],
)
def test_detect_local_mode_matches_the_name_of_the_bridge(
    cluster: DevicesCluster, start_agent: Callable[..., Agent], mode: list[str], kept: bool
) -> None:
    """As in netfilter, the input device of a bridged pod's packets is the bridge and not its port."""
    start_agent("--detect-local-mode", *mode)
    pod = cluster.neighbours["bridge"]
    ip(cluster.b, "route replace 10.20.2.0/24 via 172.18.0.1")
    seen = {
        reply["peer"] for reply in pod.call(clients.repeated, clients.ENOUGH, clients.ask_tcp, BALANCER, 80)
    }
    assert ("10.20.2.9" in seen) is kept
    assert len(seen) == (1 if kept else 2), seen


# -- links and filters


def test_attachments_of_an_agent_with_tcx_give_way_to_those_of_one_without_and_back(
    cluster: DevicesCluster, running: Agent, start_agent: Callable[..., Agent]
) -> None:
    """A device never has links and filters: both would translate a packet."""
    has_tcx = probe.probe().tcx
    for options in (["--without", "tcx"], [], ["--without", "tcx"], []):
        used = start_agent(*options)
        links = link_attachments(pin_folder(cluster.a.bpf_root))
        attached_filters = cluster.a.call(filter_attachments)
        assert bool(links) is (has_tcx and not options)
        assert bool(attached_filters) is not bool(links)
        assert cluster.outside.call(clients.connect_error, BALANCER, 80) == "connected"
        used.stop()


# -- status


@pytest.mark.parametrize("options", [[], ["--without", "tcx"]])
def test_status_in_another_network_namespace_shows_the_devices_of_the_agent(
    cluster: DevicesCluster, start_agent: Callable[..., Agent], options: list[str]
) -> None:
    """Indexes and names of devices are those of the agent's namespace, wherever ``status`` runs."""
    start_agent(*options)
    here = json.loads(cluster.a.cli("status", "-o", "json"))
    other_namespace = cluster.neighbours["veth"]
    command = ["status", "--bpf-root", str(cluster.a.bpf_root)]
    there = json.loads(other_namespace.run_command([*command, "-o", "json"]).output)
    assert there["devices"] == here["devices"]
    assert {"eth0", "p1", "veth0", "bridge0", "macvlan0"} <= {each["device"] for each in there["devices"]}
    assert there["healthy"]
    text = other_namespace.run_command(command).output
    assert text.splitlines()[0].split() == ["health:", "healthy"]
    assert "MAP" not in text
    assert "agent_state" not in text
    assert "conntrack" in other_namespace.run_command([*command, "-v"]).output


def test_log_has_the_role_of_each_device_and_its_changes(cluster: DevicesCluster, running: Agent) -> None:
    """The log has the reason of each role, at the start and after a change."""
    running.wait_log("name=eth0 taken_for=uplink because='has a default route'")
    running.wait_log("name=veth0 taken_for=outside because='a veth on a network, 10.20.1.1/24'")
    logged = running.text.count("name=veth0 taken_for=uplink")
    cluster.write_node(cluster.neighbours["veth"].address)
    running.wait_log(
        'name=veth0 taken_for=uplink because="has the Node\'s InternalIP 10.20.1.1"', times=logged + 1
    )
