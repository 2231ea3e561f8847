"""Devices, their roles, and addresses of the node."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import pytest

from ebpfproxy.config.node_port_addresses import NodePortAddressesError, parse_node_port_addresses
from ebpfproxy.kube.objects import Node
from ebpfproxy.node import network as rules
from ebpfproxy.node.facts import Address, DefaultRoute, Facts, Link, NodeAddress, NodeFacts, node_facts
from ebpfproxy.node.local import LocalMode, LocalPods
from ebpfproxy.node.network import Network
from ebpfproxy.node.node_ports import select_node_port_addresses
from ebpfproxy.services.values import parse_prefix

ETHERNET, NONE, LOOPBACK = 1, 65534, 772
V4, V6 = socket.AF_INET, socket.AF_INET6


def packed(text: str) -> bytes:
    return socket.inet_pton(V6 if ":" in text else V4, text)


def link(index: int, name: str, kind: str | None = None, master: int = 0, type: int = ETHERNET) -> Link:
    return Link(index, name, kind, type, master)


def address(index: int, text: str, *, fit: bool = True) -> Address:
    """Returns an address, with the prefix of a network by default."""
    host, _, length = text.partition("/")
    return Address(index, packed(host), int(length or (64 if ":" in host else 24)), fit)


def route(index: int, family: int = V4, metric: int = 0, source: str = "") -> DefaultRoute:
    return DefaultRoute(index, family, metric, packed(source) if source else b"")


def node_of(*addresses: str, pod_cidrs: tuple[str, ...] = ()) -> NodeFacts:
    """Returns a Node with addresses such as ``InternalIP 192.0.2.1``."""
    found = tuple(NodeAddress(kind, packed(text)) for kind, text in map(str.split, addresses))
    return NodeFacts(found, tuple(filter(None, map(parse_prefix, pod_cidrs))))


def _text(address: bytes) -> str:
    return socket.inet_ntop(V4 if len(address) == 4 else V6, address)


def network_of(
    links: list[Link],
    addresses: list[Address],
    routes: list[DefaultRoute],
    patterns: tuple[str, ...] = (),
    *,
    node: NodeFacts | None = None,
    gateways: tuple[int, ...] = (),
) -> Network:
    facts = Facts(tuple(links), tuple(addresses), tuple(routes), frozenset(gateways))
    return rules.network_of(facts, node or NodeFacts(), patterns)


def roles(network: Network) -> dict[str, str]:
    return {device.name: device.role.name for device in network.devices}


LO = link(1, "lo", type=LOOPBACK)
ETH0 = link(2, "eth0")


def test_physical_device_with_an_address_is_an_uplink_and_a_pods_device_is_local() -> None:
    network = network_of(
        [LO, ETH0, link(3, "cali1", "veth"), link(4, "eth9")], [address(2, "192.0.2.1")], [route(2)]
    )
    assert roles(network) == {"eth0": "UPLINK", "cali1": "LOCAL", "eth9": "OUTSIDE"}


def test_device_of_any_kind_with_the_default_route_is_an_uplink() -> None:
    network = network_of([ETH0, link(3, "br-ex", "bridge")], [address(3, "192.0.2.1")], [route(3)])
    assert roles(network)["br-ex"] == "UPLINK"


def test_a_tunnel_stays_a_tunnel_even_with_the_default_route() -> None:
    links = [ETH0, link(3, "wg0", "wireguard", type=NONE), link(4, "flannel.1", "vxlan")]
    network = network_of(links, [address(2, "192.0.2.1")], [route(3), route(2)])
    assert roles(network) == {"eth0": "UPLINK", "wg0": "TUNNEL", "flannel.1": "TUNNEL"}
    assert [d.ethernet for d in network.devices] == [True, False, True]


def test_members_of_a_bond_get_no_programs() -> None:
    links = [link(2, "eth0", master=4), link(3, "eth1", master=4), link(4, "bond0", "bond")]
    assert roles(network_of(links, [address(4, "192.0.2.1")], [route(4)])) == {"bond0": "UPLINK"}


def test_members_of_a_vrf_get_programs_and_the_vrf_none() -> None:
    links = [link(2, "eth0", master=3), link(3, "red", "vrf")]
    assert roles(network_of(links, [address(2, "192.0.2.1")], [])) == {"eth0": "UPLINK"}


def test_bridge_of_pods_and_its_ports_get_programs() -> None:
    links = [ETH0, link(3, "cni0", "bridge"), link(4, "veth1", "veth", 3), link(5, "eth1", None, 3)]
    addresses = [address(2, "192.0.2.1"), address(3, "10.244.1.1")]
    pods = node_of(pod_cidrs=("10.244.1.0/24",))
    assert roles(network_of(links, addresses, [route(2)], node=pods)) == {
        "eth0": "UPLINK",
        "cni0": "LOCAL",
        "veth1": "LOCAL",
    }
    # Without podCIDRs, a source behind the bridge may be a host behind eth1.
    assert roles(network_of(links, addresses, [route(2)])) == {
        "eth0": "UPLINK",
        "cni0": "OUTSIDE",
        "veth1": "LOCAL",
    }
    assert roles(network_of(links[:3], addresses, [route(2)]))["cni0"] == "LOCAL"


def test_ports_of_an_uplink_bridge_get_no_programs() -> None:
    links = [link(2, "eth0", "veth", 3), link(3, "br-ex", "bridge"), link(4, "tap1", "tun", 3)]
    assert roles(network_of(links, [address(3, "192.0.2.1")], [route(3)])) == {"br-ex": "UPLINK"}


def below(*links: Link, node: NodeFacts | None = None) -> dict[str, tuple[bool, bool]]:
    """Returns the devices whose packets pass another one at ingress and at egress."""
    addresses = [address(2, "192.0.2.1"), address(9, "198.51.100.1")]
    network = network_of(list(links), addresses, [route(2)], node=node)
    found = {device.name: (device.ingress_below, device.egress_below) for device in network.devices}
    return {name: ways for name, ways in found.items() if any(ways)}


def test_packets_of_a_bridge_pass_its_ports_with_programs() -> None:
    """The bridge and its pods' ports have programs; a bridge whose ports have none stands alone."""
    bridge = link(3, "cni0", "bridge")
    assert below(ETH0, bridge, link(4, "veth1", "veth", 3)) == {"cni0": (True, True)}
    assert below(ETH0, bridge, link(4, "eth1", None, 3)) == {}
    assert below(ETH0, bridge) == {}
    ovs = link(3, "ovs-system", "openvswitch"), link(4, "veth1", "veth", 3), link(9, "br-ex", "openvswitch")
    assert below(ETH0, *ovs, node=node_of("InternalIP 198.51.100.1")) == {"br-ex": (True, True)}


@pytest.mark.parametrize(("late", "own"), [("192.0.2.9", "192.0.2.1"), ("2001:db8::9", "2001:db8::1")])
def test_clients_are_masqueraded_by_the_address_of_the_node_not_by_a_later_one(late: str, own: str) -> None:
    """The kernel lists the latest IPv6 address first. It may be a lease that ends, and a flow would end with it."""
    found = network_of(
        [ETH0], [address(2, late), address(2, own)], [route(2)], node=node_of(f"InternalIP {own}")
    )
    device = found.devices[0]
    assert (device.address6 if ":" in own else device.address4) == packed(own)


def above(*links: Link) -> set[str]:
    """Returns the devices by which packets of another device of ours leave as well."""
    network = network_of(list(links), [address(2, "192.0.2.1")], [route(2)])
    return {device.name for device in network.devices if device.egress_above}


def test_packets_of_a_bridge_or_macvlan_leave_by_the_devices_below() -> None:
    """What our program has masqueraded at the device above looks the same below."""
    assert above(ETH0, link(3, "cni0", "bridge"), link(4, "veth1", "veth", 3)) == {"veth1"}
    assert above(ETH0, link(3, "mac0", "macvlan")._replace(lower=2)) == {"eth0"}
    assert above(ETH0, link(3, "eth0.5", "vlan")._replace(lower=2)) == set()
    assert above(ETH0, link(3, "tap", "tun")) == set()


@pytest.mark.parametrize(
    ("kind", "passthru", "ways"),
    [
        ("vlan", False, None),
        ("vxlan", False, None),
        ("macvlan", False, (False, True)),
        ("macvlan", True, (True, True)),
        ("macvtap", True, (True, True)),
        ("ipvlan", False, (True, True)),
        ("veth", False, (True, True)),
    ],
)
def test_packets_of_a_stacked_device_may_pass_the_lower_one(
    kind: str, passthru: bool, ways: tuple[bool, bool] | None
) -> None:
    """Frames to a macvlan have its own link address; an ipvlan and a passthru macvlan use the lower's."""
    above = link(9, "above", kind)._replace(lower=2, passthru=passthru)
    assert below(ETH0, above) == ({"above": ways} if ways else {})


def test_a_vlan_with_an_address_is_an_uplink_of_its_own() -> None:
    links = [ETH0, link(3, "eth0.5", "vlan")]
    network = network_of(links, [address(2, "192.0.2.1"), address(3, "198.51.100.1")], [route(2)])
    assert roles(network) == {"eth0": "UPLINK", "eth0.5": "UPLINK"}
    assert network.answered == {packed("192.0.2.1"), packed("198.51.100.1")}


def test_uplinks_that_carry_vlans_and_other_devices_have_no_xdp() -> None:
    eth1, vlan = link(3, "eth1"), link(5, "eth1.5", "vlan")._replace(lower=3)
    links = [ETH0._replace(link_address=bytes(5) + b"\1"), eth1, vlan, link(6, "tun0", "tun", type=NONE)]
    links.append(link(7, "veth1", "veth"))
    own = [address(index, f"192.0.{index}.1") for index in (2, 3, 5)]
    found = {device.name: device for device in network_of(links, own, [route(2)]).devices}
    assert {name: device.xdp_obstacle for name, device in found.items()} == {
        "eth0": "",
        "eth1": "it carries VLANs",
        "eth1.5": "",
        "tun0": "not an uplink",
        "veth1": "not an uplink",
    }
    assert found["eth0"].link_address == bytes(5) + b"\1"


def test_only_devices_that_match_the_patterns_are_uplinks() -> None:
    links = [ETH0, link(3, "ens1"), link(4, "ens2")]
    network = network_of(links, [address(2, "192.0.2.1")], [route(2)], ("ens*",))
    assert roles(network) == {"eth0": "OUTSIDE", "ens1": "UPLINK", "ens2": "UPLINK"}


@pytest.mark.parametrize("kind", ["dummy", "ifb", "nlmon", "openvswitch"])
def test_devices_without_clients_are_skipped(kind: str) -> None:
    assert roles(network_of([ETH0, link(3, "x", kind), link(4, "kube-ipvs0")], [], [])) == {"eth0": "OUTSIDE"}


@pytest.mark.parametrize("device", ["kube-ipvs0", "kube-dummy-if"])
def test_addresses_of_ipvs_devices_are_not_local_addresses(device: str) -> None:
    addresses = [address(2, "192.0.2.1"), address(3, "10.96.0.10"), address(4, "10.96.0.11")]
    links = [ETH0, link(3, device, "dummy"), link(4, "nodelocaldns", "dummy")]
    network = network_of(links, addresses, [])
    assert network.addresses == {each.address for each in addresses}
    assert network.answered == {addresses[0].address, addresses[2].address}
    everywhere = parse_node_port_addresses(["0.0.0.0/0"])
    assert select_node_port_addresses(network, everywhere) == network.answered


def test_masquerading_uses_the_devices_own_address_or_the_nodes() -> None:
    links = [ETH0, link(3, "cni0", "bridge"), link(4, "cali1", "veth")]
    addresses = [
        address(2, "192.0.2.9", fit=False),
        address(2, "192.0.2.1"),
        address(2, "fe80::1", fit=False),
        address(2, "2001:db8::1"),
        address(3, "10.244.1.1"),
    ]
    found = {d.name: (d.address4, d.address6) for d in network_of(links, addresses, [route(2)]).devices}
    node = packed("192.0.2.1"), packed("2001:db8::1")
    assert found == {"eth0": node, "cni0": (packed("10.244.1.1"), node[1]), "cali1": node}


def test_primary_address_is_the_preferred_source_or_that_of_the_best_default_route() -> None:
    links = [ETH0, link(3, "eth1")]
    addresses = [address(2, "192.0.2.1"), address(3, "198.51.100.1"), address(3, "2001:db8::1")]
    best = network_of(links, addresses, [route(2, metric=100), route(3, metric=50), route(3, V6)])
    assert best.primary == (packed("198.51.100.1"), packed("2001:db8::1"))
    preferred = network_of(links, addresses, [route(2, source="203.0.113.5")])
    assert preferred.primary == (packed("203.0.113.5"), packed("2001:db8::1"))
    assert network_of(links, addresses, []).primary[0] == packed("192.0.2.1")


def test_loopback_addresses_are_excluded_and_other_addresses_of_lo_included() -> None:
    addresses = [address(1, "127.0.0.1"), address(1, "::1"), address(1, "192.0.2.7"), address(2, "fe80::1")]
    network = network_of([LO, ETH0], addresses, [route(2)])
    assert network.addresses == {packed("192.0.2.7"), packed("fe80::1")}
    assert select_node_port_addresses(network, ()) == {packed("192.0.2.7")}


def test_node_port_addresses_are_all_the_primary_or_those_in_cidrs() -> None:
    links = [ETH0, link(3, "cni0", "bridge")]
    addresses = [
        address(2, "192.0.2.1"),
        address(2, "192.0.2.2"),
        address(3, "10.244.1.1"),
        address(2, "2001:db8::1"),
        address(2, "fe80::1", fit=False),
    ]
    network = network_of(links, addresses, [route(2), route(2, V6)])
    everywhere = {packed(text) for text in ("192.0.2.1", "192.0.2.2", "10.244.1.1", "2001:db8::1")}

    def chosen(*texts: str) -> set[bytes]:
        return set(select_node_port_addresses(network, parse_node_port_addresses(texts)))

    assert chosen() == chosen("all") == chosen("0.0.0.0/0", "::/0") == everywhere
    assert chosen("localhost") == set()
    assert chosen("primary", "localhost") == chosen("primary")
    assert chosen("primary", "10.0.0.0/8") == chosen("primary") | {packed("10.244.1.1")}
    assert chosen("localhost", "all", "primary") == everywhere
    assert chosen("fe80::/10") == {packed("fe80::1")}
    assert chosen("primary") == {packed("192.0.2.1"), packed("2001:db8::1")}
    assert chosen("10.0.0.0/8", "192.0.2.2/32") == {packed("10.244.1.1"), packed("192.0.2.2")}
    assert chosen("::/0") == {packed("2001:db8::1")}


@pytest.mark.parametrize("texts", [("primary", "Localhost"), ("10.0.0.1",), ("10.0.0.0/33",), ("eth0",)])
def test_invalid_node_port_addresses_are_reported(texts: tuple[str, ...]) -> None:
    with pytest.raises(NodePortAddressesError, match=r"'"):
        parse_node_port_addresses(texts)


def test_packets_of_local_pods_are_recognized() -> None:
    links = [ETH0, link(3, "cni0", "bridge"), link(4, "lxc1", "veth"), link(5, "vx0", "vxlan")]
    devices = {d.name: d for d in network_of(links, [address(2, "192.0.2.1")], [route(2)]).devices}

    def behind(*mode: Any) -> set[str]:
        return {name for name, device in devices.items() if LocalPods(*mode).is_behind(device)}

    assert behind() == {"cni0", "lxc1"}
    assert behind(LocalMode.BRIDGE_INTERFACE, "cni0") == {"cni0"}
    assert behind(LocalMode.INTERFACE_NAME_PREFIX, "lx") == {"lxc1"}
    assert LocalPods(LocalMode.CLUSTER_CIDR).by_cidr


INTERNAL = node_of("InternalIP 10.0.0.5", "ExternalIP 203.0.113.9", pod_cidrs=("10.244.1.0/24",))
#: These are ports of bridges and masters.
VETH9, TAP9, ETH9 = link(9, "veth9", "veth", 3), link(9, "tap9", "tun", 3), link(9, "eth9", None, 3)
VXLAN9 = link(9, "vxlan9", "vxlan", 3)
MACVLAN8 = link(8, "macvlan8", "macvlan")._replace(lower=3)


@pytest.mark.parametrize(
    ("device", "others", "text", "role", "why"),
    [
        # These have addresses of the Node, on any device.
        (link(3, "eth1", "veth"), [], "10.0.0.5/24", "UPLINK", "has the Node's InternalIP 10.0.0.5"),
        (link(3, "eth1", "veth"), [], "10.0.0.5/32", "UPLINK", "has the Node's InternalIP 10.0.0.5"),
        (link(3, "br1", "bridge"), [VETH9], "10.0.0.5/24", "UPLINK", "has the Node's InternalIP 10.0.0.5"),
        (
            link(3, "wg0", "wireguard", type=NONE),
            [],
            "10.0.0.5/24",
            "UPLINK",
            "the Node's InternalIP 10.0.0.5",
        ),
        (link(3, "br-ex", "openvswitch"), [], "10.0.0.5/24", "UPLINK", "has the Node's InternalIP 10.0.0.5"),
        (link(3, "mac0", "macvlan"), [], "203.0.113.9/24", "UPLINK", "has the Node's ExternalIP 203.0.113.9"),
        # These kinds lead to a network of other machines.
        (link(3, "mac0", "macvlan"), [], "10.9.0.5/24", "UPLINK", "a macvlan with the address 10.9.0.5"),
        (link(3, "ipv0", "ipvlan"), [], "10.9.0.5/24", "UPLINK", "an ipvlan with the address 10.9.0.5"),
        (link(3, "eth1"), [], "10.9.0.5/24", "UPLINK", "hardware with the address 10.9.0.5"),
        (link(3, "br1", "bridge"), [ETH9], "10.9.0.5/24", "UPLINK", "a bridge to eth9, with an address"),
        (link(3, "br1", "bridge"), [ETH9], "", "OUTSIDE", "a bridge to eth9"),
        (link(3, "br1", "bridge"), [VXLAN9], "10.9.0.5/24", "OUTSIDE", "a bridge to vxlan9 alone"),
        (link(3, "mac0", "macvlan"), [], "", "OUTSIDE", "a macvlan without an address"),
        (link(3, "new0", "newkind"), [], "10.9.0.5/24", "OUTSIDE", "a newkind, which tells nothing"),
        (link(3, "eth1", "veth"), [], "10.9.0.5/24", "OUTSIDE", "a veth on a network, 10.9.0.5/24"),
        (link(3, "low1", "veth"), [MACVLAN8], "", "OUTSIDE", "a veth that carries macvlan8"),
        # These are devices of pods, as CNIs create them.
        (link(3, "cali1", "veth"), [], "", "LOCAL", "a veth to a pod"),
        (link(3, "lxc1", "netkit"), [], "", "LOCAL", "a netkit to a pod"),
        (link(3, "veth1", "veth"), [], "169.254.7.1/32", "LOCAL", "a veth to a pod"),
        (link(3, "veth1", "veth"), [], "10.244.1.1/24", "LOCAL", "a veth to a pod"),
        (link(3, "tap1", "tun"), [], "172.16.0.1/30", "LOCAL", "a tap"),
        (
            link(3, "cni0", "bridge"),
            [],
            "10.244.1.1/24",
            "LOCAL",
            "a bridge with 10.244.1.1, of the Node's podC",
        ),
        (link(3, "docker0", "bridge"), [], "172.17.0.1/16", "LOCAL", "a bridge without ports"),
        (link(3, "docker0", "bridge"), [VETH9], "172.17.0.1/16", "LOCAL", "a bridge of pods"),
        (link(3, "virbr0", "bridge"), [TAP9], "192.168.122.1/24", "LOCAL", "a bridge of pods"),
        (link(3, "weave", "bridge"), [VETH9, VXLAN9], "10.32.0.1/12", "LOCAL", "a bridge of pods"),
        (link(3, "flannel.1", "vxlan"), [], "10.244.1.0/32", "TUNNEL", "vxlan"),
        (link(3, "tun0", "tun", type=NONE), [], "10.8.0.1/24", "TUNNEL", "tun"),
    ],
)
def test_the_role_of_a_device_and_its_reason(
    device: Link, others: list[Link], text: str, role: str, why: str
) -> None:
    """No route decides about these devices; eth0 has the default route."""
    addresses = [address(2, "192.0.2.1"), *([address(3, text)] if text else [])]
    network = network_of([LO, ETH0, device, *others], addresses, [route(2)], node=INTERNAL)
    found = {each.name: (each.role.name, each.why) for each in network.devices}
    assert found["eth0"] == ("UPLINK", "has a default route")
    assert found[device.name][0] == role
    assert why in found[device.name][1]


@pytest.mark.parametrize("kind", ["veth", "bridge"])
def test_device_with_routes_by_a_gateway_is_an_uplink(kind: str) -> None:
    links, addresses = [ETH0, link(3, "x", kind)], [address(2, "192.0.2.1"), address(3, "10.9.0.5")]
    found = network_of(links, addresses, [route(2)], gateways=(3,)).devices[1]
    assert (found.role.name, found.why) == ("UPLINK", "has routes by a gateway")
    pods = node_of(pod_cidrs=("10.9.0.0/24",))
    assert roles(network_of(links, addresses, [route(2)], gateways=(3,), node=pods))["x"] == "LOCAL"


def test_node_address_on_devices_of_pods_does_not_make_them_uplinks() -> None:
    links = [LO, link(2, "p1", "veth"), link(3, "p2", "veth"), link(4, "eth0", "veth")]
    addresses = [address(2, "10.0.0.5/32"), address(3, "10.0.0.5/32"), address(4, "10.0.0.5/24")]
    network = network_of(links, addresses, [], node=INTERNAL)
    assert roles(network) == {"p1": "LOCAL", "p2": "LOCAL", "eth0": "UPLINK"}


def test_ports_of_an_uplink_bridge_get_no_programs_also_without_a_pattern_for_it() -> None:
    links = [link(2, "eth0", "veth", 3), link(3, "br-ex", "bridge"), link(4, "wan0")]
    network = network_of(links, [address(3, "192.0.2.1")], [route(3)], ("wan*",))
    assert roles(network) == {"br-ex": "OUTSIDE", "wan0": "UPLINK"}


def test_named_devices_are_the_only_uplinks_and_others_with_a_node_address_are_not_local() -> None:
    links = [ETH0, link(3, "eth1", "veth"), link(4, "p1", "veth"), link(5, "wg0", "wireguard", type=NONE)]
    addresses = [address(2, "192.0.2.1"), address(3, "10.0.0.5")]
    network = network_of(links, addresses, [route(2)], ("eth0",), node=INTERNAL)
    assert roles(network) == {"eth0": "UPLINK", "eth1": "OUTSIDE", "p1": "LOCAL", "wg0": "TUNNEL"}
    assert network.devices[1].why == "has the Node's InternalIP 10.0.0.5, but not among devices"
    assert packed("10.0.0.5") in select_node_port_addresses(network, ())


def test_primary_addresses_are_local_ones_of_the_node_with_internal_before_external() -> None:
    addresses = [address(1, "198.51.100.1/32"), address(2, "192.0.2.1"), address(2, "2001:db8::1")]
    links, routes = [LO, ETH0], [route(2), route(2, V6)]

    def primary(*texts: str) -> set[str]:
        found = network_of(links, addresses, routes, node=node_of(*texts))
        return set(map(_text, select_node_port_addresses(found, ("primary",))))

    assert primary() == {"192.0.2.1", "2001:db8::1"}
    assert primary("InternalIP 198.51.100.1", "ExternalIP 192.0.2.1") == {"198.51.100.1", "2001:db8::1"}
    # A router before the node translates it, so that no packet here has it.
    assert primary("InternalIP 203.0.113.9", "ExternalIP 198.51.100.1") == {"198.51.100.1", "2001:db8::1"}
    assert primary("InternalIP 203.0.113.9") == {"192.0.2.1", "2001:db8::1"}


def test_node_address_on_an_ipvs_device_is_a_local_address() -> None:
    links = [ETH0, link(3, "kube-ipvs0", "dummy")]
    addresses = [address(2, "192.0.2.1"), address(3, "10.96.0.10/32"), address(3, "10.0.0.5/32")]
    network = network_of(links, addresses, [route(2)], node=INTERNAL)
    assert network.answered == {packed("192.0.2.1"), packed("10.0.0.5")}


def test_addresses_of_the_node_object_are_read_and_host_names_skipped() -> None:
    text = """{"metadata": {"name": "a"}, "spec": {"podCIDRs": ["10.244.1.0/24", "ten"]}, "status": {"addresses": [
        {"type": "Hostname", "address": "a"}, {"type": "ExternalIP", "address": "203.0.113.9"},
        {"type": "InternalDNS", "address": "10.0.0.9"}, {"type": "InternalIP", "address": "10.0.0.5"},
        {"type": "InternalIP", "address": "nonsense"}, {"type": "InternalIP"}]}}"""
    found = msgspec.json.decode(text, type=Node)
    assert node_facts(found) == INTERNAL
    assert node_facts(None) == node_facts(Node(metadata=found.metadata)) == NodeFacts()


def test_ports_of_a_bridge_are_local_as_netfilter_sees_them() -> None:
    """kube-proxy's rules match the input device, which is the bridge and never its port."""
    links = [ETH0, link(3, "cni0", "bridge"), link(4, "veth1", "veth", 3)]
    devices = network_of(links, [address(2, "192.0.2.1"), address(3, "10.244.1.1")], [route(2)]).devices

    def behind(*mode: Any) -> set[str]:
        return {device.name for device in devices if LocalPods(*mode).is_behind(device)}

    assert behind(LocalMode.BRIDGE_INTERFACE, "cni0") == {"cni0", "veth1"}
    assert behind(LocalMode.INTERFACE_NAME_PREFIX, "cni") == {"cni0", "veth1"}
    assert behind(LocalMode.INTERFACE_NAME_PREFIX, "veth") == set()
