"""Writes the results of a run to the page that the environment names."""

from __future__ import annotations

import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import tested
from tests.cnis.report import COMMAND, TITLE, Report

_REPORT = pytest.StashKey[Report]()
_BEGAN = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORT] = Report()
    config.stash[_BEGAN] = time.monotonic()
    config.pluginmanager.register(_Results(config.stash[_REPORT]))


class _Results:
    """Sees the results of all workers, in the process that started them."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        is_result = report.when == "call" or report.outcome != "passed"
        if is_result and "cell" in properties:
            reason = (
                report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
            )
            row, column, family = properties["cell"]
            self._report.add_cell(row, column, family, report.outcome, reason)
        elif is_result and "sentence" in properties:
            sentence, variant = properties["sentence"]
            self._report.sentences.setdefault(sentence, []).append((variant, report.outcome))


@pytest.fixture(autouse=True)
def _sentence(request: pytest.FixtureRequest, record_property: Any) -> None:
    """Records the sentence of a test that is no cell of the table."""
    if "check" not in request.fixturenames:
        made = " ".join((request.function.__doc__ or "").split("\n\n")[0].split())
        variant = request.node.callspec.id if hasattr(request.node, "callspec") else ""
        record_property("sentence", (made, variant))


def pytest_sessionfinish(session: pytest.Session) -> None:
    report = session.config.stash[_REPORT]
    if tested.PAGE in os.environ and report.cells and not hasattr(session.config, "workeroutput"):
        seconds = time.monotonic() - session.config.stash[_BEGAN]
        page = Path(os.environ[tested.PAGE])
        commit = tested.commit()
        tested.write(page, TITLE, COMMAND, date.today(), seconds, report.lines(), commit=commit)


class ByNetwork(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each network, whose cluster its checks share, to one worker, and other modules as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        network, is_check, _ = nodeid.partition(";")
        return network if is_check else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByNetwork:
    return ByNetwork(config, log)
