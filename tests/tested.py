"""docs/tested.md: a section for each command that tests more than ``make test`` has the time or the kernel for.

Some of the commands take hours. What they find is kept beside the page, in docs/tested, so that a run of a part
replaces that part of the section only.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

#: Names the page that a run writes its section of; without it a run writes nothing.
PAGE = "EBPFPROXY_TESTED"
_HEAD = "# What was tested\n\nEach section is written by the command that it names; do not edit.\n"


def write(
    page: Path,
    title: str,
    command: str,
    day: date,
    seconds: float,
    lines: Sequence[str],
    *,
    commit: str = "",
) -> None:
    """Replaces the section of a command in the page, or adds it at the end.

    ``commit``: the one that all of it was run with, if it is one.
    ``lines`` are Markdown below a heading of level 2, and so have headings of level 3 or deeper.
    """
    head, *sections = (page.read_text() if page.exists() else _HEAD).split("\n## ")
    about = f"Written by `{command}` on {day.isoformat()}, in {seconds / 60:.0f} minutes{commit and f', of commit {commit}'}."
    section = "\n".join([title, "", about, "", *lines]).rstrip() + "\n"
    places = [at for at, each in enumerate(sections) if each.startswith(f"{title}\n")]
    if places:
        sections[places[0]] = section
    else:
        sections.append(section)
    page.write_text("\n## ".join(part.rstrip() + "\n" for part in [head, *sections]))


def kept(name: str, kind: type[T]) -> dict[str, T]:
    """Returns what earlier runs of a command have kept, by name; nothing without a page."""
    file = _file(name)
    if file is None or not file.exists():
        return {}
    return msgspec.json.decode(file.read_bytes(), type=dict[str, kind])  # type: ignore[valid-type]


def keep(name: str, found: Mapping[str, object]) -> None:
    """Replaces what is kept: as JSON, in lines, so that a change of it can be read."""
    file = _file(name)
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


def _file(name: str) -> Path | None:
    return Path(os.environ[PAGE]).with_suffix("") / f"{name}.json" if PAGE in os.environ else None


def commit() -> str:
    """Returns the commit of this checkout, with a plus sign if files differ from it; nothing without git.

    The page itself differs while a command runs.
    """
    try:
        known = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/docs/tested*")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return known + "+" * bool(changed)


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table, with an empty one after it."""
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return [*lines, ""]
