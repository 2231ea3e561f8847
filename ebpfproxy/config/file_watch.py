"""Notices a changed configuration file, so that the agent can exit and be restarted with the new one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_SECONDS = 1.0


def watch_file(path: Path, changed: Callable[[], None], seconds: float = _SECONDS) -> None:
    """Calls ``changed`` once, from a thread, when the content has changed. A missing file is no change.

    The file is polled, not watched: a ConfigMap's file is a link to a link, replaced by renaming a directory.
    """
    before = _content(path)

    def run() -> None:
        while _content(path) in (None, before):
            pause.wait(seconds)
        changed()

    pause = threading.Event()
    threading.Thread(target=run, name="configuration", daemon=True).start()


def _content(path: Path) -> bytes | None:
    with suppress(OSError):
        return path.read_bytes()
    return None
