"""Calico's networks (without its BPF data plane), as its CNI plugin and Felix leave them on a node.

Taken from Calico's main branch of 2026-08-22. Pods: cni-plugin/pkg/dataplane/linux/dataplane_linux.go (a veth with the
link address ee:ee:ee:ee:ee:ee, the next hop 169.254.1.1 that nobody has, proxy ARP and NDP, IPv6's next hop is
link-local) and felix/dataplane/linux/endpoint_mgr.go (strict rp_filter, route_localnet). Routes and tunnels:
felix/dataplane/linux/{route,vxlan,noencap}_mgr.go: blocks of other nodes through their VTEP, or from BGP through the node,
and a blackhole for the own block. Rules: felix/rules/{static,dispatch,endpoints,policy,nat}.go; they have the same
meaning for iptables and for nftables, whose table is felix/nftables/{table,match_builder,actions}.go's. IPIP needs a device
that not every kernel has: :mod:`tests.cnis.tunnels`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from tests.cnis.network import CLUSTER_CIDRS, FAMILIES, SERVICE_CIDRS, Network, ip, load, sysctl
from tests.cnis.vxlan import Vxlan
from tests.lab import LabNode, Pod

#: Felix takes these bits of its default IptablesMarkMask, 0xffff0000.
_ACCEPT, _PASS, _FROM_WORKLOAD, _SCRATCH = 0x10000, 0x20000, 0x40000, 0x80000
_VXLAN_PORT = 4789
_HOST_MAC, _LINK_LOCAL = "ee:ee:ee:ee:ee:ee", "fe80::ecee:eeff:feee:eeee"


@dataclass(frozen=True)
class Policy:
    """A policy of one pod: the CIDRs or addresses of both families that packets may come from, or go to."""

    pod: str
    ingress: tuple[str, ...] | None = None
    egress: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Rule:
    """One rule of Felix; a mark matches where all of its bits are set, or none."""

    action: str
    chain: str = ""
    bits: int = 0
    iif: str = ""
    oif: str = ""
    marked: int = 0
    unmarked: int = 0
    state: str = ""
    udp_port: int = 0
    protocol: int = 0
    source: str = ""
    destination: str = ""
    not_destination: str = ""
    spoofed: bool = False
    other_local_source: bool = False


@dataclass
class Chains:
    """The chains of one of iptables' tables; those without a hook are jumped to."""

    hooks: dict[str, list[Rule]] = field(default_factory=dict)
    others: dict[str, list[Rule]] = field(default_factory=dict)


def _block(node: LabNode, family: str) -> str:
    """The block of addresses that the node has taken from the pool."""
    return f"10.244.{node.number}.0/26" if family == "IPv4" else f"fd00:10:244:{node.number}::/122"


def _vtep(node: LabNode, family: str) -> str:
    return f"10.244.{node.number}.63" if family == "IPv4" else f"fd00:10:244:{node.number}::3f"


def _mac(node: LabNode, family: str) -> str:
    return f"66:{family[-1]}0:00:00:00:{node.number:02x}"


_VXLAN = Vxlan(
    devices={"IPv4": "vxlan.calico", "IPv6": "vxlan-v6.calico"},
    number=4096,
    port=_VXLAN_PORT,
    mac=_mac,
    address=_vtep,
    block=_block,
    protocol="80",
)


def _device(pod: Pod) -> str:
    return f"cali{pod.name}"


class Calico(Network):
    def __init__(self, title: str, *, vxlan: bool, nftables: bool, policies: Iterable[Policy] = ()) -> None:
        super().__init__(title)
        self._vxlan, self._nftables = vxlan, nftables
        self.policies = tuple(policies)
        # Without a tunnel BGP brings the same routes.
        self.routes_pods = not vxlan

    def prepare(self, node: LabNode) -> None:
        ip(
            node,
            f"route add blackhole {_block(node, 'IPv4')} proto 80",
            f"-6 route add blackhole {_block(node, 'IPv6')} proto 80",
        )
        if self._vxlan:
            _VXLAN.add_devices(node)

    def connect(self, node: LabNode, name: str) -> Pod:
        pod = node.bare_pod(name)
        device = _device(pod)
        ip(
            node,
            f"link add {device} type veth peer name eth0 netns {pod.netns}",
            f"link set {device} address {_HOST_MAC} mtu {1430 if self._vxlan else 1500}",
        )
        for version in ("ipv4", "ipv6"):
            sysctl(node, **{f"{version}__conf__{device}__forwarding": 1})
        sysctl(
            node,
            **{
                f"ipv4__conf__{device}__route_localnet": 1,
                f"ipv4__neigh__{device}__proxy_delay": 0,
                f"ipv4__conf__{device}__proxy_arp": 1,
                f"ipv4__conf__{device}__rp_filter": 1,
                f"ipv6__conf__{device}__proxy_ndp": 1,
                f"ipv6__conf__{device}__accept_dad": 0,
                f"ipv6__conf__{device}__accept_ra": 0,
            },
        )
        ip(node, f"link set {device} up")
        ip(
            pod,
            f"link set eth0 mtu {1430 if self._vxlan else 1500} up",
            "route add 169.254.1.1 dev eth0 scope link",
            f"address add {pod.address}/32 dev eth0",
            f"address add {pod.address6}/128 dev eth0 nodad",
            "route add default via 169.254.1.1 dev eth0",
            f"-6 route add default via {_LINK_LOCAL} dev eth0",
        )
        ip(
            node,
            f"route add {pod.address} dev {device} scope link",
            f"-6 route add {pod.address6} dev {device}",
        )
        return pod

    def join(self, node: LabNode, other: LabNode) -> None:
        if self._vxlan:
            _VXLAN.reach(node, other)

    def finish(self, node: LabNode) -> None:
        for family in FAMILIES:
            tables = self._tables(node, family)
            if self._nftables:
                load(node, ["nft", "-f", "-"], _as_nft(tables, family))
            else:
                command = "iptables-restore" if family == "IPv4" else "ip6tables-restore"
                load(node, [command, "--noflush"], _as_iptables(tables))

    # -- rules

    def _tables(self, node: LabNode, family: str) -> dict[str, Chains]:
        return {
            "raw": self._raw(),
            "mangle": _mangle(),
            "nat": self._nat(family),
            "filter": self._filter(node, family),
        }

    def _raw(self) -> Chains:
        rules = [Rule("clear", bits=_ACCEPT | _PASS | _FROM_WORKLOAD | _SCRATCH)]
        if self._vxlan:
            rules.append(Rule("notrack", udp_port=_VXLAN_PORT))
        rules += [
            Rule("mark", bits=_FROM_WORKLOAD, iif="cali"),
            Rule("drop", marked=_FROM_WORKLOAD, spoofed=True),
            Rule("accept", marked=_ACCEPT),
        ]
        return Chains({"PREROUTING": [Rule("jump", "cali-PREROUTING")]}, {"cali-PREROUTING": rules})

    def _nat(self, family: str) -> Chains:
        cluster = CLUSTER_CIDRS[family]
        rules = [Rule("masquerade", source=cluster, not_destination=cluster)]
        if self._vxlan:
            device = _VXLAN.devices[family]
            rules.append(Rule("masquerade", oif=device, other_local_source=True))
        return Chains({"POSTROUTING": [Rule("jump", "cali-POSTROUTING")]}, {"cali-POSTROUTING": rules})

    def _filter(self, node: LabNode, family: str) -> Chains:
        others = {
            "cali-FORWARD": [
                Rule("clear", bits=_PASS | _FROM_WORKLOAD | _SCRATCH),
                Rule("jump", "cali-from-wl-dispatch", iif="cali"),
                Rule("jump", "cali-to-wl-dispatch", oif="cali"),
                Rule("jump", "cali-cidr-block"),
            ],
            "cali-INPUT": [Rule("goto", "cali-wl-to-host", iif="cali")],
            "cali-wl-to-host": [
                *(Rule("accept", protocol=58) for _ in range(family == "IPv6")),
                Rule("jump", "cali-from-wl-dispatch"),
                Rule("accept"),
            ],
            # Felix drops packets to the Service network that would be routed on (ServiceLoopPrevention).
            "cali-cidr-block": [Rule("drop", destination=SERVICE_CIDRS[family])],
            "cali-from-wl-dispatch": [],
            "cali-to-wl-dispatch": [],
            "cali-pro": [Rule("mark", bits=_ACCEPT), Rule("return", marked=_ACCEPT)],
        }
        for pod in node.pods:
            device = _device(pod)
            others["cali-from-wl-dispatch"].append(Rule("goto", f"cali-fw-{device}", iif=device))
            others["cali-to-wl-dispatch"].append(Rule("goto", f"cali-tw-{device}", oif=device))
            policy = next((each for each in self.policies if each.pod == pod.name), Policy(pod.name))
            no_tunnels = [Rule("drop", udp_port=_VXLAN_PORT), Rule("drop", protocol=4)]
            others |= _endpoint(f"cali-fw-{device}", f"cali-po-{pod.name}", policy.egress, family, no_tunnels)
            others |= _endpoint(f"cali-tw-{device}", f"cali-pi-{pod.name}", policy.ingress, family, [])
        # An unknown pod has no policy yet.
        others["cali-from-wl-dispatch"].append(Rule("drop"))
        others["cali-to-wl-dispatch"].append(Rule("drop"))
        forward = [
            Rule("jump", "cali-FORWARD"),
            Rule("accept", marked=_ACCEPT),
            Rule("mark", bits=_ACCEPT),
        ]
        return Chains({"INPUT": [Rule("jump", "cali-INPUT")], "FORWARD": forward}, others)


def _mangle() -> Chains:
    others = {
        "cali-PREROUTING": [Rule("accept", state="established"), Rule("accept", marked=_ACCEPT)],
        "cali-POSTROUTING": [
            Rule("return", marked=_ACCEPT),
            Rule("clear", bits=_ACCEPT | _PASS | _FROM_WORKLOAD | _SCRATCH),
        ],
    }
    hooks = {hook: [Rule("jump", f"cali-{hook}")] for hook in ("PREROUTING", "POSTROUTING")}
    return Chains(hooks, others)


def _endpoint(
    name: str, policy: str, allowed: tuple[str, ...] | None, family: str, first: list[Rule]
) -> dict[str, list[Rule]]:
    """The chain of one direction of a pod, and that of its policy."""
    side = "destination" if name.startswith("cali-fw-") else "source"
    rules = [
        Rule("accept", state="established"),
        Rule("drop", state="invalid"),
        Rule("clear", bits=_ACCEPT | _PASS),
        *first,
    ]
    made: dict[str, list[Rule]] = {}
    if allowed is not None:
        made[policy] = [
            Rule(
                "mark",
                bits=_ACCEPT,
                source=cidr if side == "source" else "",
                destination=cidr if side != "source" else "",
            )
            for cidr in allowed
            if (":" in cidr) == (family == "IPv6")
        ]
        rules += [
            Rule("clear", bits=_PASS),
            Rule("jump", policy, unmarked=_PASS),
            Rule("return", marked=_ACCEPT),
            Rule("drop", unmarked=_PASS),
        ]
    return {**made, name: [*rules, Rule("jump", "cali-pro"), Rule("return", marked=_ACCEPT), Rule("drop")]}


def _wild(prefix: str, star: str) -> str:
    """Matches all pods' devices by their prefix; other names are whole."""
    return prefix + star if prefix == "cali" else prefix


def _as_iptables(tables: dict[str, Chains]) -> str:
    lines = []
    for table, chains in tables.items():
        lines += [f"*{table}", *(f":{name} - [0:0]" for name in chains.others)]
        for name, rules in chain(chains.hooks.items(), chains.others.items()):
            lines += [f"-A {name} {_iptables_rule(rule)}" for rule in rules]
        lines.append("COMMIT")
    return "\n".join([*lines, ""])


def _iptables_rule(rule: Rule) -> str:
    state = {"established": "RELATED,ESTABLISHED", "invalid": "INVALID"}.get(rule.state)
    others = "-m addrtype ! --src-type LOCAL --limit-iface-out -m addrtype --src-type LOCAL"
    bits = f"{rule.bits:#x}"
    parts = [
        rule.iif and f"-i {_wild(rule.iif, '+')}",
        rule.oif and f"-o {_wild(rule.oif, '+')}",
        rule.marked and f"-m mark --mark {rule.marked:#x}/{rule.marked:#x}",
        rule.unmarked and f"-m mark --mark 0x0/{rule.unmarked:#x}",
        state and f"-m conntrack --ctstate {state}",
        rule.udp_port and f"-p udp -m multiport --dports {rule.udp_port}",
        rule.protocol and f"-p {rule.protocol}",
        rule.source and f"-s {rule.source}",
        rule.destination and f"-d {rule.destination}",
        rule.not_destination and f"! -d {rule.not_destination}",
        rule.spoofed and "-m rpfilter --validmark --invert",
        rule.other_local_source and others,
        {
            "accept": "-j ACCEPT",
            "drop": "-j DROP",
            "return": "-j RETURN",
            "jump": f"-j {rule.chain}",
            "goto": f"-g {rule.chain}",
            "mark": f"-j MARK --set-xmark {bits}/{bits}",
            "clear": f"-j MARK --set-xmark 0x0/{bits}",
            "masquerade": "-j MASQUERADE --random-fully",
            "notrack": "-j NOTRACK",
        }[rule.action],
    ]
    return " ".join(str(part) for part in parts if part)


#: Type and priority of base chains by table; that of route is of output alone.
_NFT_HOOKS = {
    "raw": "type filter hook {} priority raw;",
    "mangle": "type filter hook {} priority mangle;",
    "nat": "type nat hook {} priority srcnat + 10;",
    "filter": "type filter hook {} priority filter;",
}


def _as_nft(tables: dict[str, Chains], family: str) -> str:
    word = "ip" if family == "IPv4" else "ip6"
    # Chains that are jumped to have to be there before.
    heads, bodies = [], []
    for table, chains in tables.items():
        heads += [f"  chain {table}-{name} {{ }}" for name in chains.others]
        for name, rules in chain(chains.hooks.items(), chains.others.items()):
            hook = _NFT_HOOKS[table].format(name.lower()) if name in chains.hooks else ""
            body = "\n".join(f"    {_nft_rule(rule, table, word)}" for rule in rules)
            bodies.append(f"  chain {table}-{name} {{\n    {hook}\n{body}\n  }}")
    return "\n".join([f"table {word} calico {{", *heads, *bodies, "}", ""])


def _nft_rule(rule: Rule, table: str, word: str) -> str:
    state = {"established": "established,related", "invalid": "invalid"}.get(rule.state)
    everything = 0xFFFFFFFF
    parts = [
        rule.iif and f'iifname "{_wild(rule.iif, "*")}"',
        rule.oif and f'oifname "{_wild(rule.oif, "*")}"',
        rule.marked and f"meta mark & {rule.marked:#x} == {rule.marked:#x}",
        rule.unmarked and f"meta mark & {rule.unmarked:#x} == 0",
        state and f"ct state {state}",
        rule.udp_port and f"udp dport {rule.udp_port}",
        rule.protocol and f"meta l4proto {rule.protocol}",
        rule.source and f"{word} saddr {rule.source}",
        rule.destination and f"{word} daddr {rule.destination}",
        rule.not_destination and f"{word} daddr != {rule.not_destination}",
        rule.spoofed and "fib saddr . mark . iif oif 0",
        rule.other_local_source and "fib saddr . oif type != local fib saddr type local",
        {
            "accept": "accept",
            "drop": "drop",
            "return": "return",
            "jump": f"jump {table}-{rule.chain}",
            "goto": f"goto {table}-{rule.chain}",
            "mark": f"meta mark set mark or {rule.bits:#x}",
            "clear": f"meta mark set mark & {everything & ~rule.bits:#x}",
            "masquerade": "masquerade fully-random",
            "notrack": "notrack",
        }[rule.action],
    ]
    return " ".join(str(part) for part in parts if part)


NETWORKS: list[Network] = [
    Calico("Calico, VXLAN, iptables", vxlan=True, nftables=False),
    Calico("Calico, VXLAN, nftables", vxlan=True, nftables=True),
    Calico("Calico, BGP, iptables", vxlan=False, nftables=False),
    Calico("Calico, BGP, nftables", vxlan=False, nftables=True),
]
