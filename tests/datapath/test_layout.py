"""The agent's bytes are the programs' bytes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import layout, schema
from ebpfproxy.datapath.abi.layout import Scope
from ebpfproxy.services.model import (
    Backend,
    BackendState,
    Family,
    FrontendKind,
    Protocol,
    ServicePortKey,
)

BPF = Path(__file__).parents[2] / "bpf"
STRUCTS = {
    "service4_key": "services4 key",
    "service6_key": "services6 key",
    "service": "services4 value",
    "backend": "backends value",
    "origin": "sock_origin value",
    "peers": "sock_peers value",
    "clash_key": "port_clashes key",
    "redirect": "sock_redirects value",
    "service_stats": "service_stats value",
    "backend_stats": "backend_stats value",
    "member_key": "members key",
    "affinity_key": "affinity key",
    "affinity": "affinity value",
    "load": "loads value",
    "flow": "conntrack key",
    "nat": "conntrack value",
    "departure_key": "departures key",
    "device": "devices value",
    "fragment_key": "fragments key",
    "source_range_key": "source_ranges key",
    "cidr_key": "cidrs key",
}


def test_every_struct_has_the_size_that_its_map_has(tmp_path: Path) -> None:
    source = tmp_path / "sizes.c"
    source.write_text(
        "#include <stdbool.h>\n#include <stdio.h>\n#include <linux/types.h>\n"
        "typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64;\n"
        '#include "lib/types.h"\n#include <stddef.h>\n'
        "int main(void)\n{\n"
        + "".join(f'printf("{name} %zu\\n", sizeof(struct {name}));\n' for name in STRUCTS)
        + 'printf("proto %zu\\n", offsetof(struct backend, proto));\n'
        + 'printf("state %zu\\n", offsetof(struct backend, state));\n'
        + "return sizeof(union selection) != 8 || sizeof(union slot) != 8;\n}\n"
    )
    program = tmp_path / "sizes"
    subprocess.run(["clang", f"-I{BPF}", "-o", str(program), str(source)], check=True)
    said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    sizes = {name: int(size) for name, size in re.findall(r"(\w+) (\d+)", said)}
    specs = {spec.name: spec for spec in schema.map_specs(Capacity())}
    for name, where in STRUCTS.items():
        spec, part = where.split()
        assert sizes[name] == getattr(specs[spec], f"{part}_size"), name
    assert sizes["proto"] == layout.BACKEND_PROTOCOL_OFFSET
    assert sizes["state"] == layout.BACKEND_STATE_OFFSET


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


def test_a_free_backend_is_none() -> None:
    assert layout.unpack_backend(bytes(layout.BACKEND_SIZE)) is None


def test_another_size_is_another_version() -> None:
    assert schema.version_name(Capacity()) != schema.version_name(Capacity(services=1))
    assert schema.version_name(Capacity()).startswith(f"v{schema.SCHEMA_VERSION}-")
