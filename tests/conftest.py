"""What all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ebpfproxy.datapath.programs import bytecode
from tests.lab.lab import clean_dead_labs

#: One for all tests, and for commands that they run, so that every program is compiled once.
_CACHE = Path(__file__).parent.parent / ".bytecode"
os.environ["EBPFPROXY_CACHE_DIR"] = str(_CACHE)
bytecode.CACHE = _CACHE

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("ebpfproxy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ebpfproxy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need root say so instead of failing without it."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session", autouse=True)
def _no_leftovers() -> None:
    """What a killed run left behind is removed before it disturbs this one."""
    if os.geteuid() == 0 and Path("/run/netns").is_dir():
        clean_dead_labs()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """``ebpfproxy run`` configures logging for its process: a test that calls it must not for all others."""
    root, ours = logging.getLogger(), logging.getLogger("ebpfproxy")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
