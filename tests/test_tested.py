"""Sections of docs/tested.md."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from tests import tested

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
