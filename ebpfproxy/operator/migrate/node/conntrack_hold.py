"""All that is kept for kube-proxy's connections: chains for netfilter's, and virtual servers for IPVS'."""

from __future__ import annotations

from pyroute2.netlink.exceptions import NetlinkError

from ebpfproxy.operator.migrate.node import hold_chains, ipvs, tools


def find() -> list[str]:
    """Returns what is kept, in words. Raises ToolError."""
    return [*hold_chains.find(), *filter(None, [ipvs.find_kept()])]


def end() -> list[str]:
    """Removes it and returns what there was. Flows that still need it break. Raises ToolError."""
    kept = ipvs.find_kept()
    ended = hold_chains.end()
    try:
        ipvs.end_kept()
    except NetlinkError as error:
        raise tools.ToolError(f"IPVS: {error}") from error
    return [*ended, *filter(None, [kept])]
