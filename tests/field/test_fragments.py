"""Fragmented datagrams of masqueraded clients, whose ids collide unless they are translated."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.packet import Raw

from tests.e2e.outside_client import VARIANTS, OutsideClientCluster
from tests.lab import Lab

pytestmark = pytest.mark.root

UDP_NODE_PORT = 30053
#: All clients send with this id, in fragments of this many bytes.
IDENTITY, FRAGMENT_SIZE = 0x4242, 1200
SIZE = 3 * FRAGMENT_SIZE
SECOND = {"4": "172.18.0.253", "6": "fd00:172:18::fd"}


@pytest.fixture(scope="module", params=["default", "bypass"])
def cluster(request: pytest.FixtureRequest) -> Iterator[OutsideClientCluster]:
    """The only backend is remote, so that both external clients are masqueraded."""
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        for address in SECOND.values():
            prefix, nodad = (24, []) if "." in address else (64, ["nodad"])
            made.outside.run(["ip", "address", "add", f"{address}/{prefix}", "dev", "eth0", *nodad])
        made.write_web(made.w2)
        made.agent(*VARIANTS[request.param]).start()
        yield made


def fragments(source: str, destination: str, sport: int, letter: bytes) -> list[bytes]:
    """The fragments of a datagram of SIZE bytes, all with IDENTITY."""
    ip = IPv6 if ":" in source else IP
    body = Raw(letter * (SIZE - 8))
    whole = raw(ip(src=source, dst=destination) / UDP(sport=sport, dport=UDP_NODE_PORT) / body)
    data, found = whole[len(whole) - SIZE :], []
    for at in range(0, SIZE, FRAGMENT_SIZE):
        more, part = at + FRAGMENT_SIZE < SIZE, Raw(data[at : at + FRAGMENT_SIZE])
        if ip is IP:
            flags = "MF" if more else 0
            head = IP(src=source, dst=destination, proto=17, id=IDENTITY, flags=flags, frag=at // 8)
        else:
            head = IPv6(src=source, dst=destination) / IPv6ExtHdrFragment(
                nh=17, offset=at // 8, m=int(more), id=IDENTITY
            )
        found.append(raw(head / part))
    return found


def ask_at_once(clients: list[str], node: str) -> list[str]:
    """Each client sends a fragmented datagram, fragments alternate; returns the names of the backends."""
    family = socket.AF_INET6 if ":" in node else socket.AF_INET
    sockets = []
    for client in clients:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind((client, 0))
        sock.settimeout(3)
        sockets.append(sock)
    # Small datagrams resolve all neighbours first, so that no fragment is queued.
    for sock in sockets:
        sock.sendto(b"?", (node, UDP_NODE_PORT))
        sock.recv(65536)
    each = [
        fragments(client, node, sock.getsockname()[1], letter)
        for client, sock, letter in zip(clients, sockets, (b"a", b"b"), strict=True)
    ]
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as wire:
        if family == socket.AF_INET6:
            wire.setsockopt(socket.IPPROTO_IPV6, 36, struct.pack("i", 1))  # IPV6_HDRINCL
        for together in zip(*each, strict=True):
            for fragment in together:
                wire.sendto(fragment, (node, 0))
    return [json.loads(sock.recv(65536))["name"] for sock in sockets]


@pytest.mark.parametrize("version", ["4", "6"])
def test_fragments_of_two_masqueraded_clients_with_one_id_are_reassembled(
    cluster: OutsideClientCluster, version: str
) -> None:
    """The backend reassembles datagrams of both clients from one source address; a corrupt one is lost."""
    node = cluster.a.address if version == "4" else cluster.a.address6
    first = cluster.outside.address if version == "4" else cluster.outside.address6
    for _ in range(3):
        assert cluster.outside.call(ask_at_once, [first, SECOND[version]], node) == ["w2", "w2"]
