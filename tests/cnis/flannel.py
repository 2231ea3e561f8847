"""Flannel's networks, as flanneld and its CNI plugin leave them on a node.

Taken from flannel 0.28.9: devices, neighbours and routes from pkg/backend/vxlan/{device,vxlan_network}.go and
pkg/backend/route_network.go (host-gw), rules from pkg/trafficmngr/iptables/iptables.go and
pkg/trafficmngr/nftables/nftables.go, the chain of plugins from Documentation/kube-flannel.yml. Its plugin delegates to
``bridge`` with the node's subnet, a route to the whole network and ipMasq off, as flanneld masquerades (--ip-masq).
"""

from __future__ import annotations

from tests.cnis.network import CLUSTER_CIDRS, FAMILIES, Network, load, pod_cidr
from tests.cnis.plugins import HOST_PORT, PORTMAP, add, host_local
from tests.cnis.vxlan import Vxlan
from tests.lab import LabNode, Pod

#: kube-proxy's mark, for which flannel leaves out its masquerading.
_MARK = "0x4000/0x4000"


def _mac(node: LabNode, family: str) -> str:
    return f"0e:{family[-1]}0:00:00:00:{node.number:02x}"


def _subnet_address(node: LabNode, family: str) -> str:
    """The first address of the node's subnet, which the VXLAN device has."""
    return pod_cidr(node, family).split("/", maxsplit=1)[0]


_VXLAN = Vxlan(
    devices={"IPv4": "flannel.1", "IPv6": "flannel-v6.1"},
    number=1,
    port=8472,
    mac=_mac,
    address=_subnet_address,
    block=pod_cidr,
)


class Flannel(Network):
    def __init__(self, title: str, *, vxlan: bool, nftables: bool) -> None:
        super().__init__(title)
        self._vxlan, self._nftables = vxlan, nftables
        self.host_port = HOST_PORT
        self.routes_pods = not vxlan

    def prepare(self, node: LabNode) -> None:
        if self._vxlan:
            _VXLAN.add_devices(node)
        for family in FAMILIES:
            if self._nftables:
                load(node, ["nft", "-f", "-"], _nft_rules(node, family))
            else:
                command = "iptables-restore" if family == "IPv4" else "ip6tables-restore"
                load(node, [command, "--noflush"], _iptables_rules(node, family))

    def connect(self, node: LabNode, name: str) -> Pod:
        pod = node.bare_pod(name)
        ipam = host_local(node, routes=tuple(CLUSTER_CIDRS.values()))
        bridge = {"type": "bridge", "bridge": "cni0", "hairpinMode": True, "isDefaultGateway": True}
        add(pod, {**bridge, "mtu": 1430 if self._vxlan else 1500, "ipMasq": False, "ipam": ipam}, PORTMAP)
        return pod

    def join(self, node: LabNode, other: LabNode) -> None:
        if self._vxlan:
            _VXLAN.reach(node, other)


def _iptables_rules(node: LabNode, family: str) -> str:
    cluster, subnet = CLUSTER_CIDRS[family], pod_cidr(node, family)
    multicast = "224.0.0.0/4" if family == "IPv4" else "ff00::/8"
    return f"""
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark {_MARK} -j RETURN
-A FLANNEL-POSTRTG -s {subnet} -d {cluster} -j RETURN
-A FLANNEL-POSTRTG -s {cluster} -d {subnet} -j RETURN
-A FLANNEL-POSTRTG ! -s {cluster} -d {subnet} -j RETURN
-A FLANNEL-POSTRTG -s {cluster} ! -d {multicast} -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {cluster} -d {cluster} -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {cluster} -j ACCEPT
-A FLANNEL-FWD -d {cluster} -j ACCEPT
COMMIT
"""


def _nft_rules(node: LabNode, family: str) -> str:
    cluster, subnet = CLUSTER_CIDRS[family], pod_cidr(node, family)
    table, word, multicast = (
        ("ip flannel-ipv4", "ip", "224.0.0.0/4")
        if family == "IPv4"
        else ("ip6 flannel-ipv6", "ip6", "ff00::/8")
    )
    return f"""
table {table} {{
    chain forward {{
        type filter hook forward priority filter;
        {word} saddr {cluster} accept
        {word} daddr {cluster} accept
    }}
    chain postrtg {{
        type nat hook postrouting priority srcnat;
        meta mark 0x4000 return
        {word} saddr {subnet} {word} daddr {cluster} return
        {word} saddr {cluster} {word} daddr {subnet} return
        {word} saddr != {subnet} {word} daddr {cluster} return
        {word} saddr {cluster} {word} daddr != {multicast} masquerade fully-random
        {word} saddr != {cluster} {word} daddr {cluster} masquerade fully-random
    }}
}}
"""


NETWORKS: list[Network] = [
    Flannel("flannel, VXLAN, iptables", vxlan=True, nftables=False),
    Flannel("flannel, VXLAN, nftables", vxlan=True, nftables=True),
    Flannel("flannel, host-gw, iptables", vxlan=False, nftables=False),
    Flannel("flannel, host-gw, nftables", vxlan=False, nftables=True),
]
