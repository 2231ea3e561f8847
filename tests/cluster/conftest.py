"""Clusters that modules share: kubeadm without kube-proxy, routed pods, two nodes with two networks each."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from collections.abc import Generator, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import tested
from tests.cluster import binaries, images
from tests.cluster.cluster import Cluster, own_mounts
from tests.cluster.report import COMMAND, TITLE, Report

_REPORT = pytest.StashKey[Report]()
_FOLDER = Path(__file__).parent
#: A worker's key for its part of the report.
_PART = "cluster_report"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORT] = Report()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs modules with their own clusters before the shared one is made, as an idle cluster takes processor time."""
    if all(item.path.parent == _FOLDER for item in items):
        items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


class TwoWorkers(LoadScopeScheduling):  # type: ignore[misc]
    """Gives the suite's clusters, which mostly wait, to one worker, and all others, in their order, to another.

    The marks of ``--dist loadgroup`` have no effect with pytest 9.2: pytest-xdist 3.8 sets an attribute for them
    that pytest does not read any more.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "e2e" if "test_e2e.py" in nodeid else "life"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoWorkers:
    return TwoWorkers(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Records the docstring's sentence of every test that ran in a cluster."""
    made = yield
    sentence = (getattr(item, "obj", None).__doc__ or "").split("\n\n")[0]
    if call.when == "call" and item.get_closest_marker("cluster") and sentence:
        kept = item.config.stash[_REPORT].sentences
        kept.append((item.path.stem, " ".join(sentence.split()), made.outcome, call.duration))
    return made


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds a worker's part to the report of the run."""
    if _PART in getattr(node, "workeroutput", {}):
        node.config.stash[_REPORT].add(pickle.loads(node.workeroutput[_PART]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the page that the environment names if clusters were created."""
    found = session.config.stash[_REPORT]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_PART] = pickle.dumps(found)
    elif tested.PAGE in os.environ and found.versions:
        seconds = time.monotonic() - found.began
        page = Path(os.environ[tested.PAGE])
        commit = tested.commit()
        tested.write(page, TITLE, COMMAND, date.today(), seconds, found.lines(), commit=commit)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[_REPORT]


@pytest.fixture(scope="session")
def _mounts(report: Report) -> None:
    lacking = binaries.missing()
    if lacking:
        pytest.skip(f"KUBE_BIN ({binaries.KUBE_BIN}) has no {', '.join(lacking)}")
    report.versions |= binaries.versions()
    own_mounts()


@pytest.fixture(scope="session")
def folder(_mounts: None, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Yields a folder on the file system of the images, which are shared as hard links.

    Logs of failed tests remain there.
    """
    made = images.KEPT / f"run-{os.getpid()}"
    made.mkdir(parents=True)
    yield made
    for each in list(made.rglob("disk")) if request.session.testsfailed else [made]:
        shutil.rmtree(each, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Yields a cluster of Ready nodes with a DNS and without a service proxy, which a module installs."""
    with Cluster(folder / "routed") as made:
        yield made.up()
