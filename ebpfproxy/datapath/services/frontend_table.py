"""The frontends' tables, and the filters by which packets of no frontend are passed over.

A cluster IP has, beside the entries of its ports, one that stands for all other ports: those are rejected.

A DNS cache of the node may have the cluster IP of the cluster's DNS as an address of its own (nodelocaldns):
packets that ask it have to come to it. Its entries are marked, and left alone by programs, while it is there;
other ports are then not rejected, since its own sockets have them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import U32, ServiceFlags
from ebpfproxy.datapath.kernel.maps import Map, MapSet
from ebpfproxy.datapath.services.filter import BitFilter, address_hash
from ebpfproxy.services.model import FrontendKind

_TABLES = ("services4", "services6")
_DNS_PORT = 53


class Frontends:
    """The only writer of ``services4`` and ``services6``, their filters, and ``node_addresses``."""

    def __init__(self, maps: MapSet, lost: Callable[[int, bytes], None]) -> None:
        """``lost`` is told a service's id and a key: a frontend that has been taken from it."""
        self._maps = maps
        self._lost = lost
        self._addresses = BitFilter(maps.shared("address_filter"))
        self._ports = BitFilter(maps.shared("port_filter"))
        self._cluster_ips: Counter[bytes] = Counter()
        self._own_addresses: frozenset[bytes] = frozenset()
        self._answered: frozenset[bytes] = frozenset()
        self._node_addresses = frozenset(
            layout.unpack_address(key) for key, _ in maps["node_addresses"].items()
        )
        self._entries: dict[bytes, bytes] = {}
        for table in _TABLES:
            for key, value in maps[table].items():
                entry = layout.unpack_service(value)
                if entry.flags & ServiceFlags.OWN:
                    self._answered |= {layout.unpack_service_key(key).address}
                if not entry.flags & ServiceFlags.ADDRESS:
                    self._entries[key] = layout.with_service_flags(value, entry.flags & ~ServiceFlags.OWN)
                    self._note(key, entry.kind, closes=False)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        yield from self._entries.items()

    def get(self, key: bytes) -> bytes | None:
        return self._entries.get(key)

    # -- changes

    def write(self, entries: Mapping[bytes, bytes]) -> dict[bytes, str]:
        """Returns a sentence for each that did not fit."""
        full: dict[bytes, str] = {}
        for table in _TABLES:
            size = self._maps[table].spec.key_size
            batch = {key: value for key, value in entries.items() if len(key) == size}
            # What a filter does not know would pass untouched: it learns first, and forgets last.
            for key, value in batch.items():
                self._note(key, layout.unpack_service(value).kind)
            refused = set(self._maps[table].update_many(self._marked(batch)))
            losers: dict[bytes, int] = {}
            for key, value in batch.items():
                replaced = value if key in refused else self._entries.get(key)
                if replaced is not None:
                    before = layout.unpack_service(replaced)
                    self._forget(key, before.kind)
                    if before.id != layout.unpack_service(value).id:
                        losers[key] = before.id
                if key not in refused:
                    self._entries[key] = value
            for key, service_id in losers.items():
                self._lost(service_id, key)
            full |= {key: f"no room in {table} for {describe_frontend(key)}" for key in refused}
        return full

    def _marked(self, entries: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """As they are written: with the mark where this node answers."""
        made = dict(entries)
        for key, value in entries.items():
            if layout.service_key_port(key) != _DNS_PORT:
                continue
            entry = layout.unpack_service(value)
            is_answered = layout.unpack_service_key(key).address in self._answered
            if is_answered and entry.kind is FrontendKind.CLUSTER_IP:
                made[key] = layout.with_service_flags(value, entry.flags | ServiceFlags.OWN)
        return made

    def withdraw(self, service_id: int, key: bytes) -> None:
        """A frontend that another service port has taken over is the other's, and stays."""
        present = self._entries.get(key)
        if present is not None and layout.unpack_service(present).id == service_id:
            self._delete(key)

    def drop_leftovers(self, service_ids: Set[int]) -> None:
        """What a killed agent left half done: entries of no service port."""
        for key, value in list(self._entries.items()):
            if layout.unpack_service(value).id not in service_ids:
                self._delete(key)
        if self._maps.adopted:
            self._repair_cluster_ips()
        self._addresses.drop_leftovers()
        self._ports.drop_leftovers()

    def _table_of(self, key: bytes) -> Map:
        return self._maps["services4" if len(key) == self._maps["services4"].spec.key_size else "services6"]

    def _delete(self, key: bytes) -> None:
        self._table_of(key).delete(key)
        entry = layout.unpack_service(self._entries.pop(key))
        self._forget(key, entry.kind)
        self._lost(entry.id, key)

    def _note(self, key: bytes, kind: FrontendKind, *, closes: bool = True) -> None:
        """Its address and port are of interest; a cluster IP gets an entry for all its other ports, too."""
        frontend = layout.unpack_service_key(key)
        self._ports.add(frontend.port)
        if kind is FrontendKind.NODE_PORT:
            return
        address = frontend.address
        self._addresses.add(address_hash(address))
        if kind is FrontendKind.CLUSTER_IP:
            self._cluster_ips[address] += 1
            if self._cluster_ips[address] == 1 and closes:
                self._close_other_ports(address)

    def _forget(self, key: bytes, kind: FrontendKind) -> None:
        frontend = layout.unpack_service_key(key)
        address = frontend.address
        if kind is FrontendKind.CLUSTER_IP:
            self._cluster_ips[address] -= 1
            if not self._cluster_ips[address]:
                del self._cluster_ips[address]
                other_ports, _ = layout.pack_cluster_ip(address)
                self._table_of(other_ports).delete(other_ports)
        if kind is not FrontendKind.NODE_PORT:
            self._addresses.remove(address_hash(address))
        self._ports.remove(frontend.port)

    def _close_other_ports(self, address: bytes) -> None:
        if address in self._answered:
            return
        key, value = layout.pack_cluster_ip(address)
        # Without room for it such ports are not rejected, and nothing else is different.
        self._table_of(key).update_many({key: value})

    def _repair_cluster_ips(self) -> None:
        """The entries for other ports are those of the cluster IPs, whatever was adopted."""
        found = {
            layout.unpack_service_key(key).address
            for table in _TABLES
            for key, value in self._maps[table].items()
            if layout.unpack_service(value).flags & ServiceFlags.ADDRESS
        }
        for address in self._cluster_ips.keys() - found:
            self._close_other_ports(address)
        for address in found - (self._cluster_ips.keys() - self._answered):
            key, _ = layout.pack_cluster_ip(address)
            self._table_of(key).delete(key)

    # -- what is looked at besides

    def watch(self, address: bytes, port: int) -> None:
        """Packets to an address and port that are no frontend's are looked at, too, until :meth:`unwatch`."""
        self._addresses.add(address_hash(address))
        self._ports.add(port)

    def unwatch(self, address: bytes, port: int) -> None:
        self._addresses.remove(address_hash(address))
        self._ports.remove(port)

    # -- the node

    def set_own_addresses(self, addresses: frozenset[bytes]) -> None:
        """All addresses of this node: answers to masqueraded clients come to one of them."""
        for address in addresses - self._own_addresses:
            self._addresses.add(address_hash(address))
        for address in self._own_addresses - addresses:
            self._addresses.remove(address_hash(address))
        self._own_addresses = addresses

    def set_answered_addresses(self, addresses: frozenset[bytes]) -> None:
        """Addresses at which processes of this node answer themselves."""
        changed = (addresses ^ self._answered) & self._cluster_ips.keys()
        self._answered = addresses
        if changed:
            entries = {
                key: value
                for key, value in self._entries.items()
                if layout.unpack_service_key(key).address in changed
            }
            for table in _TABLES:
                size = self._maps[table].spec.key_size
                batch = {key: value for key, value in entries.items() if len(key) == size}
                self._maps[table].update_many(self._marked(batch))
        for address in changed:
            other_ports, _ = layout.pack_cluster_ip(address)
            self._table_of(other_ports).delete(other_ports)
            self._close_other_ports(address)

    def set_node_addresses(self, addresses: frozenset[bytes]) -> None:
        """The addresses at which this node's NodePorts answer."""
        table = self._maps["node_addresses"]
        table.update_many({layout.pack_address(a): U32.pack(1) for a in addresses - self._node_addresses})
        table.delete_many([layout.pack_address(a) for a in self._node_addresses - addresses])
        self._node_addresses = addresses


def describe_frontend(packed: bytes) -> str:
    """``10.96.0.1:443/TCP`` for a key of the services' maps."""
    key = layout.unpack_service_key(packed)
    return layout.format_frontend(key.address, key.port, key.protocol)
