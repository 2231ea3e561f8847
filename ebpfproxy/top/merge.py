"""One refresh of several nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter

from ebpfproxy.top.rows import BackendRow, PacketRow, ServiceRow, Top


def merged(tops: Sequence[Top]) -> Top:
    """The sums of at least one. A Service is only counted on nodes that have it among their rows."""
    rows = _service_rows(row for top in tops for row in top.rows)
    return Top(
        time=max(top.time for top in tops),
        seconds=max(top.seconds for top in tops),
        services=max(top.services for top in tops),
        active=max(sum(row.is_active for row in rows), *(top.active for top in tops)),
        connections_per_second=sum(top.connections_per_second for top in tops),
        refused_per_second=sum(top.refused_per_second for top in tops),
        dropped_per_second=sum(top.dropped_per_second for top in tops),
        packets=_packet_rows(row for top in tops for row in top.packets),
        trouble=_service_rows(row for top in tops for row in top.trouble),
        rows=rows,
    )


def _service_rows(rows: Iterable[ServiceRow]) -> tuple[ServiceRow, ...]:
    found = []
    by_key = attrgetter("key")
    for key, group in groupby(sorted(rows, key=by_key), by_key):
        same = list(group)
        found.append(
            ServiceRow(
                namespace=key.namespace,
                service=key.service,
                port=key.name,
                connections_per_second=sum(row.connections_per_second for row in same),
                refused_per_second=sum(row.refused_per_second for row in same),
                dropped_per_second=sum(row.dropped_per_second for row in same),
                open=sum(row.open for row in same),
                connections=sum(row.connections for row in same),
                refused=sum(row.refused for row in same),
                dropped=sum(row.dropped for row in same),
                recently_refused=sum(row.recently_refused for row in same),
                recently_dropped=sum(row.recently_dropped for row in same),
                # Policies and hints leave some out on one node and others on another.
                endpoints=max(row.endpoints for row in same),
                backends=_backend_rows(each for row in same for each in row.backends),
            )
        )
    return tuple(found)


def _backend_rows(rows: Iterable[BackendRow]) -> tuple[BackendRow, ...]:
    found = []
    by_key = attrgetter("address", "protocol")
    for (address, protocol), group in groupby(sorted(rows, key=by_key), by_key):
        same = list(group)
        found.append(
            BackendRow(
                address=address,
                protocol=protocol,
                state=", ".join(sorted({row.state for row in same})),
                connections_per_second=sum(row.connections_per_second for row in same),
                open=sum(row.open for row in same),
                connections=sum(row.connections for row in same),
                shared=any(row.shared for row in same),
            )
        )
    return tuple(sorted(found, key=attrgetter("connections_per_second", "open"), reverse=True))


def _packet_rows(rows: Iterable[PacketRow]) -> tuple[PacketRow, ...]:
    by_key = attrgetter("action", "reason")
    found = []
    for (action, reason), group in groupby(sorted(rows, key=by_key), by_key):
        same = list(group)
        found.append(
            PacketRow(
                action=action,
                reason=reason,
                per_second=sum(row.per_second for row in same),
                recently=sum(row.recently for row in same),
            )
        )
    return tuple(found)
