"""Writes the table of what was lost at the end of a run."""

from __future__ import annotations

import pytest

from tests.faults import report

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
