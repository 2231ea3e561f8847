"""Selection of kube-proxy's rules in the output of iptables-save."""

from __future__ import annotations

from ebpfproxy.operator.migrate.node import iptables
from tests.operator.migrate import rules


def of(*tables: str) -> list[iptables.TablePlan]:
    return iptables.plan("\n".join(tables))


def table(name: str, *lines: str) -> str:
    return "\n".join([f"*{name}", *lines, "COMMIT"])


def test_all_rules_of_a_real_dump_are_removed_except_kubelets_chain_and_jumps_to_it() -> None:
    saved = rules.text("iptables-legacy-save.txt")
    plans = {each.table: each for each in iptables.plan(saved)}
    assert iptables.count(plans.values()) == (50, 12 + 122)
    assert {name: (len(p.chains), len(p.jumps), p.rules, p.kept) for name, p in plans.items()} == {
        "filter": (6, 9, 9, ()),
        "mangle": (1, 0, 0, ()),
        "nat": (43, 3, 113, ()),
    }
    named = {chain for p in plans.values() for chain in p.chains}
    there = {chain for t in iptables.parse(saved) for chain in t.policies if not t.is_built_in(chain)}
    assert there - named == {"KUBE-FIREWALL"}
    assert not any("KUBE-FIREWALL" in jump for p in plans.values() for jump in p.jumps)


def test_restore_script_has_only_removed_rules() -> None:
    (plan,) = of(
        table(
            "nat",
            ":PREROUTING ACCEPT [5:300]",
            ":KUBE-SERVICES - [0:0]",
            ":MINE - [7:8]",
            "[1:2] -A PREROUTING -j MINE",
            '[3:4] -A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
            "-A KUBE-SERVICES -j RETURN",
        )
    )
    assert plan.script() == (
        "*nat\n"
        ":KUBE-SERVICES - [0:0]\n"
        '-D PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES\n'
        "-X KUBE-SERVICES\n"
        "COMMIT\n"
    )


def test_kube_chains_of_other_programs_are_kept() -> None:
    """These are kubelet's, kube-router's and CRI-O's; KUBE-FIREWALL is IPVS mode's in the table nat only."""
    foreign = [f"KUBE-{end}" for end in ("KUBELET-CANARY", "IPTABLES-HINT", "MARK-DROP", "ROUTER-INPUT")]
    foreign += ["KUBE-POD-FW-XYZ", "KUBE-NWPLCY-XYZ", "KUBE-HOSTPORTS", "KUBE-HP-XYZ", "KUBERNETES"]
    for name in ("nat", "filter", "mangle", "raw", "security"):
        assert of(table(name, *(f":{chain} - [0:0]" for chain in foreign))) == []
    assert of(table("filter", ":KUBE-FIREWALL - [0:0]")) == []
    assert of(table("nat", ":KUBE-FIREWALL - [0:0]"))[0].chains == ("KUBE-FIREWALL",)
    assert of(table("raw", ":KUBE-SERVICES - [0:0]", ":KUBE-SVC-X - [0:0]")) == []


def test_chain_that_others_jump_to_is_kept_with_all_that_it_jumps_to() -> None:
    (plan,) = of(
        table(
            "nat",
            ":POSTROUTING ACCEPT [0:0]",
            ":KUBE-HOSTPORTS - [0:0]",
            ":KUBE-MARK-MASQ - [0:0]",
            ":KUBE-POSTROUTING - [0:0]",
            ":KUBE-SEP-A - [0:0]",
            ":KUBE-SVC-A - [0:0]",
            ":KUBE-SVC-B - [0:0]",
            ":MINE - [0:0]",
            "-A POSTROUTING -j KUBE-POSTROUTING",
            "-A KUBE-HOSTPORTS -s 10.0.0.1/32 -j KUBE-MARK-MASQ",
            "-A KUBE-SVC-A -j KUBE-SEP-A",
            "-A KUBE-SVC-B -j KUBE-SEP-A",
            "-A MINE -g KUBE-SVC-A",
        )
    )
    assert plan.chains == ("KUBE-SVC-B",)
    assert plan.jumps == ()
    assert {kept.chain: kept.because for kept in plan.kept} == {
        "KUBE-MARK-MASQ": "KUBE-HOSTPORTS jumps to it",
        "KUBE-POSTROUTING": "it masquerades what KUBE-MARK-MASQ marks",
        "KUBE-SEP-A": "KUBE-SVC-A jumps to it",
        "KUBE-SVC-A": "MINE jumps to it",
    }


def test_comments_are_not_parsed_as_rules() -> None:
    output = '-A INPUT -m comment --comment "say \\"-j KUBE-SERVICES\\" -j KUBE-SERVICES" -j ACCEPT'
    assert iptables.target(output) == "ACCEPT"
    assert iptables.target("-A INPUT -m comment --comment -j -j MINE") == "MINE"
    assert iptables.target("-A INPUT -m comment --comment -j") == ""
    assert iptables.target("-A INPUT -p tcp") == ""
    (plan,) = of(table("filter", ":INPUT ACCEPT [0:0]", ":KUBE-SERVICES - [0:0]", output))
    assert plan.jumps == ()


def test_dump_without_kube_proxys_rules_gives_no_script() -> None:
    assert iptables.plan("") == []
    assert of(table("nat", ":PREROUTING ACCEPT [0:0]", "-A PREROUTING -j ACCEPT")) == []
