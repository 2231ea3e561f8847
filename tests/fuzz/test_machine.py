"""A sample of ``make fuzz``: a few hundred steps of the tracker and the writer, with agents that are killed."""

from __future__ import annotations

import pytest

from tests.fuzz import machine

pytestmark = pytest.mark.root


def test_any_order_of_events_restarts_and_kills_ends_with_the_result_of_the_rules() -> None:
    with machine.bench() as bench:
        done = machine.run(bench, 300, seed=1, objects=machine.population(60))
    assert sum(done.steps.values()) >= 300
    assert done.steps["killed"]
    assert done.killed_in
