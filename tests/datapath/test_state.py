"""The recorded state of the agent, and the fill level of maps."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest

from ebpfproxy.agent import state
from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.dump import fill
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.roots import Lock, pin_folder
from ebpfproxy.inspection.status import read_status

pytestmark = pytest.mark.root

OLD = state.AgentState(pid=7, version="0.1.0", node="a", source="s", started=1.0, written=5.0, synced=True)


def test_state_of_the_agent_with_the_newest_maps_is_loaded(pins: Path) -> None:
    assert state.load_latest(pins) is None
    new = msgspec.structs.replace(OLD, pid=8, written=6.0, synced=False)
    for record, backends in ((OLD, 100), (new, 200)):
        opened = maps.open_or_create(pins, Capacity(backends=backends))
        assert state.load(opened) is None
        state.save(opened, record)
        assert state.load(opened) == record
        opened.close()
    assert state.load_latest(pins) == new


def test_the_latest_record_is_found_after_the_clock_was_set_back(pins: Path) -> None:
    """Commands ask at the socket that it names."""
    before = msgspec.structs.replace(OLD, heartbeat=50.0)
    after = msgspec.structs.replace(OLD, pid=8, written=OLD.written - 3600, heartbeat=60.0)
    for record, backends in ((before, 100), (after, 200)):
        opened = maps.open_or_create(pins, Capacity(backends=backends))
        state.save(opened, record)
        opened.close()
    assert state.load_latest(pins) == after


@pytest.mark.parametrize(
    ("silent", "hangs"), [(0.0, False), (40.0, True), (None, False)], ids=["well", "hangs", "other-version"]
)
def test_an_agent_that_hangs_is_a_problem(pins: Path, silent: float | None, hangs: bool) -> None:
    """It holds its lock, and the last record that it wrote says that all is well."""
    (home := pin_folder(pins)).mkdir()
    opened = maps.open_or_create(home, Capacity())
    heartbeat = 0.0 if silent is None else time.monotonic() - silent
    state.save(opened, msgspec.structs.replace(OLD, healthy=True, heartbeat=heartbeat))
    lock = Lock([("--bpf-root", pins)])
    found = read_status(pins, opened)
    lock.release()
    opened.close()
    assert any(each.startswith("the agent has not reported for 40s:") for each in found.problems) is hangs


def test_a_record_fits_whatever_others_have_answered(pins: Path) -> None:
    """A collector chooses the reason of its refusal, and JSON writes what cannot be printed with six letters."""
    odd = "\x01" * 70_000
    signal = state.SignalState(1.0, 2.0, odd, 3)
    full = msgspec.structs.replace(
        OLD,
        watches=tuple(state.WatchState(f"{n}", "failed", 1.0, error=odd) for n in range(5)),
        telemetry=state.TelemetryState("http://a", log=signal, metrics=signal),
    )
    opened = maps.open_or_create(pins, Capacity())
    state.save(opened, full)
    found = state.load(opened)
    assert found is not None
    assert found.telemetry is not None
    assert found.telemetry.log == state.SignalState(1.0, 2.0, "\x01" * 300, 3)
    opened.close()


@pytest.mark.parametrize("backends", [16, 1000])
def test_empty_maps_of_any_size_have_no_entries(pins: Path, backends: int) -> None:
    """A memory mapping extends to the end of a page, behind the last entry."""
    opened = maps.open_or_create(pins, Capacity(backends=backends))
    assert {each.name: each.entries for each in fill(opened) if each.entries} == {}
    opened.close()


def test_state_of_another_schema_is_ignored(pins: Path) -> None:
    home = pins / "v99-x" / "maps"
    home.mkdir(parents=True)
    bpf.pin(fd := bpf.map_create(uapi.MAP_HASH, "agent_state", 4, 8192, 1), home / "agent_state")
    os.close(fd)
    assert state.load_latest(pins) is None
