"""The limit of ICMP errors that reject packets: as the kernel limits its own, for all CPUs together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import IP, IPOption_NOP
from scapy.packet import Packet

from ebpfproxy.datapath.abi.layout import U32, U64
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.flows.conntrack_table import counters
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.datapath.test_pressure import OnOtherCpu, on_cpu
from tests.packets.packet_cluster import PORTS, V4, FamilyAddresses
from tests.packets.test_flows import ends_of, segment
from tests.packets.test_rejects import assert_rejected
from tests.packets.wire import DROP, REDIRECT, Wire, ip_of

pytestmark = pytest.mark.root

#: net.ipv4.icmp_msgs_burst and icmp_msgs_per_sec, as the kernel has them.
BURST, PER_SECOND = 50, 1000
LIMITED = PacketEvent.ICMP_RATE_LIMIT
_MONOTONIC_COARSE = 6  # CLOCK_MONOTONIC_COARSE in linux/time.h


class Bucket:
    def __init__(self, tables: MapSet) -> None:
        self._tables = tables

    def set(self, until: int) -> None:
        """Tokens have been taken until this time: CLOCK_MONOTONIC in ns."""
        self._tables["icmp_bucket"].update(U32.pack(0), U64.pack(until))

    def empty(self) -> None:
        self.set(time.monotonic_ns() + 3600 * 10**9)

    def fill(self) -> None:
        self.set(0)

    @property
    def until(self) -> int:
        found = self._tables["icmp_bucket"].lookup(U32.pack(0))
        assert found is not None
        (until,) = U64.unpack(found)
        return int(until)


@pytest.fixture
def bucket(tables: MapSet) -> Iterator[Bucket]:
    made = Bucket(tables)
    made.fill()
    yield made
    made.fill()


@pytest.fixture
def counted(tables: MapSet) -> Callable[[], dict[PacketEvent, int]]:
    """Returns what was counted since the last call."""
    before = counters(tables["packet_events"])

    def since() -> dict[PacketEvent, int]:
        nonlocal before
        now = counters(tables["packet_events"])
        changed = {event: now[event] - before[event] for event in now if now[event] != before[event]}
        before = now
        return changed

    return since


def most_since(began: float) -> float:
    """So many errors there may be since the bucket was full. The programs' clock goes by steps."""
    step = time.clock_getres(_MONOTONIC_COARSE)
    return BURST + (time.monotonic() - began + step) * PER_SECOND + 1


def rejected(family: FamilyAddresses, protocol: str, port: int) -> Packet:
    """A packet to a Service without endpoints."""
    return family.ip(family.client, family.empty) / segment(protocol, port, PORTS[protocol][0])


@pytest.mark.parametrize("protocol", ["UDP", "SCTP"])
def test_packet_beyond_the_limit_is_dropped_and_counted_as_that(
    wire: Wire,
    family: FamilyAddresses,
    port: int,
    bucket: Bucket,
    counted: Callable[[], dict[PacketEvent, int]],
    protocol: str,
) -> None:
    packet = rejected(family, protocol, port)
    bucket.empty()
    assert wire.ingress(packet).verdict == DROP
    assert counted() == {LIMITED: 1}
    bucket.fill()
    assert_rejected(wire, wire.ingress(packet), family, family.empty, family.client)
    assert counted() == {PacketEvent.NO_ENDPOINT: 1}


def test_packet_of_the_host_beyond_the_limit_is_dropped(
    wire: Wire,
    family: FamilyAddresses,
    port: int,
    bucket: Bucket,
    counted: Callable[[], dict[PacketEvent, int]],
) -> None:
    bucket.empty()
    packet = family.ip(family.node, family.empty) / segment("UDP", port, 53)
    assert wire.egress(packet).verdict == DROP
    assert counted() == {LIMITED: 1}


def test_tcp_resets_are_not_limited(
    wire: Wire,
    family: FamilyAddresses,
    port: int,
    bucket: Bucket,
    counted: Callable[[], dict[PacketEvent, int]],
) -> None:
    """Netfilter's REJECT with tcp-reset is not limited either."""
    bucket.empty()
    for _ in range(3):
        result = wire.ingress(rejected(family, "TCP", port))
        assert_rejected(wire, result, family, family.empty, family.client)
    assert counted() == {PacketEvent.NO_ENDPOINT: 3}


def test_errors_that_tell_of_a_smaller_mtu_are_not_limited(
    wire: Wire, family: FamilyAddresses, port: int, bucket: Bucket
) -> None:
    """As in the kernel: without them a connection would stand still."""
    bucket.empty()
    packet = family.ip(family.node, family.web)
    route = [family.remote_pod, "via", family.node_b, "dev", "eth0", "mtu", "lock", "1400"]
    wire.node.run(["ip", "route", "add", *route])
    try:
        assert ends_of(wire.egress(packet / segment("TCP", port, 80)).packet)[2] == family.remote_pod
        for _ in range(3):
            result = wire.egress(packet / segment("TCP", port, 80, "A", payload=b"x" * 1400))
            assert result.verdict == REDIRECT
            assert (ip_of(result.packet).src, ip_of(result.packet).dst) == (family.web, family.node)
    finally:
        wire.node.run(["ip", "route", "del", family.remote_pod])


def test_packets_that_get_no_error_leave_the_bucket_alone(
    wire: Wire, port: int, bucket: Bucket, counted: Callable[[], dict[PacketEvent, int]]
) -> None:
    """A TCP segment gets a reset, and an IP header with options nothing at all."""
    with_options = IP(src=V4.client, dst=V4.empty, options=[IPOption_NOP()] * 4) / segment("UDP", port, 53)
    assert wire.ingress(with_options).verdict == DROP
    assert wire.ingress(rejected(V4, "TCP", port)).verdict == REDIRECT
    assert counted() == {PacketEvent.NO_ENDPOINT: 2}
    assert bucket.until == 0


def test_as_many_errors_as_the_kernel_sends_itself(
    wire: Wire, family: FamilyAddresses, port: int, bucket: Bucket
) -> None:
    """A burst at once, then one a millisecond, with the clock's own steps."""
    packet = rejected(family, "UDP", port)
    began = time.monotonic()
    verdicts = [wire.ingress(packet).verdict for _ in range(4 * BURST)]
    most = most_since(began)
    assert set(verdicts[:BURST]) == {REDIRECT}
    assert set(verdicts) <= {REDIRECT, DROP}
    assert verdicts.count(REDIRECT) <= most


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_the_limit_is_one_for_all_cpus(
    wire: Wire, port: int, bucket: Bucket, counted: Callable[[], dict[PacketEvent, int]]
) -> None:
    """Two CPUs take tokens at the same time, and none twice."""
    runs = [wire.prepared("from_device", "eth0", rejected(V4, "UDP", port)) for _ in range(2)]
    answered = [0, 0]

    def ask(number: int, times: int) -> None:
        for _ in range(times):
            answered[number] += runs[number]() == REDIRECT

    cpus = os.sched_getaffinity(0)

    def ask_from_here() -> None:
        with on_cpu(min(cpus)):
            ask(0, 20_000)

    def ask_from_the_other() -> None:
        wire.enter()
        ask(1, 1000)

    counted()
    began = time.monotonic()
    bucket.fill()
    with OnOtherCpu(max(cpus), ask_from_the_other):
        wire.within(ask_from_here)
    most = most_since(began)
    assert BURST <= sum(answered) <= most
    found = counted()
    assert found[PacketEvent.NO_ENDPOINT] == sum(answered)
    assert found[LIMITED] > 0
