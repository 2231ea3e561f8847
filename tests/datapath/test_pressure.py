"""No packet is translated by the entry of another flow while the conntrack map overflows on two CPUs."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi.flow_layout import Flow, Nat, NatFlags, Seen, pack_flow, pack_nat
from ebpfproxy.datapath.abi.hooks import PACKETS
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.schema import FLOW_FILTER_BITS
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs import loader
from tests.datapath.altered import altered_sources
from tests.datapath.test_loading import OPTIONS
from tests.packets.wire import PASS, run_program

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

SECONDS = 3.0
FLOWS = 32
#: This is a multiple of the map's capacity.
OTHERS = 16384
#: The number of flows that are inserted between two flows with packets.
STRIDE = 4
FRONTEND = bytes((192, 0, 2, 80))


@pytest.fixture
def opened(pins: Path) -> Iterator[MapSet]:
    made = maps.open_or_create(pins, Capacity(conntrack=1024))
    made["flow_filter"].update(U32.pack(0), b"\3" * (1 << FLOW_FILTER_BITS))
    yield made
    made.close()


@pytest.fixture(params=["as it is", "slow"])
def program(
    request: pytest.FixtureRequest, opened: MapSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """Returns ``to_device``; the slow variant gives other CPUs more time to reuse the element that it reads."""
    if request.param == "slow":
        sources = altered_sources(tmp_path)
        monkeypatch.setattr(loader, "source_folder", lambda: sources)
    fd = bpf.get_pinned(loader.ensure_loaded(opened, OPTIONS, (PACKETS,)) / "to_device")
    yield fd
    os.close(fd)


def reply(number: int, frontend: bytes = FRONTEND) -> tuple[bytes, bytes]:
    """Returns the entry of the reply direction, which translates backend to frontend.

    Client and ports tell which flow it is, so a packet shows by which entry it was translated.
    """
    client = struct.pack(">I", 0x64000000 + number)
    port = 1024 + number % 60000
    key = pack_flow(Flow(bytes((10, 0, 0, 1)), client, 8080, port, 6, egress=True))
    now = time.monotonic_ns()
    value = Nat(frontend, client, port, port, 1, 1, NatFlags.REPLY, Seen.REPLY, now, now)
    return key, pack_nat(key, value)


def packet(number: int) -> bytes:
    client = ".".join(map(str, struct.pack(">I", 0x64000000 + number)))
    segment = TCP(sport=8080, dport=1024 + number % 60000, flags="A", seq=1, ack=1)
    return bytes(raw(Ether() / IP(src="10.0.0.1", dst=client) / segment))


def ends(data: bytes) -> tuple[bytes, bytes, int, int]:
    return data[26:30], data[30:34], *struct.unpack_from(">HH", data, 34)


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """This thread runs on one CPU alone. With PREEMPT_RT a test run may interrupt another one on its CPU, which
    programs at devices never do."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


class OnOtherCpu(threading.Thread):
    """Calls a function in a loop on another CPU until the context ends."""

    def __init__(self, cpu: int, work: Callable[[], None]) -> None:
        super().__init__()
        self._cpu, self._work = cpu, work
        self._over = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        os.sched_setaffinity(0, {self._cpu})
        try:
            while not self._over.is_set():
                self._work()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        if self.error:
            raise self.error


def test_entry_whose_element_is_reused_during_a_lookup(
    program: int, opened: MapSet, cpus: tuple[int, int]
) -> None:
    """The other CPU inserts flows as fast as possible, and each reuses the element of another."""
    table = opened["conntrack"]
    packets = [packet(number) for number in range(FLOWS)]
    entries = [reply(number) for number in range(FLOWS)]
    pressed = []
    for number in range(FLOWS, FLOWS + OTHERS):
        if number % STRIDE == 0:
            pressed.append(entries[number // STRIDE % FLOWS])
        pressed.append(reply(number, bytes((198, 51, 100, 1))))
    keys, values = (b"".join(part) for part in zip(*pressed, strict=True))
    results = {"translated": 0, "not there": 0}

    def press() -> None:
        assert bpf.map_update_batch(table.fd, keys, values, len(pressed)) == len(pressed)

    with OnOtherCpu(cpus[1], press):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for number in range(FLOWS):
                verdict, out, _ = run_program(program, packets[number], 1)
                source, destination, sport, dport = ends(out)
                asked = ends(packets[number])
                assert (verdict, destination, dport) == (PASS, asked[1], asked[3])
                if source == asked[0]:
                    results["not there"] += 1
                    assert sport == 8080
                else:
                    results["translated"] += 1
                    assert (source, sport) == (FRONTEND, 1024 + number)
    assert results["translated"]
