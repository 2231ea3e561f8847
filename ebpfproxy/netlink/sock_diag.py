"""Finding and ending sockets by what they are connected to (sock_diag(7)).

Ending is SOCK_DESTROY: Linux 4.5 for TCP, 4.9 for UDP.

The kernel wakes the application with ECONNABORTED; to a TCP peer it sends a reset. A socket is named by its
cookie as well as its addresses, so that no other can be meant.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.logs import get_logger
from ebpfproxy.netlink import codec
from ebpfproxy.netlink.namespaces import OWN, namespaces, netlink_in

log = get_logger(__name__)

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_INET_DIAG_REQ_BYTECODE = 1
_BC_JMP, _BC_D_COND = 1, 8
#: All states but TIME_WAIT, LISTEN and NEW_SYN_RECV (enum in tcp_states.h): those are no application's.
_STATES = 0xFFF & ~(1 << 6 | 1 << 10 | 1 << 12)

_REQUEST_V2 = struct.Struct("=BBBBI48s")  # struct inet_diag_req_v2; the last is struct inet_diag_sockid
_COOKIE = struct.Struct("=Q")
_SOCKID = struct.Struct("=HH16s16s")  # the first fields of struct inet_diag_sockid; network byte order
_MAPPED = bytes(10) + b"\xff\xff"
_ID_AT, _COOKIE_AT = 4, 44  # in struct inet_diag_msg
_ID_SIZE = 48
#: Records of sockets leave out the highest byte (``bpf/lib/socket_types.h``, ``enum origin_kind``).
_COOKIE_MASK = (1 << 56) - 1
_BATCH = 128
#: In one filter, whose jumps are 16 bits long.
_PEERS = 1000
#: For up to this many peers a filter costs less than all that it leaves out.
_FEW_PEERS = 64
_TIMEOUT_SECONDS = 5.0


class Peer(NamedTuple):
    """The peer that sockets are connected to. ``protocol`` is the IP protocol's number."""

    address: bytes
    port: int
    protocol: int


class Connected(NamedTuple):
    """A connected socket. Addresses are of the family of the packets: 4 bytes for IPv4-mapped ones."""

    #: The highest byte is left out.
    cookie: int
    address: bytes
    port: int
    peer: Peer
    #: A path to its network namespace.
    namespace: Path

    @property
    def is_here(self) -> bool:
        """True in this process's own network namespace, the host's."""
        return self.namespace == OWN


def find_sockets(stale: Mapping[Peer, Collection[int]]) -> list[Connected]:
    """The sockets with these cookies in any network namespace, if they are still connected so."""
    wanted = {cookie for cookies in stale.values() for cookie in cookies}
    found: dict[int, Connected] = {}
    for path, diag in _diagnosers():
        for protocol, peers in _by_protocol(stale).items():
            try:
                for family, name in _all_connected_to(diag, protocol, peers):
                    each = _connected(family, protocol, name, path)
                    if each.cookie in wanted:
                        found[each.cookie] = each
            except OSError as error:
                _complain(path, error)
        if len(found) == len(wanted):
            break
    return list(found.values())


@codec.reading
def _connected(family: int, protocol: int, name: bytes, namespace: Path) -> Connected:
    """``name``: struct inet_diag_sockid."""
    sport, dport, source, destination = _SOCKID.unpack_from(name)
    cookie = _cookie(name)
    addresses = [_plain(family, each) for each in (source, destination)]
    peer = Peer(addresses[1], socket.ntohs(dport), protocol)
    return Connected(cookie, addresses[0], socket.ntohs(sport), peer, namespace)


@codec.reading
def _cookie(name: bytes) -> int:
    """Where one cookie is made while another is, the kernel counts it down from 2^64."""
    (cookie,) = _COOKIE.unpack_from(name, _COOKIE_AT - _ID_AT)
    return int(cookie) & _COOKIE_MASK


def _plain(family: int, address: bytes) -> bytes:
    if family == socket.AF_INET:
        return address[:4]
    return address[12:] if address.startswith(_MAPPED) else address


def end_sockets(stale: Mapping[Peer, Collection[int]]) -> set[int]:
    """Closes the sockets with these cookies in any network namespace, if they are still connected so.

    Returns the cookies of those that were ended. Namespaces that cannot be entered are left out.
    """
    ended: set[int] = set()
    by_protocol = _by_protocol(stale)
    cookies = {protocol: {c for p in peers for c in stale[p]} for protocol, peers in by_protocol.items()}
    for path, diag in _diagnosers():
        for protocol, peers in by_protocol.items():
            try:
                ended |= _end_all_in(diag, protocol, peers, cookies[protocol])
            except OSError as error:
                _complain(path, error)
        if sum(map(len, cookies.values())) == len(ended):
            break
    return ended


def sockets_in(
    namespace: Path, protocol: int, cookies: Collection[int], peers: Collection[Peer] | None = None
) -> dict[int, Connected]:
    """Those with these cookies of a protocol in a namespace, by cookie. Without a peer its port is 0.

    ``peers``: only those that are connected to one of these. Raises OSError: the namespace is gone or cannot
    be entered, the kernel does not know the protocol or does not tell.
    """
    found = {}
    with netlink_in(namespace, _NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(_TIMEOUT_SECONDS)
        for family, name in _names(diag, protocol, peers):
            cookie = _cookie(name)
            if cookie in cookies:
                found[cookie] = _connected(family, protocol, name, namespace)
    return found


def _names(diag: socket.socket, protocol: int, peers: Collection[Peer] | None) -> Iterator[tuple[int, bytes]]:
    # The kernel compares each socket with each peer.
    if peers is not None and len(peers) <= _FEW_PEERS:
        yield from _all_connected_to(diag, protocol, list(peers))
        return
    for family in (socket.AF_INET, socket.AF_INET6):
        for name in _dump(diag, family, protocol):
            yield family, name


def _by_protocol(peers: Collection[Peer]) -> dict[int, list[Peer]]:
    found: dict[int, list[Peer]] = {}
    for peer in peers:
        found.setdefault(peer.protocol, []).append(peer)
    return found


def _diagnosers() -> Iterator[tuple[Path, socket.socket]]:
    """A sock_diag socket in each namespace that can be entered, open until the next is asked for."""
    for path in namespaces():
        try:
            diag = netlink_in(path, _NETLINK_SOCK_DIAG)
        except OSError as error:
            # Some end while they are listed.
            if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EINVAL):
                _complain(path, error)
            continue
        with diag:
            diag.settimeout(_TIMEOUT_SECONDS)
            yield path, diag


def _complain(path: Path, error: OSError) -> None:
    log.warning(
        "failed to close stale sockets in a network namespace, leaving them",
        namespace=str(path),
        error=str(error),
    )


def _end_all_in(
    diag: socket.socket, protocol: int, peers: Sequence[Peer], cookies: Collection[int]
) -> set[int]:
    """Lists sockets of one protocol in one namespace."""
    found: dict[int, dict[int, bytes]] = {}
    for family, name in _all_connected_to(diag, protocol, peers):
        cookie = _cookie(name)
        if cookie in cookies:
            found.setdefault(family, {})[cookie] = name
    ended: set[int] = set()
    for family, names in found.items():
        each = list(names.items())
        for start in range(0, len(each), _BATCH):
            ended |= _destroy(diag, family, protocol, each[start : start + _BATCH])
    return ended


def _all_connected_to(
    diag: socket.socket, protocol: int, peers: Sequence[Peer]
) -> Iterator[tuple[int, bytes]]:
    """Family and name (struct inet_diag_sockid) of the sockets that are connected to any of these."""
    for start in range(0, len(peers), _PEERS):
        for family in (socket.AF_INET, socket.AF_INET6):
            for name in _connected_to(diag, family, protocol, peers[start : start + _PEERS]):
                yield family, name


def _connected_to(diag: socket.socket, family: int, protocol: int, peers: Sequence[Peer]) -> Iterator[bytes]:
    """The names (struct inet_diag_sockid) of the sockets that are connected to any of these."""
    code = _bytecode([peer for peer in peers if family == socket.AF_INET6 or len(peer.address) == 4])
    if code:
        yield from _dump(diag, family, protocol, code)


def _dump(diag: socket.socket, family: int, protocol: int, code: bytes = b"") -> Iterator[bytes]:
    """The names of all sockets for which the filter is true."""
    body = _REQUEST_V2.pack(family, protocol, 0, 0, _STATES, bytes(_ID_SIZE))
    if code:
        body += codec.attribute(_INET_DIAG_REQ_BYTECODE, code)
    diag.send(codec.pack(_SOCK_DIAG_BY_FAMILY, codec.REQUEST | codec.DUMP, body))
    for each in codec.replies(diag):
        yield bytes(each.payload[_ID_AT : _ID_AT + _ID_SIZE])


def _bytecode(peers: Sequence[Peer]) -> bytes:
    """A filter for the kernel (inet_diag_bc_op): connected to one of these. It matches if it reaches its end.

    Each condition that holds is followed by a jump to the end, each that does not by the next condition.
    """
    conditions = [_condition(peer) for peer in peers]
    left = sum(4 + len(condition) + 4 for condition in conditions)
    found = b""
    for condition in conditions:
        size = 4 + len(condition)
        left -= size + 4
        # Where the last does not hold, the jump beyond the end says no.
        found += struct.pack("=BBH", _BC_D_COND, size, size + 4 + (0 if left else 4)) + condition
        found += struct.pack("=BBH", _BC_JMP, 4, 4 + left)
    return found


def _condition(peer: Peer) -> bytes:
    """struct inet_diag_hostcond. One of IPv4 also matches IPv4-mapped addresses."""
    family = socket.AF_INET6 if len(peer.address) == 16 else socket.AF_INET
    return struct.pack("=BBxxi", family, 8 * len(peer.address), peer.port) + peer.address


def _destroy(
    diag: socket.socket, family: int, protocol: int, sockets: Sequence[tuple[int, bytes]]
) -> set[int]:
    """Sends one message for each in one call; each gets a reply, since all ask for one."""
    messages = b"".join(
        codec.pack(
            _SOCK_DESTROY,
            codec.REQUEST | codec.ACK,
            _REQUEST_V2.pack(family, protocol, 0, 0, _STATES, name),
            number,
        )
        for number, (_, name) in enumerate(sockets)
    )
    diag.send(messages)
    ended: set[int] = set()
    answered = 0
    while answered < len(sockets):
        for each in codec.receive(diag):
            answered += 1
            error = each.error
            if error is None:
                ended.add(sockets[each.sequence][0])
            elif error.errno not in (errno.ENOENT, errno.ESTALE):
                raise error
    return ended
