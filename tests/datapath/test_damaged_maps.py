"""Maps in which somebody else has written what no agent writes: commands and the next agent go on."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from ebpfproxy.datapath.abi.flow_layout import RemovalReason
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.schema import MAP_NAMES
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.services.model import Prefix
from tests.datapath.writing import SMALL, Bench, check, port

pytestmark = pytest.mark.root

_ID = 11


def _update(table: str, key: bytes, value: bytes = b"") -> Callable[[Bench], None]:
    def write(bench: Bench) -> None:
        assert bench.maps is not None
        bench.maps[table].update(key, value or b"\xff" * bench.maps[table].spec.value_size)

    return write


def _overwrite_backend(bench: Bench) -> None:
    assert bench.maps is not None
    size = bench.maps["backends"].spec.value_size
    bench.maps.shared("backends").bytes[_ID * size : (_ID + 1) * size] = b"\xff" * size


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_update("service_names", bytes([_ID, 0, 0, 0])), id="service_names"),
        pytest.param(_update("services4", b"\xfe" * 8), id="services4"),
        pytest.param(_update("services6", b"\xfe" * 20), id="services6"),
        pytest.param(_update("members", b"\xfe" * 8), id="members"),
        pytest.param(_update("departures", b"\xfe" * 8), id="departures"),
        *(
            pytest.param(_update("departures", b"\xfe" * 8, U32.pack(why)), id=f"departures-{why.name}")
            for why in RemovalReason
        ),
        pytest.param(_overwrite_backend, id="backends"),
    ],
)
def test_what_no_agent_writes_stops_neither_commands_nor_the_next_agent(
    bench: Bench, damage: Callable[[Bench], None]
) -> None:
    """The comparison of maps finds it, and removes it; until then it is nobody's."""
    wanted = port("a", [1, 2], [1])
    bench.empty().apply([wanted], complete=True)
    expected = bench.rows
    damage(bench)
    assert bench.drift() != []
    assert bench.rows == expected
    writer = bench.reopen()
    assert writer.apply([wanted], complete=True) == []
    assert bench.rows == expected
    assert bench.maps is not None
    assert len(Dump(bench.maps).backends()) == 2


def test_backend_that_is_selected_has_lost_its_record(bench: Bench) -> None:
    """It gets another id, and the one without a record is free once nothing selects it any more."""
    ports = [port("a", [1, 2], [1], affinity=60), port("b", [2, 3])]
    bench.empty().apply(ports, complete=True)
    assert bench.maps is not None
    records = bench.maps.shared("backends")
    for number in (0, 1):
        records.bytes[number * records.stride : (number + 1) * records.stride] = bytes(records.stride)
    writer = bench.reopen()
    assert writer.apply(ports, complete=True) == []
    check(bench, {each.key: each for each in ports}, {})
    writer.reclaim(writer.take_retired())
    assert bench.records.keys() == {2, 3, 4}
    assert writer.apply([port("c", range(10, 23))]) == []
    assert len(bench.records) == SMALL.backends


def test_start_without_one_of_the_maps(bench: Bench) -> None:
    """Somebody has unpinned it, or an agent was killed before it had pinned all of them."""
    ports = [
        msgspec.structs.replace(port("a", [1, 2], [1], affinity=60), source_ranges=(Prefix(bytes(4), 0),)),
        port("b", [2, 3], terminating=(4,)),
    ]
    wanted = {each.key: each for each in ports}
    bench.empty().apply(ports, complete=True)
    for name in MAP_NAMES:
        assert bench.maps is not None
        (bench.maps.folder / "maps" / name).unlink()
        writer = bench.reopen()
        assert bench.maps.adopted
        assert writer.apply(ports, complete=True) == [], name
        check(bench, wanted, {})
        writer.reclaim(writer.take_retired())
