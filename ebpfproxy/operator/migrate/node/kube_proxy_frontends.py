"""The frontends that kube-proxy serves, and their endpoints, read from its rules in any mode.

The agent's maps are compared with them before kube-proxy is stopped: it watched the same API by itself.
Frontends are named as ``service list`` names them, ``10.96.0.10:53/UDP``; a NodePort is one in each family,
``0.0.0.0:30080/TCP`` and ``[::]:30080/TCP``, since modes differ in the addresses that they answer on.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ebpfproxy.datapath.dump import FrontendRow
from ebpfproxy.operator.migrate.node import iptables
from ebpfproxy.operator.migrate.node.ipvs import VirtualServer
from ebpfproxy.operator.migrate.node.tools import ToolError

#: The endpoints of each frontend; they are empty where connections are refused.
Frontends = dict[str, frozenset[str]]

_SERVICE = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-")
_ENDPOINT = "KUBE-SEP-"
_NODE_PORT = "NodePort"
#: NodePorts have these as addresses.
_ANY4, _ANY6 = "0.0.0.0", "::"


def name(address: str, port: int | str, protocol: str) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{port}/{protocol.upper()}"


def node_port(port: int | str, protocol: str, *, is_ipv6: bool) -> str:
    return name(_ANY6 if is_ipv6 else _ANY4, port, protocol)


# -- iptables


def _words(rule: str) -> dict[str, str]:
    """Returns a rule's options, each with the word after it; a ``!`` before it becomes part of the value."""
    words = iptables.words(rule)
    return {
        word: f"! {after}" if words[at - 1] == "!" else after
        for at, (word, after) in enumerate(itertools.pairwise(words))
        if word.startswith("-")
    }


class _Chains:
    def __init__(self, table: iptables.Table) -> None:
        self._rules = table.rules
        self._known: Frontends = {}

    def endpoints(self, chain: str) -> frozenset[str]:
        """Returns all endpoints that a chain leads to, by either policy."""
        if chain in self._known:
            return self._known[chain]
        self._known[chain] = frozenset()  # chains do not lead back; should they, this ends it
        found: set[str] = set()
        for rule in self._rules.get(chain, ()):
            target = iptables.target(rule)
            if target == "DNAT":
                found.add(_words(rule)["--to-destination"])
            elif target.startswith((*_SERVICE, _ENDPOINT)):
                found |= self.endpoints(target)
        self._known[chain] = frozenset(found)
        return self._known[chain]


def of_iptables(saved: str, *, is_ipv6: bool = False) -> Frontends:
    """Reads one ``iptables-save``, or ``ip6tables-save``. Raises ToolError."""
    try:
        return _of_tables(iptables.parse(saved), is_ipv6=is_ipv6)
    except (LookupError, RecursionError) as error:
        raise ToolError(f"iptables-save printed a rule that is not understood: {error!r}") from error


def _of_tables(tables: Iterable[iptables.Table], *, is_ipv6: bool) -> Frontends:
    found: Frontends = {}
    for table in tables:
        chains = _Chains(table)
        for chain, is_node_port in (
            ("KUBE-SERVICES", False),
            ("KUBE-EXTERNAL-SERVICES", False),
            ("KUBE-NODEPORTS", True),
        ):
            for rule in table.rules.get(chain, ()):
                target = iptables.target(rule)
                if target not in ("REJECT", "DROP") and not target.startswith(_SERVICE):
                    continue
                words = _words(rule)
                address = words.get("-d", "").partition("/")[0]
                if "--dport" not in words or address.startswith("127."):
                    continue
                port, protocol = words["--dport"], words["-p"]
                if is_node_port or not address:
                    key = node_port(port, protocol, is_ipv6=is_ipv6)
                else:
                    key = name(address, port, protocol)
                found[key] = found.get(key, frozenset()) | chains.endpoints(target)
    return found


# -- nftables


def of_nftables(listed: str) -> Frontends:
    """Reads ``nft -j list ruleset``, or ``list table`` of one of kube-proxy's. Raises ToolError."""
    try:
        return _of_objects(json.loads(listed)["nftables"])
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise ToolError(f"nft printed rules that are not understood: {error!r}") from error


def _of_objects(objects: Iterable[dict[str, Any]]) -> Frontends:
    found: Frontends = {}
    for family in ("ip", "ip6"):
        maps: dict[str, list[Any]] = {}
        leads: dict[str, set[str]] = {}
        for each in objects:
            ((kind, body),) = each.items()
            if body.get("family") != family:
                continue
            if kind == "map" and body["table"] == "kube-proxy":
                maps[body["name"]] = body.get("elem", [])
            elif kind == "rule" and body["table"] == "kube-proxy":
                leads.setdefault(body["chain"], set()).update(_leads(body["expr"]))
        for map_name in ("service-ips", "service-nodeports", "no-endpoint-services", "no-endpoint-nodeports"):
            for key, verdict in maps.get(map_name, ()):
                parts = _concat(key)
                if len(parts) == 3:
                    shown = name(*parts)
                else:
                    shown = node_port(parts[1], parts[0], is_ipv6=family == "ip6")
                target = str(next(iter(verdict.values()))["target"]) if isinstance(verdict, dict) else ""
                found[shown] = found.get(shown, frozenset()) | _reached(leads, target)
    return found


def _concat(key: Any) -> tuple[str, ...]:
    """``10.96.0.1, 443, tcp``, or ``tcp, 30080``."""
    value = key["elem"]["val"] if "elem" in key else key
    parts = [str(part) for part in value["concat"]]
    return (parts[0], parts[2], parts[1]) if len(parts) == 3 else tuple(parts)


def _leads(value: Any) -> Iterable[str]:
    """Chains that expressions lead to, and endpoints that they translate to."""
    if isinstance(value, list):
        for each in value:
            yield from _leads(each)
    elif isinstance(value, dict):
        for key, inside in value.items():
            if key in ("goto", "jump"):
                yield str(inside["target"])
            elif key == "dnat":
                yield from _destinations(inside)
            else:
                yield from _leads(inside)


def _destinations(dnat: dict[str, Any]) -> Iterable[str]:
    address = dnat["addr"]
    if isinstance(address, str):
        yield _endpoint(address, dnat["port"])
        return
    for _, to in address["map"]["data"]["set"]:
        yield _endpoint(*to["concat"])


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _reached(leads: Mapping[str, set[str]], chain: str) -> frozenset[str]:
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [chain]
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        for to in leads.get(at, ()):
            if re.fullmatch(r"(\[[0-9a-f:.]+\]|[\d.]+):\d+", to):
                found.add(to)
            else:
                waiting.append(to)
    return frozenset(found)


# -- IPVS


def of_ipvs(servers: Iterable[VirtualServer]) -> Frontends:
    """Reads kube-proxy's virtual servers, which exist without endpoints, too."""
    found: Frontends = {}
    for each in servers:
        if each.is_node_port:
            key = node_port(each.port, each.protocol, is_ipv6=":" in each.address)
        else:
            key = name(each.address, each.port, each.protocol)
        found[key] = found.get(key, frozenset()) | frozenset(each.endpoints)
    return found


# -- the agent's maps


def of_maps(rows: Iterable[FrontendRow]) -> Frontends:
    """Returns all endpoints of either scope, without draining ones."""
    found: dict[str, set[str]] = {}
    for row in rows:
        shown = row.frontend
        if row.type == _NODE_PORT:
            address, _, rest = row.frontend.rpartition(":")
            shown = node_port(*rest.split("/"), is_ipv6=":" in address)
        found.setdefault(shown, set()).update(backend.address for backend in row.backends)
    return {frontend: frozenset(backends) for frontend, backends in found.items()}


def normal(found: Frontends) -> Frontends:
    """Writes addresses in one way, so that both sides can be compared."""
    return {_normal(key): frozenset(map(_normal, values)) for key, values in found.items()}


def _normal(text: str) -> str:
    match = re.fullmatch(r"\[([^\]]+)\](.*)", text)
    try:
        return f"[{ipaddress.ip_address(match[1])}]{match[2]}" if match else text
    except ValueError:
        return text


def unserved(ours: Frontends, theirs: Frontends) -> list[str]:
    """Returns frontends of the maps that kube-proxy does not serve. It may know fewer endpoints, by its
    policies, and a NodePort in one family alone, by the addresses of the node.
    """
    served = _in_any_family(normal(theirs))
    return sorted(
        frontend
        for frontend, endpoints in normal(ours).items()
        if (key := _familyless(frontend)) not in served or (endpoints and not served[key])
    )


def _in_any_family(found: Frontends) -> Frontends:
    merged: Frontends = {}
    for frontend, endpoints in found.items():
        key = _familyless(frontend)
        merged[key] = merged.get(key, frozenset()) | endpoints
    return merged


def _familyless(frontend: str) -> str:
    """The same for a NodePort in both families."""
    address, _, rest = frontend.rpartition(":")
    return f"*:{rest}" if address.strip("[]") in (_ANY4, _ANY6) else frontend


def missing(theirs: Frontends, ours: Frontends) -> dict[str, str]:
    """Returns, by frontend, what kube-proxy serves and the maps do not, or with other endpoints."""
    ours, found = normal(ours), {}
    for frontend, endpoints in sorted(normal(theirs).items()):
        if frontend not in ours:
            found[frontend] = "is not in the maps"
        elif extra := endpoints - ours[frontend]:
            found[frontend] = f"kube-proxy also sends to {', '.join(sorted(extra))}"
    return found
