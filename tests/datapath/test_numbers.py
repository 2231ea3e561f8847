"""Flags, enumerations and constants have the same numbers in Python and C, and the same names."""

from __future__ import annotations

import enum
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from ebpfproxy.datapath.abi import decision_layout, flow_layout, layout, node_layout, schema, socket_layout
from ebpfproxy.datapath.abi.measure_layout import ConnectFailure
from ebpfproxy.services.model import Algorithm, BackendState, FrontendKind, Policy

BPF = Path(__file__).parents[2] / "bpf"
HEADERS = sorted((BPF / "lib").glob("*_types.h"))
#: Constants that structs' headers do not have.
OTHERS = ("events.h", "filter.h", "flow_cache.h", "next_hop.h", "rewrite.h", "service_cidr.h", "../sweep.c")

#: Names of members in C begin with these prefixes.
PREFIXES: Mapping[str, type[enum.IntEnum | enum.IntFlag]] = {
    "ALGORITHM_": Algorithm,
    "BACKEND_": BackendState,
    "CIDR_": node_layout.CidrFlags,
    "CLIENT_": flow_layout.ClientKind,
    "DECISION_": decision_layout.DecisionKind,
    "DEPARTED_": flow_layout.RemovalReason,
    "EVENT_": node_layout.PacketEvent,
    "FAILURE_": ConnectFailure,
    "KIND_": FrontendKind,
    "NAT_": flow_layout.NatFlags,
    "ORIGIN_": socket_layout.OriginKind,
    "PLACE_": decision_layout.Place,
    "POLICY_": Policy,
    "SCOPE_": layout.Scope,
    "SEEN_": flow_layout.Seen,
    "SERVICE_": layout.ServiceFlags,
    "TRACING_": decision_layout.TracingPrograms,
    "XDP_": node_layout.XdpFlags,
}
#: Flags of ``devices`` that are the whole node's have no prefix.
OF_NODE = ("HANDOVER_MODE", "NO_NEW_FLOWS", "MIGRATING_FLOWS")
#: These are numbers of another kind.
NO_MEMBERS = {"ORIGIN_KIND_SHIFT"}

CONSTANTS = {
    "ADDRESS_FILTER_BITS": schema.ADDRESS_FILTER_BITS,
    "BITS_OF_ALGORITHM": decision_layout.BITS_OF_ALGORITHM,
    "CIDR_FILTER_BITS": schema.CIDR_FILTER_BITS,
    "CRC_STEPS": schema.CRC_STEPS,
    "ENTRIES_OF_A_RUN": schema.ENTRIES_OF_A_RUN,
    "EVENTS": len(node_layout.PacketEvent),
    "FLOWS_ENDED": layout.FLOWS_ENDED,
    "FLOW_FILTER_BITS": schema.FLOW_FILTER_BITS,
    "FLOW_MARKS": schema.FLOW_MARKS,
    "1 << FLOW_GROUP_BITS": schema.FLOW_GROUPS,
    "1 << NEXT_HOP_BITS": schema.NEXT_HOPS,
    "NOBODY": layout.NOBODY,
    "ORIGIN_KIND_SHIFT": socket_layout.COOKIE_BITS,
    "PEERS": socket_layout.PEER_PLACES,
    "POLICIES": layout.POLICIES,
    "UNALLOCATED": len(node_layout.UNALLOCATED),
    "UNALLOCATED_IPV6": node_layout.UNALLOCATED["packet", 6],
    "UNALLOCATED_SOCKET": node_layout.UNALLOCATED["socket", 4],
    "WORDS_OF_A_RUN * 8": schema.BYTES_OF_A_RUN,
}


def _definitions() -> str:
    """Returns the simple macros, and the enumeration of events, of headers that include more than structs."""
    sources = [(BPF / "lib" / name).read_text() for name in OTHERS]
    macros = [line for text in sources for line in re.findall(r"^#define [A-Z_]+[ \t]+[\d(].*", text, re.M)]
    return "\n".join([*macros, *re.findall(r"enum event \{.*?\};", "".join(sources), re.S)])


def _numbers(folder: Path, names: Iterable[str]) -> dict[str, int]:
    source, program = folder / "numbers.c", folder / "numbers"
    source.write_text(
        "#include <stdbool.h>\n#include <stdio.h>\n#include <linux/types.h>\n"
        "typedef __u8 u8; typedef __u16 u16; typedef __u32 u32; typedef __u64 u64;\n"
        f'#include "lib/types.h"\n{_definitions()}\nint main(void)\n{{\n'
        + "".join(f'printf("{name}=%lld\\n", (long long)({name}));\n' for name in names)
        + "return 0;\n}\n"
    )
    subprocess.run(["clang", f"-I{BPF}", "-o", str(program), str(source)], check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, _, number in (line.partition("=") for line in output.splitlines())}


def test_constants(tmp_path: Path) -> None:
    assert _numbers(tmp_path, CONSTANTS) == CONSTANTS


def test_members_of_enumerations(tmp_path: Path) -> None:
    wanted = {f"{prefix}{each.name}": int(each) for prefix, kind in PREFIXES.items() for each in kind}
    wanted |= {
        each.name if each.name in OF_NODE else f"DEVICE_{each.name}": int(each)
        for each in node_layout.DeviceFlags
        if each.name is not None
    }
    assert _numbers(tmp_path, wanted) == wanted


@pytest.mark.parametrize("prefix", [*PREFIXES, "DEVICE_"])
def test_names_in_c_are_members(prefix: str) -> None:
    """A flag or reason that only programs know would be shown as nothing, or end a command."""
    kind = PREFIXES.get(prefix, node_layout.DeviceFlags)
    headers = [BPF / "lib" / "events.h"] if prefix == "EVENT_" else HEADERS
    text = "".join(re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S) for path in headers)
    found = set(re.findall(rf"\b{prefix}[A-Z0-9_]+\b", text)) - NO_MEMBERS
    assert found == {f"{prefix}{each}" for each in kind.__members__ if each not in OF_NODE}
