"""The cluster of a module, and the table of what was lost, which is written at the end of a run."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.faults import report
from tests.faults.faulted import Faulted
from tests.lab import Lab

#: A worker's key for its part of the table.
_PART = "faults_report"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    made = yield
    if call.when == "call":
        sentence = (getattr(item, "obj", None).__doc__ or "").split("\n\n")[0]
        parameters = item.name.partition("[")[2].removesuffix("]")
        says = " ".join(sentence.split()) + (f" ({parameters})" if parameters else "")
        report.add_outcome(item.nodeid, says, made.outcome, call.duration)
    return made


def pytest_sessionfinish(session: pytest.Session) -> None:
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:
        worker[_PART] = report.part()
    else:
        report.write()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    found = getattr(node, "workeroutput", {}).get(_PART)
    if found is not None:
        report.join(found)


@pytest.fixture(scope="module")
def faulted() -> Iterator[Faulted]:
    with Lab() as lab:
        yield Faulted(lab)


@pytest.fixture(autouse=True)
def _no_agents(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test begins beside an agent that another has left; that of a module stays."""
    found: Faulted | None = request.getfixturevalue("faulted") if "faulted" in request.fixturenames else None
    before = list(found.lab.agents) if found is not None else []
    yield
    if found is not None:
        found.end_agents(before)
