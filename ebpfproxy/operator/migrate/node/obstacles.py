"""Finds others that translate Services: they block a migration, or behave differently after it."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path

import msgspec
from pyroute2 import IPRoute

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.operator.migrate.node import early_filters, iptables, running_kube_proxy


class Severity(enum.StrEnum):
    BLOCKS = "blocks"
    WARNS = "warns"


class Conflict(msgspec.Struct, frozen=True):
    """A finding, and what to do about it."""

    severity: Severity
    what: str
    advice: str
    consequence: str = "both translate, and which one does depends on the path of a connection"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about this node. ``pins`` are paths below the bpffs, ``saved`` each iptables-save's output.

    ``tables`` are what nft printed of tables that may filter before NAT.
    """

    pins: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    saved: dict[str, str] = {}
    tables: dict[str, str] = {}
    #: These are names of processes in all network namespaces that /proc shows.
    processes: frozenset[str] = frozenset()


_KUBE_ROUTER_DEVICE = "kube-dummy-if"
_FOLDERS = ("tc/globals", "cilium/socketlb/links/cgroup", "")


def bpffs_of(path: Path) -> Path:
    """Returns the mount point of the bpffs that a path is on; in a container it may not be /sys/fs/bpf."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    while path.parent != path and path.parent.stat().st_dev == path.stat().st_dev:
        path = path.parent
    return path


def look(bpffs: Path = BPFFS, proc: Path = Path("/proc")) -> Facts:
    """Raises ToolError."""
    pins = {
        f"{folder}/{path.name}".lstrip("/")
        for folder in _FOLDERS
        if (bpffs / folder).is_dir()
        for path in (bpffs / folder).iterdir()
    }
    with IPRoute() as routes:
        devices = {str(link.get_attr("IFLA_IFNAME")) for link in routes.get_links()}
    return Facts(
        pins=frozenset(pins),
        devices=frozenset(devices),
        saved={tool.name: tool.saved() for tool in iptables.installed()},
        tables=early_filters.tables(),
        processes=frozenset(_processes(proc)),
    )


def _processes(proc: Path) -> Iterable[str]:
    for folder in proc.iterdir():
        try:
            if folder.name.isdigit():
                yield running_kube_proxy.name_of(folder)
        except OSError:
            continue


def find(facts: Facts) -> list[Conflict]:
    """Decides from the facts."""
    return [*_proxies(facts), *_istio(facts), *_forwarding(facts), *_early_filters(facts)]


def _proxies(facts: Facts) -> Iterable[Conflict]:
    """Others that translate at the socket, or every packet: two of them fight for each connection.

    Cilium pins links below cilium/socketlb. Its maps are below tc/globals: those of Services also where it
    leaves all but its own pods' to kube-proxy, that of neighbours only with NodePorts (bpf/lib/neigh.h).
    Calico: felix/bpf/nat.
    """
    if any(pin.startswith("cilium/socketlb/links/") for pin in facts.pins):
        yield Conflict(
            Severity.BLOCKS,
            "Cilium translates Services at the socket (links below /sys/fs/bpf/cilium/socketlb)",
            "keep Cilium's, or set kubeProxyReplacement=false, socketLB.enabled=false and restart its agent",
        )
    elif any(pin.startswith("tc/globals/cilium_nodeport_neigh") for pin in facts.pins):
        yield Conflict(
            Severity.BLOCKS,
            "Cilium translates NodePorts (maps /sys/fs/bpf/tc/globals/cilium_nodeport_neigh*)",
            "keep Cilium's; where it no longer runs, remove its pins: cilium-dbg post-uninstall-cleanup",
        )
    elif any(pin.startswith(("tc/globals/cilium_lb4", "tc/globals/cilium_lb6")) for pin in facts.pins):
        yield Conflict(
            Severity.WARNS,
            "Cilium translates what its own pods send to cluster IPs, packet by packet (maps"
            " /sys/fs/bpf/tc/globals/cilium_lb*): with pods' sockets translated nothing is left for it",
            "go on where kubeProxyReplacement is false; keep Cilium's where it is true",
        )
    if any(pin.startswith(("tc/globals/cali_v4_nat_fe", "tc/globals/cali_v6_nat_fe")) for pin in facts.pins):
        yield Conflict(
            Severity.BLOCKS,
            "Calico's eBPF mode translates Services (maps /sys/fs/bpf/tc/globals/cali_v*_nat_fe*)",
            "keep Calico's, or set bpfEnabled: false in its FelixConfiguration",
        )
    if _KUBE_ROUTER_DEVICE in facts.devices:
        yield Conflict(
            Severity.BLOCKS,
            f"kube-router translates Services (device {_KUBE_ROUTER_DEVICE})",
            "run it with --run-service-proxy=false",
        )


def _istio(facts: Facts) -> Iterable[Conflict]:
    chains = sorted(
        {
            chain
            for saved in facts.saved.values()
            for table in iptables.parse(saved)
            for chain in table.policies
            if chain.startswith("ISTIO_")
        }
    )
    if chains:
        yield Conflict(
            Severity.WARNS,
            f"Istio redirects on this node (chains {', '.join(chains)}): translated sockets show it backends'"
            " addresses, not Services'",
            "run the agent with --no-pod-sockets (podSockets: false)",
        )
    if sidecars := facts.processes & {"pilot-agent", "ztunnel"}:
        yield Conflict(
            Severity.WARNS,
            f"Istio runs in pods here ({', '.join(sorted(sidecars))}): it would see backends' addresses where"
            " applications asked Services, and route by address instead of by Service",
            "run the agent with --no-pod-sockets (podSockets: false)",
        )


def _forwarding(facts: Facts) -> Iterable[Conflict]:
    """KUBE-FORWARD accepts what is forwarded for Services: with a policy that drops, somebody else must."""
    for tool, saved in facts.saved.items():
        for table in iptables.parse(saved):
            if table.name != "filter" or table.policies.get("FORWARD") != "DROP":
                continue
            others = [t for rule in table.rules["FORWARD"] if (t := iptables.target(rule))]
            if not any(t == "ACCEPT" or not iptables.is_kube_proxys("filter", t) for t in others):
                yield Conflict(
                    Severity.BLOCKS,
                    f"{tool}: the policy of FORWARD is DROP, and only kube-proxy's rules accept anything",
                    f"{tool} -P FORWARD ACCEPT, or rules of your own for pods",
                )
            elif "KUBE-FORWARD" in others:
                yield Conflict(
                    Severity.WARNS,
                    f"{tool}: the policy of FORWARD is DROP: what KUBE-FORWARD accepted, others must accept",
                    "check that a rule accepts packets from and to pods",
                )


def _early_filters(facts: Facts) -> Iterable[Conflict]:
    """They stop to hold for Services when kube-proxy is gone, and nobody would notice."""
    found = [
        f"{tool}, table {table}"
        for tool, saved in facts.saved.items()
        for table in early_filters.of_iptables(saved)
    ]
    found += [
        f"nftables, table {name}"
        for name, listed in facts.tables.items()
        if early_filters.of_nftables(listed)
    ]
    for where in found:
        yield Conflict(
            Severity.WARNS,
            f"{where}: rules drop packets by their destination before NAT (as Calico's with preDNAT do)",
            "restrict Services by loadBalancerSourceRanges, nodePortAddresses, or rules for pods in FORWARD",
            "they see the backend's address and port instead of a NodePort, and let pass what they dropped",
        )
