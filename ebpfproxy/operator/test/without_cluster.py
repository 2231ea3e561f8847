"""The test without a cluster: the Services of a folder of manifests, asked from this node.

It changes nothing. The servers are somebody's own, so that nothing is sent to them: a TCP or SCTP connection
is made and closed, a UDP socket is connected, and the kernel says to which backend.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from ebpfproxy.kube.errors import ManifestError
from ebpfproxy.kube.manifests import ManifestSource
from ebpfproxy.netlink.namespaces import OWN
from ebpfproxy.netlink.sock_diag import Peer, sockets_in
from ebpfproxy.operator.test.pod import words
from ebpfproxy.operator.test.questions import AFFINITY
from ebpfproxy.operator.test.results import Report, Result, failure, report
from ebpfproxy.operator.test.site import CannotTestError
from ebpfproxy.services.model import (
    Backend,
    Frontend,
    FrontendKind,
    Policy,
    Protocol,
    ServicePort,
    format_address,
    format_endpoint,
)
from ebpfproxy.services.reduce import reducer
from ebpfproxy.services.tracker import Tracker

WITHOUT = "without endpoints"
_SECONDS = 2.0
_TIMES = 5
_THREADS = 32
_SHOWN = 3
_SO_COOKIE = 57  # asm-generic/socket.h
#: What ``sock_diag`` leaves out of cookies.
_COOKIE_MASK = (1 << 56) - 1


def check(folder: Path, node: str, node_addresses: Sequence[bytes]) -> Report:
    """``node_addresses``: where NodePorts answer. Raises CannotTestError, ManifestError and OSError."""
    asked = [
        (port, frontend, address)
        for port in _read(folder, node)
        for frontend in port.frontends
        for address in _addresses(port, frontend, node_addresses)
    ]
    if not asked:
        raise CannotTestError(f"{folder}: no Service has an address that this node could ask")
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(lambda each: _ask(node, *each), asked))
    results.sort(key=lambda each: (each.check == WITHOUT, each.check, each.family, each.protocol))
    return report(results, f"{folder} on {node}", ())


def _read(folder: Path, node: str) -> list[ServicePort]:
    tracker = Tracker(node)
    source = ManifestSource(folder, tracker.apply, node_name=node, reduce=reducer(node))
    source.check()
    source.read()
    if broken := {each.error for each in source.statuses if each.error}:
        raise ManifestError("; ".join(broken))
    tracker.drain()
    return tracker.service_ports()


def _addresses(port: ServicePort, frontend: Frontend, node_addresses: Iterable[bytes]) -> Iterable[bytes]:
    if frontend.kind is FrontendKind.NODE_PORT:
        return [each for each in node_addresses if len(each) == len(frontend.address)]
    if frontend.kind is FrontendKind.LOAD_BALANCER and port.source_ranges is not None:
        # This node may not be in the ranges.
        return []
    return [frontend.address]


def _ask(node: str, port: ServicePort, frontend: Frontend, address: bytes) -> Result:
    backends = port.local if frontend.internal is Policy.LOCAL else port.cluster
    where = format_endpoint(address, frontend.port)
    kind = AFFINITY if port.affinity_seconds and len(backends) > 1 else str(frontend.kind)
    result = Result(
        check=kind if backends else WITHOUT,
        protocol=frontend.protocol.name,
        family=str(port.key.family),
        asked=_TIMES,
    )
    try:
        wrong = _wrong(frontend.protocol, address, frontend.port, backends, same=kind == AFFINITY)
    except _NoProtocolError as error:
        return msgspec.structs.replace(result, asked=0, skipped=str(error))
    if not wrong:
        return result
    key = port.key
    failed = failure(
        f"{node} itself",
        f"Service {key.namespace}/{key.name}" + (f":{key.port_name}" if key.port_name else ""),
        f"{where}/{result.protocol}",
        _expected(backends),
        wrong,
        explain=f"ebpfproxy explain host {where} --protocol {result.protocol}",
    )
    return msgspec.structs.replace(result, failure=failed)


class _NoProtocolError(Exception):
    """The kernel lacks the protocol."""


def _wrong(
    protocol: Protocol, address: bytes, number: int, backends: tuple[Backend, ...], *, same: bool
) -> str:
    """Returns what came instead of a connection to one of the backends; empty where all was right."""
    chosen: set[str] = set()
    for _ in range(_TIMES):
        with _open(protocol, address) as sock:
            try:
                sock.connect((format_address(address), number))
            except OSError as error:
                return f"{words(error)}{_directly(backends)}" if backends else ""
            peer = _peer(sock, protocol, backends)
        is_known = peer is not None and (peer.address, peer.port) != (address, number)
        if not backends:
            # A UDP socket without a backend is refused when it sends.
            if is_known or protocol is not Protocol.UDP:
                return "it was connected"
            continue
        if peer is None or not is_known:
            continue
        name = format_endpoint(peer.address, peer.port)
        if Backend(peer.address, peer.port, protocol) not in backends:
            return f"it was connected to {name}"
        chosen.add(name)
        if same and len(chosen) > 1:
            return f"{' and '.join(sorted(chosen))} were chosen for one client"
    return ""


def _open(protocol: Protocol, address: bytes) -> socket.socket:
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    kind = socket.SOCK_DGRAM if protocol is Protocol.UDP else socket.SOCK_STREAM
    try:
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _NoProtocolError(f"the kernel has no {protocol.name}: {words(error)}") from error
    sock.settimeout(_SECONDS)
    return sock


def _peer(sock: socket.socket, protocol: Protocol, backends: Iterable[Backend]) -> Peer | None:
    """Where packets go, which programs hide from applications; None where the kernel does not tell."""
    cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), "little") & _COOKIE_MASK
    wanted = [Peer(each.address, each.port, each.protocol) for each in backends]
    # All sockets are looked through only if it is none of these.
    for peers in (wanted, None):
        try:
            found = sockets_in(OWN, protocol, {cookie}, peers).get(cookie)
        except OSError:
            return None
        if found is not None:
            return found.peer
    return None


def _directly(backends: Iterable[Backend]) -> str:
    """Says which of the first endpoints cannot be reached without the Service, either."""
    failing = []
    for each in list(backends)[:_SHOWN]:
        with _open(each.protocol, each.address) as sock:
            if sock.connect_ex((format_address(each.address), each.port)):
                failing.append(format_endpoint(each.address, each.port))
    return f"; nor can {', '.join(failing)} be reached directly" if failing else ""


def _expected(backends: Sequence[Backend]) -> str:
    if not backends:
        return "no connection, as no endpoint may be used"
    names = [format_endpoint(each.address, each.port) for each in backends]
    more = f" or {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"a connection to {' or '.join(names[:_SHOWN])}{more}"
