"""Maps that another version of ebpfproxy has pinned are copied if possible, and no command reads the others."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import msgspec
import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath import dump
from ebpfproxy.datapath.abi import schema, uapi
from ebpfproxy.datapath.abi.layout import DRAINED, U32
from ebpfproxy.datapath.abi.schema import MapSpec, map_specs
from ebpfproxy.datapath.flows.map_migration import copy_drain_requests
from ebpfproxy.datapath.kernel import maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import pin_folder
from tests.datapath.writing import SMALL

pytestmark = pytest.mark.root

REQUEST = bytes(range(DRAINED.size))


def other_specs(capacity: Capacity) -> tuple[MapSpec, ...]:
    """Returns specifications that lack one map, have an additional one, and a third with another value size."""
    changed = {"service_rejections": 24}
    return (
        *(
            spec._replace(value_size=changed.get(spec.name, spec.value_size))
            for spec in map_specs(capacity)
            if spec.name != "service_choices"
        ),
        MapSpec("abandoned", uapi.MAP_ARRAY, 4, 8, 1),
    )


@pytest.fixture
def other(pins: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MapSet]:
    with monkeypatch.context() as patch:
        for module in (schema, maps):
            patch.setattr(module, "map_specs", other_specs)
        made = maps.open_or_create(pin_folder(pins), Capacity())
    yield made
    made.close()


def test_drain_requests_are_copied(pins: Path, other: MapSet) -> None:
    other["drained"].update(REQUEST, U32.pack(1))
    new = maps.open_or_create(pin_folder(pins), Capacity())
    assert new.folder != other.folder
    copy_drain_requests(pin_folder(pins), new)
    assert dict(new["drained"].items()) == {REQUEST: U32.pack(1)}
    new.close()


def test_commands_report_another_version(pins: Path, other: MapSet) -> None:
    with pytest.raises(dump.NothingPinnedError, match="another version of ebpfproxy") as output:
        dump.open_maps(pins)
    assert str(other.folder) in str(output.value)


def test_commands_name_the_maps_whose_pins_are_gone(pins: Path) -> None:
    """Another version's commands would not read them either."""
    made = maps.open_or_create(pin_folder(pins), SMALL)
    for name in ("members", "conntrack"):
        (made.folder / "maps" / name).unlink()
    with pytest.raises(
        dump.NothingPinnedError, match=f"{made.folder}/maps lacks conntrack, members: somebody"
    ):
        dump.open_maps(pins)
    made.close()


def test_what_reads_maps_for_long_follows_an_agent_that_makes_others(pins: Path) -> None:
    """`ebpfproxy service list --watch` would show the former ones for ever."""
    home = pin_folder(pins)
    former = maps.open_or_create(home, SMALL)
    current = dump.CurrentMaps(pins)
    assert current.get().folder == former.folder and not current.are_replaced
    other = maps.open_or_create(home, msgspec.structs.replace(SMALL, backends=2048))
    rmtree(former.folder)
    assert current.are_replaced
    assert current.get().folder == other.folder
    assert not current.are_replaced
    # So does one with other maps of the same sizes.
    rmtree(other.folder)
    again = maps.open_or_create(home, msgspec.structs.replace(SMALL, backends=2048))
    assert current.are_replaced
    again["drained"].update(REQUEST, U32.pack(1))
    assert dict(current.get()["drained"].items()) == {REQUEST: U32.pack(1)}
    rmtree(again.folder)
    with pytest.raises(dump.NothingPinnedError, match="nothing is pinned"):
        current.get()
    for each in (former, other, again):
        each.close()


@pytest.mark.parametrize("field", Capacity.__struct_fields__)
@pytest.mark.parametrize("size", [1024, 1 << 20])
def test_maps_of_other_sizes_are_of_this_version(pins: Path, field: str, size: int) -> None:
    """Whatever is configured, commands read all maps, with the sizes that they have."""
    made = maps.open_or_create(pin_folder(pins), msgspec.structs.replace(SMALL, **{field: size}))
    read = dump.open_maps(pins)
    assert {name: each.spec for name, each in read.maps.items()} == {
        name: each.spec for name, each in made.maps.items()
    }
    for each in (made, read):
        each.close()


def opened() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_maps_that_cannot_all_be_opened_are_closed(pins: Path) -> None:
    """The page opens them for each question, and is told of an error each time."""
    made = maps.open_or_create(pin_folder(pins), Capacity())
    made.close()
    pin = made.folder / "maps" / "tracing"
    pin.unlink()
    pin.mkdir()
    # What other tests have left open is closed when it is collected.
    gc.collect()
    before = opened()
    with pytest.raises(OSError, match="tracing"):
        maps.open_pinned(made.folder)
    assert opened() == before
