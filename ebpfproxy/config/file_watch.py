"""Notices a changed configuration file, so that the agent can start anew with the new one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_SECONDS = 1.0


class ReadFile:
    """A file, and the content that is in use.

    It is compared with what was parsed, not with what is there when watching begins: an agent that stands by
    (``agent.succession``) may wait for days between the two.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self._path = path
        self._content = content

    @property
    def has_changed(self) -> bool:
        """A missing file is no change, and neither is what can be read once only, as a pipe."""
        with suppress(OSError):
            return self._path.is_file() and self._path.read_bytes() != self._content
        return False

    def watch(self, changed: Callable[[], None], seconds: float = _SECONDS) -> None:
        """Calls ``changed`` once, from a thread, when the content is another one.

        The file is polled, not watched: a ConfigMap's file is a link to a link, replaced by renaming a
        directory.
        """

        def run() -> None:
            while not self.has_changed:
                pause.wait(seconds)
            changed()

        pause = threading.Event()
        threading.Thread(target=run, name="configuration", daemon=True).start()
