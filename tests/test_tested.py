"""Sections of docs/tested.md."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pytest

from tests import tested, trust
from tests.faults import report
from tests.fuzz import __main__ as fuzz
from tests.kernels import __main__ as kernels

DAY = date(2026, 11, 28)


def test_a_command_replaces_its_own_section_only(tmp_path: Path) -> None:
    page = tmp_path / "tested.md"
    for title in ("Kernels", "Networks", "Faults"):
        tested.write(page, title, f"make {title.lower()}", DAY, 90, [f"### {title} old", "", "old"])
    before = page.read_text()
    tested.write(page, "Networks", "make networks", DAY, 150, tested.table(["a"], [["new"]]))
    head, kernels, networks, faults = page.read_text().split("\n## ")
    assert head == "# What was tested\n\nEach section is written by the command that it names; do not edit.\n"
    assert [kernels, faults] == [before.split("\n## ")[1], before.split("\n## ")[3]]
    assert networks == (
        "Networks\n\nWritten by `make networks` on 2026-11-28, in 2 minutes.\n\n| a |\n| --- |\n| new |\n"
    )


def test_the_same_section_leaves_the_page_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "tested.md"
    tested.write(page, "Kernels", "make kernels", DAY, 90, ["one"])
    tested.write(page, "Networks", "make networks", DAY, 90, ["two", ""])
    before = page.read_text()
    tested.write(page, "Kernels", "make kernels", DAY, 90, ["one"])
    assert page.read_text() == before


def _ended(name: str, outcome: str, lost: int) -> str:
    report.add_steps(name, 10)
    report.add_probes(name, 100, lost)
    return report.end(7, f"{name} says.", outcome, 60)


def test_faults_in_parts_add_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a test add up, the same part again replaces itself, and a part that is missing is said to be missing."""
    page = tmp_path / "tested.md"
    monkeypatch.setenv(tested.PAGE, str(page))
    for number, lost in ((0, 1), (0, 0), (1, 2)):
        report.begin()
        report.take_part(number, 3)
        found = report.Found()
        found.add("b.py::ladder", _ended("ladder", "failed" if lost == 1 else "passed", lost))
        report.begin()
        found.add("a.py::whole", _ended("whole", "passed", lost))
        found.write()
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert rows[2:4] == [
        "| whole | 10 |  |  |  |  | 2 of 100 |  |",
        "| ladder | 20 |  |  |  |  | 2 of 200 |  |",
    ]
    assert [row.split(" | ")[:3] for row in rows[6:]] == [
        ["| whole says.", "passed", "60 s"],
        ["| ladder says.", "passed (part 1, 2 of 3)", "120 s"],
    ]
    report.begin()
    found.add("b.py::ladder", _ended("ladder", "passed", 0))
    assert "| ladder says. | passed | 60 s |" in "\n".join(found.lines())
    report.begin()


def test_faults_of_a_test_that_is_no_more_leave_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a test of another name has found is no result of these tests. What a test does not assert is said."""
    page = tmp_path / "tested.md"
    monkeypatch.setenv(tested.PAGE, str(page))
    for name in ("test_token_that_expires", "test_of_old"):
        report.begin()
        report.add(name, {}, {"packets"})
        found = report.Found()
        found.add(f"tests/faults/test_api.py::{name}", _ended(name, "passed", 0))
        found.write()
    report.begin()
    report.Found().write()
    assert "| test_token_that_expires | 10 |  |  |  |  | 0 of 100 | packets |" in page.read_text()
    assert "test_of_old" not in page.read_text()


def test_page_has_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has edited the sections of those that keep what they find."""
    docs = Path(__file__).parents[1] / "docs"
    shutil.copytree(docs / "tested", tmp_path / "tested")
    page = Path(shutil.copy(docs / "tested.md", tmp_path))
    monkeypatch.setenv(tested.PAGE, str(page))
    report.Found().write()
    fuzz.write(tested.kept(fuzz.KEPT, fuzz.Part))
    kernels.write_page()
    trust.write_page()
    assert page.read_text() == (docs / "tested.md").read_text()
