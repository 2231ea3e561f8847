"""Fixtures of several modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.two_node_cluster import TwoNodeCluster
from tests.lab import Lab


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodeCluster]:
    """Two nodes without an agent; see ``tests.e2e.two_node_cluster``."""
    with Lab() as lab:
        yield TwoNodeCluster(lab)
