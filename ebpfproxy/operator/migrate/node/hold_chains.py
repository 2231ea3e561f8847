"""Keeps netfilter translating kube-proxy's connections after its rules are gone.

An established connection needs no rule: conntrack's entry says how it is translated. But conntrack and NAT
run in a network namespace only while a rule or a chain there asks for them (nf_ct_netns_put() and
nf_nat_unregister_fn() in net/netfilter/nf_conntrack_proto.c and nf_nat_core.c). Where kube-proxy's were the
last, removing them breaks every connection that went through a Service: so it is where nftables mode was
alone on a node (tests/operator/migrate/test_handover.py). A NAT chain of our own asks for NAT, and its one
rule, which does nothing, for conntrack; only the first packet of a flow passes it. Without nft it is a chain
of iptables that nothing leads to: there the table, which stays, asks for NAT.
"""

from __future__ import annotations

from ebpfproxy.operator.migrate.node import iptables, nftables, tools

NAME = "ebpfproxy-handover"
CHAIN = "EBPFPROXY-HANDOVER"

_FAMILIES = ("ip", "ip6")
_TABLE = """table %s %s {
    comment "keeps connections that kube-proxy began"
    chain established {
        type nat hook postrouting priority 300; policy accept;
        ct state new continue
    }
}
"""
_SCRIPT = f"*nat\n:{CHAIN} - [0:0]\n-A {CHAIN} -m conntrack --ctstate NEW -j RETURN\nCOMMIT\n"


def keep() -> list[str]:
    """Creates the chains and returns their names. Doing it again changes nothing. Raises ToolError."""
    if tools.has("nft"):
        tools.run("nft", "-f", "-", stdin="".join(_TABLE % (family, NAME) for family in _FAMILIES))
        return [f"nftables table {family} {NAME}" for family in _FAMILIES]
    made = []
    for tool in iptables.installed():
        if any(table.name == "nat" for table in iptables.parse(tool.saved())):
            tool.apply(_SCRIPT)
            made.append(f"{tool.name} chain {CHAIN} of table nat")
    return made


def find() -> list[str]:
    """Returns what :func:`keep` created and is still there. Raises ToolError."""
    found = []
    if tools.has("nft"):
        there = nftables.names(tools.run("nft", "-j", "list", "tables"))
        found += [f"nftables table {f} {NAME}" for f in _FAMILIES if f"{f} {NAME}" in there]
    for tool in iptables.installed():
        if tool.has_chain("nat", CHAIN):
            found.append(f"{tool.name} chain {CHAIN} of table nat")
    return found


def end() -> list[str]:
    """Removes them and returns their names. Flows that still need them break. Raises ToolError."""
    ended = find()
    if tables := [each.removeprefix("nftables table ") for each in ended if each.startswith("nftables")]:
        nftables.remove(tuple(tables))
    for tool in iptables.installed():
        if any(each.startswith(f"{tool.name} chain") for each in ended):
            tool.apply(f"*nat\n:{CHAIN} - [0:0]\n-X {CHAIN}\nCOMMIT\n")
    return ended


def is_handover() -> bool:
    """True if connections of kube-proxy may be here: its chains or tables are, or those of :func:`keep`.

    It is quick where there are 100,000 rules, too: iptables-save names the chains first. Raises ToolError.
    """
    if tools.has("nft"):
        there = nftables.names(tools.run("nft", "-j", "list", "tables"))
        if there & {f"{family} {name}" for family in _FAMILIES for name in (NAME, nftables.NAME)}:
            return True
    return any(tool.has_chain("nat", "KUBE-SERVICES", CHAIN) for tool in iptables.installed())
