"""Fixtures of the operator's tests."""

from __future__ import annotations

import pytest

from ebpfproxy.operator import waiting


@pytest.fixture(autouse=True)
def _short_poll_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API servers of these tests change within milliseconds, and are on this machine."""
    monkeypatch.setattr(waiting, "API_SECONDS", 0.05)
