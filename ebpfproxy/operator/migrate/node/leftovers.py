"""Finds all that kube-proxy leaves on a node, in any mode, and removes it in an order that works.

What is not kube-proxy's alone stays: sysctls (route_localnet, conntrack's limits, arp_ignore and
arp_announce of IPVS mode), kernel modules, kubelet's chains.
"""

from __future__ import annotations

import msgspec
from pyroute2.netlink.exceptions import NetlinkError

from ebpfproxy.netlink import ctnetlink
from ebpfproxy.operator.migrate.node import hold_chains, ipsets, ipvs, nfacct, nftables, tools
from ebpfproxy.operator.migrate.node import iptables as xtables
from ebpfproxy.operator.migrate.node.iptables import TablePlan


class InIptables(msgspec.Struct, frozen=True):
    """What one family of one backend holds."""

    tool: str
    tables: tuple[TablePlan, ...]


class Leftovers(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. The JSON of ``ebpfproxy migrate plan``: these names stay."""

    iptables: tuple[InIptables, ...] = ()
    #: Their names are like ``ip kube-proxy``.
    nftables: tuple[str, ...] = ()
    ipsets: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    ipvs: tuple[ipvs.VirtualServer, ...] = ()
    ipvs_device: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        """Returns the modes that left something; IPVS mode leaves iptables rules, too."""
        chains = {chain for found in self.iptables for table in found.tables for chain in table.chains}
        found = []
        if self.ipvs or self.ipvs_device or self.ipsets:
            found.append("ipvs")
        elif chains - {"KUBE-PROXY-CANARY"}:
            found.append("iptables")
        if self.nftables:
            found.append("nftables")
        return tuple(found)

    def __bool__(self) -> bool:
        return self != Leftovers()


class Removed(msgspec.Struct, frozen=True):
    """What was done, and what could not be, each in a line."""

    done: tuple[str, ...]
    failed: tuple[str, ...]


def find() -> Leftovers:
    """Changes nothing. Raises ToolError."""
    in_iptables = []
    for tool in xtables.installed():
        if tables := xtables.plan(tool.saved()):
            in_iptables.append(InIptables(tool.name, tuple(tables)))
    device = ipvs.device()
    # What is kept for connections is reported by conntrack_hold.
    has_ipvs = device is None or not device.is_kept
    return Leftovers(
        iptables=tuple(in_iptables),
        nftables=nftables.find(),
        ipsets=ipsets.find() if has_ipvs else (),
        accounts=nfacct.find(),
        ipvs=tuple(ipvs.serving()),
        ipvs_device=device is not None and has_ipvs,
    )


def remove(found: Leftovers) -> Removed:
    """Goes on where something cannot be removed. Connections of kube-proxy are kept.

    Rules go before what they refer to: sets and counters. See :mod:`hold_chains` for what is made first,
    and :mod:`ipvs` for what stays for IPVS's.
    """
    done: list[str] = []
    failed: list[str] = []
    if (found.iptables or found.nftables) and ctnetlink.find():
        # Where this fails nothing is removed, since connections would break.
        done += [f"made {each}" for each in hold_chains.keep()]
    by_name = {tool.name: tool for tool in xtables.installed()}
    for each in found.iptables:
        for table in each.tables:
            try:
                by_name[each.tool].apply(table.script())
            except tools.ToolError as error:
                failed.append(f"{each.tool}, table {table.table}: {error}")
            else:
                chains, rules = xtables.count([table])
                done.append(
                    f"removed {chains} chains and {rules} rules from {each.tool}, table {table.table}"
                )
    if found.nftables:
        try:
            nftables.remove(found.nftables)
        except tools.ToolError as error:
            failed.append(f"nftables: {error}")
        else:
            done += [f"removed nftables table {name}" for name in found.nftables]
    _remove_ipvs(found, done, failed)
    for name in found.accounts:
        try:
            nfacct.remove(name)
        except OSError as error:
            failed.append(f"counter {name}: {error.strerror}")
        else:
            done.append(f"removed counter {name}")
    return Removed(tuple(done), tuple(failed))


def _remove_ipvs(found: Leftovers, done: list[str], failed: list[str]) -> None:
    if not (found.ipvs or found.ipvs_device or found.ipsets):
        return
    device = ipvs.device()
    now = ipvs.servers(device)
    kept = ipvs.carrying(now, device) if device is not None else []
    gone = [each for each in now if each not in kept]
    if gone:
        try:
            ipvs.remove_servers(gone)
        except (NetlinkError, OSError) as error:
            failed.append(f"IPVS: {error}")
            return  # the device's addresses and the sets are the only way to tell whose they are
        done.append(f"removed {len(gone)} virtual servers from IPVS")
    if device is not None:
        _leave_device(device, kept, done, failed)
    for name in ipsets.find():
        if kept and name in ipsets.NAMING:
            continue
        try:
            ipsets.remove(name)
        except (NetlinkError, OSError) as error:
            failed.append(f"ipset {name}: {error}")
        else:
            done.append(f"removed ipset {name}")


def _leave_device(
    device: ipvs.Device, kept: list[ipvs.VirtualServer], done: list[str], failed: list[str]
) -> None:
    try:
        if kept:
            ipvs.keep_device(device, {each.address for each in kept})
            connections = sum(each.connections for each in kept)
            done.append(
                f"kept {len(kept)} virtual servers of IPVS and {ipvs.DEVICE} for {connections} connections"
            )
        else:
            ipvs.remove_device(device)
            done.append(f"removed device {ipvs.DEVICE}")
    except (NetlinkError, OSError) as error:
        failed.append(f"device {ipvs.DEVICE}: {error}")
