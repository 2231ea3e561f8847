"""Filters before NAT: rules that drop packets by the NodePort or the address that a client has asked.

With kube-proxy they see that, as its rules translate after them. Our programs translate before netfilter, so
that such rules see backends. Known are Calico's policies with ``preDNAT`` (its chains cali-fh-* of the table
mangle) and Talos' ingress firewall (chains of nftables).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ebpfproxy.operator.migrate.node import iptables, nftables, tools
from ebpfproxy.operator.migrate.node.tools import ToolError

_TABLES = ("raw", "mangle")
_NAMES_DESTINATION = frozenset(
    ("--dport", "--dports", "--destination-port", "--destination-ports", "--dst-type")
)
#: Packets that fit no connection or come from the wrong side, whatever they ask for.
_OF_ANY_DESTINATION = frozenset(("rpfilter", "INVALID"))
#: The priority of destination NAT, which rules of netfilter begin with.
_DSTNAT = -100
_FAMILIES = frozenset(("ip", "ip6", "inet"))


def _reachable(first: Iterable[str], targets: Callable[[str], Iterable[str]]) -> set[str]:
    """The chains that the ``first`` ones lead to, and these."""
    found: set[str] = set()
    waiting = list(first)
    while waiting:
        if (chain := waiting.pop()) not in found:
            found.add(chain)
            waiting += targets(chain)
    return found


def of_iptables(saved: str) -> list[str]:
    """The tables, as ``mangle``, of an ``iptables-save`` that filter so. Raises ToolError."""
    return [table.name for table in iptables.parse(saved) if table.name in _TABLES and _filters(table)]


def _filters(table: iptables.Table) -> bool:
    chains = _reachable(
        ("PREROUTING",), lambda chain: (iptables.target(rule) for rule in table.rules.get(chain, ()))
    )
    rules = [iptables.words(rule) for chain in chains for rule in table.rules.get(chain, ())]
    return any(_NAMES_DESTINATION.intersection(rule) for rule in rules) and any(
        "DROP" in rule and not _OF_ANY_DESTINATION.intersection(rule) for rule in rules
    )


def of_nftables(listed: str) -> bool:
    """Whether a table filters so, of which ``nft -j list table`` printed this. Raises ToolError."""
    try:
        objects = json.loads(listed)["nftables"]
        chains = [each["chain"] for each in objects if "chain" in each]
        rules: dict[str, list[Any]] = {}
        for each in objects:
            if "rule" in each:
                rules.setdefault(each["rule"]["chain"], []).append(each["rule"]["expr"])
        first = [chain for chain in chains if _is_early(chain)]
        names = _reachable((chain["name"] for chain in first), lambda n: _values(rules.get(n, []), "target"))
        reached = [rule for name in names for rule in rules.get(name, [])]
        drops = any(chain.get("policy") == "drop" for chain in first) or any(map(_drops, reached))
        return drops and "dport" in _values(reached, "field")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ToolError(f"nft printed no table: {error!r}") from error


def _drops(rule: Any) -> bool:
    """Whether a rule drops packets, but those that fit no connection or come from the wrong side."""
    if "invalid" in _values(rule, "right") or any("saddr" in flags for flags in _values(rule, "flags")):
        return False
    return any(True for key in ("drop", "reject") for _ in _values(rule, key))


def _is_early(chain: Mapping[str, Any]) -> bool:
    return chain.get("hook") == "prerouting" and chain.get("type") == "filter" and chain["prio"] < _DSTNAT


def _values(tree: Any, key: str) -> Iterator[Any]:
    """The values of a key, anywhere in JSON."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        tree = tree.values()
    elif not isinstance(tree, list):
        return
    for each in tree:
        yield from _values(each, key)


def tables() -> dict[str, str]:
    """What ``nft -j list table`` prints of the tables that may filter so, by family and name.

    iptables-save prints those that iptables has made. Raises ToolError.
    """
    if not tools.has("nft"):
        return {}
    listed = tools.run("nft", "-j", "list", "chains")
    try:
        chains = [each["chain"] for each in json.loads(listed)["nftables"] if "chain" in each]
        found = {
            f"{chain['family']} {chain['table']}"
            for chain in chains
            if _is_early(chain)
            and chain["family"] in _FAMILIES
            and chain["table"] not in (nftables.NAME, *_TABLES)
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ToolError(f"nft printed no list of chains: {error!r}") from error
    return {name: tools.run("nft", "-j", "-t", "list", "table", *name.split()) for name in sorted(found)}
