"""Refreshes of several nodes as one."""

from __future__ import annotations

from typing import Any

from ebpfproxy.datapath.abi.measure_layout import CONNECT_BOUNDS
from ebpfproxy.top.measured import ConnectRow, MeasuringRow, TrafficRow, connect_row
from ebpfproxy.top.merge import merged
from ebpfproxy.top.rows import BackendRow, PacketRow, ServiceRow, Top


def backend(address: str, rate: float, opened: int, **fields: Any) -> BackendRow:
    values = {"protocol": "TCP", "state": "active", "connections": 0, "shared": False, **fields}
    return BackendRow(address=address, connections_per_second=rate, open=opened, **values)


def service(name: str, rate: float = 0, opened: int = 0, **fields: Any) -> ServiceRow:
    zero = ("refused_per_second", "dropped_per_second", "connections", "refused", "dropped")
    values = dict.fromkeys([*zero, "recently_refused", "recently_dropped"], 0) | {"endpoints": 1, **fields}
    return ServiceRow(
        namespace="shop", service=name, port="http", connections_per_second=rate, open=opened, **values
    )


def top(*rows: ServiceRow, **fields: Any) -> Top:
    sums = {
        name: sum(getattr(row, name) for row in rows)
        for name in ("connections_per_second", "refused_per_second", "dropped_per_second")
    }
    active = sum(row.is_active for row in rows)
    values = {"time": 1.0, "seconds": 2.0, "services": len(rows), "packets": (), "trouble": (), **fields}
    return Top(rows=rows, active=active, **sums, **values)


def test_services_and_backends_are_added() -> None:
    one, two = backend("10.0.0.1:80", 1.0, 2), backend("10.0.0.2:80", 0.5, 9)
    here = top(service("web", 1.5, 11, endpoints=2, backends=(one, two)), service("idle"))
    there = backend("10.0.0.2:80", 4.0, 1, state="drained", shared=True)
    others = top(service("web", 4.0, 1, recently_refused=3, backends=(there,)), time=5.0)
    found = merged([here, others])
    assert (found.time, found.services, found.active, found.connections_per_second) == (5.0, 2, 1, 5.5)
    idle, web = found.rows
    assert (idle.name, web.name) == ("shop/idle:http", "shop/web:http")
    assert (web.connections_per_second, web.open, web.recently_refused, web.endpoints) == (5.5, 12, 3, 2)
    assert web.backends == (
        backend("10.0.0.2:80", 4.5, 10, state="active, drained", shared=True),
        backend("10.0.0.1:80", 1.0, 2),
    )


def test_trouble_and_packets_are_added_by_reason() -> None:
    def packets(reason: str, count: int) -> PacketRow:
        return PacketRow(action="dropped", reason=reason, per_second=1.0, recently=count)

    refusing = service("web", recently_refused=2)
    here = top(trouble=(refusing,), packets=(packets("no-such-service", 2),))
    there = top(trouble=(refusing,), packets=(packets("no-such-service", 3), packets("fragment", 1)))
    found = merged([here, there])
    assert [row.recently_refused for row in found.trouble] == [4]
    assert [(row.reason, row.per_second, row.recently) for row in found.packets] == [
        ("fragment", 1.0, 1),
        ("no-such-service", 2.0, 5),
    ]


def test_one_node_is_what_it_is() -> None:
    one = top(service("web", 1.0, backends=(backend("10.0.0.1:80", 1.0, 0),)))
    assert merged([one]) == one


def _connects(bucket: int, count: int, failed: dict[str, int]) -> ConnectRow:
    times = [0] * (len(CONNECT_BOUNDS) + 1)
    times[bucket] = count
    return connect_row(30.0, times, 1.0, failed)


def test_percentiles_are_of_the_connections_of_all_nodes() -> None:
    """The mean of a quick node's and a slow one's would be nobody's."""
    quick, slow = _connects(0, 98, {"reset": 1}), _connects(10, 2, {"reset": 2, "timeout": 1})
    traffic = TrafficRow(
        request_bytes_per_second=1.0,
        response_bytes_per_second=2.0,
        request_packets_per_second=3.0,
        response_packets_per_second=4.0,
    )
    measuring = MeasuringRow(connections=1, traffic=1)
    found = merged(
        [
            top(service("web", connects=quick, traffic=traffic), measuring=measuring),
            top(service("web", connects=slow, traffic=traffic), measuring=measuring),
            top(service("web")),
        ]
    )
    (row,) = found.rows
    assert found.measuring == MeasuringRow(nodes=3, connections=2, traffic=2)
    assert row.connects is not None and row.traffic is not None
    assert sum(row.connects.times) == 100
    assert row.connects.p50 is not None and row.connects.p99 is not None
    assert row.connects.p50 <= 64e-6 and row.connects.p99 > CONNECT_BOUNDS[9] / 1e6
    assert row.connects.recently_failed == {"reset": 3, "timeout": 1}
    assert row.connects.failed_per_second == 2.0
    assert (row.traffic.bytes_per_second, row.traffic.response_packets_per_second) == (6.0, 8.0)


def test_failures_of_a_backend_are_added() -> None:
    one = backend("10.0.0.1:80", 0.0, 0, failed_per_second=1.0, recently_failed={"reset": 2})
    other = backend("10.0.0.1:80", 0.0, 0)
    found = merged([top(service("web", backends=(each,))) for each in (one, one, other)])
    (row,) = found.rows[0].backends
    assert (row.failed_per_second, row.recently_failed) == (2.0, {"reset": 4})
    (row,) = merged([top(service("web", backends=(other,)))] * 2).rows[0].backends
    assert row.failed_per_second is None
