"""The frontends' tables, and the filters that let packets of no frontend pass quickly.

A cluster IP has, besides the entries of its ports, one that stands for all other ports: those are rejected.

A DNS cache of the node may have the cluster IP of the cluster's DNS as its own address (nodelocaldns):
packets to it must arrive there. While it has it, the entries are marked, so that programs do not translate,
and other ports are not rejected, since they are those of the cache's own sockets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import partial
from itertools import chain

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import U32, Scope, ServiceEntry, ServiceFlags, ServiceKey
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned
from ebpfproxy.datapath.services.filter import BitFilter, address_hash
from ebpfproxy.datapath.services.frontend_cache import changing_frontends, renew_frontends
from ebpfproxy.services.model import FrontendKind, Protocol

_DNS_PORT = 53
#: An enumeration looks for each of its members anew (until Python 3.12), which takes longer than a call.
_CLUSTER_IP, _NODE_PORT = FrontendKind.CLUSTER_IP, FrontendKind.NODE_PORT


class Frontends:
    """The only writer of ``services4`` and ``services6``, their filters, and ``node_addresses``."""

    def __init__(self, maps: MapSet, lost: Callable[[int, ServiceKey], None]) -> None:
        """``lost`` is called with a service id and the key of each frontend that is taken from it."""
        self._is_adopted = maps.adopted
        #: The keys are lengths of addresses.
        self._tables = {4: maps["services4"], 16: maps["services6"]}
        self._lost = lost
        self._addresses = BitFilter(maps.shared("address_filter"))
        self._ports = BitFilter(maps.shared("port_filter"))
        self._cluster_ips: Counter[bytes] = Counter()
        self._own_addresses: frozenset[bytes] = frozenset()
        self._answered: frozenset[bytes] = frozenset()
        self._node_map = maps["node_addresses"]
        self._node_addresses = frozenset(layout.unpack_address(key) for key, _ in self._node_map.items())
        self._entries: dict[ServiceKey, ServiceEntry] = {}
        self._maps = maps
        # An agent that was killed may have changed the tables without saying so.
        renew_frontends(maps)
        for key, entry in self._stored():
            if entry.flags & ServiceFlags.ADDRESS:
                continue
            if entry.flags & ServiceFlags.OWN:
                self._answered |= {key.address}
                entry = entry._replace(flags=entry.flags & ~ServiceFlags.OWN)  # noqa: PLW2901
            self._entries[key] = entry
        self._note_all(self._entries)

    def count(self) -> int:
        """Of addresses with a port and a protocol: one with an entry for each scope counts once."""
        return len({(key.address, key.port, key.protocol) for key in self._entries})

    def items(self) -> Iterable[tuple[ServiceKey, ServiceEntry]]:
        return self._entries.items()

    def get(self, key: ServiceKey) -> ServiceEntry | None:
        return self._entries.get(key)

    def has_udp(self, service_id: int, address: bytes, port: int) -> bool:
        """Says if a service has one at an address, or at all of the node's. Any thread may ask."""
        keys = (
            ServiceKey(each, port, Protocol.UDP, Scope.INTERNAL) for each in (address, bytes(len(address)))
        )
        found = map(self._entries.get, keys)
        return any(entry is not None and entry.id == service_id for entry in found)

    def owned(self) -> list[Owned]:
        """The maps, with what they should hold."""
        node = Owned(self._node_map, lambda: _packed_addresses(self._node_addresses))
        return [*(Owned(table, partial(self._wanted, size)) for size, table in self._tables.items()), node]

    def _wanted(self, size: int) -> Iterable[tuple[bytes, bytes]]:
        """All packed entries of a family. Packing them is left to whoever reads them."""
        entries = [each for each in self._entries.items() if len(each[0].address) == size]
        closed = [ip for ip in self._cluster_ips if len(ip) == size and ip not in self._answered]
        packed = ((layout.pack_service_key(*key), self._marked(key, entry)) for key, entry in entries)
        return chain(packed, map(layout.pack_cluster_ip, closed))

    def _stored(self) -> Iterator[tuple[ServiceKey, ServiceEntry]]:
        """All entries of both maps, those for the other ports of cluster IPs among them."""
        for table in self._tables.values():
            yield from layout.known_services(table.items())

    # -- changes, each of which ends the validity of programs' cache before anybody is told of it

    def write(self, entries: Mapping[ServiceKey, ServiceEntry]) -> dict[ServiceKey, str]:
        """Writes entries. Returns the reason for each that did not fit."""
        full: dict[ServiceKey, str] = {}
        for size, table in self._tables.items():
            batch = {key: entry for key, entry in entries.items() if len(key.address) == size}
            if not batch:
                continue
            # What a filter does not know would pass untouched: it learns first, and forgets last.
            self._close_other_ports(self._note_all(batch))
            with changing_frontends(self._maps):
                refused = self._store(table, batch)
            losers: dict[ServiceKey, int] = {}
            for key, entry in batch.items():
                replaced = entry if key in refused else self._entries.get(key)
                if replaced is not None:
                    self._forget(key, replaced.kind)
                    if replaced.id != entry.id:
                        losers[key] = replaced.id
                if key not in refused:
                    self._entries[key] = entry
            for key, service_id in losers.items():
                self._lost(service_id, key)
            full |= {key: f"no room in {table.spec.name} for {key}" for key in refused}
        return full

    def _store(self, table: Map, entries: Mapping[ServiceKey, ServiceEntry]) -> set[ServiceKey]:
        """Writes entries of one family, marked if this node answers itself; returns those without room."""
        packed = {layout.pack_service_key(*key): self._marked(key, entry) for key, entry in entries.items()}
        return {layout.unpack_service_key(key) for key in table.update_many(packed)}

    def _marked(self, key: ServiceKey, entry: ServiceEntry) -> bytes:
        if key.port == _DNS_PORT and key.address in self._answered and entry.kind is _CLUSTER_IP:
            entry = entry._replace(flags=entry.flags | ServiceFlags.OWN)
        return layout.pack_service(*entry)

    def withdraw(self, service_id: int, key: ServiceKey) -> None:
        """Deletes a frontend, unless another service port has taken it over: then it is the other's."""
        present = self._entries.get(key)
        if present is not None and present.id == service_id:
            self._delete(key)

    def drop_leftovers(self, service_ids: Set[int]) -> None:
        """Deletes what a killed agent left half done: entries of no service port."""
        for key, entry in list(self._entries.items()):
            if entry.id not in service_ids:
                self._delete(key)
        if self._is_adopted:
            self._repair_cluster_ips()
        self._addresses.drop_leftovers()
        self._ports.drop_leftovers()

    def _delete(self, key: ServiceKey) -> None:
        with changing_frontends(self._maps):
            self._tables[len(key.address)].delete(layout.pack_service_key(*key))
        entry = self._entries.pop(key)
        self._forget(key, entry.kind)
        self._lost(entry.id, key)

    def _note_all(self, entries: Mapping[ServiceKey, ServiceEntry]) -> list[bytes]:
        """Adds keys to the filters. Returns the cluster IPs among them that had none: their other ports are
        to be closed."""
        hashes: list[int] = []
        first: list[bytes] = []
        cluster_ips = self._cluster_ips
        for key, entry in entries.items():
            kind, address = entry.kind, key.address
            if kind is _NODE_PORT:
                continue
            hashes.append(address_hash(address))
            if kind is _CLUSTER_IP:
                count = cluster_ips.get(address, 0)
                cluster_ips[address] = count + 1
                if not count:
                    first.append(address)
        self._ports.add_all([key.port for key in entries])
        self._addresses.add_all(hashes)
        return first

    def _forget(self, key: ServiceKey, kind: FrontendKind) -> None:
        address = key.address
        if kind is _CLUSTER_IP:
            self._cluster_ips[address] -= 1
            if not self._cluster_ips[address]:
                del self._cluster_ips[address]
                self._open_other_ports(address)
        if kind is not _NODE_PORT:
            self._addresses.remove(address_hash(address))
        self._ports.remove(key.port)

    def _close_other_ports(self, addresses: Iterable[bytes]) -> None:
        """Adds an entry for all ports that a cluster IP lacks; without room they are not rejected."""
        closed = [address for address in addresses if address not in self._answered]
        for size, table in self._tables.items():
            table.update_many(dict(layout.pack_cluster_ip(each) for each in closed if len(each) == size))

    def _open_other_ports(self, address: bytes) -> None:
        key, _ = layout.pack_cluster_ip(address)
        self._tables[len(address)].delete(key)

    def _repair_cluster_ips(self) -> None:
        """Brings the entries for other ports in line with the cluster IPs, whatever was adopted."""
        found = {
            layout.key_address(key)
            for table in self._tables.values()
            for key, value in table.items()
            if layout.service_flags(value) & ServiceFlags.ADDRESS
        }
        self._close_other_ports(self._cluster_ips.keys() - found)
        for address in found - (self._cluster_ips.keys() - self._answered):
            self._open_other_ports(address)

    # -- what is looked at besides

    def watch(self, address: bytes, port: int) -> None:
        """Lets programs see packets to an address and port of no frontend, until :meth:`unwatch`."""
        self._addresses.add(address_hash(address))
        self._ports.add(port)

    def unwatch(self, address: bytes, port: int) -> None:
        self._addresses.remove(address_hash(address))
        self._ports.remove(port)

    # -- the node

    def set_own_addresses(self, addresses: frozenset[bytes]) -> None:
        """Sets all addresses of this node: replies to masqueraded clients arrive at one of them."""
        for address in addresses - self._own_addresses:
            self._addresses.add(address_hash(address))
        for address in self._own_addresses - addresses:
            self._addresses.remove(address_hash(address))
        self._own_addresses = addresses

    def set_answered_addresses(self, addresses: frozenset[bytes]) -> None:
        """Sets the addresses at which processes of this node answer themselves."""
        changed = (addresses ^ self._answered) & self._cluster_ips.keys()
        self._answered = addresses
        if not changed:
            return
        entries = {key: entry for key, entry in self._entries.items() if key.address in changed}
        with changing_frontends(self._maps):
            for size, table in self._tables.items():
                self._store(table, {key: entry for key, entry in entries.items() if len(key.address) == size})
            for address in changed:
                self._open_other_ports(address)
            self._close_other_ports(changed)

    def set_node_addresses(self, addresses: frozenset[bytes]) -> None:
        """Sets the addresses of this node's NodePorts."""
        table, known = self._node_map, self._node_addresses
        table.update_many(dict(_packed_addresses(addresses - known)))
        table.delete_many([layout.pack_address(address) for address in known - addresses])
        self._node_addresses = addresses


def _packed_addresses(addresses: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return ((layout.pack_address(address), U32.pack(1)) for address in addresses)
