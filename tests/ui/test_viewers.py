"""What viewers are told of a trace that ends, and of what they have missed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from ebpfproxy.trace.session import Filter
from ebpfproxy.ui import live as live_module
from ebpfproxy.ui.live import Live, Lost, State, Viewer


def test_losses_are_one_sum_until_they_are_taken() -> None:
    """However long a viewer takes nothing."""

    async def run() -> list[bytes]:
        viewer = Viewer(Filter())
        viewer.put((), (Lost(1, 2), State(tracing=True, text="tracing")))
        viewer.put((), (Lost(3, 4),))
        await asyncio.sleep(0)
        events = viewer.events()
        return [await anext(events), await anext(events)]

    state, lost = asyncio.run(run())
    assert state.startswith(b"event: state\n")
    assert lost == b'event: lost\ndata: {"limited":4,"full":6,"skipped":0}\n\n'


def test_an_error_that_nobody_foresaw_is_told_and_the_next_viewer_is_served() -> None:
    # The type checker would not allow this folder, so nothing expects its error.
    live = Live(cast(Path, None))

    async def run() -> None:
        for _ in range(2):
            viewer = Viewer(Filter())
            live.join(viewer)
            async with asyncio.timeout(30):
                async for event in viewer.events():
                    if b"an error of ebpfproxy ui" in event:
                        assert b'"tracing":false' in event
                        break
            live.leave(viewer)

    asyncio.run(run())
    live.end_streams()
    live.wait()
    assert live._thread is None


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "_HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(live_module, "_SEEN_SECONDS", 0.3)


async def _beats(viewer: Viewer) -> int:
    """How many events came until the stream ended."""
    async with asyncio.timeout(30):
        return len([event async for event in viewer.events()])


def test_the_stream_of_a_viewer_that_is_stopped_ends(short: None) -> None:
    """Its connection stays, and takes what little is sent."""
    assert asyncio.run(_of_one(Filter(), "stopped"))


async def _of_one(wanted: Filter, name: str) -> int:
    return await _beats(Viewer(wanted, name))


def test_the_stream_of_a_viewer_that_looks_goes_on(short: None, tmp_path: Path) -> None:
    live = Live(tmp_path)

    async def run() -> None:
        viewer, other = Viewer(Filter(), "looks"), Viewer(Filter(), "stopped")
        live.join(viewer)
        live.join(other)
        ends = asyncio.create_task(_beats(viewer)), asyncio.create_task(_beats(other))
        while not ends[1].done():
            live.look("looks")
            await asyncio.sleep(0.01)
        assert not ends[0].done()
        await ends[0]
        for each in (viewer, other):
            live.leave(each)

    asyncio.run(run())
    live.end_streams()
    live.wait()
