"""Says whether the proxy keeps up, and whether load balancers should send this node traffic."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ebpfproxy.kube.objects import Node

#: A cluster autoscaler marks nodes that it will delete.
DELETION_TAINT = "ToBeDeletedByClusterAutoscaler"

FAMILIES = ("IPv4", "IPv6")


def eligible(node: Node | None) -> bool:
    """True if load balancers may use the node: it is known, not being deleted and not about to be."""
    if node is None or node.metadata.deletion_timestamp is not None:
        return False
    taints = (node.spec.taints if node.spec is not None else None) or ()
    return all(taint.key != DELETION_TAINT for taint in taints)


class ProxyHealth:
    """Healthy once everything is programmed and attached, while no change waits for ``timeout`` seconds.

    Any thread may use it. ``clock`` gives Unix seconds, ``monotonic`` those that pass: somebody may set the
    clock.
    """

    def __init__(
        self,
        timeout: float,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._timeout = timeout
        self._lock = threading.Lock()
        self._updated: float | None = None
        self._pending: float | None = None
        self._attached = False
        self._eligible = False

    def queued(self) -> None:
        """A change waits to be programmed."""
        with self._lock:
            if self._pending is None:
                self._pending = self._monotonic()

    def programmed(self) -> None:
        """Everything known is programmed."""
        with self._lock:
            self._pending = None
            self._updated = self._clock()

    def attached(self) -> None:
        """The programs are attached: what is programmed takes effect."""
        with self._lock:
            self._attached = True

    def set_eligible(self, is_eligible: bool) -> None:
        with self._lock:
            self._eligible = is_eligible

    @property
    def healthy(self) -> bool:
        with self._lock:
            return self._healthy()

    def _healthy(self) -> bool:
        if self._updated is None or not self._attached:
            return False
        return self._pending is None or self._monotonic() - self._pending < self._timeout

    def livez(self) -> tuple[bool, dict[str, Any]]:
        """Health alone, and the body that says it."""
        with self._lock:
            now = self._clock()
            healthy = self._healthy()
            updated = _rfc3339(self._updated)
            return healthy, {
                "lastUpdated": _rfc3339(now) if healthy else updated,
                "currentTime": _rfc3339(now),
                "healthy": healthy,
                "status": {family: {"lastUpdated": updated, "healthy": healthy} for family in FAMILIES},
            }

    def healthz(self) -> tuple[bool, dict[str, Any]]:
        """Health and the node's eligibility: without that ``lastUpdated`` is not now, as without health."""
        healthy, body = self.livez()
        with self._lock:
            is_eligible, updated = self._eligible, _rfc3339(self._updated)
        return healthy and is_eligible, {
            "lastUpdated": body["lastUpdated"] if is_eligible else updated,
            "currentTime": body["currentTime"],
            "nodeEligible": is_eligible,
            "healthy": healthy,
            "status": body["status"],
        }


def _rfc3339(seconds: float | None) -> str:
    """Go writes its zero time where there is none."""
    if seconds is None:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
