"""``make trust`` with a Makefile of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import trust


def test_a_part_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBE_BIN", raising=False)
    (tmp_path / "Makefile").write_text("test:\n\ttrue\ntest-cnis:\n\tfalse\nfuzz:\n\ttouch fuzzed\n")
    page = tmp_path / "tested.md"
    make = ("make", "-s", "-C", str(tmp_path))

    assert not trust.run(("test", "test-cnis", "fuzz", "test-cluster"), page, make)

    assert (tmp_path / "fuzzed").exists()
    told = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    parts = ["test", "test-cnis", "fuzz", "test-cluster"]
    assert [line.split(" | ")[0] for line in told] == [f"| `make {part}`" for part in parts]
    assert "passed" in told[0]
    assert "failed with 2" in told[1]


def test_every_part_is_a_target() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()

    assert all(f"\n{part}: setup" in makefile for part in trust.PARTS)


def test_without_binaries_there_is_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBE_BIN", raising=False)
    (tmp_path / "Makefile").write_text("test:\n\ttrue\n")
    page = tmp_path / "tested.md"

    assert trust.run(("test-cluster", "test"), page, ("make", "-s", "-C", str(tmp_path)))

    assert "| `make test-cluster` |  | did not run: KUBE_BIN is not set |" in page.read_text()
