"""One refresh of several nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter

from ebpfproxy.top.measured import ConnectRow, MeasuringRow, TrafficRow, connect_row
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
        failed_per_second=sum(top.failed_per_second for top in tops),
        bytes_per_second=sum(top.bytes_per_second for top in tops),
        measuring=_measuring([top.measuring for top in tops]),
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
                connects=_connects([row.connects for row in same if row.connects is not None]),
                traffic=_traffic([row.traffic for row in same if row.traffic is not None]),
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
                failed_per_second=sum(rates) if (rates := _known(same)) else None,
                recently_failed=_sums(row.recently_failed for row in same),
            )
        )
    return tuple(sorted(found, key=attrgetter("connections_per_second", "open"), reverse=True))


def _known(rows: Iterable[BackendRow]) -> list[float]:
    return [row.failed_per_second for row in rows if row.failed_per_second is not None]


def _sums(counted: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for each in counted:
        found.update(each)
    return dict(sorted(found.items()))


def _measuring(rows: Sequence[MeasuringRow]) -> MeasuringRow:
    return MeasuringRow(
        nodes=sum(row.nodes for row in rows),
        connections=sum(row.connections for row in rows),
        traffic=sum(row.traffic for row in rows),
        full=sum(row.full for row in rows),
    )


def _connects(rows: Sequence[ConnectRow]) -> ConnectRow | None:
    """Of the nodes that measure them. Percentiles of nodes do not add up; the connections do."""
    if not rows:
        return None
    return connect_row(
        max(row.seconds for row in rows),
        [sum(counts) for counts in zip(*(row.times for row in rows), strict=True)],
        sum(row.failed_per_second for row in rows),
        _sums(row.recently_failed for row in rows),
    )


def _traffic(rows: Sequence[TrafficRow]) -> TrafficRow | None:
    if not rows:
        return None
    return TrafficRow(
        request_bytes_per_second=sum(row.request_bytes_per_second for row in rows),
        response_bytes_per_second=sum(row.response_bytes_per_second for row in rows),
        request_packets_per_second=sum(row.request_packets_per_second for row in rows),
        response_packets_per_second=sum(row.response_packets_per_second for row in rows),
    )


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
