"""The network of a cluster: two LANs, the nodes on both, and one host outside that routes between them.

Network namespaces have names of the run, so that two runs on one machine do not collide; addresses are the same in all
runs, since only the namespaces see them.

====================  ======================  =====================================================
device of a node      addresses of node N     what it is for
====================  ======================  =====================================================
eth0                  10.77.0.N, fd78::N      the default route: images, the world
eth1                  192.168.77.N, fd77::N   the cluster: InternalIP of the Node, the pods' routes
====================  ======================  =====================================================
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field

from tests.lab.spaces import Space

#: The host outside has this host number in every network.
OUTSIDE = 254
LANS = ("10.77.0.", "192.168.77.")
LANS_6 = ("fd78::", "fd77::")
POD_CIDRS = ("10.244.0.0/16", "fd44::/48")
SERVICE_CIDRS = ("10.96.0.0/16", "fd96::/112")
#: Connections of pods to the outside are masqueraded to the node's address, as with every CNI plugin: thus netfilter
#: tracks connections on every node, which it does not where no rule needs it.
_MASQUERADE = f"""
table inet pods-to-the-world {{
    chain postrouting {{
        type nat hook postrouting priority srcnat
        oifname eth0 ip saddr {POD_CIDRS[0]} masquerade
        oifname eth0 ip6 saddr {POD_CIDRS[1]} masquerade
    }}
}}
"""
_VXLAN_ID = 77
_VXLAN_PORT = 8472


def internal_ips(number: int) -> tuple[str, str]:
    return f"192.168.77.{number}", f"fd77::{number:x}"


def ordered(pair: tuple[str, str], primary: int) -> tuple[str, str]:
    """Returns addresses of both families, the primary one (4 or 6) first."""
    return pair if primary == 4 else (pair[1], pair[0])


def pod_cidrs(number: int) -> tuple[str, str]:
    """Returns the node's podCIDRs, which the controller manager assigns in order from 0."""
    return f"10.244.{number - 1}.0/24", f"fd44:0:0:{number - 1:x}::/64"


def _ip(netns: str, *arguments: str) -> None:
    subprocess.run(["ip", "-n", netns, *arguments], check=True, capture_output=True)


def _sysctl(netns: str, *settings: str) -> None:
    subprocess.run(
        ["nsenter", f"--net=/run/netns/{netns}", "sysctl", "-qw", *settings], check=True, capture_output=True
    )


@dataclass
class Network:
    """``prefix`` makes the names of its namespaces unique to the run."""

    prefix: str
    nodes: list[int] = field(default_factory=list)

    @property
    def outside(self) -> str:
        return f"{self.prefix}-outside"

    def netns(self, number: int) -> str:
        return f"{self.prefix}-node-{number}"

    def make(self) -> None:
        """Sets up the host outside: a bridge for each LAN, with the address of the nodes' gateway."""
        subprocess.run(["ip", "netns", "add", self.outside], check=True)
        _ip(self.outside, "link", "set", "lo", "up")
        for index, (lan, lan_6) in enumerate(zip(LANS, LANS_6, strict=True)):
            bridge = f"lan{index}"
            _ip(self.outside, "link", "add", bridge, "type", "bridge")
            _ip(self.outside, "link", "set", bridge, "up")
            _ip(self.outside, "address", "add", f"{lan}{OUTSIDE}/24", "dev", bridge)
            _ip(self.outside, "address", "add", f"{lan_6}{OUTSIDE:x}/64", "dev", bridge, "nodad")
        _sysctl(
            self.outside,
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv4.ip_local_port_range=1024 65535",
            "net.ipv4.tcp_tw_reuse=1",
        )

    def add_node(self, number: int) -> None:
        name = self.netns(number)
        subprocess.run(["ip", "netns", "add", name], check=True)
        _ip(name, "link", "set", "lo", "up")
        for index, (lan, lan_6) in enumerate(zip(LANS, LANS_6, strict=True)):
            device, port = f"eth{index}", f"node{number}-{index}"
            _ip(self.outside, "link", "add", port, "type", "veth", "peer", "name", device, "netns", name)
            _ip(self.outside, "link", "set", port, "master", f"lan{index}", "up")
            _ip(name, "link", "set", device, "up")
            _ip(name, "address", "add", f"{lan}{number}/24", "dev", device)
            _ip(name, "address", "add", f"{lan_6}{number:x}/64", "dev", device, "nodad")
        _ip(name, "route", "add", "default", "via", f"{LANS[0]}{OUTSIDE}")
        _ip(name, "-6", "route", "add", "default", "via", f"{LANS_6[0]}{OUTSIDE:x}")
        _sysctl(name, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        load = ["nsenter", f"--net=/run/netns/{name}", "nft", "-f", "-"]
        subprocess.run(load, input=_MASQUERADE, text=True, check=True)
        self.nodes.append(number)

    def route_pods(self) -> None:
        """Adds a route to each node's pods through the node, as host-gw CNIs do; also outside."""
        for number in self.nodes:
            gateways = internal_ips(number)
            for name in (self.outside, *(self.netns(other) for other in self.nodes if other != number)):
                for cidr, gateway in zip(pod_cidrs(number), gateways, strict=True):
                    _ip(name, "route", "replace", cidr, "via", gateway)

    def tunnel_pods(self) -> None:
        """Routes each node's pods through a VXLAN device with static neighbours, as flannel's backend does."""
        for number in self.nodes:
            name = self.netns(number)
            own = internal_ips(number)[0]
            options = [
                "id",
                str(_VXLAN_ID),
                "dstport",
                str(_VXLAN_PORT),
                "local",
                own,
                "dev",
                "eth1",
                "nolearning",
            ]
            _ip(name, "link", "add", "flannel.1", "address", _mac(number), "type", "vxlan", *options)
            _ip(name, "link", "set", "flannel.1", "mtu", "1450", "up")
            for cidr in pod_cidrs(number):
                address = cidr.split("/", maxsplit=1)[0]
                bits, more = ("128", ["nodad"]) if ":" in address else ("32", [])
                _ip(name, "address", "add", f"{address}/{bits}", "dev", "flannel.1", *more)
        for number in self.nodes:
            for other in self.nodes:
                if other != number:
                    self._tunnel(self.netns(number), other)

    def _tunnel(self, name: str, other: int) -> None:
        bridge = [
            "bridge",
            "-n",
            name,
            "fdb",
            "add",
            _mac(other),
            "dev",
            "flannel.1",
            "dst",
            internal_ips(other)[0],
        ]
        subprocess.run(bridge, check=True, capture_output=True)
        for cidr in pod_cidrs(other):
            address = cidr.split("/", maxsplit=1)[0]
            neighbour = ["lladdr", _mac(other), "dev", "flannel.1", "nud", "permanent"]
            _ip(name, "neighbour", "add", address, *neighbour)
            _ip(name, "route", "replace", cidr, "via", address, "dev", "flannel.1", "onlink")

    def space(self) -> Space:
        """Returns the host outside, to start processes in."""
        return Space(self.outside, None)

    def remove(self) -> None:
        for name in (*(self.netns(number) for number in self.nodes), self.outside):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _mac(number: int) -> str:
    return f"0e:77:00:00:00:{number:02x}"
