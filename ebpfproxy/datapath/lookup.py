"""What programs find in the maps: their look-ups, one by one, without their effects.

Each method is the reading of a function in bpf/lib, which it names. What follows from the results is decided
elsewhere (``ebpfproxy.explain``).
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from ebpfproxy.datapath.abi import flow_layout, layout
from ebpfproxy.datapath.abi.arrays import backend_ids
from ebpfproxy.datapath.abi.flow_layout import AffinityKey
from ebpfproxy.datapath.abi.layout import U32, Scope, ServiceEntry, ServiceFlags
from ebpfproxy.datapath.abi.node_layout import (
    CidrFlags,
    DeviceFlags,
    XdpFlags,
    pack_cidr,
    unpack_device,
    unpack_xdp_device,
)
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Backend, BackendState, Policy, Prefix, Protocol


class Selected(NamedTuple):
    """A backend that new connections may get. ``slots``: its places in the selection, or its weight there."""

    id: int
    backend: Backend
    state: BackendState
    slots: int


class Affinity(NamedTuple):
    """The backend that a client keeps. ``last``: its last choice, CLOCK_MONOTONIC in nanoseconds."""

    backend_id: int
    last: int


class Lookup:
    """Reads one set of maps."""

    def __init__(self, maps: MapSet) -> None:
        self._maps = maps
        self._backends, self._selections = maps.backends(), maps.selections()

    def frontend(
        self, address: bytes, port: int, protocol: Protocol | None, scope: Scope
    ) -> ServiceEntry | None:
        """``service_by_address``: no frontend has the unspecified address, or IPv6's loopback."""
        if not any(address[:-1]) and address[-1] <= (1 if len(address) == 16 else 0):
            return None
        return self._service(address, port, protocol, scope)

    def node_port(self, family: int, port: int, protocol: Protocol, scope: Scope) -> ServiceEntry | None:
        """``service_by_node_port``, whatever the address of this ``family``: the length of its addresses."""
        return self._service(bytes(family), port, protocol, scope)

    def is_cluster_ip(self, address: bytes) -> bool:
        """``is_cluster_ip``: one of our Services has it, and refuses all other ports."""
        entry = self.frontend(address, 0, None, Scope.INTERNAL)
        return entry is not None and bool(entry.flags & ServiceFlags.ADDRESS)

    def _service(
        self, address: bytes, port: int, protocol: Protocol | None, scope: Scope
    ) -> ServiceEntry | None:
        table = self._maps["services4" if len(address) == 4 else "services6"]
        found = table.lookup(layout.pack_service_key(address, port, protocol, scope))
        try:
            return layout.unpack_service(found) if found is not None else None
        except ValueError:  # somebody else has written there
            return None

    def is_node_address(self, address: bytes) -> bool:
        """``addr_is_this_node``: NodePorts answer there."""
        return self._maps["node_addresses"].lookup(layout.pack_address(address)) is not None

    def node_addresses(self) -> list[bytes]:
        """All of these, sorted."""
        return sorted(layout.unpack_address(key) for key, _ in self._maps["node_addresses"].items())

    def source_allowed(self, service_id: int, source: bytes) -> bool:
        """``source_allowed``: the source is in one of the Service's ranges."""
        key = layout.pack_source_range(service_id, Prefix(source, 8 * len(source)))
        return self._maps["source_ranges"].lookup(key) is not None

    def cidr_flags(self, address: bytes) -> CidrFlags:
        """``service_cidr_flags``, and what ``is_in_pod_cidr`` reads where addresses decide."""
        found = self._maps["cidrs"].lookup(pack_cidr(Prefix(address, 8 * len(address))))
        return CidrFlags(U32.unpack(found)[0]) if found is not None else CidrFlags(0)

    def device_flags(self, ifindex: int) -> DeviceFlags:
        found = self._maps["devices"].lookup(U32.pack(ifindex))
        return unpack_device(found).flags if found is not None else DeviceFlags(0)

    def xdp_flags(self, ifindex: int) -> XdpFlags:
        """``xdp_device_of``: what frames XDP forwards from there, and to there."""
        found = self._maps["xdp_devices"].lookup(U32.pack(ifindex))
        return unpack_xdp_device(found)[1] if found is not None else XdpFlags(0)

    def masquerade_address(self, ifindex: int, family: int) -> bytes:
        """``masquerade_address`` for a device; empty where there is none of this ``family``."""
        devices = self._maps["devices"]
        found = devices.lookup(U32.pack(ifindex)) or devices.lookup(U32.pack(0))
        if found is None:
            return b""
        device = unpack_device(found)
        return device.address4 if family == 4 else device.address6

    def selection(self, service_id: int, policy: Policy) -> list[Selected]:
        """The backends of ``selection_of``, in the order of their first slots."""
        words = self._selections.slots(self._selections.ranges(service_id)[policy])
        numbers = backend_ids(words)
        weights = {number: layout.slot_weight(word) for number, word in zip(numbers, words, strict=True)}
        found = []
        for number, count in Counter(numbers).items():
            record = self._backends.read(number)
            if record is not None:
                found.append(Selected(number, *record, weights[number] or count))
        return found

    def client_namespace(self, address: bytes) -> int | None:
        """The cookie of the network namespace that a packet's source stands for (``set_client``)."""
        found = self._maps["client_namespaces"].lookup(layout.pack_address(address))
        return layout.U64.unpack(found)[0] if found is not None else None

    def affinity(self, key: AffinityKey, policy: Policy, seconds: int, now: int) -> Affinity | None:
        """``affinity_recall``: the backend that a client keeps, while new clients could get it, too.

        ``seconds``: the Service's time-out; ``now`` is CLOCK_MONOTONIC in nanoseconds.
        """
        found = self._maps["affinity"].lookup(flow_layout.pack_affinity_key(key))
        if found is None:
            return None
        known = Affinity(*flow_layout.unpack_affinity(found))
        selection = key.service_id * layout.POLICIES + policy
        is_member = self._maps["members"].lookup(layout.pack_member(selection, known.backend_id))
        return known if is_member is not None and now - known.last <= seconds * layout.NSEC_PER_SEC else None

    def backend(self, number: int) -> tuple[Backend, BackendState] | None:
        return self._backends.read(number)
