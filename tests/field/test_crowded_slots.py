"""Sockets whose cookies lead to the same slot of ``sock_origin``: each keeps its own frontend.

The agent has so few slots that most sockets collide there, whatever cookies the kernel gives.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.two_node_cluster import EXTERNAL, SERVICE_IPS, TwoNodeCluster
from tests.field.records import fill, kept_elsewhere, open_sockets, origins
from tests.field.remote import Remote
from tests.lab import Lab
from tests.lab.waiting import until

pytestmark = pytest.mark.root

SLOTS = 8
#: Two of them collide, whatever their cookies are; the overflow, as large, has room for all the others.
SOCKETS = SLOTS + 1
V4, V6, MAPPED = SERVICE_IPS["v4"], SERVICE_IPS["v6"], SERVICE_IPS["mapped"]


class FewSlotsCluster(TwoNodeCluster):
    def records(self) -> tuple[int, int, int, int]:
        """The number of connected sockets, unconnected sockets, pages of further frontends, and open connections."""
        return *origins(self.a), fill(self.a, "sock_peers"), open_sockets(self.a)

    def wait_empty(self) -> None:
        until(lambda: self.records() == (0, 0, 0, 0), "records of closed sockets are left")
        assert kept_elsewhere(self.a) == 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[FewSlotsCluster]:
    with Lab() as lab:
        found = FewSlotsCluster(lab)
        # A sweep would hide records that programs leave.
        found.agent("--max-connections", str(SLOTS), "--socket-sweep-seconds", "3600").start()
        yield found


def connected(stack: ExitStack, cluster: TwoNodeCluster, host: str, kind: str) -> Remote:
    is_udp = kind == "udp"
    sock = Remote(cluster.client, host, kind=socket.SOCK_DGRAM if is_udp else socket.SOCK_STREAM)
    stack.enter_context(sock)
    assert sock.connect(host, 53 if is_udp else 80) is None
    return sock


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_getpeername_of_colliding_sockets(cluster: FewSlotsCluster, kind: str) -> None:
    port = 53 if kind == "udp" else 80
    with ExitStack() as stack:
        hosts = [V4, V6, MAPPED] * (SOCKETS // 3)
        socks = [connected(stack, cluster, host, kind) for host in hosts]
        assert cluster.records() == (SOCKETS, 0, 0, SOCKETS)
        assert 0 < fill(cluster.a, "sock_origin_overflow") == kept_elsewhere(cluster.a) < SOCKETS
        assert [sock.peer() for sock in socks] == [[host, port] for host in hosts]
    cluster.wait_empty()


def test_colliding_sockets_closed_in_random_order_leave_no_record(cluster: FewSlotsCluster) -> None:
    """A freed slot is taken by another socket, while origins in the overflow stay there."""
    order = random.Random(7)
    open_now: list[tuple[ExitStack, Remote, list[object]]] = []
    for _ in range(60):
        if len(open_now) == SOCKETS or (open_now and order.random() < 0.4):
            stack, _, _ = open_now.pop(order.randrange(len(open_now)))
            stack.close()
        stack = ExitStack()
        host, kind = order.choice([V4, V6, MAPPED]), order.choice(["tcp", "udp"])
        sock = connected(stack, cluster, host, kind)
        open_now.append((stack, sock, [host, 53 if kind == "udp" else 80]))
        for _, each, peer in open_now:
            assert each.peer() == peer
    for stack, _, _ in open_now:
        stack.close()
    cluster.wait_empty()


def test_colliding_datagram_sockets_connect_again(cluster: FewSlotsCluster) -> None:
    """The origin is replaced, in the slot or in the overflow, and deleted if the new peer is no Service."""
    with ExitStack() as stack:
        socks = [connected(stack, cluster, V4, "udp") for _ in range(SOCKETS)]
        for sock in socks:
            assert sock.connect("10.96.0.10", 53) is None
            assert sock.ask() in ("w1", "w2")
        assert cluster.records() == (SOCKETS, 0, 0, SOCKETS)
        for sock in socks[::2]:
            assert sock.connect(cluster.w1.address, 5353) is None
            assert sock.peer() == [cluster.w1.address, 5353]
        assert cluster.records() == (SOCKETS // 2, 0, 0, SOCKETS // 2)
        for sock in socks:
            assert sock.connect(V4, 53) is None
            assert sock.peer() == [V4, 53]
        assert cluster.records() == (SOCKETS, 0, 0, SOCKETS)
    cluster.wait_empty()


def test_replies_to_colliding_unconnected_sockets(cluster: FewSlotsCluster) -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(Remote(cluster.client, V4)) for _ in range(SOCKETS)]
        names = [sock.ask_at(V4, 53) for sock in socks]
        _, unconnected, pages, _ = cluster.records()
        assert unconnected <= SLOTS
        assert unconnected + pages == kept_elsewhere(cluster.a) + unconnected == SOCKETS
        assert [sock.ask_at(V4, 53) for sock in socks] == names
    cluster.wait_empty()


def test_datagram_sockets_without_room_are_translated_in_packets(cluster: FewSlotsCluster) -> None:
    """Connected ones see the frontend as their peer and as the source of replies, and leave no record."""
    with ExitStack() as stack:
        hosts = [V4, V6, MAPPED] * SLOTS
        socks = [connected(stack, cluster, host, "udp") for host in hosts]
        records = cluster.records()[0]
        assert SLOTS <= records <= 2 * SLOTS
        for _ in range(2):
            assert {sock.ask() for sock in socks} <= {"w1", "w2"}
            assert [sock.peer() for sock in socks] == [[host, 53] for host in hosts]
        for sock, host in zip(socks, hosts, strict=True):
            assert sock.send() is None
            assert sock.receive()[1:] == [host, 53]
        assert cluster.records()[0] == records
    cluster.wait_empty()


def test_a_socket_with_two_frontends_leaves_its_slot_as_it_was(cluster: FewSlotsCluster) -> None:
    with Remote(cluster.client, V4) as sock:
        for host in (V4, EXTERNAL):
            assert sock.sendto(host, 53) is None
        assert (fill(cluster.a, "sock_peers"), kept_elsewhere(cluster.a)) == (1, 1)
        assert sock.connect(V4, 53) is None
        assert sock.peer() == [V4, 53]
        assert (fill(cluster.a, "sock_origin_overflow"), kept_elsewhere(cluster.a)) == (1, 2)
    cluster.wait_empty()


def test_datagram_sockets_connect_after_sending_and_send_after_disconnecting(
    cluster: FewSlotsCluster,
) -> None:
    some = SLOTS // 2
    with ExitStack() as stack:
        first = [stack.enter_context(Remote(cluster.client, V4)) for _ in range(some)]
        assert {sock.ask_at(V4, 53) for sock in first} <= {"w1", "w2"}
        second = [connected(stack, cluster, V4, "udp") for _ in range(some)]
        for sock in first:
            assert sock.connect(V4, 53) is None
        assert [sock.peer() for sock in first + second] == [[V4, 53]] * 2 * some
        assert cluster.records()[0] == cluster.records()[3] == 2 * some
        for sock in first + second:
            assert sock.disconnect() is None
            assert sock.ask_at(V4, 53) in ("w1", "w2")
    cluster.wait_empty()
