"""Clients outside whose flows are masqueraded, with few ports for them."""

from __future__ import annotations

import enum
import ipaddress
from itertools import starmap

from scapy.layers.inet import TCP
from scapy.packet import Packet

from ebpfproxy.datapath.abi.flow_layout import Entry, NatFlags, Seen, with_check
from ebpfproxy.datapath.abi.layout import U64
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.flows.conntrack_table import counters
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import ends_of, segment
from tests.packets.wire import DROP, PASS, REDIRECT, Wire, earlier, ip_of

#: Fewer than a packet looks at: which flow it ends is certain.
FIRST, LAST = 61000, 61003
COUNT = LAST - FIRST + 1
#: Fields of struct nat.
_SOURCE_PORT_AT, _DESTINATION_PORT_AT, _SEEN_AT, _LAST_AT = 32, 34, 45, 48
TARGETS = {protocol: ports[2] for protocol, ports in PORTS.items()}
#: Another Service has two backends elsewhere: NodePorts by protocol, addresses by family.
NODE_PORTS_OF_TWO = {protocol: 30600 + number for number, protocol in enumerate(PORTS)}
BACKENDS_OF_TWO = {4: ("10.244.2.5", "10.244.2.6"), 6: ("fd00:10:244:2::5", "fd00:10:244:2::6")}


class Part(enum.Enum):
    """An entry of a client's flow. With --bypass-netfilter there are the second and the last."""

    ORIGINAL = enum.auto()
    MASQUERADE = enum.auto()
    REPLY = enum.auto()
    #: While this one is there the port is taken.
    PORT = enum.auto()


def part_of(entry: Entry) -> Part:
    if entry.flags & NatFlags.REPLY:
        return Part.PORT if not entry.flow.egress else Part.REPLY
    return Part.MASQUERADE if entry.flags & (NatFlags.SOURCE | NatFlags.BYPASS) else Part.ORIGINAL


class Client:
    """A flow of a client outside to a NodePort with a backend elsewhere, on its way through the node's programs."""

    def __init__(
        self, wire: Wire, family: FamilyAddresses, protocol: str, number: int, *, bypass: bool, of_two: bool
    ) -> None:
        self.wire, self.family, self.protocol, self.bypass = wire, family, protocol, bypass
        self.address = f"198.51.100.{number}" if family.version == 4 else f"2001:db8:51::{number:x}"
        self.port = 20000 + number
        self.node_port = NODE_PORTS_OF_TWO[protocol] if of_two else PORTS[protocol][1]
        self._backends = BACKENDS_OF_TWO[family.version] if of_two else (family.remote_pod,)
        self.backend = ""
        self.snat_port = 0

    def _segment(self, sport: int, dport: int, flags: str, seq: int, ack: int) -> Packet:
        if self.protocol == "TCP":
            return TCP(sport=sport, dport=dport, flags=flags, seq=seq, ack=ack)
        return segment(self.protocol, sport, dport, flags)

    def original(self, flags: str = "S", seq: int = 1000, ack: int = 0) -> bool:
        """Sends a packet; returns False where it is dropped or rejected. Notes the port that the backend sees."""
        family, target = self.family, TARGETS[self.protocol]
        sent = self._segment(self.port, self.node_port, flags, seq, ack)
        result = self.wire.ingress(family.ip(self.address, family.node) / sent)
        if result.verdict == DROP or ip_of(result.packet).dst not in self._backends:
            return False
        self.backend = ip_of(result.packet).dst
        if not self.bypass:
            sent = self._segment(self.port, target, flags, seq, ack)
            result = self.wire.egress(family.ip(self.address, self.backend) / sent, iif="eth0")
        assert result.verdict == (REDIRECT if self.bypass else PASS)
        source, self.snat_port, to, port = ends_of(result.packet)
        assert (source, to, port) == (family.node, self.backend, target)
        return True

    def reply(self, flags: str = "SA", seq: int = 5000, ack: int = 1001) -> str:
        """Sends a packet of the backend to the port that it has seen; returns the client that gets it."""
        family, target = self.family, TARGETS[self.protocol]
        sent = self._segment(target, self.snat_port, flags, seq, ack)
        result = self.wire.ingress(family.ip(self.backend, family.node) / sent)
        if not self.bypass:
            result = self.wire.egress(result.packet, iif="eth0")
        return str(ip_of(result.packet).dst)

    def establish(self) -> None:
        assert self.original()
        assert self.reply() == self.address
        if self.protocol == "TCP":
            assert self.original("A", 1001, 5001)

    def is_alive(self) -> bool:
        """Whether packets of both directions still come through by the same port."""
        before = self.snat_port
        if not self.original("A", 1001, 5001) or self.snat_port != before:
            return False
        return self.reply("A", 5001, 1001) == self.address


class Clients:
    def __init__(self, wire: Wire, family: FamilyAddresses, tables: MapSet, bypass: bool) -> None:
        self._wire, self._family, self.tables, self._bypass = wire, family, tables, bypass
        self._numbers = iter(range(10, 250))

    def new(self, protocol: str = "TCP", *, of_two: bool = False) -> Client:
        """``of_two``: of the Service with two backends."""
        number = next(self._numbers)
        return Client(self._wire, self._family, protocol, number, bypass=self._bypass, of_two=of_two)

    def entries(self, client: Client) -> list[Entry]:
        address = ipaddress.ip_address(client.address).packed
        found = starmap(Entry, self.tables["conntrack"].items())
        return [
            each
            for each in found
            if address in (each.flow.source, each.flow.destination, each.nat.source, each.nat.destination)
        ]

    def silence(self, client: Client, seconds: float) -> None:
        """Makes a flow as if it had had all its packets so many seconds earlier."""
        for entry in self.entries(client):
            times = U64.pack(earlier(entry.last, seconds)) + U64.pack(earlier(entry.nat.created, seconds))
            self._change(entry, _LAST_AT, times)

    def silence_entry(self, entry: Entry, seconds: float) -> None:
        """Makes an entry as if it had had no packet for so many seconds more."""
        self._change(entry, _LAST_AT, U64.pack(earlier(entry.last, seconds)))

    def lose(self, client: Client, part: Part) -> None:
        """Takes an entry out of the map."""
        self.tables["conntrack"].delete(self._entry(client, part).key)

    def give_away(self, client: Client, part: Part) -> None:
        """The client has another flow by this entry: what its packets become differs in a port."""
        entry = self._entry(client, part)
        at = _DESTINATION_PORT_AT if part is Part.ORIGINAL else _SOURCE_PORT_AT
        self._change(entry, at, bytes(each ^ 1 for each in entry.value[at : at + 2]))

    def claim(self, client: Client) -> None:
        """Another CPU gives the flow's port to another one just now."""
        entry = self._entry(client, Part.PORT)
        self._change(entry, _SEEN_AT, bytes([entry.seen | Seen.CLAIMED]))

    def _entry(self, client: Client, part: Part) -> Entry:
        (found,) = (each for each in self.entries(client) if part_of(each) is part)
        return found

    def _change(self, entry: Entry, at: int, data: bytes) -> None:
        value = entry.value[:at] + data + entry.value[at + len(data) :]
        self.tables["conntrack"].update(entry.key, with_check(entry.key, value))

    def early_drops(self) -> int:
        return counters(self.tables["packet_events"])[PacketEvent.EARLY_DROPS]
