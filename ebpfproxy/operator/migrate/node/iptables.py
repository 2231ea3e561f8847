"""kube-proxy's chains in iptables: found in what ``iptables-save`` prints, removed by ``iptables-restore``.

Names: kubernetes/kubernetes pkg/proxy/iptables/proxier.go and cleanup.go, pkg/proxy/ipvs/proxier.go and
cleanup.go, pkg/kubelet/kubelet_network_linux.go. Three ways differ from kube-proxy's own ``--cleanup``:

- both backends are cleaned, and what iptables mode and IPVS mode of any version left;
- a chain that somebody else's rule jumps to stays, with all that it leads to, where kube-proxy's clean-up
  fails as a whole;
- jumps and chains of a table go in one transaction.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator

import msgspec

from ebpfproxy.operator.migrate.node import tools

#: Names of these chains end with a hash. KUBE-EXT- was KUBE-XLB- before 1.24.
_PREFIXES = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-", "KUBE-XLB-")
_MARK, _MASQUERADE = "KUBE-MARK-MASQ", "KUBE-POSTROUTING"
_CANARY = "KUBE-PROXY-CANARY"

#: KUBE-FIREWALL of the table nat was IPVS mode's (before 1.26); the one in filter is kubelet's, as are those
#: that are not named here: KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT, KUBE-MARK-DROP.
_CHAINS = {
    "nat": frozenset(
        {
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            _MASQUERADE,
            _MARK,
            _CANARY,
            "KUBE-NODE-PORT",
            "KUBE-LOAD-BALANCER",
            "KUBE-FIREWALL",
        }
    ),
    "filter": frozenset(
        {
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-FORWARD",
            "KUBE-PROXY-FIREWALL",
            _CANARY,
            "KUBE-NODE-PORT",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
        }
    ),
    "mangle": frozenset({_CANARY}),
}

#: iptables-save quotes with double quotes and escapes by backslashes.
_WORD = re.compile(r'"(?:\\.|[^"\\])*"|\S+')
_COUNTERS = re.compile(r"^\[\d+:\d+\] ")
#: How many characters of a wrong line are shown.
_SHOWN = 80


def is_kube_proxys(table: str, chain: str) -> bool:
    return chain in _CHAINS.get(table, ()) or (table == "nat" and chain.startswith(_PREFIXES))


class Table(msgspec.Struct, frozen=True):
    """A table as iptables-save prints it: rules as ``-A CHAIN …``, in order, by chain."""

    name: str
    #: Chain and policy; ``-`` for all but built-in chains.
    policies: dict[str, str]
    rules: dict[str, list[str]]

    def is_built_in(self, chain: str) -> bool:
        return self.policies.get(chain) != "-"


def parse(saved: str) -> list[Table]:
    """Returns the tables of an ``iptables-save``, with or without ``-c``. Raises ToolError."""
    tables: list[Table] = []
    # Only a line feed ends a line: comments may have whatever else str.splitlines() takes for an end.
    for line in saved.split("\n"):
        try:
            _parse_line(line, tables)
        except (LookupError, ValueError) as error:
            raise tools.ToolError(f"iptables-save printed a line {line[:_SHOWN]!r}") from error
    return tables


def _parse_line(line: str, tables: list[Table]) -> None:
    if line.startswith("*"):
        tables.append(Table(line[1:].strip(), {}, {}))
    elif line.startswith(":"):
        chain, policy = line[1:].split(" ")[:2]
        tables[-1].policies[chain] = policy
        tables[-1].rules[chain] = []
    elif (rule := _COUNTERS.sub("", line)).startswith("-A "):
        tables[-1].rules.setdefault(rule.split(" ", 2)[1], []).append(rule)


def words(rule: str) -> list[str]:
    """Splits a rule. Quoted words keep their quotes, so that a comment is never taken for an option."""
    return _WORD.findall(rule)


def target(rule: str) -> str:
    """Returns the chain or target that the rule jumps or goes to; empty where it does neither."""
    found = words(rule)
    for at, word in enumerate(found[:-1]):
        # A comment of one word is not quoted.
        if word in ("-j", "-g") and found[at - 1] != "--comment":
            return found[at + 1]
    return ""


class Kept(msgspec.Struct, frozen=True):
    """A chain of kube-proxy that stays."""

    chain: str
    because: str


class TablePlan(msgspec.Struct, frozen=True):
    """What is to be removed from one table."""

    table: str
    chains: tuple[str, ...]
    #: These rules of built-in chains are as iptables-save prints them.
    jumps: tuple[str, ...]
    #: The number of rules in the chains.
    rules: int
    kept: tuple[Kept, ...] = ()

    def script(self) -> str:
        """Returns input for ``iptables-restore --noflush``: named chains are emptied, all others stay."""
        return "\n".join(
            [
                f"*{self.table}",
                *(f":{chain} - [0:0]" for chain in self.chains),
                *(f"-D {jump.removeprefix('-A ')}" for jump in self.jumps),
                *(f"-X {chain}" for chain in self.chains),
                "COMMIT\n",
            ]
        )


def plan(saved: str) -> list[TablePlan]:
    """Plans, from what ``iptables-save`` printed, the removal of kube-proxy's chains and of nothing else."""
    return [made for table in parse(saved) if (made := _plan_table(table)) is not None]


def _plan_table(table: Table) -> TablePlan | None:
    ours = {chain for chain in table.policies if is_kube_proxys(table.name, chain)}
    if not ours:
        return None
    kept = _kept(table, ours)
    gone = [chain for chain in table.policies if chain in ours and chain not in kept]
    removed = frozenset(gone)
    jumps = [
        rule
        for chain, rules in table.rules.items()
        if table.is_built_in(chain)
        for rule in rules
        if target(rule) in removed
    ]
    if not gone:
        return None
    return TablePlan(
        table.name,
        tuple(gone),
        tuple(jumps),
        sum(len(table.rules[chain]) for chain in gone),
        tuple(Kept(chain, because) for chain, because in sorted(kept.items())),
    )


def _kept(table: Table, ours: set[str]) -> dict[str, str]:
    """Returns the chains that others' chains lead to, and why each stays.

    CRI-O's and dockershim's host ports (KUBE-HOSTPORTS) mark packets by KUBE-MARK-MASQ: then what masquerades
    marked packets stays as well.
    """
    kept: dict[str, str] = {}
    waiting: list[tuple[str, str]] = []
    for chain, rules in table.rules.items():
        if chain not in ours and not table.is_built_in(chain):
            waiting += [(found, f"{chain} jumps to it") for r in rules if (found := target(r)) in ours]
    while waiting:
        chain, because = waiting.pop()
        if chain in kept:
            continue
        kept[chain] = because
        waiting += [(t, f"{chain} jumps to it") for r in table.rules[chain] if (t := target(r)) in ours]
        if chain == _MARK and _MASQUERADE in ours:
            waiting.append((_MASQUERADE, f"it masquerades what {_MARK} marks"))
    return kept


def built_in(saved: str) -> list[str]:
    """Returns the lines of built-in chains: their policies and counters."""
    return [line for line in saved.split("\n") if line.startswith(":") and line.split(" ")[1:2] != ["-"]]


class Tool(msgspec.Struct, frozen=True, order=True):
    """One family of one backend, by the names of its two programs."""

    name: str
    save: str
    restore: str

    @property
    def is_ipv6(self) -> bool:
        return self.name.startswith("ip6tables")

    def saved(self, *arguments: str) -> str:
        """Reads existing tables and creates none. Raises ToolError."""
        return tools.run(self.save, *arguments)

    def has_chain(self, table: str, *chains: str) -> bool:
        """True if the table has any of them. Reads names of chains only, and creates no table."""
        begin = tuple(f":{chain} " for chain in chains)
        with subprocess.Popen(
            [self.save],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="surrogateescape",
        ) as p:
            assert p.stdout is not None
            inside = found = False
            for line in p.stdout:
                if line.startswith("*"):
                    inside = line[1:].strip() == table
                elif inside and not line.startswith(":"):
                    break
                elif inside and line.startswith(begin):
                    found = True
                    break
            p.kill()
        return found

    def apply(self, script: str) -> None:
        """Changes one table. Raises ToolError; then nothing of it was changed.

        The legacy backend replaces the table as a whole and keeps the counters of rules, but not those of
        built-in chains' policies: they are named with what they have counted up to now.
        """
        first, rest = script.split("\n", 1)
        if "nf_tables" not in tools.run(self.save, "--version"):
            first = "\n".join([first, *built_in(self.saved("--counters", "--table", first[1:]))])
        tools.run(self.restore, "--noflush", "--counters", "--wait", "30", stdin=f"{first}\n{rest}")


def installed() -> list[Tool]:
    """Returns the backends of this host. Both may hold rules, whichever ``iptables`` is."""
    return [tool for family in ("iptables", "ip6tables") for tool in _of(family)]


def _of(family: str) -> Iterator[Tool]:
    found = [f"{family}-{backend}" for backend in ("legacy", "nft")]
    found = [name for name in found if tools.has(f"{name}-save") and tools.has(f"{name}-restore")]
    if not found and tools.has(f"{family}-save"):
        found = [family]
    for name in found:
        yield Tool(name, f"{name}-save", f"{name}-restore")


def count(plans: Iterable[TablePlan]) -> tuple[int, int]:
    """Counts chains, and rules with the jumps."""
    found = list(plans)
    return sum(len(p.chains) for p in found), sum(p.rules + len(p.jumps) for p in found)
