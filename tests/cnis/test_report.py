"""The section of docs/tested.md."""

from __future__ import annotations

from tests.cnis.report import Report


def test_table_has_a_row_for_each_network_and_says_what_was_left_out_and_failed() -> None:
    report = Report()
    for family in ("IPv6", "IPv4"):
        report.add_cell("ptp", "NodePort", family, "passed")
        report.add_cell("macvlan", "NodePort", family, "skipped", "no node in between")
    report.add_cell("ptp", "hairpin", "IPv4", "failed")
    report.add_cell("ptp", "hostPort", "IPv4", "skipped", "no portmap there")
    report.sentences["It holds."] = [("a", "passed"), ("b", "failed")]
    text = "\n".join(report.lines())
    assert "| ptp | 4 6 | **4 failed** | - |" in text
    assert "| macvlan | - | - | - |" in text
    assert "| macvlan | NodePort | no node in between |" in text
    assert "no portmap there" not in text
    assert "| It holds. | 1 of 2; **not with b** |" in text
