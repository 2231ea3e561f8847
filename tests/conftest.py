"""Fixtures of all tests."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ebpfproxy.datapath.programs import bytecode
from tests.examples import FAST

#: All tests and commands that they run share this folder, so that every program is compiled once.
_CACHE = Path(__file__).parent.parent / ".bytecode"
os.environ["EBPFPROXY_CACHE_DIR"] = str(_CACHE)
bytecode.CACHE = _CACHE

# The duration of an example depends on the load of the machine, not on the code.
settings.register_profile("ebpfproxy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# This one is for the loop while writing; --hypothesis-profile selects it after this.
settings.register_profile(FAST, settings.get_profile("ebpfproxy"), max_examples=10)
settings.load_profile("ebpfproxy")


#: All tests of a file have these marks.
_MARKS_OF_FILE = re.compile(r"^pytestmark = (\[[^\]]*|.*)", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that ``-m 'not root and …'`` deselects as a whole are not imported: every worker would do so."""
    if collection_path.suffix != ".py" or not re.fullmatch(r"not \w+( and not \w+)*", config.option.markexpr):
        return None
    marks = _MARKS_OF_FILE.search(collection_path.read_text())
    deselected = re.findall(r"not (\w+)", config.option.markexpr)
    return True if marks and re.search(rf"\bmark\.({'|'.join(deselected)})\b", marks[1]) else None


#: Folders with files that take a minute and more, or that are one worker's.
_LONG = tuple(f"{Path(__file__).parent}/{name}/" for name in ("e2e", "field", "operator", "packets", "ui"))
#: Each of these folders is one worker's: its files share a cluster, which each worker would set up.
_TOGETHER = re.compile(r"tests/packets/(early_drop/)?")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Without ``--dist loadfile`` xdist makes its own."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 - not where one process runs all tests

    made = LoadFileScheduling(config, log)
    made._split_scope = _scope
    return made


def _scope(node_id: str) -> str:
    folder = _TOGETHER.match(node_id)
    return folder[0] if folder else node_id.partition("::")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half a surrogate pair in what a test logs or prints ends the worker, which cannot send its report."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first: at the end one worker would be left with one of them, and the others idle.

    Tests that need root are skipped without it.
    """
    items.sort(key=lambda item: not str(item.path).startswith(_LONG))
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None]:
    """There is next to no garbage among thousands of tests, and every worker would search all of them for it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Excludes thousands of collected tests from garbage collection: each would take 0.2 s, and copy the pages of every
    forked child that does one."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_leftovers(request: pytest.FixtureRequest) -> None:
    """Leftovers of a killed run are removed before they disturb this one."""
    needs_root = any(item.get_closest_marker("root") for item in request.session.items)
    if needs_root and os.geteuid() == 0 and Path("/run/netns").is_dir():
        from tests.lab.lab import clean_dead_labs  # noqa: PLC0415 - imports pyroute2

        clean_dead_labs()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Restores logging: ``ebpfproxy run``, which a test may call, configures it for the whole process."""
    root, ours = logging.getLogger(), logging.getLogger("ebpfproxy")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
