"""Fixtures of the tests of ``ebpfproxy top``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.kernel.roots import ensure_bpffs
from tests.datapath.writing import Bench


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    ensure_bpffs(BPFFS)
    folder = BPFFS / f"test-top-{os.getpid()}"
    folder.mkdir()
    made = Bench(folder)
    yield made
    made.close()
    shutil.rmtree(folder)
