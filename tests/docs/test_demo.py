"""``make demo``, as it is: it passes, and README.md shows what it prints."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.docs.pages import blocks
from tools.docs.made import ROOT

_HEADING = "# ebpfproxy trace"


def _comparable(text: str) -> list[str]:
    """Lines without what differs between runs: numbers, addresses of backends, names of processes' files."""
    return [re.sub(r" +", " ", re.sub(r"\d+", "0", line)).strip() for line in text.splitlines()]


@pytest.mark.root
def test_readme_shows_the_end_of_the_demo() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (excerpt,) = (each.text for each in blocks(ROOT / "README.md") if each.text.startswith(_HEADING))
    printed = done.stdout[done.stdout.index(_HEADING) :]
    assert _comparable(printed)[: len(_comparable(excerpt))] == _comparable(excerpt)
    assert re.search(r"^demo passed in [\d.]+ s; everything it made is removed$", printed, re.M)
