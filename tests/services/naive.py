"""A second implementation of kube-proxy's rules, slow and from plain objects.

It shares no code with ``ebpfproxy.services``, so that equal results show equal reading of the rules.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, NamedTuple

Object = dict[str, Any]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
#: Service, port name, kind, scope, frontend.
Row = tuple[str, str, str, str, str]
#: Service, port name, protocol, IP version.
PortRow = tuple[str, str, str, int]
#: These are drain requests: address, and port or 0 for all ports.
DrainRequest = tuple[str, int]


class Table(NamedTuple):
    """Backends of each frontend in each scope, ``dropped`` or ``rejected``, and the settings of each port."""

    rows: dict[Row, frozenset[str] | str]
    draining: dict[PortRow, frozenset[str]]
    drained: dict[PortRow, frozenset[str]]
    weights: dict[PortRow, dict[str, int]]
    algorithms: dict[PortRow, str]


_PROTOCOLS = ("TCP", "UDP", "SCTP")
#: These are those of ipvsadm(8) and our own.
_ALGORITHMS = {
    "random": "",
    "round-robin": "rr wrr",
    "least-connections": "lc wlc lblc lblcr twos",
    "shortest-expected-delay": "sed",
    "never-queue": "nq",
    "source-hash": "sh",
    "destination-hash": "dh",
    "maglev": "mh",
}
_ANY = {4: ipaddress.ip_address("0.0.0.0"), 6: ipaddress.ip_address("::")}


def address_of(text: str, *, of_endpoint: bool = False) -> Address | None:
    parts = [part.lstrip("0") or part[-1:] for part in re.split(r"([.:])", text)]
    try:
        found = ipaddress.ip_address("".join(parts))
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and (found.scope_id is not None or found.ipv4_mapped):
        return None
    special = found.is_unspecified or found.is_link_local or found.is_multicast
    special = special or (found.is_loopback and not of_endpoint)
    return None if special or str(found) == "255.255.255.255" else found


def _show(address: Address, port: int) -> str:
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def _labels(each: Object) -> dict[str, Any]:
    return {
        name: value for name, value in (each["metadata"].get("labels") or {}).items() if value is not None
    }


def _is_ours(service: Object) -> bool:
    return "service.kubernetes.io/service-proxy-name" not in _labels(service)


def _is_headless(piece: Object) -> bool:
    return "service.kubernetes.io/headless" in _labels(piece)


def _full_name(each: Object) -> str:
    return f"{each['metadata']['namespace']}/{each['metadata']['name']}"


def _ports(service: Object) -> list[tuple[str, int, str, int]]:
    """Yields name, port, protocol and nodePort (0: none) of usable ports."""
    found: list[tuple[str, int, str, int]] = []
    for port in service["spec"].get("ports") or []:
        name, number, protocol = port.get("name", ""), port["port"], port.get("protocol", "TCP")
        known = [(n, (p, proto)) for n, p, proto, _ in found]
        if protocol not in _PROTOCOLS or not 1 <= number <= 65535 or len(name.encode()) > 63:
            continue
        if any(name == n or (number, protocol) == p for n, p in known):
            continue
        node_port = port.get("nodePort") or 0
        taken = any((node_port, protocol) == (n, proto) for _, _, proto, n in found)
        found.append((name, number, protocol, node_port if 1 <= node_port <= 65535 and not taken else 0))
    return found


def _addresses(service: Object) -> list[tuple[str, Address]]:
    spec, status = service["spec"], service.get("status") or {}
    cluster_ips = spec.get("clusterIPs") or [spec.get("clusterIP") or "None"]
    if spec.get("type") == "ExternalName" or cluster_ips[0] == "None" or not _is_ours(service):
        return []
    named = [("ClusterIP", text) for text in cluster_ips]
    for ingress in (status.get("loadBalancer") or {}).get("ingress") or []:
        if ingress.get("ip") and ingress.get("ipMode") in (None, "VIP"):
            named.append(("LoadBalancer", ingress["ip"]))
    named += [("ExternalIP", text) for text in spec.get("externalIPs") or []]
    parsed = [(kind, address) for kind, text in named if (address := address_of(text)) is not None]
    versions = {address.version for kind, address in parsed if kind == "ClusterIP"}
    found: list[tuple[str, Address]] = []
    for kind, address in parsed:
        if address.version in versions and address not in [a for _, a in found]:
            found.append((kind, address))
    return found


def _endpoints(
    service: Object, name: str, protocol: str, version: int, slices: list[Object]
) -> dict[str, Object]:
    """Returns endpoints by address and port: ready, serving-terminating, node, zones, nodes."""
    listed: dict[str, list[Object]] = {}
    for piece in slices:
        owner = _labels(piece).get("kubernetes.io/service-name")
        if _is_headless(piece) or f"{piece['metadata']['namespace']}/{owner}" != _full_name(service):
            continue
        if piece["addressType"] != f"IPv{version}":
            continue
        for port in piece.get("ports") or []:
            if ((port.get("name") or ""), (port.get("protocol") or "TCP")) != (name, protocol):
                continue
            if port.get("port") is None or not 1 <= port["port"] <= 65535:
                continue
            for endpoint in piece.get("endpoints") or []:
                address = address_of((endpoint.get("addresses") or [""])[0], of_endpoint=True)
                if address is None or address.version != version:
                    continue
                conditions, hints = endpoint.get("conditions") or {}, endpoint.get("hints") or {}
                ready = conditions.get("ready") is not False
                serving = conditions.get("serving") is not False
                new = {
                    "ready": ready,
                    "leaving": not ready and serving and bool(conditions.get("terminating")),
                    "terminating": bool(conditions.get("terminating")),
                    "on": {endpoint.get("nodeName")},
                    "zones": [zone["name"] for zone in hints.get("forZones") or []],
                    "nodes": [node["name"] for node in hints.get("forNodes") or []],
                    "node": endpoint.get("nodeName") or "",
                    "zone": endpoint.get("zone") or "",
                    "address": address,
                    "port": port["port"],
                }
                listed.setdefault(_show(address, port["port"]), []).append(new)
    found: dict[str, Object] = {}
    for shown, same in listed.items():
        staying = [e for e in same if not e["terminating"]] or same
        ranks = ("ready", "leaving", "zones", "nodes", "node", "zone")
        best = max(staying, key=lambda e: [e[k] for k in ranks])
        if best["ready"] or best["leaving"]:
            found[shown] = {**best, "on": set().union(*(e["on"] for e in staying))}
    return found


def _annotation(service: Object, name: str) -> str:
    return (service["metadata"].get("annotations") or {}).get(f"ebpfproxy.io/{name}") or ""


def _algorithm(service: Object) -> str:
    """The default of the cluster is random."""
    named = _annotation(service, "lb-algorithm").strip().lower()
    return next((ours for ours, ipvs in _ALGORITHMS.items() if named in (ours, *ipvs.split())), "random")


def _weight(service: Object, endpoint: Object) -> int:
    """The first kind of key that matches the endpoint decides, and of that kind the last entry."""
    parts = re.findall(
        r"(?:^|(?<=[\s,]))([^\s,]+)=0*(\d{1,5})(?=[\s,]|$)", _annotation(service, "weights"), re.A
    )
    known = [(key, int(weight)) for key, weight in parts if int(weight) <= 65535]
    for kind in ("address", "node", "zone", "*"):
        found = [weight for key, weight in known if _names(key, kind, endpoint)]
        if found:
            return found[-1]
    return 1


def _names(key: str, kind: str, endpoint: Object) -> bool:
    if kind == "address":
        try:
            return bool(ipaddress.ip_address(key) == endpoint["address"])
        except ValueError:
            return False
    if kind == "*":
        return key == "*"
    return bool(endpoint[kind]) and key == f"{kind}/{endpoint[kind]}"


def _is_drained(service: Object, endpoint: Object, requests: frozenset[DrainRequest]) -> bool:
    """Returns True if it is drained by request or has weight 0."""
    address = str(endpoint["address"])
    return not requests.isdisjoint({(address, 0), (address, endpoint["port"])}) or not _weight(
        service, endpoint
    )


def _cluster(endpoints: dict[str, Object], node_name: str, zone: str | None) -> set[str]:
    ready = {name: e for name, e in endpoints.items() if e["ready"]}
    for hint, here in (("nodes", node_name), ("zones", zone)):
        chosen = {name for name, e in ready.items() if here is not None and here in e[hint]}
        if chosen and all(e[hint] for e in ready.values()):
            return chosen
    return set(ready) or {name for name, e in endpoints.items() if e["leaving"]}


def _local(endpoints: dict[str, Object], node_name: str) -> set[str]:
    here = {name: e for name, e in endpoints.items() if node_name in e["on"]}
    return {name for name, e in here.items() if e["ready"]} or {
        name for name, e in here.items() if e["leaving"]
    }


def table(
    services: list[Object],
    slices: list[Object],
    nodes: list[Object],
    node_name: str,
    requests: frozenset[DrainRequest] = frozenset(),
) -> Table:
    """Returns the result of the rules for these objects and drain ``requests``."""
    zones = [
        _labels(n).get("topology.kubernetes.io/zone") for n in nodes if n["metadata"]["name"] == node_name
    ]
    zone = (zones[0] if zones else None) or None
    found = Table({}, {}, {}, {}, {})
    claimed: set[tuple[Address, int, str]] = set()
    by_age = sorted(
        services, key=lambda s: (s["metadata"].get("creationTimestamp") or "", _full_name(s).split("/"))
    )
    for service in by_age:
        spec, addresses = service["spec"], _addresses(service)
        for name, number, protocol, node_port in _ports(service):
            for version in sorted({a.version for kind, a in addresses}):
                frontends = [(kind, a, number) for kind, a in addresses if a.version == version]
                if node_port and spec.get("type") in ("NodePort", "LoadBalancer"):
                    frontends.append(("NodePort", _ANY[version], node_port))
                frontends = [f for f in frontends if (f[1], f[2], protocol) not in claimed]
                claimed |= {(address, port, protocol) for _, address, port in frontends}
                if not frontends:
                    continue
                serving = _endpoints(service, name, protocol, version, slices)
                endpoints = {n: e for n, e in serving.items() if not _is_drained(service, e, requests)}
                cluster, local = _cluster(endpoints, node_name, zone), _local(endpoints, node_name)
                leaving = {e for e, traits in endpoints.items() if traits["leaving"]}
                key = _full_name(service), name, protocol, version
                weights = {n: _weight(service, endpoints[n]) for n in cluster | local}
                found.draining[key] = frozenset(leaving - cluster - local)
                found.drained[key] = frozenset(serving.keys() - endpoints.keys())
                found.weights[key] = {n: weight for n, weight in weights.items() if weight != 1}
                found.algorithms[key] = _algorithm(service)
                for kind, address, port in frontends:
                    for scope in ("internal", "external"):
                        policy = "Cluster"
                        if kind == "ClusterIP":
                            policy = spec.get("internalTrafficPolicy") or "Cluster"
                        elif scope == "external":
                            is_external = spec.get("type", "ClusterIP") != "ClusterIP" or spec.get(
                                "externalIPs"
                            )
                            policy = (is_external and spec.get("externalTrafficPolicy")) or "Cluster"
                        used: frozenset[str] | str = frozenset(local if policy == "Local" else cluster)
                        if not used:
                            used = "dropped" if cluster else "rejected"
                        frontend = f"{_show(address, port)}/{protocol}"
                        found.rows[_full_name(service), name, kind, scope, frontend] = used
    return found
