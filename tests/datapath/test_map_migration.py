"""What is copied to maps of other sizes, entry by entry; whole flows are in tests/e2e/test_outside.py."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import starmap
from pathlib import Path

import pytest

from ebpfproxy.datapath.abi import flow_layout
from ebpfproxy.datapath.abi.flow_layout import (
    AFFINITY,
    NAT_STATE,
    AffinityKey,
    BackendUse,
    ClientKind,
    Entry,
    Flow,
    Nat,
    NatFlags,
    RemovalReason,
    Seen,
)
from ebpfproxy.datapath.abi.layout import NSEC_PER_SEC, U32, pack_name
from ebpfproxy.datapath.abi.socket_layout import OriginKind, origin_frontend, origin_use, with_origin_ids
from ebpfproxy.datapath.flows import map_migration
from ebpfproxy.datapath.flows.map_migration import MapMigration
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.former import former_backends, with_former
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.services.model import Backend, BackendState, Family, Protocol, ServicePortKey
from tests.datapath.test_socket_records import Sockets, origin
from tests.datapath.writing import backend, port, set_load

pytestmark = pytest.mark.root

CLIENT = bytes((10, 244, 1, 7))
WEB, SHOP = (ServicePortKey("shop", name, "http", Protocol.TCP, Family.IPV4) for name in ("web", "shop"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def _affinity(sockets: Sockets, service: int) -> int | None:
    key = flow_layout.pack_affinity_key(AffinityKey(CLIENT, service, ClientKind.ADDRESS))
    found = sockets.maps["affinity"].lookup(key)
    return None if found is None else flow_layout.unpack_affinity(found)[0]


def _set_affinity(sockets: Sockets, service: int, backend: int) -> None:
    key = flow_layout.pack_affinity_key(AffinityKey(CLIENT, service, ClientKind.ADDRESS))
    sockets.maps["affinity"].update(key, AFFINITY.pack(backend, 0, 1))


def test_affinity_is_copied_whatever_service_has_the_same_id_in_the_new_maps(
    pins: Path, stack: ExitStack
) -> None:
    """Two Services whose ids are exchanged in the new maps, and a client that has asked one there already."""
    old, new = Sockets(pins, stack, 64), Sockets(pins, stack, 128)
    for sockets, web, shop in ((old, 3, 6), (new, 6, 3)):
        sockets.maps["service_names"].update(U32.pack(web), pack_name(WEB))
        sockets.maps["service_names"].update(U32.pack(shop), pack_name(SHOP))
    for sockets, first in ((old, 1), (new, 2)):
        for number in range(2):
            backend = Backend(bytes((10, 244, 0, number)), 80, Protocol.TCP)
            sockets.maps.backends().write(first + number, backend, BackendState.ACTIVE)
    _set_affinity(old, 3, 1)
    _set_affinity(old, 6, 2)
    # The new programs have chosen for shop, whose new id is web's old one.
    _set_affinity(new, 3, 2)
    migration = MapMigration(pins, new.maps, new.programs)
    stack.callback(migration.close)
    migration.copy()
    assert (_affinity(new, 6), _affinity(new, 3)) == (2, 2)
    # What begins later is found by a later copy, which leaves what is there.
    _set_affinity(old, 6, 1)
    migration.copy()
    assert (_affinity(new, 6), _affinity(new, 3)) == (2, 2)


class _Flows:
    """Maps of two sizes with a Service that has other ids in each, and the entry that one key has in them."""

    KEY = flow_layout.pack_flow(Flow(backend(1).address, CLIENT, 80, 2000, Protocol.TCP, False))

    def __init__(self, pins: Path, stack: ExitStack) -> None:
        self._pins, self._stack = pins, stack
        self.old, self.new = Sockets(pins, stack, 64), Sockets(pins, stack, 128)
        self.uses = {id(self.old): BackendUse(3, 5), id(self.new): BackendUse(4, 6)}
        for sockets in (self.old, self.new):
            service_id, backend_id = self.uses[id(sockets)]
            sockets.maps["service_names"].update(U32.pack(service_id), pack_name(WEB))
            sockets.maps.backends().write(backend_id, backend(1), BackendState.ACTIVE)
        self.migration = MapMigration(pins, self.new.maps, self.new.programs)
        stack.callback(self.migration.close)

    def find_maps_of_a_killed_agent(self) -> None:
        """Its programs for the new maps may be attached."""
        self.new.maps.adopted = True
        self.migration.close()
        self.migration = MapMigration(self._pins, self.new.maps, self.new.programs)
        self._stack.callback(self.migration.close)

    def put(self, sockets: Sockets, client: int, created: int, seen: int = 0, last: int = 0) -> None:
        """The port is that of a client with this port."""
        use = self.uses[id(sockets)]
        flags = NatFlags.REPLY | NatFlags.SOURCE
        nat = Nat(backend(1).address, CLIENT, 80, client, *use, flags, Seen(seen), last or created, created)
        sockets.maps["conntrack"].update(self.KEY, flow_layout.pack_nat(self.KEY, nat))

    def copied(self) -> tuple[int, Seen, int]:
        """The client's port, what was seen, and the time of the last packet, in the new maps."""
        self.migration.copy()
        value = self.new.maps["conntrack"].lookup(self.KEY)
        assert value is not None
        entry = Entry(self.KEY, value)
        assert entry.use == self.uses[id(self.new)]
        # What is copied has the epoch before the current one.
        assert value in [entry.with_use(entry.use, epoch) for epoch in (-1, 0)], "its check is right"
        return entry.nat.destination_port, entry.nat.seen, entry.last


@pytest.fixture
def flows(pins: Path, stack: ExitStack) -> _Flows:
    return _Flows(pins, stack)


def test_port_that_another_client_gets_after_a_copy_is_copied_again(flows: _Flows) -> None:
    """Its former owner has closed its connection meanwhile; else replies to the later one went to the former."""
    flows.put(flows.old, 1001, created=10)
    assert flows.copied()[0] == 1001
    flows.put(flows.old, 1002, created=20)
    assert flows.copied()[0] == 1002


def test_flow_that_ends_after_a_copy_has_ended_in_the_new_maps(flows: _Flows) -> None:
    """And one that is confirmed is so there; else it would hold its port for long, or lose it."""
    flows.put(flows.old, 1001, created=10)
    assert flows.copied()[1] == Seen(0)
    for seen in (Seen.REPLY, Seen.REPLY | Seen.FIN, Seen.REPLY | Seen.FIN | Seen.REPLY_FIN):
        flows.put(flows.old, 1001, created=10, seen=seen)
        assert flows.copied()[1] == seen


def test_what_programs_for_the_new_maps_have_made_or_seen_stays(flows: _Flows) -> None:
    flows.put(flows.old, 1001, created=10)
    flows.copied()
    flows.put(flows.new, 1001, created=10, seen=Seen.REPLY, last=40)
    flows.put(flows.old, 1001, created=10, seen=Seen.FIN, last=30)
    assert flows.copied() == (1001, Seen.REPLY | Seen.FIN, 40)
    flows.put(flows.new, 1003, created=50)
    flows.put(flows.old, 1002, created=20)
    assert flows.copied()[0] == 1003


def test_flow_that_ends_in_a_half_of_each_map_has_ended(flows: _Flows) -> None:
    """New programs at one device and old ones at another: each has seen the FIN of one direction."""
    flows.put(flows.old, 1001, created=10)
    flows.copied()
    flows.put(flows.new, 1001, created=10, seen=Seen.FIN, last=30)
    flows.put(flows.old, 1001, created=10, seen=Seen.REPLY | Seen.REPLY_FIN, last=30)
    assert flows.copied() == (1001, Seen.REPLY | Seen.FIN | Seen.REPLY_FIN, 30)


def test_entry_that_a_program_replaces_is_left_to_it(flows: _Flows) -> None:
    """What is claimed in the old maps is free in the new ones; there it stays claimed until it is replaced."""
    flows.put(flows.old, 1001, created=10, seen=Seen.RST | Seen.CLAIMED)
    assert flows.copied()[1] == Seen.RST
    flows.put(flows.new, 1001, created=10, seen=Seen.RST | Seen.CLAIMED)
    flows.put(flows.old, 1001, created=10, seen=Seen.RST | Seen.REPLY)
    assert flows.copied()[1] == Seen.RST | Seen.CLAIMED


@pytest.mark.parametrize("client", [1001, 1003], ids=["same flow", "later flow"])
def test_what_programs_for_the_new_maps_write_while_flows_are_read_stays(
    flows: _Flows, monkeypatch: pytest.MonkeyPatch, client: int
) -> None:
    """An agent was killed while it swapped programs; the next one reads the old maps for a second."""
    merge = map_migration._merge_filters

    def write(old: MapSet, new: MapSet) -> None:
        """Between reading and writing."""
        flows.put(flows.new, client, created=10 if client == 1001 else 50, seen=Seen.RST, last=50)
        merge(old, new)

    monkeypatch.setattr(map_migration, "_merge_filters", write)
    flows.put(flows.old, 1001, created=10, seen=Seen.REPLY, last=20)
    flows.find_maps_of_a_killed_agent()
    expected = Seen.RST | Seen.REPLY if client == 1001 else Seen.RST
    assert flows.copied() == (client, expected, 50)


def test_flow_of_dsr_at_the_backends_node_has_no_backend_in_either(flows: _Flows) -> None:
    """Its connection ended if its entries were not copied: the backend's node answers it (DSR)."""
    to_pod = flow_layout.pack_flow(Flow(CLIENT, bytes((203, 0, 113, 10)), 2000, 80, Protocol.TCP, False))
    from_pod = flow_layout.pack_flow(Flow(backend(1).address, CLIENT, 80, 2000, Protocol.TCP, True))
    flags, use = NatFlags.DSR_BACKEND, BackendUse(3, flow_layout.NO_USE.backend_id)
    for key, nat in (
        (to_pod, Nat(CLIENT, backend(1).address, 2000, 80, *use, flags, Seen(0), 10, 10)),
        (
            from_pod,
            Nat(bytes((203, 0, 113, 10)), CLIENT, 80, 2000, *use, flags | NatFlags.REPLY, Seen.REPLY, 10, 10),
        ),
    ):
        flows.old.maps["conntrack"].update(key, flow_layout.pack_nat(key, nat))
    flows.migration.copy()
    for key in (to_pod, from_pod):
        value, was = (each.maps["conntrack"].lookup(key) for each in (flows.new, flows.old))
        assert value is not None and was is not None
        entry = Entry(key, value)
        assert entry.use == BackendUse(4, flow_layout.NO_USE.backend_id)
        assert Entry(key, was).with_use(entry.use, -1) == value


def test_what_a_killed_agent_has_copied_is_copied_again_where_it_has_changed(
    flows: _Flows, pins: Path, stack: ExitStack
) -> None:
    flows.put(flows.old, 1001, created=10)
    flows.copied()
    flows.put(flows.old, 1002, created=20)
    flows.migration = MapMigration(pins, flows.new.maps, flows.new.programs)
    stack.callback(flows.migration.close)
    assert flows.copied()[0] == 1002


def test_keys_of_a_map_are_those_of_its_entries(pins: Path, stack: ExitStack) -> None:
    maps = Sockets(pins, stack, 64).maps
    names = maps["service_names"]
    names.update_many({U32.pack(number): pack_name(WEB) for number in range(5000)})
    assert names.keys() == {key for key, _ in names.items()}
    assert len(names.keys()) == 5000
    assert maps["affinity"].keys() == set()


def test_entries_that_have_changed_are_found_by_a_part_of_their_value(pins: Path, stack: ExitStack) -> None:
    """As many as take several batches; what is deleted and comes back is new."""
    flows = Sockets(pins, stack, 64).maps["conntrack"]
    entries = {}
    for number in range(5000):
        key = flow_layout.pack_flow(Flow(CLIENT, backend(1).address, number, 80, Protocol.TCP, False))
        nat = Nat(CLIENT, backend(1).address, number, 80, 3, 5, NatFlags(0), Seen(0), 1, 1)
        entries[key] = flow_layout.pack_nat(key, nat)
    flows.update_many(entries)
    seen: set[int] = set()
    assert dict(flows.changed(NAT_STATE, set(), seen)) == entries
    first, second, third, *_ = starmap(Entry, entries.items())
    ended = first.with_seen(Seen.FIN)
    flows.update(first.key, ended)
    flows.update(second.key, second.with_use(BackendUse(4, 5), 0))
    flows.delete(third.key)
    now: set[int] = set()
    assert dict(flows.changed(NAT_STATE, seen, now)) == {
        first.key: ended,
        second.key: flows.lookup(second.key),
    }
    flows.update(*third)
    assert dict(flows.changed(NAT_STATE, now, set())) == {third.key: third.value}


class _Sized(Sockets):
    """With a writer that waits for endpoints, by a clock that the test sets."""

    def __init__(self, pins: Path, stack: ExitStack, slots: int) -> None:
        super().__init__(pins, stack, slots)
        self.now = 100.0
        grace = Grace()
        stack.callback(grace.close)
        # Without a cycle, in which maps would stay open until it is collected.
        itself = weakref.proxy(self)
        self.writer = Writer(self.maps, grace.wait, absence=5.0, clock=lambda: itself.now)

    def id_of(self, n: int) -> int:
        records = self.maps.backends()
        (found,) = (
            each for each in records.ids() if (known := records.read(each)) and known[0] == backend(n)
        )
        return found

    def departures(self) -> dict[BackendUse, int]:
        found = self.maps["departures"].items()
        return {flow_layout.unpack_departure(key): U32.unpack(value)[0] for key, value in found}

    def flow(self, use: BackendUse, n: int, source: int) -> bytes:
        """Adds one of a client to a backend, as found current; returns its key."""
        flow = Flow(CLIENT, bytes((10, 96, 0, 97)), source, 80, Protocol.UDP, False)
        epoch = self.maps.shared("epochs").words()[use.service_id]
        key = flow_layout.pack_flow(flow)
        nat = Nat(CLIENT, backend(n).address, source, 80, *use, NatFlags(0), Seen(0), 1, 1)
        entry = Entry(key, flow_layout.pack_nat(key, nat))
        self.maps["conntrack"].update(key, entry.with_use(use, epoch))
        return key

    def is_current(self, key: bytes) -> bool:
        """False if its next packet has it ask about its backend and its frontend."""
        value = self.maps["conntrack"].lookup(key)
        assert value is not None
        entry = Entry(key, value)
        epoch = self.maps.shared("epochs").words()[entry.use.service_id]
        return entry.with_use(entry.use, epoch) == value


def test_backends_that_left_while_no_agent_ran_leave_in_maps_of_other_sizes_as_in_the_same(
    pins: Path, stack: ExitStack
) -> None:
    """What is removed is waited for, with its flows; datagrams leave at once what is removed, or no longer ready."""
    old, new = _Sized(pins, stack, 64), _Sized(pins, stack, 128)
    old.writer.apply([port("a", [1, 2, 3, 4, 5]), port("b", [2])], complete=True)
    old.writer.apply([port("a", [1, 2, 3])])
    service = next(number for number, key in old.writer.names().items() if key.name == "a")
    before = {n: old.flow(BackendUse(service, old.id_of(n)), n, 1000 + n) for n in (1, 2, 3, 4, 5)}

    former = former_backends(pins, new.maps)
    assert former[port("a", []).key] == {backend(n) for n in (1, 2, 3, 4, 5)}
    wanted = [port("b", [2]), port("a", [1], idle=[2, 5])]
    new.writer.apply(list(with_former(wanted, former)))
    new.writer.apply(wanted, complete=True)

    service = next(number for number, key in new.writer.names().items() if key.name == "a")
    uses = {n: BackendUse(service, new.id_of(n)) for n in (1, 2, 3, 4, 5)}
    absent, idle = RemovalReason.ABSENT, RemovalReason.IDLE
    assert new.departures() == {uses[2]: idle, uses[3]: absent, uses[4]: absent, uses[5]: idle}
    migration = MapMigration(pins, new.maps, new.programs)
    stack.callback(migration.close)
    migration.catch_up()
    assert migration.copied == len(before)
    # Each asks about its backend, and about its frontend, which may be another Service's by now.
    assert not any(map(new.is_current, before.values()))

    new.now += 5.0
    new.writer.end_absences()
    gone = RemovalReason.GONE
    assert new.departures() == {uses[2]: idle, uses[3]: gone, uses[4]: gone, uses[5]: idle}


def test_unconnected_sockets_leave_an_endpoint_that_became_unready_while_no_agent_ran(
    pins: Path, stack: ExitStack
) -> None:
    """Of all frontends that a socket sends to: programs look for the removal where the epoch is another."""
    old, new = _Sized(pins, stack, 64), _Sized(pins, stack, 128)
    old.writer.apply([port("a", [1, 2])], complete=True)
    use = BackendUse(0, old.id_of(1))
    epoch = old.maps.shared("epochs").words()[use.service_id]
    frontends = [bytes((10, 96, 0, n)) for n in range(3)]
    for frontend in frontends:
        record = origin(frontend, backend(1).address, kind=OriginKind.UNCONNECTED)
        assert old.programs.restore([with_origin_ids(record, use, epoch)]) == 1
    wanted = [port("a", [2], idle=[1])]
    new.writer.apply(list(with_former(wanted, former_backends(pins, new.maps))))
    new.writer.apply(wanted, complete=True)
    migration = MapMigration(pins, new.maps, new.programs)
    stack.callback(migration.close)
    migration.copy()

    use = BackendUse(0, new.id_of(1))
    assert new.departures() == {use: RemovalReason.IDLE}
    copied = list(map_migration._origins(new.maps))
    assert sorted(origin_frontend(each)[0] for each in copied) == frontends
    epoch = new.maps.shared("epochs").words()[use.service_id]
    assert all(origin_use(each) == use for each in copied)
    assert not any(with_origin_ids(each, use, epoch) == each for each in copied), "they ask"


def test_maps_of_no_other_size_have_no_former_backends(pins: Path, stack: ExitStack) -> None:
    only = _Sized(pins, stack, 64)
    only.writer.apply([port("a", [1])], complete=True)
    assert former_backends(pins, only.maps) == {}


def test_terminating_backend_that_another_service_selects_is_a_former_one_of_what_has_it_open(
    pins: Path, stack: ExitStack
) -> None:
    old, new = _Sized(pins, stack, 64), _Sized(pins, stack, 128)
    others = [port("b", [1], terminating=(1,))]
    old.writer.apply([port("a", [1, 2]), *others], complete=True)
    service = next(number for number, key in old.writer.names().items() if key.name == "a")
    old.flow(BackendUse(service, old.id_of(1)), 1, 1001)
    set_load(old.maps, old.id_of(1), flows_begun=1)
    old.writer.apply([port("a", [2], terminating=(1,)), *others])
    former = former_backends(pins, new.maps)
    assert former[port("a", []).key] == {backend(1), backend(2)}


def test_flow_that_went_on_after_an_agent_was_killed_has_its_later_time(flows: _Flows) -> None:
    """Programs for the old maps go on until an agent gets to the end: the flow has not timed out since its first copy."""
    flows.put(flows.old, 1001, created=10, seen=1, last=20)
    assert flows.copied()[2] == 20
    flows.find_maps_of_a_killed_agent()
    flows.put(flows.old, 1001, created=10, seen=1, last=900 * NSEC_PER_SEC)
    assert flows.copied()[2] == 900 * NSEC_PER_SEC
