"""Structs have the same layout in Python and C."""

from __future__ import annotations

import ctypes as ct
import re
import socket
import struct
import subprocess
import sys
from array import array
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import (
    decision_layout,
    flow_layout,
    layout,
    measure_layout,
    node_layout,
    schema,
    socket_layout,
)
from ebpfproxy.datapath.abi.arrays import BackendRecords, Loads, Selections, SweepRecord, backend_ids
from ebpfproxy.datapath.abi.flow_layout import BackendUse, Flow, Nat, NatFlags, Seen
from ebpfproxy.datapath.abi.layout import Scope
from ebpfproxy.datapath.abi.socket_layout import OriginKind
from ebpfproxy.services.model import (
    Backend,
    BackendState,
    Family,
    FrontendKind,
    Policy,
    Prefix,
    Protocol,
    ServicePortKey,
)

BPF = Path(__file__).parents[2] / "bpf"
STRUCTS = {
    "service4_key": "services4 key",
    "service6_key": "services6 key",
    "service": "services4 value",
    "backend": "backends value",
    "frontend_line": "frontend_cache value",
    "origin": "sock_origin value",
    "peers": "sock_peers value",
    "clash_key": "port_clashes key",
    "redirect": "sock_redirects value",
    "rejections": "service_rejections value",
    "connects": "connects value",
    "traffic": "service_traffic value",
    "failure_key": "connect_failures key",
    "connect_failures": "connect_failures value",
    "member_key": "members key",
    "affinity_key": "affinity key",
    "affinity": "affinity value",
    "flow": "conntrack key",
    "nat": "conntrack value",
    "flow_slot": "flow_cache value",
    "flow_hop": "flow_hops value",
    "sweep": "sweep value",
    "departure_key": "departures key",
    "device": "devices value",
    "xdp_device": "xdp_devices value",
    "fragment_key": "fragments key",
    "source_range_key": "source_ranges key",
    "cidr_key": "cidrs key",
    "tracing": "tracing value",
    "decision_state": "decision_state value",
}


def test_struct_sizes_and_offsets_equal_those_of_the_compiler(tmp_path: Path) -> None:
    source = tmp_path / "sizes.c"
    source.write_text(
        "#include <stdbool.h>\n#include <stdio.h>\n#include <linux/types.h>\n"
        "typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64;\n"
        '#include "lib/types.h"\n#include <stddef.h>\n'
        "int main(void)\n{\n"
        + "".join(f'printf("{name} %zu\\n", sizeof(struct {name}));\n' for name in STRUCTS)
        + 'printf("proto %zu\\n", offsetof(struct backend, proto));\n'
        + 'printf("state %zu\\n", offsetof(struct backend, state));\n'
        + "".join(f'printf("{m} %zu\\n", offsetof(struct backend, {m}));\n' for m in layout.LOAD_OFFSETS)
        + 'printf("rows %d\\n", CHOICE_ROWS);\n'
        + 'printf("generations %d\\n", RANGE_GENERATIONS);\n'
        + 'printf("sequences %d\\n", RANDOM_SEQUENCES);\n'
        + 'printf("batch %d\\n", FRONTENDS_READ);\n'
        + 'printf("header %zu\\n", sizeof(struct frontends_read));\n'
        + 'printf("read %zu\\n", sizeof(struct frontend_read));\n'
        + "".join(f'printf("{m} %zu\\n", offsetof(struct sweep, {m}));\n' for m in ("next", "mark", "kept"))
        + 'printf("decision %zu\\n", sizeof(struct decision));\n'
        + "".join(f'printf("{m} %zu\\n", offsetof(struct tracing, {m}));\n' for m in ("interval", "programs"))
        + 'printf("buckets %d\\n", CONNECT_BUCKETS);\n'
        + 'printf("first %d\\n", FIRST_CONNECT_BUCKET_US);\n'
        + "return sizeof(union selection) != 8 || sizeof(union slot) != 8;\n}\n"
    )
    program = tmp_path / "sizes"
    subprocess.run(["clang", f"-I{BPF}", "-o", str(program), str(source)], check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    sizes = {name: int(size) for name, size in re.findall(r"(\w+) (\d+)", output)}
    specs = {spec.name: spec for spec in schema.map_specs(Capacity())}
    for name, where in STRUCTS.items():
        spec, part = where.split()
        assert sizes[name] == getattr(specs[spec], f"{part}_size"), name
    assert sizes["proto"] == layout.BACKEND_PROTOCOL_OFFSET
    assert sizes["next"] == SweepRecord.NUMBERS_AT
    assert sizes["mark"] == SweepRecord.MARK_AT
    assert sizes["kept"] == SweepRecord.RESULTS_AT
    assert sizes["decision"] == decision_layout.DECISION.size
    assert sizes["interval"] == decision_layout.WANTED_AT
    assert sizes["programs"] == decision_layout.PROGRAMS_AT
    assert sizes["state"] == layout.BACKEND_STATE_OFFSET
    assert {name: sizes[name] for name in layout.LOAD_OFFSETS} == layout.LOAD_OFFSETS
    assert sizes["rows"] == layout.CHOICE_ROWS
    assert sizes["generations"] == layout.RANGE_GENERATIONS
    assert sizes["sequences"] == layout.RANDOM_SEQUENCES
    assert sizes["batch"] == layout.FRONTENDS_READ
    assert sizes["header"] == layout.FRONTENDS_READ_HEADER.size
    assert sizes["read"] == len(layout.MAPPED) + layout.SERVICE4_KEY.size + 4 + layout.SERVICE.size
    assert sizes["buckets"] == len(measure_layout.CONNECT_BOUNDS) + 1
    assert sizes["first"] == measure_layout.CONNECT_BOUNDS[0]


addresses = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)).filter(
    lambda a: len(a) == 4 or not a.startswith(b"\0" * 10 + b"\xff\xff")
)
ports = st.integers(1, 65535)
protocols = st.sampled_from(list(Protocol))


@given(addresses, ports, protocols, st.sampled_from(list(Scope)))
def test_service_keys(address: bytes, port: int, protocol: Protocol, scope: Scope) -> None:
    packed = layout.pack_service_key(address, port, protocol, scope)
    assert layout.unpack_service_key(packed) == (address, port, protocol, scope)
    assert len(packed) == (8 if len(address) == 4 else 20)


@given(addresses, ports, protocols, st.sampled_from(list(BackendState)))
def test_backends(address: bytes, port: int, protocol: Protocol, state: BackendState) -> None:
    backend = Backend(address, port, protocol)
    assert layout.unpack_backend(layout.pack_backend(backend, state)) == (backend, state)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_selections(base: int, count: int) -> None:
    assert layout.selection_range(layout.selection_word(base, count)) == (base, count)


def test_service_entries_and_names() -> None:
    packed = layout.pack_service(7, 3, FrontendKind.NODE_PORT, 0, 10800)
    assert layout.unpack_service(packed) == (7, 3, FrontendKind.NODE_PORT, 0, 10800)
    key = ServicePortKey("n" * 63, "s" * 63, "p" * 63, Protocol.SCTP, Family.IPV6)
    assert layout.unpack_name(layout.pack_name(key)) == key


def test_unused_backend_is_unpacked_as_none() -> None:
    assert layout.unpack_backend(bytes(layout.BACKEND_SIZE)) is None


def test_changed_capacity_is_another_folder() -> None:
    assert schema.version_name(Capacity()) != schema.version_name(Capacity(services=1))
    assert schema.version_name(Capacity()).startswith(f"v{schema.SCHEMA_VERSION}-")


prefixes = addresses.flatmap(
    lambda address: st.integers(0, 8 * len(address)).map(lambda length: cut(address, length))
).filter(lambda prefix: len(prefix.address) == 4 or any(prefix.address))


def cut(address: bytes, length: int) -> Prefix:
    """Returns the prefix of this length that contains an address."""
    rest = 8 * len(address) - length
    return Prefix((int.from_bytes(address) >> rest << rest).to_bytes(len(address)), length)


@given(prefixes, st.integers(0, 2**32 - 1))
def test_ranges_of_addresses(prefix: Prefix, service_id: int) -> None:
    packed = layout.pack_source_range(service_id, prefix)
    assert layout.unpack_source_range(packed) == (service_id, prefix)
    assert node_layout.unpack_cidr(node_layout.pack_cidr(prefix)) == prefix


@given(addresses, addresses, st.integers(0, 32))
def test_prefix_contains_addresses_with_its_leading_bits(one: bytes, other: bytes, length: int) -> None:
    prefix = cut(one, length)
    assert prefix.contains(one)
    assert prefix.contains(other) == (len(other) == len(one) and cut(other, length) == prefix)
    assert not prefix.contains(b"")


def test_shortest_ipv6_prefix_is_no_ipv4_prefix() -> None:
    everything = Prefix(bytes(16), 0)
    assert layout.unpack_source_range(layout.pack_source_range(7, everything)) == (7, everything)


def test_backends_in_an_array() -> None:
    memory = memoryview(bytearray(4096))
    records = BackendRecords(memory, 5)
    web = Backend(bytes([10, 0, 0, 1]), 80, Protocol.TCP)
    records.write(3, web, BackendState.ACTIVE)
    records.set_state(3, BackendState.DRAINED)
    assert (len(records), records.ids()) == (5, [3])
    assert records.read(3) == (web, BackendState.DRAINED)
    assert records.state(3) == BackendState.DRAINED
    assert [number for number, _ in records.identities()] == [3]
    assert records.read(4) is records.read(5) is records.read(0xFFFFFFFF) is None
    records.clear(3)
    assert not any(memory)


def test_what_a_backend_counts() -> None:
    """Words of 32 bits wrap; a record that is written or cleared keeps its counts."""
    memory = memoryview(bytearray(4096))
    loads, records = Loads(memory, 5), BackendRecords(memory, 5)

    def count(number: int, **fields: int) -> None:
        for name, value in fields.items():
            form = layout.U64 if name in ("sockets_opened", "flows_begun", "datagrams") else layout.U32
            form.pack_into(memory, number * layout.BACKEND_SIZE + layout.LOAD_OFFSETS[name], value)

    count(2, sockets_opened=(5 << 32) + 1, sockets_closed=0xFFFFFFFE, sockets_carried=0xFFFFFFFF, datagrams=7)
    records.write(2, Backend(bytes([10, 0, 0, 1]), 80, Protocol.TCP), BackendState.ACTIVE)
    assert loads[2].open_sockets == loads[2].open_now == 2
    assert loads[2].chosen == (5 << 32) + 1 + 7
    records.clear(2)
    assert loads[2].open_sockets == 2
    count(4, flows_begun=(1 << 32) + 1, flows_ended=3)
    assert (loads[4].counted_flows, loads[4].open_flows) == (-2, 0)
    loads.correct(4, 2)
    assert loads[4].counted_flows == 0
    assert list(loads.with_flows(5)) == [4]
    assert list(loads.with_flows(4)) == []
    assert (list(loads.counted(5)), list(loads.counted(4))) == ([2, 4], [2])
    count(4, flows_seen=3 | layout.FLOWS_ENDED)
    assert (loads.seen(5), loads.seen(4)) == ({4: 3}, {})
    loads.forget_seen(5)
    assert loads.seen(5) == {}
    for number in (2, 4):
        loads.clear(number)
    assert not any(memory)


def test_selections_are_ranges_of_slots() -> None:
    slots = memoryview(bytearray(4096))
    selections = Selections((ct.c_uint64 * 8)(), slots)
    selections.write_slots(5, array("Q", [layout.slot(1), layout.slot(0xFFFFFFFF, 7), layout.slot(1)]))
    selections.set_range(3, Policy.LOCAL, (5, 3))
    assert selections.ranges(3) == ((0, 0), (5, 3))
    assert backend_ids(selections.slots((5, 3))).tolist() == [1, 0xFFFFFFFF, 1]
    assert selections.slots((0, 0)) == array("Q")


ids = st.integers(0, 2**32 - 1)
flows = st.builds(Flow, addresses, addresses, ports, ports, st.sampled_from([6, 17, 132, 136]), st.booleans())
nats = st.builds(
    Nat,
    addresses,
    addresses,
    ports,
    ports,
    ids,
    ids,
    st.integers(0, 63).map(NatFlags),
    st.integers(0, 15).map(Seen),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    ids,
    ids,
)


@given(flows, nats)
def test_flows_and_their_entries(flow: Flow, nat: Nat) -> None:
    """The properties of an entry equal the fields of the unpacked one."""
    key = flow_layout.pack_flow(flow)
    entry = flow_layout.Entry(key, flow_layout.pack_nat(key, nat))
    assert (entry.flow, entry.nat) == (flow, nat)
    assert (entry.protocol, entry.source) == (flow.protocol, flow.source)
    assert (entry.flags, entry.seen, entry.last, entry.created) == (
        nat.flags,
        nat.seen,
        nat.last,
        nat.created,
    )
    assert entry.use == (nat.service_id, nat.backend_id)
    partner = flow_layout.unpack_flow(entry.partner)
    assert partner[:4] == (nat.destination, nat.source, nat.destination_port, nat.source_port)
    moved = flow_layout.Entry(entry.key, entry.with_use(BackendUse(1, 2), 0x12345))
    assert moved.nat == nat._replace(service_id=1, backend_id=2)
    assert moved.value == flow_layout.with_check(key, moved.value) != entry.value


@given(addresses, ports, addresses, ports, ids, ids, ids)
def test_origins_of_sockets(
    frontend: bytes, port: int, backend: bytes, target: int, service_id: int, backend_id: int, netns: int
) -> None:
    peer = socket_layout.PEER.pack(
        layout.pack_address(frontend),
        layout.pack_address(backend),
        socket.htons(port),
        socket.htons(target),
        service_id,
        backend_id,
        5,
    )
    connected, unconnected = OriginKind.CONNECTED, OriginKind.UNCONNECTED
    key = int.from_bytes(socket_layout.origin_key(7, connected), sys.byteorder)
    packed = socket_layout.ORIGIN.pack(key, peer, netns, 0)
    assert packed[socket_layout.ORIGIN_KIND_AT] == connected and socket_layout.is_connected(packed)
    assert socket_layout.origin_cookie(packed) == 7
    assert socket_layout.origin_frontend(packed) == (frontend, port)
    assert socket_layout.origin_backend(packed) == (backend, target)
    assert socket_layout.origin_use(packed) == (service_id, backend_id)
    assert socket_layout.origin_netns(packed) == netns
    assert list(socket_layout.origin_uses(packed * 2)) == [(service_id, backend_id)] * 2
    assert list(socket_layout.split_origins(packed * 2)) == [packed, packed]
    moved = socket_layout.with_origin_ids(packed, BackendUse(1, 2), 0x300000004)
    assert socket_layout.origin_use(moved) == (1, 2)
    assert moved == packed[:44] + struct.pack("=III", 1, 2, 4) + packed[56:]
    free = bytes(socket_layout.PEER.size)
    page = socket_layout.PEERS.pack(free + peer + free * 2, 0, netns)
    first = layout.U64.pack(7 | 1 << 56)
    assert list(socket_layout.peers_as_origins(first, page)) == [
        socket_layout.origin_key(7, unconnected) + packed[8:]
    ]
