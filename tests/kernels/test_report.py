"""The section of docs/tested.md of kernels, and what comes out of an emulator."""

from __future__ import annotations

import msgspec
import pytest

from ebpfproxy.datapath.kernel import probe
from ebpfproxy.datapath.kernel.socket_fields import SocketFields
from tests.kernels import guest, report
from tests.kernels.kernels import GROUPS, KERNELS, SETTINGS, Kernel
from tests.kernels.results import Result, Run, line, read
from tests.kernels.root import TOP

OLD = Kernel("old", "bullseye", "cloud", refused="batched lookup")
NEW = Kernel("new", "sid", "rt", arguments="a=1")
MACHINE = {"release": "7.2", "version": "#1 SMP", "IPv6": "yes"}


def run(*results: Result, complete: bool = True) -> Run:
    return Run(machine=MACHINE, features={"tcx": True}, results=list(results), complete=complete)


def test_results_are_read_as_they_were_written_up_to_a_crash() -> None:
    results = [
        Result("tests/packets/test_xdp.py::test_x[a|b]", "failed", "no\u2026", 1.5),
        Result("b", "passed"),
    ]
    texts = [
        line("machine", MACHINE),
        line("refusal", ""),
        line("features", {"tcx": True}),
        line("planned", {}),
    ]
    texts += [line("result", each) for each in results]
    assert read(texts) == run(*results, complete=False)
    assert read([*texts, line("complete", True)]) == run(*results)
    assert read([*texts, '{"result": {"test": "c", "outc']) == run(*results, complete=False)


def test_results_are_kept_whatever_the_probe_has_found() -> None:
    """A later run reads them again."""
    fields = SocketFields(**dict.fromkeys(SocketFields.__struct_fields__, 8))
    for found in (fields, None):
        texts = [line("features", guest.features_of(probe.Features(set_retval=False, socket_fields=found)))]
        kept = msgspec.json.decode(msgspec.json.encode(read(texts)), type=Run)
        assert (kept.features["set_retval"], kept.features["socket_fields"]) == (False, found is not None)


@pytest.mark.parametrize(
    ("kernel", "found", "is_good"),
    [
        (NEW, run(Result("a", "passed"), Result("b", "skipped", "no")), True),
        (NEW, run(Result("a", "passed"), Result("b", "failed", "no")), False),
        (NEW, run(Result("a", "passed"), complete=False), False),
        (NEW, run(), False),
        (NEW, Run(machine=MACHINE, refusal="lacks batched lookup", complete=True), False),
        (OLD, Run(machine=MACHINE, refusal="lacks batched lookup", complete=True), True),
        (OLD, Run(machine=MACHINE, refusal="Permission denied", complete=True), False),
        (OLD, run(Result("a", "passed")), False),
        (OLD, Run(), False),
    ],
)
def test_a_run_is_good_only_if_it_ended_as_expected(kernel: Kernel, found: Run, is_good: bool) -> None:
    assert report.good(kernel, found) == is_good


def test_section_has_a_column_for_each_kernel_and_names_failures_and_reasons() -> None:
    refused = Run(machine={**MACHINE, "release": "5.10"}, refusal="lacks a|b", complete=True)
    tried = run(
        Result("tests/packets/a.py::test_a[v4]", "passed"),
        Result("tests/packets/a.py::test_b[v4]", "failed", "AssertionError"),
        Result("tests/e2e/test_sockets.py::test_c", "skipped", "no UDP-Lite"),
    )
    tried.day = "2026-11-28"
    absent = Kernel("absent", "sid", "cloud")
    lines = report.lines({"old": OLD, "new": NEW, "absent": absent}, {}, {"old": refused, "new": tried})
    assert "Not run: absent." in lines
    assert "|  | old | new |" in lines
    assert "| release | 5.10 | 7.2 |" in lines
    assert "| arguments of the kernel |  | `a=1` |" in lines
    assert "| last run |  | 2026-11-28 |" in lines
    assert "| the agent's probe | refuses | accepts |" in lines
    assert "| `tcx` |  | yes |" in lines
    assert r"| old | lacks a\|b |" in lines
    assert "| packets |  | 1 of 2 |" in lines
    assert "| sockets |  | 0 of 0, 1 skipped |" in lines
    assert r"| tests/packets/a.py::test_b\[v4] |  | 1 |" in lines
    assert "| no UDP-Lite |  | 1 |" in lines


def test_kinds_of_devices_have_a_row_for_each_network() -> None:
    """What a kernel has no devices for is left empty."""
    test = "tests/cnis/test_devices.py::test_devices[{};-NodePort-{}]"
    first = run(
        Result(test.format("VLAN, a", "IPv4"), "passed"),
        Result(test.format("VLAN, a", "IPv6"), "failed", "no"),
        Result(test.format("netkit", "IPv4"), "skipped", "this kernel has no netkit"),
    )
    lines = report.lines({"old": OLD, "new": NEW}, {}, {"old": first, "new": run()})
    assert "| VLAN, a | 1 of 2 |  |" in lines
    assert "| netkit |  |  |" in lines


def test_other_settings_have_tables_of_their_own() -> None:
    passed = run(Result("tests/field/test_every_kernel.py::test_a", "passed"))
    lines = report.lines({"old": OLD}, {"new": NEW}, {"old": run(), "new": passed})
    kernels, settings = "\n".join(lines).split("### Other builds and settings")
    assert "a=1" not in kernels
    assert "| all ways of traffic | 1 of 1 |" in settings


def test_groups_name_tests_that_exist_and_kernels_name_groups() -> None:
    assert all((TOP / path).exists() for paths in GROUPS.values() for path in paths)
    assert all(set(kernel.groups) <= set(GROUPS) for kernel in (KERNELS | SETTINGS).values())


def test_groups_that_did_not_end_are_marked_and_those_of_other_runs_kept() -> None:
    kernel = Kernel("new", "sid", "rt", groups=("packets", "sockets", "start"))
    sockets = Result("tests/e2e/test_sockets.py::test_c", "passed")
    first = run(Result("tests/packets/a.py::test_a", "passed"), sockets, complete=False)
    first.planned = {"start": 1, "packets": 1, "sockets": 2}
    first.stopped = report.stopped(kernel, first)
    assert first.stopped == ["sockets", "start"]
    assert "| sockets | 1 of 1, stopped |" in report.lines({"new": kernel}, {}, {"new": first})
    assert "| start | not run |" in report.lines({"new": kernel}, {}, {"new": first})
    assert report.stopped(kernel, run(complete=False)) == list(kernel.groups)
    both = report.merged(
        first, run(sockets, Result("tests/e2e/test_sockets.py::test_d", "failed")), ["sockets"]
    )
    assert both.stopped == ["start"]
    lines = report.lines({"new": kernel}, {}, {"new": both})
    assert "| packets | 1 of 1 |" in lines
    assert "| sockets | 1 of 2 |" in lines


def test_tests_that_are_run_again_replace_their_first_outcomes() -> None:
    kernel = Kernel("new", "sid", "rt", groups=("packets",))
    good, bad = (Result(f"tests/packets/a.py::test_{name}", "failed") for name in ("good", "bad"))
    first = run(good, Result("tests/packets/a.py::test_other", "passed"), bad)
    both = report.repeated(first, run(Result(good.test, "passed"), Result(bad.test, "failed")), 60)
    assert [each.test for each in both.results] == [bad.test]
    assert not report.good(kernel, both)
    assert report.good(kernel, report.repeated(both, run(Result(bad.test, "passed")), 60))
    lines = report.lines({"new": kernel}, {}, {"new": both})
    assert "| packets | 2 of 3 |" in lines
    assert f"| {good.test} | passed |" in lines
    assert f"| {bad.test} | 1 |" in lines
    assert f"| {bad.test} | passed |" not in lines
    skipped = report.repeated(first, run(Result(good.test, "skipped", "too young")), 60)
    assert f"| {good.test} | passed |" not in report.lines({"new": kernel}, {}, {"new": skipped})
    assert report.good(kernel, report.repeated(both, run(), 60)), "the test no longer exists"
    assert not report.good(kernel, report.repeated(both, run(complete=False), 60))
