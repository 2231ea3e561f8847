"""The section of a run."""

from __future__ import annotations

from tests.cluster.e2e import Outcome, Result
from tests.cluster.report import Report


def result(outcome: Outcome) -> Result:
    return Result(outcome, 1.0, "")


def test_page_has_rows_for_groups_and_for_every_failure() -> None:
    one, other = "[sig-network] Services should work", "[sig-network] Conntrack should | work"
    report = Report({"Kubernetes": "v1.36.2"})
    report.e2e["kube-proxy"] = {one: result(Outcome.PASSED), other: result(Outcome.PASSED)}
    report.e2e["ebpfproxy"] = {one: result(Outcome.PASSED), other: result(Outcome.FAILED)}
    report.sentences.append(("tests.cluster.test_life", "A node reboots.", "passed", 41.7))
    lines = report.lines()
    assert "| Kubernetes | v1.36.2 |" in lines
    assert "| Services | 1 of 1 | 1 of 1 |" in lines
    assert "| **all** | 2 of 2 | 1 of 2 |" in lines
    assert r"| Conntrack should \| work | passed | failed |" in lines
    assert "| A node reboots. | passed | 42 s |" in lines


def test_specs_that_did_not_run_are_not_counted() -> None:
    report = Report()
    report.e2e["ebpfproxy"] = {"[sig-network] Services of SCTP": Result(Outcome.SKIPPED, 0.0, "needs SCTP")}
    lines = report.lines()
    assert "| **all** |  |" in lines
    assert "| Services of SCTP | needs SCTP |" in lines


def test_spec_that_passes_alone_is_counted_and_listed() -> None:
    name = "[sig-network] Services should work"
    report = Report()
    report.e2e["kube-proxy"] = {name: result(Outcome.PASSED_ALONE)}
    report.e2e["ebpfproxy"] = {}
    lines = report.lines()
    assert "| **all** | 1 of 1 |  |" in lines
    assert "| Services should work | passed when run again, alone |  |" in lines


def test_parts_of_two_processes_make_one_section() -> None:
    report, part = Report(), Report({"Kubernetes": "v1.36.2"})
    report.sentences.append(("test_life", "A node reboots.", "passed", 41.7))
    part.sentences.append(("test_e2e", "Specs pass.", "passed", 1.0))
    part.e2e["ebpfproxy"] = {"[sig-network] Services should work": result(Outcome.PASSED)}
    report.add(part)
    lines = report.lines()
    assert "| Kubernetes | v1.36.2 |" in lines
    assert "| Services | 1 of 1 |" in lines
    assert "| A node reboots. | passed | 42 s |" in lines
    assert "| Specs pass. | passed | 1 s |" in lines
