"""The lines of ``ebpfproxy top``: what a terminal of any size shows of a refresh."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from ebpfproxy.cli.top_screen import lines
from ebpfproxy.inspection.words import duration, size
from ebpfproxy.top.measured import ConnectRow, MeasuringRow, TrafficRow
from ebpfproxy.top.rows import PacketRow, Sort, Top
from tests.top.test_merge import backend, service, top

BUSY = top(
    service(
        "web",
        120.0,
        1234,
        endpoints=3,
        backends=(backend("10.244.1.3:8080", 80.0, 1000), backend("10.244.2.2:8080", 40.0, 234, shared=True)),
    ),
    service("api", 3.5, 2, backends=(backend("[fd00::1]:80", 3.5, 2, state="terminating"),)),
    service("empty", refused_per_second=4.0, recently_refused=12, endpoints=0),
    service("idle"),
    trouble=(service("empty", recently_refused=12),),
    packets=(PacketRow(action="dropped", reason="no-such-service", per_second=0, recently=3),),
)


def shown(found: Top = BUSY, sort: Sort = Sort.CONNECTIONS, **size: int | bool) -> list[str]:
    return [line.plain for line in lines(found, sort, **size)]  # type: ignore[arg-type]


def test_everything_without_a_terminal() -> None:
    said = shown()
    assert said[0].startswith("124 connections/s   3 of 4 service ports active")
    assert said[1:4] == [
        "refused 4.0/s; in all: shop/empty:http 12",
        "packets and sockets: 3 dropped (no-such-service)",
        "",
    ]
    assert said[4:] == [
        "SERVICE                            NEW/S↓  REFUSED/S  DROPPED/S  FAILED/S     OPEN"
        "     P50     P99   BYTES/S  BACKENDS",
        "shop/web:http                         120          -          -         -    1,234"
        "       -       -         -         3",
        "  10.244.1.3:8080/TCP                80.0                                    1,000",
        "  10.244.2.2:8080/TCP                40.0                                      234"
        "                              shared",
        "shop/api:http                         3.5          -          -         -        2"
        "       -       -         -         1",
        "  [fd00::1]:80/TCP (terminating)      3.5                                        2",
        "shop/empty:http                       0.0        4.0          -         -        0"
        "       -       -         -         0",
        "shop/idle:http                        0.0          -          -         -        0"
        "       -       -         -         1",
        "",
        "FAILED/S, P50, P99 need measureConnections (--measure-connections); "
        "BYTES/S need measureTraffic (--measure-traffic)",
    ]


def test_nothing_to_be_seen_is_said() -> None:
    assert shown(top())[1:] == [
        "nothing is refused or dropped",
        "",
        "SERVICE              NEW/S↓  REFUSED/S  DROPPED/S  FAILED/S     OPEN     P50     P99   BYTES/S  BACKENDS",
        "",
        "FAILED/S, P50, P99 need measureConnections (--measure-connections); "
        "BYTES/S need measureTraffic (--measure-traffic)",
    ]


@pytest.mark.parametrize("width", range(1, 120))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    said = shown(width=width, height=30)
    assert max(map(cell_len, said)) <= width
    if width >= 40:
        assert any(line.startswith("shop/web:http") and " 120" in line for line in said)


@pytest.mark.parametrize(("width", "columns"), [(30, 1), (40, 2), (50, 3), (60, 4), (70, 5)])
def test_a_narrow_terminal_has_the_most_important_columns(width: int, columns: int) -> None:
    (head,) = (line for line in shown(width=width) if line.startswith("SERVICE"))
    assert len(head.split()) == 1 + columns


def test_long_names_are_cut_and_others_are_not() -> None:
    long = top(service("x" * 60, 1.0))
    assert any(f"shop/{'x' * 60}:http " in line for line in shown(long))
    (row,) = (line for line in shown(long, width=60) if line.startswith("shop/x"))
    assert row.startswith(f"shop/{'x' * 10}") and "…" in row and "1.0" in row


@pytest.mark.parametrize("height", range(1, 14))
def test_services_come_before_backends_where_there_is_little_room(height: int) -> None:
    said = shown(height=height)
    assert len(said) <= max(height, 5)
    rows = said[5:]
    services = [line for line in rows if line.startswith("shop/")]
    if len(rows) <= 3:
        assert services == rows
    else:
        assert len([line for line in rows if line.startswith("  ")]) == min(len(rows) - 3, 3)


def test_backends_can_be_left_out() -> None:
    assert not any(line.startswith("  ") for line in shown(backends=False))


@pytest.mark.parametrize("sort", Sort)
def test_the_key_is_marked(sort: Sort) -> None:
    said = shown(sort=sort)
    assert said[4].count("↓") == (sort is not Sort.NAME)
    first = {Sort.REFUSED: "empty", Sort.NAME: "api"}.get(sort, "web")
    assert said[5].startswith(f"shop/{first}:http")


@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\nb", "\x9b31m", "\u202e", "\r", "\x07", "[red]"])
def test_a_terminal_does_not_obey_names(hostile: str) -> None:
    """An agent of another version, or somebody with root, may send and store any."""
    evil = service(
        hostile, 1.0, recently_refused=1, backends=(backend(f"{hostile}:80", 1.0, 1, state=hostile),)
    )
    packets = (PacketRow(action=hostile, reason=hostile, per_second=1.0, recently=1),)
    said = lines(top(evil, trouble=(evil,), packets=packets), Sort.CONNECTIONS, title=hostile)
    assert all(line.plain.isprintable() for line in said)
    assert ("[red]" in said[0].plain) == (hostile == "[red]"), "markup is text"


def test_what_is_refused_now_is_red_and_what_was_is_yellow() -> None:
    styles = [span.style for line in lines(BUSY, Sort.CONNECTIONS) for span in line.spans] + [
        line.style for line in lines(BUSY, Sort.CONNECTIONS)
    ]
    assert "bold red" in styles and "yellow" in styles
    quiet = lines(top(service("web", 1.0, 1)), Sort.CONNECTIONS)
    assert not {"bold red", "yellow"} & {span.style for line in quiet for span in line.spans}


# -- what is measured

_CONNECTS = ConnectRow(
    seconds=30.0,
    times=(9, 1),
    p50=0.00034,
    p99=0.0123,
    failed_per_second=2.0,
    recently_failed={"reset": 12, "timeout": 1},
)
_TRAFFIC = TrafficRow(
    request_bytes_per_second=1_200_000.0,
    response_bytes_per_second=300_000.0,
    request_packets_per_second=0.0,
    response_packets_per_second=0.0,
)
_FAILING = backend(
    "10.244.2.2:8080", 1.0, 0, failed_per_second=2.0, recently_failed=_CONNECTS.recently_failed
)
MEASURED = top(
    service("web", 120.0, 1234, connects=_CONNECTS, traffic=_TRAFFIC, backends=(_FAILING,)),
    service("new", 1.0, 1),
    trouble=(service("web", connects=_CONNECTS),),
    measuring=MeasuringRow(connections=1, traffic=1),
    failed_per_second=2.0,
)


def test_measured_numbers_have_columns() -> None:
    said = shown(MEASURED)
    assert said[1:] == [
        "failed to connect 2.0/s; in all: shop/web:http (reset, timeout) 13",
        "",
        "SERVICE                                       NEW/S↓  REFUSED/S  DROPPED/S  FAILED/S     OPEN     P50"
        "     P99   BYTES/S  BACKENDS",
        "shop/web:http                                    120          -          -       2.0    1,234   340µs"
        "    12ms      1.5M         1",
        "  10.244.2.2:8080/TCP (12 reset, 1 timeout)      1.0                             2.0        0",
        "shop/new:http                                    1.0          -          -         -        1       -"
        "       -         -         1",
    ]


@pytest.mark.parametrize(
    ("measuring", "hint"),
    [
        (
            MeasuringRow(),
            "FAILED/S, P50, P99 need measureConnections (--measure-connections); "
            "BYTES/S need measureTraffic (--measure-traffic)",
        ),
        (MeasuringRow(connections=1), "BYTES/S need measureTraffic (--measure-traffic)"),
        (
            MeasuringRow(nodes=3, connections=2, traffic=3),
            "FAILED/S, P50, P99 are of 2 of 3 nodes, with measureConnections (--measure-connections)",
        ),
        (
            MeasuringRow(connections=1, traffic=1, full=1),
            "- in them: more Services are measured than there is room for",
        ),
    ],
)
def test_a_line_says_why_there_are_dashes(measuring: MeasuringRow, hint: str) -> None:
    assert shown(top(service("web", 1.0, 1), measuring=measuring))[-1] == hint


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (30, "NEW/S↓"),
        (68, "NEW/S↓ REFUSED/S DROPPED/S FAILED/S OPEN"),
        (76, "NEW/S↓ REFUSED/S DROPPED/S FAILED/S OPEN P99"),
        (100, "NEW/S↓ REFUSED/S DROPPED/S FAILED/S OPEN P50 P99 BYTES/S"),
    ],
)
def test_what_is_measured_comes_before_the_number_of_backends(width: int, columns: str) -> None:
    (head,) = (line for line in shown(MEASURED, width=width) if line.startswith("SERVICE"))
    assert head.split()[1:] == columns.split()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0000004, "0.4µs"),
        (0.000064, "64µs"),
        (0.000999, "999µs"),
        (0.0009996, "1.0ms"),
        (0.0123, "12ms"),
        (0.9996, "1.0s"),
        (8.388608, "≥8.4s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (512.4, "512"), (999.6, "1.0k"), (34_000_000, "34M"), (1.5e12, "1.5T"), (2e16, "20,000T")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text
