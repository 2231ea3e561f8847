"""A source's status: an immutable snapshot that any thread may read."""

from __future__ import annotations

import enum

import msgspec

from ebpfproxy.kube.objects import Resource


class State(enum.StrEnum):
    STARTING = "starting"
    CONNECTED = "connected"
    FAILING = "failing"
    #: The API server has no such resource, or does not show it; the agent works without it.
    ABSENT = "absent"


class SourceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Times are Unix seconds. ``failures`` counts by reason since the start."""

    resource: Resource
    state: State = State.STARTING
    since: float
    last_event: float | None = None
    resource_version: str = ""
    synced: bool = False
    error: str | None = None
    lists: int = 0
    failures: dict[str, int] = {}
