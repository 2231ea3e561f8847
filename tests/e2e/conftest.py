"""Fixtures of several modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.lab import Lab


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    """Two nodes, an agent on the first, and an external client; see ``tests.e2e.outside_client``."""
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.agent("--stale-tcp-seconds", "0.5").start()
        yield made
