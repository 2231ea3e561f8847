"""A sample of ``make fuzz``: objects that nobody writes by accident, in a cluster with an agent."""

from __future__ import annotations

import pytest

from tests.fuzz.hostile import hostile_cluster, unprintable

pytestmark = pytest.mark.root


def test_hostile_objects_neither_stop_the_agent_nor_reach_a_terminal() -> None:
    """Names with escape sequences are shown, and obeyed nowhere; the others' Service is served as before."""
    with hostile_cluster(ports=300, endpoints=2000, annotation=1 << 16) as (cluster, _):
        assert cluster.is_served()
        found = {name: wrong for name, text in cluster.outputs() if (wrong := unprintable(text))}
        assert cluster.agent.process is not None
        assert cluster.agent.process.poll() is None
    assert found == {}
