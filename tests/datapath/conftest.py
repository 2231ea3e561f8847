"""Fixtures of the tests on real maps, with pin folders that are unique to this process."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.kernel.roots import ensure_bpffs
from tests.datapath.writing import Bench


@contextmanager
def _folder(name: str) -> Iterator[Path]:
    ensure_bpffs(BPFFS)
    folder = BPFFS / f"test-{name}-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def pins() -> Iterator[Path]:
    with _folder("datapath") as folder:
        yield folder


@pytest.fixture(scope="module")
def module_pins() -> Iterator[Path]:
    with _folder("module") as folder:
        yield folder


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with _folder("writer") as folder:
        made = Bench(folder)
        yield made
        made.close()


@pytest.fixture
def own_bench(pins: Path) -> Iterator[Bench]:
    """One that no other test has used."""
    made = Bench(pins)
    yield made
    made.close()


def _open_maps() -> int:
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += fd.readlink().name == "anon_inode:bpf-map"
    return found


@pytest.fixture(autouse=True, scope="module")
def no_maps_are_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """A worker runs many modules, and each open map is memory of the kernel, with or without a pin."""
    before = _open_maps()
    yield
    if _open_maps() > before:
        # An array that is mapped is open until nothing refers to its memory any more.
        gc.collect()
    # The report of a test that failed refers to what it had.
    assert request.session.testsfailed or _open_maps() <= before


@pytest.fixture
def cpus() -> Iterator[tuple[int, int]]:
    """Returns two CPUs; this thread runs on the first."""
    every = os.sched_getaffinity(0)
    first, second = sorted(every)[:2]
    os.sched_setaffinity(0, {first})
    yield first, second
    os.sched_setaffinity(0, every)
