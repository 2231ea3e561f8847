"""IPVS services, sets and rules of kube-proxy in IPVS mode, loaded by ipvsadm, ipset and iptables.

They follow syncProxyRules, writeIptablesRules, iptablesJumpChain and ipsetInfo in pkg/proxy/ipvs/proxier.go of
kubernetes/kubernetes 1.33. kube-proxy creates all sets and chains, even empty ones.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

DEVICE = "kube-ipvs0"
_PERSISTENT = 10800

#: The kernel's set type, by name without the prefix ``KUBE-``.
SETS = {
    "LOOP-BACK": "hash:ip,port,ip",
    "CLUSTER-IP": "hash:ip,port",
    "EXTERNAL-IP": "hash:ip,port",
    "EXTERNAL-IP-LOCAL": "hash:ip,port",
    "LOAD-BALANCER": "hash:ip,port",
    "LOAD-BALANCER-FW": "hash:ip,port",
    "LOAD-BALANCER-LOCAL": "hash:ip,port",
    "LOAD-BALANCER-SOURCE-IP": "hash:ip,port,ip",
    "LOAD-BALANCER-SOURCE-CIDR": "hash:ip,port,net",
    "NODE-PORT-TCP": "bitmap:port",
    "NODE-PORT-LOCAL-TCP": "bitmap:port",
    "NODE-PORT-UDP": "bitmap:port",
    "NODE-PORT-LOCAL-UDP": "bitmap:port",
    "NODE-PORT-SCTP-HASH": "hash:ip,port",
    "NODE-PORT-LOCAL-SCTP-HASH": "hash:ip,port",
    "HEALTH-CHECK-NODE-PORT": "bitmap:port",
    "IPVS-IPS": "hash:ip",
}
#: Table, built-in chain, target and comment of each jump. Later ones are inserted in front of earlier ones.
_JUMPS = (
    ("nat", "OUTPUT", "KUBE-SERVICES", "kubernetes service portals"),
    ("nat", "PREROUTING", "KUBE-SERVICES", "kubernetes service portals"),
    ("nat", "POSTROUTING", "KUBE-POSTROUTING", "kubernetes postrouting rules"),
    ("filter", "FORWARD", "KUBE-FORWARD", "kubernetes forwarding rules"),
    ("filter", "INPUT", "KUBE-NODE-PORT", "kubernetes health check rules"),
    ("filter", "INPUT", "KUBE-PROXY-FIREWALL", "kube-proxy firewall rules"),
    ("filter", "FORWARD", "KUBE-PROXY-FIREWALL", "kube-proxy firewall rules"),
    ("filter", "INPUT", "KUBE-IPVS-FILTER", "kubernetes ipvs access filter"),
    ("filter", "OUTPUT", "KUBE-IPVS-OUT-FILTER", "kubernetes ipvs access filter"),
)
_CHAINS = {
    "nat": ("KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-NODE-PORT", "KUBE-LOAD-BALANCER", "KUBE-MARK-MASQ"),
    "filter": (
        "KUBE-FORWARD",
        "KUBE-NODE-PORT",
        "KUBE-PROXY-FIREWALL",
        "KUBE-SOURCE-RANGES-FIREWALL",
        "KUBE-IPVS-FILTER",
        "KUBE-IPVS-OUT-FILTER",
    ),
}


class VirtualService(NamedTuple):
    """A virtual service of IPVS. ``set`` is a key of SETS; a ``bound`` address is assigned to kube-ipvs0."""

    set: str
    address: str
    port: int
    protocol: str
    endpoints: tuple[tuple[str, int], ...]
    bound: bool = True
    persistent: bool = False

    @property
    def is_v6(self) -> bool:
        return ":" in self.address


def set_name(name: str, is_v6: bool) -> str:
    return f"KUBE-6-{name}"[:31] if is_v6 else f"KUBE-{name}"


def load(services: Iterable[VirtualService], pods: dict[bool, str], backend: str) -> None:
    """Adds the services to this network namespace as kube-proxy's first sync does.

    ``pods`` has the cluster CIDR by family (the key is true for IPv6); ``backend`` is ``legacy`` or ``nft``.
    """
    found = list(services)
    for name in ("conntrack", "expire_nodest_conn", "expire_quiescent_template"):
        Path("/proc/sys/net/ipv4/vs", name).write_text("1")
    if DEVICE not in {name for _, name in socket.if_nameindex()}:
        _run(["ip", "link", "add", DEVICE, "type", "dummy"])
    for address in dict.fromkeys(each.address for each in found if each.bound):
        _run(["ip", "address", "replace", address, "dev", DEVICE])
    saved = _run(["ipvsadm", "--save", "--numeric"]).splitlines()
    existing = {" ".join(line.split()[1:3]) for line in saved if line.startswith("-A")}
    new = [each for each in found if _service_option(each) not in existing]
    _run(["ipvsadm", "--restore"], "".join(_service_lines(new)))
    for is_v6 in (False, True):
        entries = _entries([each for each in found if each.is_v6 is is_v6])
        _run(["ipset", "restore", "-exist"], "".join(_set_lines(entries, is_v6)))
        family = "ip6tables" if is_v6 else "iptables"
        _run(
            [f"{family}-{backend}-restore", "--noflush", "--counters"],
            "".join(_tables({name for name, some in entries.items() if some}, is_v6, pods[is_v6])),
        )


def join_host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _service_option(service: VirtualService) -> str:
    return f"-{service.protocol[0]} {join_host_port(service.address, service.port)}"


def _service_lines(services: Iterable[VirtualService]) -> Iterator[str]:
    for each in services:
        option = _service_option(each)
        persistence = f" -p {_PERSISTENT}" if each.persistent else ""
        yield f"-A {option} -s rr{persistence}\n"
        for endpoint in each.endpoints:
            yield f"-a {option} -r {join_host_port(*endpoint)} -m -w 1\n"


def _entries(services: list[VirtualService]) -> dict[str, set[str]]:
    entries: dict[str, set[str]] = {name: set() for name in SETS}
    for each in services:
        if each.set.startswith("NODE-PORT"):
            entries[each.set].add(str(each.port))
        else:
            entries[each.set].add(f"{each.address},{each.protocol}:{each.port}")
        if each.bound:
            entries["IPVS-IPS"].add(each.address)
        entries["LOOP-BACK"] |= {f"{ip},{each.protocol}:{port},{ip}" for ip, port in each.endpoints}
    return entries


def _set_lines(entries: dict[str, set[str]], is_v6: bool) -> Iterator[str]:
    for name, kind in SETS.items():
        family = "inet6" if is_v6 else "inet"
        options = "range 0-65535" if kind == "bitmap:port" else f"family {family} hashsize 1024 maxelem 65536"
        yield f"create {set_name(name, is_v6)} {kind} {options}\n"
        for entry in sorted(entries[name]):
            yield f"add {set_name(name, is_v6)} {entry}\n"


def _tables(filled: set[str], is_v6: bool, pods: str) -> Iterator[str]:
    def match(name: str, directions: str) -> str:
        return f'-m comment --comment "Kubernetes {name}" -m set --match-set {set_name(name, is_v6)} {directions}'

    def rule(chain: str, name: str, directions: str, rest: str) -> Iterator[str]:
        if name in filled:
            yield f"-A {chain} {match(name, directions)} {rest}\n"

    for table, chains in _CHAINS.items():
        yield f"*{table}\n"
        yield from (f":{chain} - [0:0]\n" for chain in chains)
        for owner, chain, target, comment in _JUMPS:
            if owner == table:
                yield f'-I {chain} -m comment --comment "{comment}" -j {target}\n'
        if table == "nat":
            yield f"-A KUBE-SERVICES -s {'::1/128' if is_v6 else '127.0.0.0/8'} -j RETURN\n"
            yield from rule("KUBE-POSTROUTING", "LOOP-BACK", "dst,dst,src", "-j MASQUERADE")
            yield from rule("KUBE-SERVICES", "LOAD-BALANCER", "dst,dst", "-j KUBE-LOAD-BALANCER")
            for protocol in ("tcp", "udp"):
                name = f"NODE-PORT-{protocol.upper()}"
                yield from rule(f"KUBE-NODE-PORT -p {protocol}", name, "dst", "-j KUBE-MARK-MASQ")
            yield from rule("KUBE-SERVICES", "CLUSTER-IP", "dst,dst", f"! -s {pods} -j KUBE-MARK-MASQ")
            yield from rule("KUBE-SERVICES", "EXTERNAL-IP", "dst,dst", "-j KUBE-MARK-MASQ")
            local = "-m addrtype --dst-type LOCAL -j ACCEPT"
            yield from rule("KUBE-SERVICES", "EXTERNAL-IP", "dst,dst", local)
            yield "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT\n"
            yield "-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ\n"
            for name in ("CLUSTER-IP", "LOAD-BALANCER"):
                yield from rule("KUBE-SERVICES", name, "dst,dst", "-j ACCEPT")
            yield "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n"
            yield "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n"
            yield (
                '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT"'
                " -j MASQUERADE --random-fully\n"
            )
            yield "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n"
        else:
            yield "-A KUBE-SOURCE-RANGES-FIREWALL -j DROP\n"
            yield (
                '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules"'
                " -m mark --mark 0x4000/0x4000 -j ACCEPT\n"
            )
            yield (
                '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule"'
                " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
            )
            yield f"-A KUBE-NODE-PORT {match('HEALTH-CHECK-NODE-PORT', 'dst')} -j ACCEPT\n"
            for name in ("LOAD-BALANCER", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL"):
                yield f"-A KUBE-IPVS-FILTER {match(name, 'dst,dst')} -j RETURN\n"
            yield f"-A KUBE-IPVS-FILTER {match('HEALTH-CHECK-NODE-PORT', 'dst')} -j RETURN\n"
            yield (
                "-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW"
                f" -m set --match-set {set_name('IPVS-IPS', is_v6)} dst -j REJECT\n"
            )
        yield "COMMIT\n"


def _run(command: list[str], stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}\n{stdin}"
    return done.stdout
