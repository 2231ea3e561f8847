"""The cluster of a module, and the table of what was lost."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests.faults import report as results
from tests.faults.faulted import Faulted
from tests.lab import Lab

#: The property of a test's report that has what the test has found.
_FOUND = "faults"
_WORKER = "PYTEST_XDIST_WORKER"
_found = results.Found()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.when == "setup":
        results.begin()
    made = yield
    if call.when == "call" or not made.passed:
        sentence = (getattr(item, "obj", None).__doc__ or "").split("\n\n")[0]
        parameters = item.name.partition("[")[2].removesuffix("]")
        says = " ".join(sentence.split()) + (f" ({parameters})" if parameters else "")
        encoded = results.end(item.location[1] or 0, says, made.outcome, call.duration)
        made.user_properties.append((_FOUND, encoded))
    return made


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process that has all reports; a worker calls it for its own, too."""
    properties = [value for name, value in report.user_properties if name == _FOUND]
    if properties and _WORKER not in os.environ:
        _found.add(report.nodeid, str(properties[-1]))
        _found.write()
        if report.failed:
            # A run of hours need not get to its end, where pytest says what has failed.
            print(report.longreprtext, flush=True)


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
