"""Programs of other projects, as ``PEERS`` has them compiled: measured with the same Services in the same rounds.

Known is Calico's connect-time load balancer (connect_balancer_no_log of felix/bpf-gpl, an object for each family), which
translates in connect(), sendmsg() and recvmsg(). What felix writes to its maps is written here. Its globals stay 0:
unconnected UDP has no affinity, which felix enables.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.abi.hooks import SOCKET_HOOKS
from ebpfproxy.datapath.kernel import bpf
from tests.apiserver.objects import pod_address, service_address
from tests.lab import Lab
from tools.bench.sockets import PORT
from tools.bench.subjects import ENDPOINTS, LOAD_PORT, LOAD_TARGET_PORT, SERVICE, SERVICE6, Subject, attach

_CALLS = ("connect", "sendmsg", "recvmsg")


class _Service(NamedTuple):
    protocol: int
    address: str
    port: int
    backends: list[str]
    target_port: int


def calico(lab: Lab, load: Path, services: int) -> Subject | None:
    """None where ``PEERS`` names no folder, or one that lacks these objects."""
    folder = Path(os.environ.get("PEERS", ""))
    objects = {family: folder / f"connect_balancer_no_log_v{family}.o" for family in (4, 6)}
    if "PEERS" not in os.environ or not all(path.exists() for path in objects.values()):
        return None
    made = Subject(lab.node("calico"), load, services, translates=True)
    made.programs.mkdir(parents=True)
    for family, path in objects.items():
        maps = made.programs / f"maps{family}"
        _load(path, made.programs, maps, family)
        server = made.server.address if family == 4 else made.server.address6
        _write(maps, family, _services(family, server, services))
    attach(made, [hook for hook in SOCKET_HOOKS if (made.programs / hook.name).exists()])
    return made


def _load(path: Path, programs: Path, maps: Path, family: int) -> None:
    """Pins programs by the names of their hooks."""
    pins = programs / f"loaded{family}"
    command = ["bpftool", "prog", "loadall", str(path), str(pins), "pinmaps", str(maps)]
    subprocess.run(command, check=True, capture_output=True)
    for call in _CALLS:
        (pins / f"calico_{call}_v{family}").rename(programs / f"{call}{family}")


def _services(family: int, server: str, count: int) -> Iterator[_Service]:
    """Those that the agents have, of one family."""
    for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        yield _Service(protocol, SERVICE if family == 4 else SERVICE6, PORT, [server], PORT)
    for i in range(count if family == 4 else 0):
        backends = [pod_address(i * ENDPOINTS + k) for k in range(ENDPOINTS)]
        yield _Service(socket.IPPROTO_TCP, service_address(i), LOAD_PORT, backends, LOAD_TARGET_PORT)


def _write(maps: Path, family: int, services: Iterator[_Service]) -> None:
    """struct calico_nat_key to calico_nat_value, calico_nat_secondary_key to calico_nat_dest, as felix/bpf-gpl has them."""
    size = 4 if family == 4 else 16
    # An entry is for any source: what follows address, port and protocol is not compared.
    compared = 8 * (size + 3)
    with (
        bpf.opened(maps / f"cali_v{family}_nat_fe3") as frontends,
        bpf.opened(maps / f"cali_v{family}_nat_be") as backends,
    ):
        for number, service in enumerate(services, 1):
            for ordinal, address in enumerate(service.backends):
                value = struct.pack("=HH", service.target_port, 0)
                key = struct.pack("=II", number, ordinal)
                bpf.map_update(backends, key, ipaddress.ip_address(address).packed + value)
            key = struct.pack("=I", compared) + ipaddress.ip_address(service.address).packed
            key += struct.pack("=HB", service.port, service.protocol) + bytes(size + 1)
            bpf.map_update(frontends, key, struct.pack("=5I", number, len(service.backends), 0, 0, 0))
