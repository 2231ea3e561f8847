"""``make trust``: `make test`, and the commands that test more than it, one after the other, with the time of each.

A part that fails does not end the run. The command fails if one of its parts has. What earlier runs of other parts have
found is kept (:mod:`tests.tested`): the whole takes most of a day.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path

import click
import msgspec

from tests import tested

_TITLE = "The time of each part"
KEPT = "trust"
#: Targets of the Makefile. Those of other kernels and of a cluster are last: they take longest.
PARTS = ("test", "test-image", "test-cnis", "test-faults", "fuzz", "test-kernels", "test-cluster")


class Part(msgspec.Struct):
    """How a target ended: ``seconds`` is 0 where it did not run."""

    seconds: float
    outcome: str
    day: str
    commit: str


def run(parts: Sequence[str], make: Sequence[str] = ("make",)) -> bool:
    """Makes the parts, and writes the section anew after each; True if all ended well.

    ``make``: the command to which the name of a part is added.
    """
    all_good = True
    for part in parts:
        day, commit = datetime.now(UTC).date().isoformat(), tested.commit()
        if part == "test-cluster" and not os.environ.get("KUBE_BIN"):
            click.echo("make test-cluster does not run: KUBE_BIN is not set")
            continue
        click.echo(f"make {part}")
        start = time.monotonic()
        status = subprocess.run([*make, part], check=False).returncode
        outcome = f"failed with {status}" if status else "passed"
        made = Part(time.monotonic() - start, outcome, day, commit)
        tested.keep(KEPT, tested.kept(KEPT, Part) | {part: made})
        write_page()
        all_good = all_good and not status
    return all_good


def write_page() -> None:
    """Writes the section, of what is kept."""
    found = tested.kept(KEPT, Part)
    if not found:
        return
    rows = []
    for name in PARTS:
        if name in found:
            part = found[name]
            rows.append(
                [f"`make {name}`", f"{part.seconds / 60:.1f} minutes", part.outcome, part.day, part.commit]
            )
        else:
            rows.append([f"`make {name}`", "", "not run", "", ""])
    day = max(date.fromisoformat(each.day) for each in found.values())
    seconds = sum(each.seconds for each in found.values())
    lines = tested.table(["", "took", "", "on", "of commit"], rows)
    tested.write(Path(os.environ[tested.PAGE]), _TITLE, "make trust", day, seconds, lines)


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
def main(parts: Sequence[str]) -> None:
    """Makes PARTS, or all."""
    sys.exit(0 if run(parts or PARTS) else 1)


if __name__ == "__main__":
    main()
