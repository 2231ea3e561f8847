"""Services of this node, found by name, address or port; and why the endpoints of one are used or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import Scope, ServiceEntry, ServiceFlags, ServiceKey
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.lookup import Lookup
from ebpfproxy.datapath.services.counters import ServiceCounts
from ebpfproxy.datapath.services.measures import (
    NO_CONNECTS,
    NO_FAILURES,
    NO_TRAFFIC,
    MeasureReader,
    ServiceBackend,
    by_reason,
    quantile,
)
from ebpfproxy.explain.answer import notes_of
from ebpfproxy.explain.endpoint_reasons import EndpointRow, rows_of
from ebpfproxy.inspection.agent import AskedOnce
from ebpfproxy.inspection.measuring import measuring, unmeasured
from ebpfproxy.inspection.words import duration, size
from ebpfproxy.services.model import (
    Backend,
    BackendState,
    Family,
    FrontendKind,
    Policy,
    Protocol,
    ServicePortKey,
)
from ebpfproxy.services.reasons import PortReasons, ServiceReasons
from ebpfproxy.services.values import parse_address, parse_port

Name = tuple[str, str]


class ConnectView(msgspec.Struct, frozen=True):
    """TCP connections since they are measured: percentiles of their times in words, failures by reason."""

    established: int
    p50: str
    p99: str
    failures: dict[str, int]


class TrafficView(msgspec.Struct, frozen=True):
    """Bytes since they are counted, in words."""

    request: str
    response: str


class ServiceRow(msgspec.Struct, frozen=True):
    """A Service in the maps. Counts are of connections and datagrams since its ids were made.

    ``connects`` and ``traffic``: None where that is not measured.
    """

    namespace: str
    name: str
    ports: tuple[str, ...]
    chosen: int
    refused: int
    dropped: int
    connects: ConnectView | None = None
    traffic: TrafficView | None = None


class Found(msgspec.Struct, frozen=True):
    """``more``: so many others match, too."""

    services: tuple[ServiceRow, ...]
    more: int


class FrontendView(msgspec.Struct, frozen=True):
    """``own``: the node itself has the address, and nothing is translated."""

    address: str
    type: str
    scopes: tuple[str, ...]
    algorithm: str
    affinity: int
    own: bool


class EndpointView(msgspec.Struct, frozen=True):
    """An endpoint's row, and what this node counts for its backend; None where it has none.

    ``open``: connections of this node that are open to it, through whichever Service. ``failures``: of
    connections of this Service, by reason.
    """

    row: EndpointRow
    open: int | None = None
    connections: int | None = None
    failures: dict[str, int] = {}


class PortView(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoints of a service port under one traffic policy, and the frontends that use them."""

    port: str
    protocol: str
    family: str
    policy: str
    frontends: tuple[FrontendView, ...]
    endpoints: tuple[EndpointView, ...]
    notes: tuple[str, ...]


class ServiceView(msgspec.Struct, frozen=True, kw_only=True):
    """``unserved``: why it has no frontends. ``without_agent``: why there are no reasons.

    ``connects`` and ``traffic``: None where that is not measured; ``unmeasured`` says how it would be.
    """

    namespace: str
    name: str
    node: str
    zone: str
    unserved: str
    warnings: tuple[str, ...]
    ports: tuple[PortView, ...]
    chosen: int
    refused: int
    dropped: int
    without_agent: str
    connects: ConnectView | None
    traffic: TrafficView | None
    unmeasured: tuple[str, ...]


class Services:
    """A reading of the maps at one moment."""

    def __init__(self, maps: MapSet, bpf_root: Path) -> None:
        self._maps = maps
        self._bpf_root = bpf_root
        self._dump = Dump(maps)
        self._measuring, self._measured = measuring(maps), MeasureReader(maps).read()

    def search(self, text: str, most: int, *, rejected: bool = False) -> Found:
        """Services by a part of their name, by an address of theirs or of an endpoint, or by a port's number.

        ``rejected``: only those that have refused or dropped something.
        """
        counts = dict(ServiceCounts(self._maps).read(self._dump.names))
        matching = self._matching(text.strip().lower())
        found: dict[Name, tuple[set[str], list[int]]] = {}
        ids: dict[Name, list[int]] = {}
        for number, key in self._dump.names.items():
            if matching is not None and number not in matching:
                continue
            ports, sums = found.setdefault((key.namespace, key.name), (set(), [0, 0, 0]))
            ports.add(_port(key))
            ids.setdefault((key.namespace, key.name), []).append(number)
            sums[:] = (before + new for before, new in zip(sums, counts.get(number, (0, 0, 0)), strict=True))
        names = [name for name, (_, sums) in sorted(found.items()) if not rejected or any(sums[1:])]
        rows = []
        for name in names[:most]:
            ports, (chosen, refused, dropped) = found[name]
            rows.append(
                ServiceRow(
                    namespace=name[0],
                    name=name[1],
                    ports=tuple(sorted(ports)),
                    chosen=chosen,
                    refused=refused,
                    dropped=dropped,
                    connects=self._connects(ids[name]),
                    traffic=self._traffic(ids[name]),
                )
            )
        return Found(tuple(rows), len(names) - len(rows))

    def view(self, namespace: str, name: str) -> ServiceView | None:
        """One Service; None where neither the maps nor the agent know it."""
        asked = AskedOnce(self._bpf_root)
        service = asked.service(namespace, name)
        own = {
            n: key for n, key in self._dump.names.items() if (key.namespace, key.name) == (namespace, name)
        }
        if service is None and not own:
            return None
        sums = [sum(each) for each in zip(*(c for _, c in ServiceCounts(self._maps).read(own)), strict=True)]
        chosen, refused, dropped = sums or (0, 0, 0)
        return ServiceView(
            namespace=namespace,
            name=name,
            node=service.node if service is not None else "",
            zone=service.zone if service is not None else "",
            unserved=service.unserved if service is not None else "",
            warnings=service.warnings if service is not None else (),
            ports=tuple(self._ports(own, service)),
            chosen=chosen,
            refused=refused,
            dropped=dropped,
            without_agent=asked.silence,
            connects=self._connects(own),
            traffic=self._traffic(own),
            unmeasured=tuple(unmeasured(self._measuring)),
        )

    def _connects(self, ids: Iterable[int]) -> ConnectView | None:
        """Of these service ids together."""
        if not self._measuring.connections:
            return None
        found = [self._measured.connects.get(number, NO_CONNECTS) for number in ids]
        times = [sum(each) for each in zip(*(each.times for each in found), strict=True)]
        failures = [sum(each) for each in zip(*(each.failures for each in found), strict=True)]
        p50, p99 = (quantile(times, share) for share in (0.5, 0.99))
        return ConnectView(
            sum(times),
            duration(p50) if p50 is not None else "",
            duration(p99) if p99 is not None else "",
            by_reason(failures or NO_FAILURES),
        )

    def _traffic(self, ids: Iterable[int]) -> TrafficView | None:
        if not self._measuring.traffic:
            return None
        found = [self._measured.traffic.get(number, NO_TRAFFIC) for number in ids]
        request, response = (sum(each[at] for each in found) for at in (0, 1))
        return TrafficView(size(request), size(response))

    def _matching(self, text: str) -> set[int] | None:
        """The ids of service ports; None for all."""
        if not text:
            return None
        found = {
            number
            for number, key in self._dump.names.items()
            if text in f"{key.namespace}/{key.name}".lower()
        }
        address = parse_address(text.strip("[]"))
        if address is not None:
            found |= {entry.id for _, entry in self._dump.entries(address=address)}
            found |= self._with_endpoint(address)
        if text.isascii() and text.isdigit() and len(text) <= 5:
            found |= {entry.id for key, entry in self._dump.entries() if key.port == int(text)}
        return found

    def _with_endpoint(self, address: bytes) -> set[int]:
        packed = layout.pack_address(address)
        backends = {number for number, name in self._maps.backends().identities() if name.startswith(packed)}
        return {
            number
            for number in self._dump.names
            if backends
            and any(not backends.isdisjoint(self._dump.selection(number, policy)) for policy in Policy)
        }

    def _ports(self, own: dict[int, ServicePortKey], service: ServiceReasons | None) -> Iterator[PortView]:
        groups: dict[tuple[ServicePortKey, Policy], list[tuple[ServiceKey, ServiceEntry]]] = {}
        for key, entry in self._dump.entries(own):
            groups.setdefault((own[entry.id], entry.policy), []).append((key, entry))
        for (port, policy), entries in sorted(groups.items(), key=lambda item: item[0]):
            reasons = service.port(port) if service is not None else None
            selected = Lookup(self._maps).selection(entries[0][1].id, policy)
            rows = rows_of(selected, policy, service, reasons)
            yield PortView(
                port=port.port_name,
                protocol=port.protocol.name,
                family=str(port.family),
                policy=policy.name.capitalize(),
                frontends=tuple(_frontends(entries)),
                endpoints=tuple(self._endpoints(rows, port, [n for n, each in own.items() if each == port])),
                notes=tuple(notes_of(selected, policy, service, reasons, port)),
            )
        if service is not None:
            known = {port for port, _ in groups}
            yield from (_without_frontend(p, service) for p in service.ports if _key(service, p) not in known)

    def _endpoints(
        self, rows: Sequence[EndpointRow], port: ServicePortKey, ids: Sequence[int]
    ) -> Iterator[EndpointView]:
        """What is open now, was ever chosen, and has failed. A backend has two ids if it came back."""
        names = [_identity(row.address, port.protocol) for row in rows]
        wanted, numbers = set(names), dict[bytes, list[int]]()
        for number, packed in self._maps.backends().identities():
            if packed in wanted:
                numbers.setdefault(packed, []).append(number)
        counted = self._maps.loads()
        for row, name in zip(rows, names, strict=True):
            found = numbers.get(name, [])
            loads = [counted[number] for number in found]
            pairs = (ServiceBackend(number, backend) for number in ids for backend in found)
            failed = [self._measured.failures.get(pair, NO_FAILURES) for pair in pairs]
            yield EndpointView(
                row,
                sum(each.open_now for each in loads) if loads else None,
                sum(each.chosen for each in loads) if loads else None,
                by_reason([sum(each) for each in zip(*failed, strict=True)] or NO_FAILURES),
            )


def _identity(endpoint: str, protocol: Protocol) -> bytes:
    """An endpoint's text as the maps have it; empty for one without a port."""
    host, _, port = endpoint.rpartition(":")
    address = parse_address(host.strip("[]"))
    number = parse_port(port)
    if address is None or number is None or (len(address) == 16 and not host.startswith("[")):
        return b""
    packed = layout.pack_backend(Backend(address, number, protocol), BackendState.ACTIVE)
    return packed[: layout.BACKEND_STATE_OFFSET]


def _port(key: ServicePortKey) -> str:
    return f"{key.port_name}/{key.protocol.name}" if key.port_name else key.protocol.name


def _key(service: ServiceReasons, port: PortReasons) -> ServicePortKey:
    return ServicePortKey(
        service.namespace, service.name, port.port_name, Protocol[port.protocol], Family(port.family)
    )


def _frontends(entries: list[tuple[ServiceKey, ServiceEntry]]) -> Iterator[FrontendView]:
    """One for each address and port. An entry of the internal scope is for both, if there is no other."""
    scopes: dict[tuple[FrontendKind, bytes, int], tuple[ServiceKey, ServiceEntry, set[Scope]]] = {}
    for key, entry in entries:
        shared = key.scope == Scope.INTERNAL and not entry.flags & ServiceFlags.TWO_SCOPES
        at = entry.kind, key.address, key.port
        scopes.setdefault(at, (key, entry, set()))[2].update(Scope if shared else (key.scope,))
    for _, (key, entry, found) in sorted(scopes.items()):
        yield FrontendView(
            address=layout.format_frontend(key.address, key.port, key.protocol),
            type=str(entry.kind),
            scopes=tuple(map(str, sorted(found))),
            algorithm=str(entry.algorithm),
            affinity=entry.affinity_seconds,
            own=bool(entry.flags & ServiceFlags.OWN),
        )


def _without_frontend(port: PortReasons, service: ServiceReasons) -> PortView:
    """A port of which the maps have nothing."""
    rows = rows_of((), Policy.CLUSTER, service, port)
    lost = tuple(f"{each.frontend} is asked for, but belongs to {each.owner}" for each in port.lost)
    return PortView(
        port=port.port_name,
        protocol=port.protocol,
        family=str(Family(port.family)),
        policy=Policy.CLUSTER.name.capitalize(),
        frontends=(),
        endpoints=tuple(map(EndpointView, rows)),
        notes=lost or ("the maps have no frontend of it",),
    )
