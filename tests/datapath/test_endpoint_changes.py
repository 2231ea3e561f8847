"""Programs choose backends while the writer replaces endpoints: each choice is of the old set or of the new one.

Processes on both CPUs choose without a pause, at sockets and for packets. Before and after each choice they look which
change has been completed, and which has begun: nothing else may have been chosen from.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from ebpfproxy.config.datapath import MAGLEV_SIZES, Capacity
from ebpfproxy.datapath.abi.hooks import PACKETS, SOCKET_HOOKS, SOCKETS
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import DeviceFlags, pack_device
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import find_cgroup_root
from ebpfproxy.datapath.programs import loader
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.services.model import (
    Algorithm,
    Backend,
    Family,
    Frontend,
    FrontendKind,
    Policy,
    Protocol,
    ServicePort,
    ServicePortKey,
)
from tests.datapath.test_loading import OPTIONS
from tests.packets.wire import PreparedRun

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

CHANGES = 1000
#: Backends' addresses begin with it.
FIRST_BYTE = 10
NOBODY = bytes(4)
#: Both are of one service port, which has one set for them.
FRONTENDS = (bytes((192, 0, 2, 80)), bytes((192, 0, 2, 81)))
PORT = 53
#: Few ids and places, which are used again and again.
FEW = Capacity(
    services=8,
    backends=64,
    connected=64,
    unconnected=64,
    slots=8 * MAGLEV_SIZES[0],
    conntrack=1024,
    affinity=64,
    source_ranges=8,
)
#: A flow keeps the id of its backend until the agent has swept it, which nobody does here, so none is used again.
MANY = msgspec.structs.replace(FEW, backends=4 * CHANGES)
_CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x40000000, 1
_libc = ctypes.CDLL(None)
_COMPLETED, _BEGUN, _ENDS = range(3)


#: Makes a choice, and returns the address of the backend. The argument: how many there have been.
Choose = Callable[[int], bytes]
#: Called in a process with its CPU.
Prepare = Callable[[int], Choose]


def of_set(number: int) -> tuple[Backend, ...]:
    """The endpoints of a set, which no other set has: of one to three, by the number."""
    place = struct.pack(">H", number)
    return tuple(
        Backend(bytes((FIRST_BYTE, *place, 1 + n)), 8053, Protocol.UDP) for n in range(1 + number % 3)
    )


def set_of(address: bytes) -> int | None:
    """The number of the set that has an address."""
    return int.from_bytes(address[1:3]) if address[0] == FIRST_BYTE else None


def wanted(number: int, algorithm: Algorithm, affinity: int) -> ServicePort:
    cluster = Policy.CLUSTER, Policy.CLUSTER
    first, second = FRONTENDS
    return ServicePort(
        key=ServicePortKey("shop", "web", "dns", Protocol.UDP, Family.IPV4),
        frontends=(
            Frontend(FrontendKind.CLUSTER_IP, first, PORT, Protocol.UDP, *cluster),
            Frontend(FrontendKind.EXTERNAL_IP, second, PORT, Protocol.UDP, *cluster),
        ),
        cluster=of_set(number),
        local=(),
        algorithm=algorithm,
        affinity_seconds=affinity,
    )


class Report(msgspec.Struct):
    """What a process has seen. ``wrong``: the set that was chosen, after and before which ones it was the time."""

    choices: int = 0
    during_changes: int = 0
    sets: int = 0
    wrong: list[tuple[int, int | None, int]] = []


class Reader:
    """A process on one CPU that chooses, in a network namespace and a cgroup of its own."""

    def __init__(self, words: memoryview, cpu: int, prepare: Prepare) -> None:
        self._from, to = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(to)
            return
        with suppress(BaseException):
            try:
                # It does not go on where the tests are killed.
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                os.sched_setaffinity(0, {cpu})
                found = msgspec.json.encode(_choose_until_end(words, prepare(cpu)))
            except BaseException:
                found = json.dumps(traceback.format_exc()).encode()
            with os.fdopen(to, "wb") as out:
                out.write(found)
        os._exit(0)

    def report(self) -> Report:
        with os.fdopen(self._from, "rb") as read:
            said = read.read()
        os.waitpid(self.pid, 0)
        assert not said.startswith(b'"'), json.loads(said)
        return msgspec.json.decode(said, type=Report)


def _choose_until_end(words: memoryview, choose: Choose) -> Report:
    report, last = Report(), -1
    while not words[_ENDS]:
        completed = words[_COMPLETED]
        number = set_of(choose(report.choices))
        begun = words[_BEGUN]
        report.choices += 1
        report.during_changes += completed != begun
        report.sets += number != last
        # A process that has seen the new set does not see the old one any more.
        if number is None or not max(completed, last) <= number <= begun:
            report.wrong.append((completed, number, begun))
        last = number if number is not None else last
    return report


def _own_network() -> None:
    assert _libc.unshare(_CLONE_NEWNET) == 0
    for command in ("ip link set lo up", "ip route add default dev lo"):
        subprocess.run(command.split(), check=True)


def sockets(cgroup: Path) -> Prepare:
    """connect() of a datagram socket; nothing tells it that it is connected to something else than it asked for."""

    def prepare(_: int) -> Choose:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        _own_network()
        targets = [(socket.inet_ntoa(each), PORT) for each in FRONTENDS]
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

        def choose(turn: int) -> bytes:
            nonlocal asking
            if turn % 64 == 0:
                # A flow of Maglev's is a socket.
                asking.close()
                asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                asking.connect(targets[turn % 2])
                return socket.inet_aton(asking.getpeername()[0])
            except OSError:
                return NOBODY

        return choose

    return prepare


def packets(program: int) -> Prepare:
    """A datagram of a new flow comes in from a pod, again and again; each CPU has a pod."""

    def prepare(cpu: int) -> Choose:
        _own_network()
        runs = []
        for each in FRONTENDS:
            datagram = IP(src=f"100.{64 + cpu}.0.0", dst=socket.inet_ntoa(each)) / UDP(sport=1024, dport=PORT)
            runs.append(PreparedRun(program, raw(Ether(dst="00:00:00:00:00:00") / datagram / b"x"), 1, 1))

        def choose(turn: int) -> bytes:
            run = runs[turn % 2]
            # The end of the source address, and the port.
            run.change(28, struct.pack(">H", turn >> 15))
            run.change(34, struct.pack(">H", 1024 + (turn & 0x7FFF)))
            run()
            return run.packet[30:34]

        return choose

    return prepare


@pytest.fixture
def cgroup() -> Iterator[Path]:
    folder = find_cgroup_root() / f"ebpfproxy-changes-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


@contextmanager
def attached(opened: MapSet, cgroup: Path) -> Iterator[None]:
    """All socket programs but those that tell a process the frontend's address again."""
    folder = loader.ensure_loaded(opened, OPTIONS, (SOCKETS,))
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    links = []
    for hook in SOCKET_HOOKS:
        if not hook.name.startswith("getpeername"):
            with bpf.opened(folder / hook.name) as program:
                links.append(bpf.link_create(program, fd, hook.attach_type))
    os.close(fd)
    yield
    for link in links:
        bpf.link_detach(link)
        os.close(link)


class Replacing:
    """The writer, as the agent uses it: what was replaced is used again after a grace period."""

    def __init__(self, opened: MapSet, words: memoryview, algorithm: Algorithm, affinity: int) -> None:
        self._grace = Grace()
        self._writer = Writer(opened, self._grace.wait, maglev_size=MAGLEV_SIZES[0])
        self._words = words
        self._asked = algorithm, affinity

    def apply(self, number: int) -> None:
        self._words[_BEGUN] = number
        problems = self._writer.apply([wanted(number, *self._asked)], complete=number == 0)
        self._words[_COMPLETED] = number
        assert problems == []

    def reclaim(self) -> None:
        retired = self._writer.take_retired()
        self._grace.wait()
        self._writer.reclaim(retired)
        self._writer.forget_removed_backends(self._writer.take_removed_backends())

    def close(self) -> None:
        # It refers to the arrays' memory.
        del self._writer
        self._grace.close()


def replace(replacing: Replacing) -> None:
    """Mostly after a pause, in which choices are made of one set alone."""
    for number in range(1, CHANGES + 1):
        replacing.apply(number)
        if number % 4 == 0:
            replacing.reclaim()
        if number % 8 == 0:
            time.sleep(0.001)


@pytest.mark.parametrize(
    ("place", "algorithm", "affinity"),
    [
        ("sockets", Algorithm.RANDOM, 60),
        ("packets", Algorithm.RANDOM, 0),
        # These look at each backend, and at one of many places in a table.
        ("sockets", Algorithm.LEAST_CONNECTIONS, 0),
        ("packets", Algorithm.MAGLEV, 0),
    ],
    ids=["sockets-affinity", "packets-random", "sockets-least-connections", "packets-maglev"],
)
def test_choices_during_a_change_are_of_the_old_set_or_of_the_new_one(
    pins: Path, cgroup: Path, cpus: tuple[int, int], place: str, algorithm: Algorithm, affinity: int
) -> None:
    """None fails, none is of a set that was removed before it began, and none goes back to an earlier set."""
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    with ExitStack() as stack:
        opened = maps.open_or_create(pins, FEW if place == "sockets" else MANY)
        stack.callback(opened.close)
        opened["devices"].update(
            U32.pack(1), pack_device(b"", b"", DeviceFlags.PODS | DeviceFlags.LOCAL, 1500)
        )
        words = stack.enter_context(memoryview(shared).cast("Q"))
        replacing = Replacing(opened, words, algorithm, affinity)
        stack.callback(replacing.close)
        replacing.apply(0)
        prepare: Prepare
        if place == "sockets":
            stack.enter_context(attached(opened, cgroup))
            prepare = sockets(cgroup)
        else:
            program = bpf.get_pinned(loader.ensure_loaded(opened, OPTIONS, (PACKETS,)) / "from_device")
            stack.callback(os.close, program)
            prepare = packets(program)
        readers = [Reader(words, cpu, prepare) for cpu in cpus]
        try:
            replace(replacing)
        finally:
            words[_ENDS] = 1
            reports = [each.report() for each in readers]
    for report in reports:
        assert report.wrong == []
        assert report.sets > 10, report
        assert report.during_changes, report
