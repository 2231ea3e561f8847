"""Fixtures of several modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.world import World
from tests.lab import Lab


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Two nodes without an agent; see ``tests.e2e.world``."""
    with Lab() as lab:
        yield World(lab)
