"""What the pinned maps hold now, for commands and metrics: read from the kernel, whoever wrote it.

Nothing here needs a running agent. Names come from the ``service_names`` map.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Container, Iterator
from functools import cached_property
from pathlib import Path

import msgspec

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import layout, socket_layout, uapi
from ebpfproxy.datapath.abi.arrays import backend_ids
from ebpfproxy.datapath.abi.layout import Scope, ServiceFlags
from ebpfproxy.datapath.abi.schema import SCHEMA_VERSION, XDP_MAPS, map_specs
from ebpfproxy.datapath.kernel.bpf_map import WindowedArray
from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs.attach import LINKS, attachments, program_id
from ebpfproxy.datapath.services.counters import ServiceCounts
from ebpfproxy.services.model import Backend, Family, Protocol, ServicePortKey, format_endpoint

#: Statistics, and what is read as it comes.
_WITHOUT_FILL = (uapi.MAP_PERCPU_ARRAY, uapi.MAP_RINGBUF)
#: These have no fill: all of their places are in use, or records of the agent.
_PLAIN_ARRAYS = frozenset(
    {
        "epochs",
        "flow_cache",
        "flow_hops",
        "frontend_cache",
        "next_hops",
        "service_choices",
        "service_rejections",
        "sweep_keys",
        "sweep_values",
        "turns",
    }
)


class NothingPinnedError(Exception):
    """No agent has ever worked on this root, or it was cleaned up."""


class BackendRef(msgspec.Struct, frozen=True, order=True):
    address: str
    state: str


class FrontendRow(msgspec.Struct, frozen=True):
    """One frontend in one scope. The JSON of ``ebpfproxy service list``: these names stay."""

    namespace: str
    name: str
    port_name: str
    type: str
    scope: str
    frontend: str
    algorithm: str
    #: Seconds for which a client stays with its backend; 0 without session affinity.
    affinity: int
    backends: tuple[BackendRef, ...]
    #: The node itself has the address, and answers there: nothing is translated.
    own: bool = False


class BackendRow(msgspec.Struct, frozen=True):
    """One backend with everything that uses it. ``connections`` counts connections and datagrams.

    ``open`` is how many of this node's connected sockets and flows are open to it.
    """

    id: int
    address: str
    protocol: str
    state: str
    services: tuple[str, ...]
    connections: int
    open: int


class MapFill(msgspec.Struct, frozen=True):
    name: str
    entries: int
    capacity: int


class ServiceCounters(msgspec.Struct, frozen=True):
    """Connections and datagrams of one service port since its id was made."""

    key: ServicePortKey
    chosen: int
    refused: int
    dropped: int


def open_maps(bpf_root: Path) -> MapSet:
    """The maps that attached programs use, else the newest.

    Raises NothingPinnedError, also for those of another version of ebpfproxy and where some are gone, and
    PermissionError.
    """
    pins = pin_folder(bpf_root)
    versions = [p for p in pins.glob("v*-*") if (p / "maps").is_dir()] if pins.is_dir() else []
    if not versions and os.geteuid():
        # A bpffs is for its owner alone, and looks empty to others.
        raise PermissionError(f"nothing to be seen below {pins}")
    if not versions:
        raise NothingPinnedError(f"nothing is pinned below {pins}: no agent has run with this --bpf-root")
    running = {a.hook: a.program_id for a in attachments(pins)} if (pins / LINKS).is_dir() else {}

    def preference(version: Path) -> tuple[bool, float]:
        used = any(
            program_id(program) == running.get(program.name) for program in version.glob("progs-*/connect4")
        )
        try:
            return used, version.stat().st_mtime
        except FileNotFoundError:
            # An agent that has made others removes it at this moment.
            return used, 0.0

    folder = max(versions, key=preference)
    maps = open_pinned(folder)
    lacking = {spec.name for spec in map_specs(Capacity())} - maps.maps.keys() - XDP_MAPS
    if lacking:
        maps.close()
        raise NothingPinnedError(_why_lacking(folder, sorted(lacking)))
    return maps


def _why_lacking(folder: Path, names: list[str]) -> str:
    is_other = not folder.name.startswith(f"v{SCHEMA_VERSION}-")
    if is_other or any((folder / "maps" / name).exists() for name in names):
        return f"{folder} is of another version of ebpfproxy, whose own commands read it"
    return (
        f"{folder / 'maps'} lacks {', '.join(names)}: somebody has removed pins, which a running agent"
        " restores within seconds, or it is of another version of ebpfproxy, whose own commands read it"
    )


class CurrentMaps:
    """The maps that programs use, for what reads them for long: an agent with other sizes makes others.

    Raises what :func:`open_maps` raises, also later: somebody may remove them all.
    """

    def __init__(self, bpf_root: Path) -> None:
        self._bpf_root = bpf_root
        self._open()

    @property
    def are_replaced(self) -> bool:
        """True where others have their place, or none."""
        return _pin_of(self._maps) != self._pin

    def get(self) -> MapSet:
        """Closes those of before where they are replaced: nobody may use them any more."""
        if self.are_replaced:
            self._maps.close()
            self._open()
        return self._maps

    def _open(self) -> None:
        self._maps = open_maps(self._bpf_root)
        self._pin = _pin_of(self._maps)


def _pin_of(maps: MapSet) -> tuple[int, int] | None:
    """Which file pins one of them, which go together; None where it is gone."""
    try:
        found = (maps.folder / "maps" / "backends").stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class Dump:
    """A reading of the maps at one moment, decoded as far as asked."""

    def __init__(self, maps: MapSet) -> None:
        self._maps = maps
        self._backends, self._selections = maps.backends(), maps.selections()
        self.names: dict[int, ServicePortKey] = dict(layout.known_names(maps["service_names"].items()))
        self._refs: dict[int, BackendRef] = {}

    def selection(self, service_id: int, policy: int) -> array[int]:
        """Backend ids in the order of their first slots."""
        slots = self._selections.slots(self._selections.ranges(service_id)[policy])
        return array("I", dict.fromkeys(backend_ids(slots)))

    def backend_ref(self, number: int) -> BackendRef:
        known = self._refs.get(number)
        if known is None:
            found = self._backends.read(number)
            known = BackendRef("?", "missing")
            if found is not None:
                backend, state = found
                known = BackendRef(format_endpoint(backend.address, backend.port), str(state))
            self._refs[number] = known
        return known

    def entries(
        self, ids: Container[int] | None = None, address: bytes | None = None
    ) -> Iterator[tuple[layout.ServiceKey, layout.ServiceEntry]]:
        """All, or those of these service ids, or of this address: of many, the others are not decoded."""
        return layout.known_services(
            (key, value)
            for key, value in self._packed_entries()
            if (ids is None or layout.service_id(value) in ids)
            and (address is None or layout.key_address(key) == address)
        )

    def count_frontends(self) -> int:
        """Of addresses with a port and a protocol: one with an entry for each scope counts once."""
        return len({layout.without_scope(key) for key, _ in self._packed_entries()})

    def _packed_entries(self) -> Iterator[tuple[bytes, bytes]]:
        for table in ("services4", "services6"):
            for key, value in self._maps[table].items():
                if not layout.service_flags(value) & ServiceFlags.ADDRESS:
                    yield key, value

    def frontends(self) -> list[FrontendRow]:
        """A row for every frontend and scope, sorted by service, port, kind, address and scope."""
        rows = []
        unknown = ServicePortKey("?", "?", "?", Protocol.TCP, Family.IPV4)
        for key, entry in self.entries():
            name = self.names.get(entry.id, unknown)
            shared = key.scope == Scope.INTERNAL and not entry.flags & ServiceFlags.TWO_SCOPES
            backends = tuple(sorted(map(self.backend_ref, self.selection(entry.id, entry.policy))))
            rows += [
                (
                    (name.namespace, name.name, name.port_name, entry.kind, key.address, key.port, scope),
                    FrontendRow(
                        namespace=name.namespace,
                        name=name.name,
                        port_name=name.port_name,
                        type=str(entry.kind),
                        scope=str(scope),
                        frontend=layout.format_frontend(key.address, key.port, key.protocol),
                        algorithm=str(entry.algorithm),
                        affinity=entry.affinity_seconds,
                        backends=backends,
                        own=bool(entry.flags & ServiceFlags.OWN),
                    ),
                )
                for scope in (Scope if shared else (key.scope,))
            ]
        return [row for _, row in sorted(rows, key=lambda pair: (*pair[0], pair[1].frontend))]

    def backends(self) -> list[BackendRow]:
        """Every backend, sorted by address: also those that only serve old connections."""
        users: dict[int, set[str]] = {}
        for number, name in self.names.items():
            for policy in range(layout.POLICIES):
                for backend_id in self.selection(number, policy):
                    users.setdefault(backend_id, set()).add(f"{name.namespace}/{name.name}")
        rows = []
        connections, loads = self.backend_connections(), self.backend_loads()
        for number in self._backends.ids():
            found = self._backends.read(number)
            if found is None:
                continue
            backend, state = found
            rows.append(
                (
                    backend,
                    BackendRow(
                        id=number,
                        address=format_endpoint(backend.address, backend.port),
                        protocol=backend.protocol.name,
                        state=str(state),
                        services=tuple(sorted(users.get(number, ()))),
                        connections=connections.get(number, 0),
                        open=loads.get(number, 0),
                    ),
                )
            )
        return [row for _, row in sorted(rows, key=lambda pair: (len(pair[0].address), pair[0]))]

    def service_counters(self) -> list[ServiceCounters]:
        """The counters of all service ports that have counted anything."""
        return [
            ServiceCounters(self.names[number], *sums)
            for number, sums in ServiceCounts(self._maps).read(self.names)
        ]

    def backend_connections(self) -> dict[int, int]:
        """Connections and datagrams by backend id, where there were any."""
        return {number: load.chosen for number, load in self._loads if load.chosen}

    def backend_loads(self) -> dict[int, int]:
        """Open connections by backend id, where there are any."""
        return {number: load.open_now for number, load in self._loads if load.open_now}

    @cached_property
    def _loads(self) -> list[tuple[int, layout.Load]]:
        """What was counted for backends, of those that have an id now."""
        loads, numbers = self._maps.loads(), self._backends.ids()
        known = set(numbers)
        end = numbers[-1] + 1 if numbers else 0
        return [(number, loads[number]) for number in loads.counted(end) if number in known]

    def backend(self, number: int) -> Backend | None:
        found = self._backends.read(number)
        return found[0] if found is not None else None


def fill(maps: MapSet) -> list[MapFill]:
    """How full each map is; statistics, and tables that are one value, have no fill of their own."""
    found = []
    for name, each in maps.maps.items():
        kind = each.spec.kind
        if kind in _WITHOUT_FILL or each.spec.max_entries == 1 or name in _PLAIN_ARRAYS:
            continue
        found.append(MapFill(name, _entries(maps, name), each.spec.max_entries))
    return found


def _entries(maps: MapSet, name: str) -> int:
    if name == "backends":
        return len(maps.backends().ids())
    if name in ("selections", "slots"):
        # Most are 0, which a view passes over in an eighth of the time of ctypes.
        words = filter(None, maps.shared("selections").bytes.cast("Q"))
        counts = [layout.selection_range(word)[1] for word in words]
        return len(counts) if name == "selections" else sum(counts)
    if name == "sock_origin":
        slots = maps[name]
        assert isinstance(slots, WindowedArray)
        return slots.count_nonzero(socket_layout.ORIGIN_KIND_AT)
    return maps[name].count()
