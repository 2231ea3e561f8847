from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.operator.install.site import StandIn


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebpfproxy.operator.waiting.API_SECONDS", 0.05)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[StandIn]:
    """Yields the stand-in with two nodes, node-a and node-b."""
    made = StandIn(tmp_path)
    for name in ("node-a", "node-b"):
        made.add_node(name)
    yield made
    made.stop()
