"""The cluster of a module, and the table of what was lost, which is written at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import report
from tests.faults.faulted import Faulted
from tests.lab import Lab

#: A worker's key for its part of the table.
_PART = "faults_report"


def pytest_sessionfinish(session: pytest.Session) -> None:
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:
        worker[_PART] = report.part()
    else:
        report.write()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    report.join(getattr(node, "workeroutput", {}).get(_PART, {}))


@pytest.fixture(scope="module")
def faulted() -> Iterator[Faulted]:
    with Lab() as lab:
        yield Faulted(lab)


@pytest.fixture(autouse=True)
def _no_agents(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test begins beside an agent that another has left."""
    found = request.getfixturevalue("faulted") if "faulted" in request.fixturenames else None
    yield
    if found is not None:
        found.end_agents()
