"""Names for the numbers in decisions, from the maps as they are when a decision is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import msgspec

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.arrays import backend_ids
from ebpfproxy.datapath.abi.decision_layout import (
    SUCCESSES,
    Decision,
    DecisionKind,
    Place,
    Sender,
    Task,
)
from ebpfproxy.datapath.abi.layout import U32, Scope, ServiceFlags
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.decisions import PodNames
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.lookup import Lookup
from ebpfproxy.node.client_names import ClientNames, Namespace
from ebpfproxy.services.model import (
    Algorithm,
    FrontendKind,
    Policy,
    Protocol,
    ServicePortKey,
    format_address,
    format_endpoint,
)
from ebpfproxy.services.reasons import PortReasons, ServiceReasons
from ebpfproxy.trace.rows import BackendRow, ClientRow, DecisionRow

#: Frontends are read again where an address is not known, but not more often than this.
_FRONTENDS_SECONDS = 5.0
#: Reasons are asked for again after so long, or after so many times what the answer took.
_REASONS_SECONDS, _PAUSES = 5.0, 100
_SLOW_SECONDS = 0.1
#: Asks the agent about a port's Service; None where it does not answer, or knows none.
AskReasons = Callable[[ServicePortKey], ServiceReasons | None]
_UDPLITE = 136
_PROTOCOLS = {int(each): each.name for each in Protocol} | {_UDPLITE: Protocol.UDP.name}
_NOWHERE = Namespace("")
#: They are by number, since texts of enumerations are computed each time.
_KINDS, _REASONS, _PLACES, _ALGORITHMS = (
    tuple(str(each) for each in kind) for kind in (DecisionKind, PacketEvent, Place, Algorithm)
)
_WITHOUT_REASON = SUCCESSES | {DecisionKind.BIND_REFUSED}


class Naming:
    """Makes rows of decisions. One thread uses it.

    Decisions come in rounds: what is looked up for one is kept for the others of its round.
    """

    def __init__(self, maps: MapSet, cgroup_root: Path, reasons: AskReasons) -> None:
        self._reasons = Reasons(reasons)
        self._names = maps["service_names"]
        self._backends, self._selections = maps.backends(), maps.selections()
        self._pods, self._tables = PodNames(maps), Lookup(maps)
        self.clients = ClientNames(cgroup_root)
        self._frontends = _Frontends(maps)
        #: Distinct backends by service id and range of slots.
        self._counts: dict[tuple[int, tuple[int, int]], int] = {}
        self.begin_round()

    def begin_round(self) -> None:
        """From now on names are looked up anew."""
        self._offset = time.time() - time.monotonic()
        self._key = cache(self._find_key)
        self._pod = cache(self._pods.of)
        self._backend = cache(self._find_backend)
        self._task = cache(self._find_task)
        self._candidates = cache(self._count_candidates)
        self._endpoint = cache(format_endpoint)
        self._basis = cache(self._find_basis)
        self._policies = cache(self._find_policies)

    def service_of(self, decision: Decision) -> ServicePortKey | None:
        """The service port of a decision; where programs found none, one that has the address."""
        number = decision.service_id
        if number is None:
            number = self._frontends.service_at(decision.frontend, decision.frontend_port)
        return self._key(number) if number is not None else None

    def row(self, decision: Decision) -> DecisionRow:
        key = self.service_of(decision)
        kind = decision.kind
        return DecisionRow(
            time=decision.time / 1e9 + self._offset,
            kind=_KINDS[kind],
            reason="" if kind in _WITHOUT_REASON else _REASONS[decision.reason],
            place=_PLACES[decision.place],
            client=self._client(decision.client),
            namespace=key.namespace if key is not None else "",
            service=key.name if key is not None else "",
            # A port that a Service does not have is none of its names.
            port=key.port_name if key is not None and decision.service_id is not None else "",
            protocol=_PROTOCOLS.get(decision.protocol, "?"),
            frontend=self._endpoint(decision.frontend, decision.frontend_port),
            backend=self._backend(decision.backend_id),
            candidates=self._candidates(decision.service_id, decision.candidates),
            basis=self._basis(decision.service_id, decision.candidates, self._policies(*_asked(decision)))
            if kind in SUCCESSES
            else "",
            # Programs may report that of another Service for a packet that gets no backend.
            algorithm=_ALGORITHMS[decision.algorithm] if kind in SUCCESSES else "",
        )

    def pods_addresses(self, name: str) -> list[bytes]:
        return self._pods.addresses(name)

    def _find_key(self, number: int) -> ServicePortKey | None:
        found = self._names.lookup(U32.pack(number))
        names = layout.known_names([(U32.pack(number), found)] if found is not None else [])
        return next((name for _, name in names), None)

    def _find_backend(self, number: int | None) -> BackendRow | None:
        found = self._backends.read(number) if number is not None else None
        if found is None:
            return None
        backend, _ = found
        return BackendRow(format_endpoint(backend.address, backend.port), self._pod(backend.address))

    def _client(self, client: Task | Sender) -> ClientRow:
        if isinstance(client, Sender):
            return ClientRow(
                pod=self._pod(client.address), address=format_endpoint(client.address, client.port)
            )
        # All but the socket is the same for many.
        return msgspec.structs.replace(self._task(client._replace(cookie=0)), socket=client.cookie)

    def _find_task(self, task: Task) -> ClientRow:
        namespace = self.clients.namespace(task.netns) or _NOWHERE
        pods = (self._pod(address) for address in namespace.addresses)
        # Pods in the host's namespace have its addresses, and endpoints may have them.
        of_namespace = next(filter(None, pods), "") if namespace.name != "host" else ""
        return ClientRow(
            pod=of_namespace or self.clients.pod(task.cgroup),
            name=namespace.name,
            address=format_address(namespace.addresses[0]) if namespace.addresses else "",
            process=task.comm,
            pid=task.pid,
            netns=task.netns,
            cgroup=task.cgroup,
        )

    def _count_candidates(self, number: int | None, slots: int) -> int:
        """Programs count slots: a backend with a weight, or in a Maglev table, has several."""
        if number is None or not slots:
            return slots
        for used in self._selections.ranges(number):
            if used[1] == slots:
                key = number, used
                if key not in self._counts:
                    self._counts[key] = len(set(backend_ids(self._selections.slots(used))))
                return self._counts[key]
        return slots

    def _find_policies(
        self, address: bytes, port: int, protocol: Protocol, at_socket: bool
    ) -> tuple[Policy, ...]:
        """Those that may have been the frontend's: where scopes have their own, a packet's is not known."""
        tables = self._tables
        entry = tables.frontend(address, port, protocol, Scope.INTERNAL)
        entry = entry or tables.node_port(len(address), port, protocol, Scope.INTERNAL)
        if entry is not None and (at_socket or not entry.flags & ServiceFlags.TWO_SCOPES):
            return (entry.policy,)
        return tuple(Policy)

    def _find_basis(self, number: int | None, slots: int, policies: tuple[Policy, ...]) -> str:
        key = self._key(number) if number is not None else None
        if number is None or key is None:
            return ""
        ranges = self._selections.ranges(number)
        return self._reasons.basis(key, ranges, [each for each in policies if ranges[each][1] == slots])


def _asked(decision: Decision) -> tuple[bytes, int, Protocol, bool]:
    protocol = Protocol[_PROTOCOLS.get(decision.protocol, Protocol.TCP.name)]
    return decision.frontend, decision.frontend_port, protocol, decision.place is Place.SOCKET


class Reasons:
    """The agent's reasons for selections, which are asked for again when the selection is another."""

    def __init__(self, ask: AskReasons) -> None:
        self._ask = ask
        self._next = 0.0
        self._known: dict[ServicePortKey, tuple[float, object, PortReasons | None]] = {}

    def basis(self, key: ServicePortKey, selection: object, policies: Iterable[Policy]) -> str:
        """Empty where it is another under each of ``policies``, and where the agent does not answer."""
        began = time.monotonic()
        due, known, reasons = self._known.get(key, (began, None, None))
        if began >= due or known != selection:
            if began < self._next:
                return ""
            service = self._ask(key)
            reasons = service.port(key) if service is not None else None
            now = time.monotonic()
            # A Service with thousands of endpoints takes the agent a while.
            due = now + max(_REASONS_SECONDS, _PAUSES * (now - began))
            self._known[key] = due, selection, reasons
            if service is None and now - began > _SLOW_SECONDS:
                # It hangs, and the ring fills up.
                self._next = now + _REASONS_SECONDS
        found = {reasons.basis(policy) for policy in policies} if reasons is not None else set()
        return str(found.pop()) if len(found) == 1 else ""


class _Frontends:
    """The service ids behind addresses and NodePorts, for decisions that have none."""

    def __init__(self, maps: MapSet) -> None:
        self._maps = maps
        self._addresses: dict[bytes, int] = {}
        self._node_ports: dict[int, int] = {}
        self._next = 0.0

    def service_at(self, address: bytes, port: int) -> int | None:
        if address not in self._addresses and time.monotonic() >= self._next:
            self._read()
        return self._addresses.get(address, self._node_ports.get(port))

    def _read(self) -> None:
        self._addresses, self._node_ports = {}, {}
        for key, entry in Dump(self._maps).entries():
            if entry.kind is FrontendKind.NODE_PORT:
                self._node_ports[key.port] = entry.id
            else:
                self._addresses[key.address] = entry.id
        self._next = time.monotonic() + _FRONTENDS_SECONDS
