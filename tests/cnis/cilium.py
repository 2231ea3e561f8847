"""Cilium where it does not replace kube-proxy: programs with its verdicts on the devices that it attaches to.

Taken from Cilium: devices lxc* without an address, with a route of each (enable-endpoint-routes), the router's address on
cilium_host (pkg/datapath/linux/{node,route}, plugins/cilium-cni); tcx links at the tail of what is there, or clsact filters of
priority 1 and handle 1 (pkg/datapath/loader/{tcx,tc}.go); TC_ACT_OK for all that the stack is to handle, and a redirect to
the device of a pod of the node, or into it with BPF host routing (redirect_ep() in bpf/lib/local_delivery). Its own ARP
responder is proxy_arp here. Policies, tunnels and its translation of cluster IPs at pods' devices are not shown.
"""

from __future__ import annotations

import ipaddress
import socket
import subprocess
from pathlib import Path

from ebpfproxy.datapath.abi.hooks import TCX_EGRESS, TCX_INGRESS
from ebpfproxy.datapath.kernel import bpf
from tests.cnis.network import Network, ip, sysctl
from tests.lab import Agent, LabNode, Pod
from tests.lab.lab import routes_of

_SOURCE = Path(__file__).with_name("cilium.c")
_ROUTER, _ROUTER6 = "10.244.{}.250", "fd00:10:244:{}::fa"
#: The first program is at the ingress of all these devices, the second one at their egress.
_HOOKS = (("ingress", TCX_INGRESS), ("egress", TCX_EGRESS))


class Cilium(Network):
    """``late``: the programs are attached after ours. ``peer``: BPF host routing."""

    def __init__(
        self, title: str, *, tcx: bool, late: bool, peer: bool = False, options: tuple[str, ...] = ()
    ) -> None:
        super().__init__(title)
        self._tcx, self._late, self._peer = tcx, late, peer
        self.options = options
        # Packets are redirected past the egress of the pod's device, where clients are masqueraded.
        self.shows_clients = peer
        if peer:
            past = "replies are redirected past the client's device; Cilium needs its own replacement for this mode"
            self.lacks = {"ClusterIP, in packets": past, "hairpin, in packets": past}

    def prepare(self, node: LabNode) -> None:
        ip(
            node,
            "link add cilium_host type veth peer name cilium_net",
            "link set cilium_host up",
            "link set cilium_net up",
            f"address add {_ROUTER.format(node.number)}/32 dev cilium_host",
            f"address add {_ROUTER6.format(node.number)}/128 dev cilium_host nodad",
        )

    def connect(self, node: LabNode, name: str) -> Pod:
        pod = node.bare_pod(name)
        device, gateway, gateway6 = f"lxc{name}", _ROUTER.format(node.number), _ROUTER6.format(node.number)
        ip(
            node,
            f"link add {device} type veth peer name eth0 netns {pod.netns}",
            f"link set {device} up",
            f"route add {pod.address} dev {device}",
            f"route add {pod.address6} dev {device}",
            f"neighbour add proxy {gateway6} dev {device}",
        )
        sysctl(
            node,
            **{
                f"ipv{version}__conf__{device}__proxy_{what}": 1 for version, what in ((4, "arp"), (6, "ndp"))
            },
        )
        ip(
            pod,
            "link set eth0 up",
            f"address add {pod.address}/32 dev eth0",
            f"address add {pod.address6}/128 dev eth0 nodad",
            f"route add {gateway} dev eth0",
            f"route add default via {gateway}",
            f"route add {gateway6} dev eth0",
            f"route add default via {gateway6} dev eth0",
        )
        return pod

    def finish(self, node: LabNode) -> None:
        if not self._late:
            self._attach(node)

    def attach_late(self, node: LabNode) -> None:
        if self._late:
            self._attach(node)

    def settle(self, agent: Agent) -> None:
        if self._late and not self._tcx:
            agent.wait_log("overtaken")

    def _attach(self, node: LabNode) -> None:
        folder = node.bpf_root / "cilium"
        folder.mkdir(parents=True)
        self._load(node, folder)
        node.call(_attach_tcx if self._tcx else _attach_filters, folder)

    def _load(self, node: LabNode, folder: Path) -> None:
        """Compiles the programs with the node's pods, and pins them."""
        made = node.lab.folder / f"cilium-{node.name}.o"
        pods = ", ".join(_initializer(node, pod) for pod in node.pods)
        defines = [f"-DPODS={pods}", f"-DPEER={int(self._peer)}"]
        machine = subprocess.run(["uname", "-m"], check=True, capture_output=True, text=True).stdout.strip()
        includes = f"-I/usr/include/{machine}-linux-gnu"
        clang = [
            "clang",
            "-O2",
            "-g",
            "-target",
            "bpf",
            includes,
            *defines,
            "-c",
            str(_SOURCE),
            "-o",
            str(made),
        ]
        subprocess.run(clang, check=True)
        subprocess.run(
            ["bpftool", "prog", "loadall", str(made), str(folder), "type", "classifier"], check=True
        )


def _initializer(node: LabNode, pod: Pod) -> str:
    """The pod as a ``struct pod`` of C: its addresses, the link addresses of a packet to it, its device."""
    with routes_of(node.netns) as outside, routes_of(pod.netns) as inside:
        index = outside.link_lookup(ifname=f"lxc{pod.name}")[0]
        macs = [
            bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", ""))
            for link in (
                inside.get_links(inside.link_lookup(ifname="eth0")[0])[0],
                outside.get_links(index)[0],
            )
        ]
    number = int.from_bytes(ipaddress.ip_address(pod.address).packed, "little")
    address6, both = (
        ",".join(map(str, each)) for each in (ipaddress.ip_address(pod.address6).packed, b"".join(macs))
    )
    return f"{{ {number}u, {{ {address6} }}, {{ {both} }}, {index} }}"


def _devices() -> list[str]:
    return [name for _, name in socket.if_nameindex() if name.startswith(("lxc", "eth"))]


def _program(folder: Path, direction: str) -> Path:
    return folder / ("from_device" if direction == "ingress" else "pass")


def _attach_tcx(folder: Path) -> None:
    for device in _devices():
        for direction, hook in _HOOKS:
            with bpf.opened(_program(folder, direction)) as program:
                link = bpf.link_create(program, socket.if_nametoindex(device), hook)
                bpf.pin(link, folder / f"{device}-{direction}")


def _attach_filters(folder: Path) -> None:
    for device in _devices():
        subprocess.run(["tc", "qdisc", "replace", "dev", device, "clsact"], check=True)
        for direction, _ in _HOOKS:
            place = ["dev", device, direction, "prio", "1", "handle", "1"]
            program = ["bpf", "direct-action", "object-pinned", str(_program(folder, direction))]
            subprocess.run(["tc", "filter", "replace", *place, *program], check=True)


_OLD = ("--without", "tcx")
NETWORKS: list[Network] = [
    Cilium("Cilium's programs, tcx, attached before ours", tcx=True, late=False),
    Cilium("Cilium's programs, tcx, attached after ours", tcx=True, late=True),
    Cilium("Cilium's programs, tcx, host routing", tcx=True, late=False, peer=True),
    Cilium("Cilium's programs, clsact, ours tcx", tcx=False, late=False),
    Cilium("Cilium's programs, clsact, attached before ours", tcx=False, late=False, options=_OLD),
    Cilium("Cilium's programs, clsact, attached after ours", tcx=False, late=True, options=_OLD),
]
