"""``make trust``: `make test`, and the commands that test more than it, one after the other, with the time of each.

A part that fails does not end the run. The command fails if one of its parts has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from tests import tested

_TITLE = "The time of each part"
#: Targets of the Makefile. Those of other kernels and of a cluster are last: they take longest.
PARTS = ("test", "test-image", "test-cnis", "test-faults", "fuzz", "test-kernels", "test-cluster")


def run(parts: Sequence[str], page: Path, make: Sequence[str] = ("make",)) -> bool:
    """Makes the parts, and writes the section anew after each; True if all ended well.

    ``make``: the command to which the name of a part is added.
    """
    rows: list[tuple[str, str, str]] = []
    day, began = datetime.now(UTC).date(), time.monotonic()
    for part in parts:
        if part == "test-cluster" and not os.environ.get("KUBE_BIN"):
            rows.append((f"`make {part}`", "", "did not run: KUBE_BIN is not set"))
        else:
            click.echo(f"make {part}")
            start = time.monotonic()
            status = subprocess.run([*make, part], check=False).returncode
            minutes = f"{(time.monotonic() - start) / 60:.1f} minutes"
            rows.append((f"`make {part}`", minutes, f"failed with {status}" if status else "passed"))
        lines = tested.table(["", "took", ""], rows)
        tested.write(page, _TITLE, "make trust", day, time.monotonic() - began, lines)
    return all(not outcome.startswith("failed") for _, _, outcome in rows)


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
def main(parts: Sequence[str]) -> None:
    """Makes PARTS, or all."""
    page = Path(os.environ[tested.PAGE])
    sys.exit(0 if run(parts or PARTS, page) else 1)


if __name__ == "__main__":
    main()
