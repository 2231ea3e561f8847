"""docs/tested.md: a section for each command that tests more than ``make test`` has the time or the kernel for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

#: Names the page that a run writes its section of; without it a run writes nothing.
PAGE = "EBPFPROXY_TESTED"
_HEAD = "# What was tested\n\nEach section is written by the command that it names; do not edit.\n"


def write(page: Path, title: str, command: str, day: date, seconds: float, lines: Sequence[str]) -> None:
    """Replaces the section of a command in the page, or adds it at the end.

    ``lines`` are Markdown below a heading of level 2, and so have headings of level 3 or deeper.
    """
    head, *sections = (page.read_text() if page.exists() else _HEAD).split("\n## ")
    about = f"Written by `{command}` on {day.isoformat()}, in {seconds / 60:.0f} minutes."
    section = "\n".join([title, "", about, "", *lines]).rstrip() + "\n"
    places = [at for at, each in enumerate(sections) if each.startswith(f"{title}\n")]
    if places:
        sections[places[0]] = section
    else:
        sections.append(section)
    page.write_text("\n## ".join(part.rstrip() + "\n" for part in [head, *sections]))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table, with an empty one after it."""
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return [*lines, ""]
