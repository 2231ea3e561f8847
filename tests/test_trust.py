"""``make trust`` with a Makefile of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tested, trust


def test_a_part_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBE_BIN", raising=False)
    (tmp_path / "Makefile").write_text("test:\n\ttrue\ntest-cnis:\n\tfalse\nfuzz:\n\ttouch fuzzed\n")
    page = tmp_path / "tested.md"
    monkeypatch.setenv(tested.PAGE, str(page))
    make = ("make", "-s", "-C", str(tmp_path))

    assert not trust.run(("test", "test-cnis", "fuzz", "test-cluster"), make)

    assert (tmp_path / "fuzzed").exists()
    told = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [cells[0] for cells in told] == [f"| `make {part}`" for part in trust.PARTS]
    outcomes = {cells[0][8:-1]: cells[2] for cells in told}
    assert outcomes["test"] == outcomes["fuzz"] == "passed"
    assert outcomes["test-cnis"] == "failed with 2"
    assert outcomes["test-cluster"] == outcomes["test-kernels"] == "not run"
    (tmp_path / "Makefile").write_text("test-cnis:\n\ttrue\n")
    assert trust.run(("test-cnis",), make)
    told = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    assert {cells[2] for cells in told} == {"passed", "not run"}, "what is known of other parts is kept"


def test_every_part_is_a_target() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()

    assert all(f"\n{part}: setup" in makefile for part in trust.PARTS)
