"""The whole answer about one address and port: the path, the reasons, and what is open now."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from ebpfproxy.datapath.abi.flow_layout import AffinityKey, ClientKind
from ebpfproxy.datapath.abi.layout import NSEC_PER_SEC, Scope, ServiceEntry, ServiceFlags
from ebpfproxy.datapath.abi.node_layout import DeviceFlags
from ebpfproxy.datapath.flows.conntrack_table import FlowRow
from ebpfproxy.datapath.lookup import Affinity, Lookup, Selected
from ebpfproxy.explain.endpoint_reasons import EndpointRow, differences, rows_of
from ebpfproxy.explain.path import (
    Client,
    Hook,
    Outcome,
    Path,
    Place,
    Programs,
    Ranges,
    Target,
    find_path,
    forwards_at,
)
from ebpfproxy.services.model import (
    BackendState,
    FrontendKind,
    Policy,
    Protocol,
    ServicePortKey,
    format_address,
    format_endpoint,
)
from ebpfproxy.services.reasons import PortReasons, Reason, ServiceReasons

_MOST_ROUTES = 64


class AffinityState(msgspec.Struct, frozen=True):
    """``backend``: the one that the client keeps now, empty without one. Times in seconds."""

    seconds: int
    client: str
    backend: str = ""
    expires: float = 0.0


class MasqueradeState(msgspec.Struct, frozen=True):
    """``addresses``: what backends see, as far as routes tell.

    ``hairpin``: a backend may be the client itself, and is masqueraded in any case. ``forwarded``: backends
    to which packets go past netfilter, by the hook that forwards those after a flow's first.
    """

    applies: bool
    why: str
    hairpin: bool = False
    addresses: tuple[str, ...] = ()
    forwarded: dict[Hook, tuple[str, ...]] = {}


class OpenFlow(msgspec.Struct, frozen=True):
    """A flow of the packet path from the client to this frontend. Times in seconds.

    ``masquerade``: what the backend sees, empty for the client itself. ``what`` becomes of it.
    """

    client: str
    backend: str
    masquerade: str
    state: str
    idle: float
    expires: float
    what: str


class SocketRow(msgspec.Struct, frozen=True):
    """Open sockets of the client that asked for this frontend, by backend."""

    backend: str
    state: str
    sockets: int
    what: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """One client, one address and port. The JSON of ``ebpfproxy explain``: these names stay.

    ``error``: what the client gets where it does not work, an errno's name or ``timeout``. ``service`` with
    its port's name, empty where no Service has the address. ``notes``: sentences beside the answer.
    """

    client: str
    place: str
    target: str
    works: bool
    outcome: Outcome
    error: str
    why: str
    hook: Hook
    steps: tuple[str, ...] = ()
    service: str = ""
    frontend: str = ""
    scope: str = ""
    policy: str = ""
    policy_from: str = ""
    algorithm: str = ""
    endpoints: tuple[EndpointRow, ...] = ()
    affinity: AffinityState | None = None
    source_ranges: Ranges = Ranges.NONE
    masquerade: MasqueradeState | None = None
    flows: tuple[OpenFlow, ...] = ()
    sockets: tuple[SocketRow, ...] = ()
    notes: tuple[str, ...] = ()


class Known(msgspec.Struct, frozen=True):
    """What is asked about once for all answers. ``now``: CLOCK_MONOTONIC in nanoseconds.

    ``reasons`` of a service port's Service: None where the agent does not know it, or does not answer.
    """

    programs: Programs
    tables: Lookup
    names: Mapping[int, ServicePortKey]
    reasons: Callable[[ServicePortKey], ServiceReasons | None]
    now: int


def explain(
    client: Client,
    target: Target,
    known: Known,
    *,
    flows: tuple[FlowRow, ...] = (),
    sockets: Mapping[int, int] | None = None,
) -> Explanation:
    """``flows`` of this client to this target, and its ``sockets``: how many by backend id."""
    path = find_path(client, target, known.tables, known.programs)
    base = Explanation(
        client=client.name,
        place=client.place,
        target=f"{format_endpoint(target.address, target.port)}/{target.protocol.name}",
        works=path.outcome.works,
        outcome=path.outcome,
        error=_error(path, known.programs),
        why=path.why,
        hook=path.hook,
        steps=path.steps,
        source_ranges=path.ranges,
    )
    entry = path.entry
    opened = _Open(known.tables, target.protocol)
    if entry is None:
        return msgspec.structs.replace(
            base, flows=tuple(opened.flows(flows, ())), sockets=tuple(opened.sockets(sockets or {}, ()))
        )
    port = known.names.get(entry.id)
    service = known.reasons(port) if port is not None else None
    reasons = service.port(port) if service is not None and port is not None else None
    endpoints = rows_of(path.selected, entry.policy, service, reasons)
    affinity = _affinity(client, target, path, entry, known)
    policy_from = _policy_from(entry, path.scope)
    return msgspec.structs.replace(
        base,
        why=_why(path, endpoints, entry, affinity, knows_all=reasons is not None),
        service=f"{port.namespace}/{port.name}:{port.port_name or target.port}" if port is not None else "?",
        frontend=str(entry.kind),
        scope=str(path.scope),
        policy=entry.policy.name.capitalize(),
        policy_from=policy_from,
        algorithm=str(entry.algorithm),
        endpoints=endpoints,
        affinity=affinity,
        flows=tuple(opened.flows(flows, endpoints)),
        sockets=tuple(opened.sockets(sockets or {}, endpoints)),
        masquerade=_masquerade(client, target, path, known) if path.selected else None,
        notes=tuple(notes_of(path.selected, entry.policy, service, reasons, port)),
    )


def _error(path: Path, programs: Programs) -> str:
    if path.outcome.works:
        return ""
    if path.outcome is Outcome.UNSERVED or (path.outcome is Outcome.DROPPED and path.hook is not Hook.SOCKET):
        return "timeout"
    if path.hook is Hook.SOCKET and not programs.options.features.set_retval:
        return errno.errorcode[errno.EPERM]
    return errno.errorcode[errno.ECONNREFUSED if path.outcome is Outcome.REFUSED else errno.EHOSTUNREACH]


def _policy_from(entry: ServiceEntry, scope: Scope) -> str:
    """The field that says which policy it is."""
    if entry.kind is FrontendKind.CLUSTER_IP:
        return "internalTrafficPolicy"
    if scope is Scope.INTERNAL and entry.flags & ServiceFlags.TWO_SCOPES:
        return "clients in the cluster use all endpoints"
    return "externalTrafficPolicy"


def _why(
    path: Path,
    endpoints: tuple[EndpointRow, ...],
    entry: ServiceEntry,
    affinity: AffinityState | None,
    *,
    knows_all: bool,
) -> str:
    if path.outcome is Outcome.REFUSED and knows_all and not endpoints:
        return f"{path.why}: the Service has none in this family"
    if path.why:
        return path.why
    if affinity is not None and affinity.backend:
        return f"session affinity keeps the client with {affinity.backend}"
    used = sum(each.used for each in endpoints)
    return f"{entry.algorithm} choice among {used}" if used > 1 else "there is one endpoint to choose"


def _affinity(
    client: Client, target: Target, path: Path, entry: ServiceEntry, known: Known
) -> AffinityState | None:
    """What ``set_client`` and ``client_of`` make of the client, and the entry that it has."""
    if not entry.affinity_seconds:
        return None
    key = _client_key(client, target, path, entry, known)
    who = f"netns:{key.client}" if isinstance(key.client, int) else format_address(key.client)
    found: Affinity | None = known.tables.affinity(key, entry.policy, entry.affinity_seconds, known.now)
    record = known.tables.backend(found.backend_id) if found is not None else None
    if found is None or record is None:
        return AffinityState(entry.affinity_seconds, who)
    expires = entry.affinity_seconds - max(0.0, (known.now - found.last) / NSEC_PER_SEC)
    backend = format_endpoint(record[0].address, record[0].port)
    return AffinityState(entry.affinity_seconds, who, backend, round(expires, 3))


def _client_key(client: Client, target: Target, path: Path, entry: ServiceEntry, known: Known) -> AffinityKey:
    address = client.address(len(target.address))
    cookie: int | None = client.netns if path.hook is Hook.SOCKET else None
    if path.hook is Hook.LOOPBACK:
        cookie = known.programs.options.host_netns_cookie
    if cookie is None:
        if client.place is Place.HOST:
            address = known.programs.source_towards(target.address) or address
        cookie = known.tables.client_namespace(address)
    if cookie:
        return AffinityKey(cookie, entry.id, ClientKind.NAMESPACE)
    return AffinityKey(address, entry.id, ClientKind.ADDRESS)


def _masquerade(client: Client, target: Target, path: Path, known: Known) -> MasqueradeState:
    applies, why, may_be_hairpin, is_dsr = path.masquerade
    itself = [each for each in path.selected if each.backend.address in client.addresses]
    is_hairpin = may_be_hairpin and bool(itself)
    found: set[bytes] = set()
    is_exception = False
    forwarded: dict[Hook, tuple[str, ...]] = {}
    for each in (path.selected if applies or is_dsr else itself if is_hairpin else ())[:_MOST_ROUTES]:
        device = known.programs.device_to(each.backend.address)
        flags = known.tables.device_flags(device) if device is not None else DeviceFlags(0)
        is_masked = not is_dsr or each in itself
        if not is_masked and flags & DeviceFlags.LOCAL:
            continue
        address = known.tables.masquerade_address(device, len(target.address)) if device is not None else b""
        if device is None or not address:
            continue
        hook = forwards_at(client, device, target, known.tables, known.programs)
        if is_masked or flags & DeviceFlags.TUNNEL or target.protocol is Protocol.SCTP:
            found.add(address)
            is_exception |= not is_masked
        else:
            hook = hook or Hook.INGRESS
        if path.hook is Hook.INGRESS and hook is not None:
            backend = format_endpoint(each.backend.address, each.backend.port)
            forwarded[hook] = (*forwarded.get(hook, ()), backend)
    if is_exception:
        why += f", but for a backend behind a tunnel, and SCTP, which see {_some(found)}"
    return MasqueradeState(applies, why, is_hairpin, tuple(map(format_address, sorted(found))), forwarded)


def _some(addresses: set[bytes]) -> str:
    return " or ".join(map(format_address, sorted(addresses)))


class _Open:
    """What programs and agent do with what is open, by what its backend is to this service port."""

    def __init__(self, tables: Lookup, protocol: Protocol) -> None:
        self._tables = tables
        self._protocol = protocol

    def sockets(self, sockets: Mapping[int, int], endpoints: tuple[EndpointRow, ...]) -> Iterator[SocketRow]:
        known = {each.address: each for each in endpoints}
        for number, count in sorted(sockets.items()):
            record = self._tables.backend(number)
            if record is not None:
                backend, state = record
                address = format_endpoint(backend.address, backend.port)
                row = known.get(address)
                what = self._what(row, state, "is closed, so that the client connects again")
                yield SocketRow(
                    address, row.state if row is not None and row.state else str(state), count, what
                )

    def flows(self, flows: tuple[FlowRow, ...], endpoints: tuple[EndpointRow, ...]) -> Iterator[OpenFlow]:
        known = {each.address: each for each in endpoints}
        for flow in flows:
            what = self._what(known.get(flow.backend), BackendState.GONE, "is reset at its next packet")
            yield OpenFlow(
                flow.client, flow.backend, flow.masquerade, flow.state, flow.idle, flow.expires, what
            )

    def _what(self, row: EndpointRow | None, state: BackendState, end: str) -> str:
        """``state`` is the backend's, which counts where its endpoint is not known; ``end`` is of TCP."""
        moves = "its next datagram goes to another endpoint"
        is_udp = self._protocol is Protocol.UDP
        if row is None and state in (BackendState.GONE, BackendState.ACTIVE):
            return moves if is_udp else end
        if row is not None and row.used:
            return "stays"
        is_idle = row.reason == Reason.NOT_READY if row is not None else state is BackendState.QUARANTINED
        return moves if is_idle and is_udp else "stays; new ones go elsewhere"


def notes_of(
    selected: Sequence[Selected],
    policy: Policy,
    service: ServiceReasons | None,
    reasons: PortReasons | None,
    port: ServicePortKey | None,
) -> Iterator[str]:
    """Sentences about a service port beside what its endpoints' rows say."""
    if service is None:
        return
    name = f"{service.namespace}/{service.name}"
    if reasons is None:
        which = f"port {port.port_name!r}" if port is not None and port.port_name else "port"
        yield f"the maps still have a {which} of {name} that the agent does not know"
        return
    yield from differences(selected, policy, reasons)
    if policy is Policy.CLUSTER:
        for kind, unused in (("node", reasons.node_hints_unused), ("zone", reasons.zone_hints_unused)):
            if unused is not None:
                yield f"{kind} hints are not followed: {unused}"
    for lost in reasons.lost:
        yield f"{lost.frontend} is asked for, too, but belongs to {lost.owner}"
    yield from (f"ignored: {warning}" for warning in service.warnings)
