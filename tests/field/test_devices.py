"""Which devices and addresses are the node's: second networks, uplinks of every kind, addresses on lo."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.e2e.outer import Outer, ask_by_socat
from tests.e2e.world import BALANCER, NODE_PORT
from tests.field import test_same_ports as same_ports
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

ON_LO, ON_LO6 = "198.51.100.1", "2001:db8:51::1"


class Neighbour(Space):
    """A host on a network of node-a's own, beside the one of the default route."""

    def __init__(self, world: Outer, kind: str, number: int) -> None:
        super().__init__(f"{world.lab.id}-{kind}", world.outside.cgroup)
        self.kind, self.number, self.device = kind, number, f"{kind}0"
        #: The node's on that network.
        self.address, self.address6 = f"10.20.{number}.1", f"fd00:20:{number}::1"
        world.lab.namespace(self.netns).close()
        # In the order in which they are made, so that a device which is on another comes after it.
        made = {
            "veth": f"link add veth0 type veth peer name eth0 netns {self.netns}",
            "bridge": f"link add port7 type veth peer name eth0 netns {self.netns}\nlink add bridge0 type bridge\n"
            "link set port7 master bridge0 up",
            "macvlan": f"link add low7 type veth peer name eth0 netns {self.netns}\nlink set low7 up\n"
            "link add link low7 macvlan0 type macvlan mode bridge",
        }[kind]
        ip(
            world.a,
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


class Nodes(Outer):
    """node-a with a network of each kind, and an agent that knows no Node until :meth:`write_node`."""

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
        """What ``status`` says that each device was taken for, and why."""
        status = json.loads(self.a.cli("status", "-o", "json"))
        return {each["device"]: (each["role"], each["why"]) for each in status["devices"]}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Lab() as lab:
        yield Nodes(lab)


@pytest.fixture(scope="module")
def agent(nodes: Nodes) -> Agent:
    """The agent with default options; no other runs while a test has it."""
    return nodes.agent().start()


@pytest.fixture
def running(nodes: Nodes, agent: Agent) -> Iterator[Agent]:
    if agent.process is None or agent.process.poll() is not None:
        agent.start()
    yield agent
    nodes.forget_node()


def answers(space: Space, address: str) -> bool:
    """Whether the NodePort answers there for TCP and UDP, as itself."""
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
def test_node_ports_answer_at_an_internal_ip_on_a_device_without_a_default_route(
    nodes: Nodes, running: Agent, kind: str
) -> None:
    """A NodePort answers at the Node's InternalIPs of both families, whatever device they are on."""
    neighbour = nodes.neighbours[kind]
    nodes.write_node(neighbour.address, neighbour.address6, podCIDRs=["10.244.1.0/24"])
    because = f"has the Node's InternalIP {neighbour.address}"
    until(lambda: nodes.devices().get(neighbour.device) == ("uplink", because), "it is no uplink")
    assert answers(neighbour, neighbour.address)
    assert answers(neighbour, neighbour.address6)


@pytest.mark.parametrize("address", [ON_LO, ON_LO6])
def test_node_ports_answer_at_an_address_of_the_node_on_lo(
    nodes: Nodes, running: Agent, address: str
) -> None:
    """A NodePort answers at the addresses that a node announces by BGP and has on its loopback device."""
    assert answers(nodes.outside, address)
    assert answers(nodes.client, address)


@pytest.mark.parametrize("kind", ["veth", "macvlan"])
def test_clients_on_a_network_that_nothing_names_are_masqueraded(
    nodes: Nodes, running: Agent, kind: str
) -> None:
    """A client of a load-balancer IP on a second network is outside: it is masqueraded and gets its answer.

    No Node object says anything of the network, and no route; only pods' devices are pods'.
    """
    neighbour = nodes.neighbours[kind]
    assert nodes.devices()[neighbour.device][0] in ("uplink", "outside")
    _asks_masqueraded(nodes, neighbour)


@KINDS
@pytest.mark.parametrize("end", ["open", "udp"])
def test_a_client_that_asks_a_service_and_its_backend_from_one_port(
    nodes: Nodes, running: Agent, kind: str, end: str
) -> None:
    """Both answer by their own addresses, whatever kind of device the client is on."""
    neighbour = nodes.neighbours[kind]
    nodes.write_web(nodes.w1)
    try:
        until(lambda: all(ask_by_socat(nodes.client, f"{BALANCER}:80")["name"] == "w1" for _ in range(8)))
        asked = same_ports.asked(BALANCER, nodes.w1, "udp" if end == "udp" else "tcp")
        assert same_ports.ask_unhooked(neighbour, asked, end) == "w1"
    finally:
        nodes.write_web(nodes.w1, nodes.w2)


def test_clients_behind_a_bridge_with_the_nodes_address_are_masqueraded(nodes: Nodes, running: Agent) -> None:
    """A bridge is an uplink once the Node has its address; without one, a bridge with veth ports is a CNI's."""
    neighbour = nodes.neighbours["bridge"]
    assert nodes.devices()["bridge0"] == ("pods", "a bridge of pods")
    nodes.write_node("172.18.0.1", external=(neighbour.address,))
    until(lambda: nodes.devices()["bridge0"][0] == "uplink", "it is no uplink")
    _asks_masqueraded(nodes, neighbour)
    nodes.forget_node()
    until(lambda: nodes.devices()["bridge0"][0] == "pods", "it stays an uplink")


def _asks_masqueraded(nodes: Nodes, neighbour: Neighbour) -> None:
    found = {}
    for _ in range(clients.ENOUGH):
        answer = neighbour.call(clients.ask_tcp, BALANCER, 80)
        found[answer["name"]] = answer["peer"]
    assert found == {"w1": "10.244.1.1", "w2": nodes.a.address}
    assert neighbour.call(clients.ask_udp, BALANCER, 53)["from"] == (BALANCER, 53)


def test_pods_stay_pods_and_keep_their_addresses(nodes: Nodes, running: Agent) -> None:
    """What comes from pods' devices is not masqueraded, with a Node object and without one."""
    for write in (nodes.forget_node, lambda: nodes.write_node("172.18.0.1", podCIDRs=["10.244.1.0/24"])):
        write()
        seen = {ask_by_socat(nodes.client, f"{BALANCER}:80")["peer"] for _ in range(8)}
        assert seen == {nodes.client.address}
        assert nodes.devices()["p1"] == ("pods", "a veth to a pod")


def test_routes_by_a_gateway_make_a_bridge_an_uplink_while_they_are_there(
    nodes: Nodes, running: Agent
) -> None:
    """A route by a gateway leads to other machines: the agent hears of it when it comes and when it goes."""
    ip(nodes.a, "route add 10.77.0.0/16 via 10.20.2.9 dev bridge0")
    until(lambda: nodes.devices()["bridge0"] == ("uplink", "has routes by a gateway"), "it is no uplink")
    _asks_masqueraded(nodes, nodes.neighbours["bridge"])
    ip(nodes.a, "route del 10.77.0.0/16")
    until(lambda: nodes.devices()["bridge0"] == ("pods", "a bridge of pods"), "it stays an uplink")
    # Routes by the node's own address, as Cilium has them on its device, lead nowhere else.
    ip(nodes.a, "route add 10.77.0.0/16 via 172.18.0.254", "route add 10.78.0.0/16 dev bridge0")
    assert nodes.devices()["bridge0"] == ("pods", "a bridge of pods")
    ip(nodes.a, "route del 10.77.0.0/16", "route del 10.78.0.0/16")


def test_an_external_ip_of_the_node_that_no_device_has_disturbs_nothing(nodes: Nodes, running: Agent) -> None:
    """Clouds write an address that a router translates: NodePorts answer where they did before."""
    nodes.write_node("203.0.113.200", external=("203.0.113.201",))
    assert answers(nodes.outside, nodes.a.address)
    assert answers(nodes.outside, ON_LO)


# -- nodePortAddresses


@pytest.fixture
def alone(nodes: Nodes, agent: Agent) -> Iterator[Callable[..., Agent]]:
    """An agent with these options, and a configuration file, in place of the usual one."""
    if agent.process is not None and agent.process.poll() is None:
        agent.stop()
    started: list[Agent] = []

    def start(*arguments: str, config: dict[str, Any] | None = None) -> Agent:
        if config is not None:
            path = nodes.lab.folder / "kube-proxy.yaml"
            head = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}
            path.write_text(yaml.safe_dump({**head, **config}))
            arguments = ("--config", str(path), *arguments)
        started.append(nodes.agent(*arguments).start())
        return started[-1]

    yield start
    for each in started:
        if each.process is not None and each.process.poll() is None:
            each.stop()
    nodes.forget_node()


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
def test_node_port_addresses_mean_what_they_mean_to_kube_proxy(
    nodes: Nodes, alone: Callable[..., Agent], config: dict[str, Any], where: set[str]
) -> None:
    """Empty is all of the node's addresses in modes iptables and ipvs, the primary ones in nftables; the words
    of 1.37 go beside each other and beside CIDRs."""
    nodes.write_node(PRIMARY, nodes.a.address6)
    alone(config=config)
    asked = (PRIMARY, ON_LO, POD_GATEWAY, "127.0.0.1")
    errors = {address: nodes.a.call(clients.connect_error, address, NODE_PORT, 0.3) for address in asked}
    assert {address for address, error in errors.items() if error == "connected"} == where
    assert {errors[address] for address in set(asked) - where} <= {"ECONNREFUSED"}


def test_the_primary_address_is_the_nodes_and_follows_it(nodes: Nodes, alone: Callable[..., Agent]) -> None:
    """``primary`` is the Node's InternalIP, also on a device without a default route, and when it comes late."""
    neighbour = nodes.neighbours["veth"]
    alone("--nodeport-addresses", "primary")
    assert answers(nodes.outside, nodes.a.address)
    assert not answers(neighbour, neighbour.address)
    nodes.write_node(neighbour.address, neighbour.address6)
    until(lambda: answers(neighbour, neighbour.address), "it does not answer at the InternalIP")
    assert answers(neighbour, neighbour.address6)
    until(lambda: not answers(nodes.outside, nodes.a.address), "it answers at another address")
    # The kubelet writes what the address has become.
    nodes.write_node(ON_LO)
    until(lambda: answers(nodes.outside, ON_LO), "it does not answer at the new InternalIP")


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
def test_pods_behind_a_bridge_are_local_as_the_mode_names_the_bridge(
    nodes: Nodes, alone: Callable[..., Agent], mode: list[str], kept: bool
) -> None:
    """Netfilter sees a bridged pod's packets come from the bridge: so they are matched by its name."""
    alone("--detect-local-mode", *mode)
    pod = nodes.neighbours["bridge"]
    ip(nodes.b, "route replace 10.20.2.0/24 via 172.18.0.1")
    seen = {pod.call(clients.ask_tcp, BALANCER, 80)["peer"] for _ in range(clients.ENOUGH)}
    assert ("10.20.2.9" in seen) is kept
    assert len(seen) == (1 if kept else 2), seen


# -- status


@pytest.mark.parametrize("way", [[], ["--without", "tcx"]])
def test_status_in_another_network_namespace_shows_the_agents_devices(
    nodes: Nodes, alone: Callable[..., Agent], way: list[str]
) -> None:
    """Indexes of devices are the agent's namespace's, and so are their names, wherever status runs."""
    alone(*way)
    here = json.loads(nodes.a.cli("status", "-o", "json"))
    elsewhere = nodes.neighbours["veth"]
    command = [sys.executable, "-m", "ebpfproxy", "status", "--bpf-root", str(nodes.a.bpf_root)]
    there = json.loads(elsewhere.run([*command, "-o", "json"]))
    assert there["devices"] == here["devices"]
    assert {"eth0", "p1", "veth0", "bridge0", "macvlan0"} <= {each["device"] for each in there["devices"]}
    assert there["healthy"]
    text = elsewhere.run(command)
    assert text.splitlines()[0].split() == ["health:", "healthy"]
    assert "MAP" not in text
    assert "agent_state" not in text
    assert "conntrack" in elsewhere.run([*command, "-v"])


def test_the_log_says_what_each_device_is_taken_for_and_when_that_changes(
    nodes: Nodes, running: Agent
) -> None:
    """An operator reads from the log alone why a device has its role, at the start and after a change."""
    running.wait_log("name=eth0 taken_for=uplink because='has a default route'")
    running.wait_log("name=veth0 taken_for=outside because='a veth on a network, 10.20.1.1/24'")
    told = running.text.count("name=veth0 taken_for=uplink")
    nodes.write_node(nodes.neighbours["veth"].address)
    running.wait_log(
        'name=veth0 taken_for=uplink because="has the Node\'s InternalIP 10.20.1.1"', times=told + 1
    )
