"""What viewers are told of a trace that ends, and of what they have missed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

from ebpfproxy.trace.session import Filter
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
