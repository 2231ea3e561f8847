"""Removal of a real kube-proxy's rules leaves rules of other programs unchanged, byte for byte."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute
from pyroute2.ipset import IPSet

from ebpfproxy.datapath.kernel.roots import find_cgroup_root
from ebpfproxy.netlink import ctnetlink
from ebpfproxy.operator.migrate.node import hold_chains, ipsets, iptables, ipvs, leftovers, nfacct
from tests.lab import Lab
from tests.lab.spaces import Space
from tests.operator.migrate import rules

pytestmark = pytest.mark.root

#: A careless clean-up would change its counters, quoting, order or names.
FOREIGN = """*nat
:PREROUTING ACCEPT [11:12]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [13:14]
:POSTROUTING ACCEPT [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:DOCKER - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
[1:2] -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
[3:4] -A PREROUTING -m addrtype --dst-type LOCAL -m comment --comment "portmap; -j KUBE-SERVICES" -j CNI-HOSTPORT-DNAT
[5:6] -A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"cbr0\\"" -m tcp --dport 8080 -j RETURN
COMMIT
*filter
:INPUT ACCEPT [21:22]
:FORWARD DROP [23:24]
:OUTPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-POD-FW-ABC - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
[31:32] -A INPUT -j KUBE-FIREWALL
[33:34] -A FORWARD -m comment --comment "kube-router netpol" -j KUBE-ROUTER-FORWARD
[35:36] -A OUTPUT -j KUBE-FIREWALL
[37:38] -A KUBE-FIREWALL -m comment --comment mine -j RETURN
[39:40] -A KUBE-ROUTER-FORWARD -j KUBE-POD-FW-ABC
[41:42] -A KUBE-POD-FW-ABC -m mark --mark 0x4000/0x4000 -j ACCEPT
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
[51:52] -A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
COMMIT
"""
FOREIGN_NFT = """
table inet firewalld {
    comment "kube-proxy"
    set kube-proxy { type ipv4_addr; elements = { 10.0.0.1, 10.0.0.2 } }
    chain kube-proxy { type filter hook input priority 10; policy accept; ip saddr @kube-proxy counter packets 61 bytes 62 accept; }
}
table bridge kube-proxy {
    chain mine { counter packets 63 bytes 64 accept; }
}
table ip kube-proxys {
    chain mine { counter packets 65 bytes 66 accept; }
}
"""


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _all_rules() -> dict[str, str]:
    found = {"nft": _run("nft", "list", "ruleset")}
    for tool in iptables.installed():
        found[tool.name] = "".join(
            line for line in tool.saved("-c").splitlines(keepends=True) if not line.startswith("#")
        )
    return found


def _load_foreign() -> dict[str, str]:
    for tool in iptables.installed():
        _run(tool.restore, "--counters", stdin=FOREIGN)
    _run("nft", "-f", "-", stdin=FOREIGN_NFT.replace("; }", "\n}").replace("{ type", "{\ntype"))
    return _all_rules()


@pytest.fixture
def node() -> Iterator[Space]:
    """A network namespace without devices, because rules would count packets of the kernel."""
    with Lab() as lab:
        name = f"{lab.id}-bare"
        lab.namespace(name).close()
        cgroup = find_cgroup_root() / lab.id / "bare"
        cgroup.mkdir(parents=True)
        yield Space(name, cgroup)


def _load_and_remove(*modes: str) -> tuple[leftovers.Leftovers, dict[str, str], list[str]]:
    for mode in modes:
        rules.load(mode, lab=False)
    for family in ("iptables", "ip6tables"):
        # Each change by iptables-legacy resets the counters of chain policies; this restores them after the load.
        for table in FOREIGN.split("COMMIT\n")[:-1]:
            policies = [
                line
                for line in table.splitlines()
                if line[0] == "*" or " ACCEPT [" in line or " DROP [" in line
            ]
            _run(
                f"{family}-legacy-restore",
                "--noflush",
                "--counters",
                stdin="\n".join([*policies, "COMMIT\n"]),
            )
    assert hold_chains.is_handover()
    found = leftovers.find()
    removed = leftovers.remove(found)
    assert removed.failed == ()
    assert not leftovers.find()
    assert not hold_chains.is_handover()
    assert nfacct.find() == ()
    return found, _all_rules(), list(removed.done)


@pytest.mark.parametrize("modes", [(mode,) for mode in rules.MODES] + [rules.MODES], ids="+".join)
def test_foreign_rules_are_unchanged_byte_for_byte(node: Space, modes: tuple[str, ...]) -> None:
    before = node.call(_load_foreign)
    assert "[41:42] -A KUBE-POD-FW-ABC" in before["iptables-legacy"]
    assert "packets 63 bytes 64" in before["nft"]
    found, after, done = node.call(_load_and_remove, *modes)
    assert after == before
    backends = {each.tool for each in found.iptables}
    assert backends == {m.replace("ip", f, 1) for m in modes if m != "nftables" for f in ("ip", "ip6")}
    assert found.nftables == (("ip kube-proxy", "ip6 kube-proxy") if "nftables" in modes else ())
    assert found.modes == tuple(dict.fromkeys(m.partition("-")[0] for m in modes))
    assert any("43 chains and 116 rules" in line for line in done) == bool(backends)
    assert not any("handover" in line for line in done), "the node has no connection to keep"


def _remove_with_a_foreign_jump() -> tuple[list[str], str, tuple[str, ...]]:
    """Removes the rules while a foreign rule jumps to a chain of kube-proxy."""
    rules.load("iptables-legacy", lab=False)
    _run("iptables-legacy", "-t", "nat", "-N", "MINE")
    _run("iptables-legacy", "-t", "nat", "-A", "MINE", "-p", "tcp", "-j", "KUBE-MARK-MASQ")
    removed = leftovers.remove(leftovers.find())
    return list(removed.failed), _run("iptables-legacy-save", "-t", "nat"), leftovers.find().modes


def test_chains_that_foreign_rules_use_are_kept(node: Space) -> None:
    failed, saved, modes = node.call(_remove_with_a_foreign_jump)
    assert failed == []
    (table,) = iptables.parse(saved)
    assert [chain for chain in table.policies if not table.is_built_in(chain)] == [
        "KUBE-MARK-MASQ",
        "KUBE-POSTROUTING",
        "MINE",
    ]
    assert table.rules["POSTROUTING"], "the rule that masquerades marked packets is still reached"
    assert modes == ()


def _remove_ipvs_mode() -> tuple[leftovers.Leftovers, list[str], list[str], list[str]]:
    """Creates and removes sets, a device, and a rule that uses a set, as of IPVS mode.

    The kernel of the tests has neither IPVS nor dummy devices, so a bridge has the name and IPVS has no services.
    """
    with IPSet() as sets:
        for name in ("KUBE-CLUSTER-IP", "KUBE-6-LOAD-BALANCER-SOURCE-CID", "KUBE-MINE", "mine"):
            sets.create(name, stype="hash:ip,port")
    _run(
        "iptables-legacy-restore",
        stdin="*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-LOAD-BALANCER - [0:0]\n"
        "-A OUTPUT -j KUBE-SERVICES\n"
        "-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT\nCOMMIT\n"
        "*filter\n:KUBE-IPVS-FILTER - [0:0]\n-A INPUT -j KUBE-IPVS-FILTER\nCOMMIT\n",
    )
    with IPRoute() as routes:
        for name in (ipvs.DEVICE, "dummy9"):
            routes.link("add", ifname=name, kind="bridge")
        routes.addr("add", index=routes.link_lookup(ifname=ipvs.DEVICE)[0], address="10.96.0.1", prefixlen=32)
        found = leftovers.find()
        device = ipvs.device()
        removed = leftovers.remove(found)
        devices = [str(link.get_attr("IFLA_IFNAME")) for link in routes.get_links()]
    assert device is not None and device.addresses == ("10.96.0.1",)
    assert not leftovers.find()
    with IPSet() as sets:
        left = [name for name in ("KUBE-CLUSTER-IP", "KUBE-MINE", "mine") if ipsets.exists(sets, name)]
    return found, devices, left, list(removed.failed)


def test_sets_and_device_of_ipvs_mode_are_removed_and_foreign_ones_kept(node: Space) -> None:
    found, devices, left, failed = node.call(_remove_ipvs_mode)
    assert failed == []
    assert found.modes == ("ipvs",)
    assert found.ipsets == ("KUBE-6-LOAD-BALANCER-SOURCE-CID", "KUBE-CLUSTER-IP")
    assert found.ipvs_device
    assert ipvs.DEVICE not in devices
    assert "dummy9" in devices
    assert left == ["KUBE-MINE", "mine"]


def _find_all() -> tuple[bool, list[ctnetlink.Flow], dict[str, str]]:
    return bool(leftovers.find()), ctnetlink.find(), _all_rules()


def test_inspection_creates_no_table(node: Space) -> None:
    first = node.call(_find_all)
    assert first == node.call(_find_all)
    assert first == (False, [], dict.fromkeys(first[2], ""))
    assert node.run(["cat", "/proc/self/net/ip_tables_names"]) == ""
