"""SIGINT for children of tests: what a shell has started in the background ignores it, and so do its children."""

from __future__ import annotations

import signal


def take_interrupts() -> None:
    """In a child, before it runs its program (``preexec_fn``)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
