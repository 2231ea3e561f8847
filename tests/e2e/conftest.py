"""Fixtures of several modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outer import Outer
from tests.lab import Lab


@pytest.fixture(scope="module")
def outer() -> Iterator[Outer]:
    """Two nodes, an agent on the first, and an external client; see ``tests.e2e.outer``."""
    with Lab() as lab:
        made = Outer(lab)
        made.agent("--stale-tcp-seconds", "0.5").start()
        yield made
