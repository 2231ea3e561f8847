"""kube-proxy's nftables mode: its two tables hold everything, sets and maps included.

kubernetes/kubernetes pkg/proxy/nftables/cleanup.go deletes the same tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from ebpfproxy.operator.migrate.node import tools
from ebpfproxy.operator.migrate.node.tools import ToolError

NAME = "kube-proxy"
_FAMILIES = ("ip", "ip6")


def names(listed: str) -> set[str]:
    """Returns tables, as ``ip kube-proxy``, of what ``nft -j list tables`` or ``list ruleset`` printed.

    Raises ToolError.
    """
    try:
        tables = [each["table"] for each in json.loads(listed)["nftables"] if "table" in each]
        return {f"{table['family']} {table['name']}" for table in tables}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ToolError(f"nft printed no list of tables: {error!r}") from error


def plan(listed: str) -> tuple[str, ...]:
    """Returns the tables to delete."""
    there = names(listed)
    return tuple(name for family in _FAMILIES if (name := f"{family} {NAME}") in there)


def find() -> tuple[str, ...]:
    """Returns kube-proxy's tables; none without nft. Raises ToolError."""
    return plan(tools.run("nft", "-j", "list", "tables")) if tools.has("nft") else ()


def remove(tables: Iterable[str]) -> None:
    """Deletes all of them in one transaction. Raises ToolError."""
    tools.run("nft", "-f", "-", stdin="".join(f"delete table {name}\n" for name in tables))
