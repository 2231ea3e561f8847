"""A new flow that finds no free port gets that of a flow which is not confirmed; others keep theirs."""

from __future__ import annotations

import ipaddress
import os
import random
from contextlib import closing

import pytest
from scapy.layers.inet import TCP

from ebpfproxy.datapath.abi.flow_layout import Entry, NatFlags, Seen
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.flows.conntrack_table import Timeouts, counters
from ebpfproxy.datapath.flows.sweeper import Sweeper
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.datapath.test_pressure import OnOtherCpu, on_cpu
from tests.packets.early_drop.clients import COUNT, TARGETS, Client, Clients, Part, part_of
from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import ends_of, segment
from tests.packets.wire import DROP, REDIRECT, Wire

pytestmark = pytest.mark.root


def test_new_flow_gets_the_port_of_the_unanswered_one_that_is_silent_for_longest(
    clients: Clients, protocol: str
) -> None:
    """Nothing is left of the old one, in either direction: its packets begin another flow, or are rejected."""
    flood = [clients.new(protocol) for _ in range(COUNT)]
    for number, each in enumerate(flood):
        assert each.original()
        clients.silence(each, COUNT - number)
    before = clients.early_drops()
    client = clients.new(protocol)
    client.establish()
    assert clients.early_drops() == before + 1
    assert client.snat_port == flood[0].snat_port
    assert clients.entries(flood[0]) == []
    assert all(clients.entries(each) for each in flood[1:])
    # The backend's late answer to the old flow is the new client's, which resets what it does not know.
    assert flood[0].reply() == client.address
    assert client.is_alive()


def test_client_that_expects_no_reply_keeps_its_port_while_it_sends(clients: Clients) -> None:
    """It was there before the flood: a log goes one way only."""
    log = clients.new("UDP")
    assert log.original()
    for number in range(COUNT - 1):
        flood = clients.new("UDP")
        assert flood.original()
        clients.silence(flood, 10 + number)
    clients.silence(log, 100)
    port = log.snat_port
    for _ in range(COUNT - 1):
        assert log.original()
        assert clients.new("UDP").original()
    assert log.original()
    assert log.snat_port == port


def _half_open(clients: Clients) -> list[Client]:
    """Opens as many connections as there are ports; nobody acknowledges what the backend has answered."""
    flood = [clients.new() for _ in range(COUNT)]
    for each in flood:
        assert each.original()
        assert each.reply() == each.address
    return flood


def test_half_open_connections_lose_their_port(clients: Clients) -> None:
    """The backend has answered the forged SYN, and nobody acknowledges that."""
    flood = _half_open(clients)
    client = clients.new()
    client.establish()
    assert sum(not clients.entries(each) for each in flood) == 1
    assert client.is_alive()


@pytest.mark.parametrize("answered", [False, True])
def test_second_syn_makes_no_connection(clients: Clients, answered: bool) -> None:
    """It has another number, as a flood may choose; the backend acknowledges the first one again."""
    flood = _half_open(clients)
    for each in flood:
        assert each.original("S", 7_000_000)
        if answered:
            assert each.reply("A", 5001, 1001) == each.address
    assert clients.new().original()
    assert len([each for each in flood if clients.entries(each)]) == COUNT - 1


def test_flood_with_the_last_sequence_number_makes_no_connection(clients: Clients) -> None:
    """Its SYNs end at 0."""
    for _ in range(COUNT):
        each = clients.new()
        assert each.original("S", 0xFFFFFFFF)
        assert each.reply("SA", 5000, 0) == each.address
    assert clients.new().original()


def test_backend_that_repeats_its_answer_makes_no_connection(clients: Clients) -> None:
    """The full table has evicted the client's entries, which the answer puts back."""
    for _ in range(COUNT):
        each = clients.new()
        assert each.original()
        assert each.reply() == each.address
        clients.lose(each, Part.MASQUERADE)
        if not each.bypass:
            clients.lose(each, Part.ORIGINAL)
        clients.silence(each, 2)
        assert each.reply() == each.address
    assert clients.new().original()


def test_packet_of_a_flow_that_has_lost_its_port_does_not_leave_by_it(clients: Clients) -> None:
    flood = _half_open(clients)
    client = clients.new()
    client.establish()
    (lost,) = (each for each in flood if not clients.entries(each))
    assert lost.snat_port == client.snat_port
    assert not lost.original("A", 1001, 5001), "it is no packet that begins a connection"
    # A SYN that is sent again begins another flow, which ends another one of the flood.
    assert lost.original()
    assert lost.snat_port != client.snat_port
    assert client.is_alive()


def test_established_flows_keep_their_ports(clients: Clients, protocol: str) -> None:
    kept = [clients.new(protocol) for _ in range(COUNT)]
    for each in kept:
        each.establish()
    before = clients.early_drops()
    for _ in range(20):
        assert not clients.new(protocol).original()
    assert clients.early_drops() == before
    assert all(each.is_alive() for each in kept)
    assert counters(clients.tables["packet_events"])[PacketEvent.PORTS_TAKEN] >= 20


#: Just longer than a flow may be silent that had a reply (Timeouts). In TCP that is a day, and this machine may be younger.
SILENT = {"UDP": 31, "SCTP": 301}


@pytest.mark.parametrize("protocol", SILENT)
def test_flow_that_has_timed_out_loses_its_port(clients: Clients, protocol: str) -> None:
    """The agent ends such flows, but while none runs their ports would all be taken after a while."""
    kept = [clients.new(protocol) for _ in range(COUNT)]
    for each in kept:
        each.establish()
    over, *kept = kept
    for each in kept:
        clients.silence(each, SILENT[protocol] - 5)
    assert not clients.new(protocol).original(), "no flow is over"
    clients.silence(over, SILENT[protocol])
    client = clients.new(protocol)
    client.establish()
    assert client.snat_port == over.snat_port
    assert not clients.entries(over)
    assert all(each.is_alive() for each in [*kept, client])


def test_established_flows_keep_their_ports_in_a_flood(clients: Clients, protocol: str) -> None:
    kept = [clients.new(protocol) for _ in range(COUNT - 1)]
    for each in kept:
        each.establish()
    for _ in range(20):
        flood = clients.new(protocol)
        assert flood.original()
        assert flood.snat_port not in [each.snat_port for each in kept]
    assert all(each.is_alive() for each in kept)


def test_late_syn_makes_no_established_connection_a_half_open_one(clients: Clients) -> None:
    """Nor does a forged one, or a SYN-ACK that acknowledges nothing. The client of an idle connection may not send anything for long."""
    kept = [clients.new() for _ in range(COUNT)]
    for each in kept:
        each.establish()
    for flags, seq in (("S", 1000), ("S", 77), ("SA", 77)):
        for each in kept:
            assert each.original(flags, seq)
        assert not clients.new().original()
    assert all(each.is_alive() for each in kept)


def test_flow_whose_reply_entry_was_evicted_keeps_its_port(clients: Clients, protocol: str) -> None:
    """A packet has put the entry back, which does not know if there was a reply."""
    kept = [clients.new(protocol) for _ in range(COUNT)]
    for each in kept:
        each.establish()
        for entry in clients.entries(each):
            if entry.nat.flags & NatFlags.REPLY and not entry.flow.egress:
                clients.tables["conntrack"].delete(entry.key)
            else:
                clients.silence_entry(entry, 2)
        assert each.original("A", 1001, 5001)
    assert not clients.new(protocol).original()
    assert all(each.is_alive() for each in kept)


def test_client_whose_first_connection_ended_the_half_of_another_gets_the_same_port_again(
    clients: Clients,
) -> None:
    """The backend answers with an ACK for the other client, which the new one resets: its next SYN is welcome."""
    first = 1 << 30
    for _ in range(COUNT):
        flood = clients.new()
        assert flood.original(seq=first)
        assert flood.reply(ack=first + 1) == flood.address
    client = clients.new()
    assert client.original()
    port = client.snat_port
    assert client.reply("A", 5001, first + 1) == client.address
    assert client.original("R", first + 1)
    assert client.original()
    assert client.snat_port == port
    assert client.reply("SA", 7000) == client.address


def test_flows_of_the_node_keep_their_ports(
    clients: Clients, wire: Wire, family: FamilyAddresses, protocol: str
) -> None:
    """They are no flood's. A client outside finds no port meanwhile."""
    frontend = PORTS[protocol][0]
    for number in range(COUNT):
        sent = family.ip(family.node, family.web) / segment(protocol, 30000 + number, frontend)
        assert wire.egress(sent).verdict == REDIRECT
    assert not clients.new(protocol).original()


def test_new_flow_of_the_node_gets_the_port_of_an_unanswered_one(
    clients: Clients, wire: Wire, family: FamilyAddresses, protocol: str
) -> None:
    flood = [clients.new(protocol) for _ in range(COUNT)]
    for each in flood:
        assert each.original()
    sent = family.ip(family.node, family.web) / segment(protocol, 30000, PORTS[protocol][0])
    result = wire.egress(sent)
    assert result.verdict == REDIRECT
    assert ends_of(result.packet)[1] in [each.snat_port for each in flood]
    assert sum(not clients.entries(each) for each in flood) == 1


class Flood:
    """Connections from forged addresses on one CPU, each of which takes a port; some are reset at once."""

    def __init__(self, kept: Client, number: int, *, is_reset: bool) -> None:
        family, self._number, self._is_reset = kept.family, number, is_reset
        to_frontend, to_backend = (
            family.ip(kept.address, family.node) / TCP(dport=PORTS["TCP"][1], flags="S", seq=1000),
            family.ip(kept.address, family.remote_pod) / TCP(dport=TARGETS["TCP"], flags="R", seq=1001),
        )
        self._syn = kept.wire.prepared("from_device", "eth0", to_frontend)
        if kept.bypass:
            to_frontend[TCP].flags, to_frontend[TCP].seq = "R", 1001
            self._rst = kept.wire.prepared("from_device", "eth0", to_frontend)
        else:
            self._rst = kept.wire.prepared("to_device", "eth0", to_backend, iif="eth0")
        self._source, self._port = (29, 34) if family.version == 4 else (37, 54)
        self._chance = random.Random(number)
        self.taken = 0

    def send(self, times: int) -> None:
        chance = self._chance
        for _ in range(times):
            # An even last byte of the address on one CPU, an odd one on the other.
            source = bytes([chance.randrange(100, 125) * 2 + self._number])
            port = chance.randrange(1024, 65536).to_bytes(2, "big")
            for each in (self._syn, self._rst):
                each.change(self._source, source)
                each.change(self._port, port)
            self.taken += self._syn() != DROP
            if self._is_reset and chance.randrange(4):
                self._rst()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("is_reset", [False, True], ids=["unanswered", "reset"])
def test_two_cpus_never_give_one_port_to_two_flows(
    clients: Clients, wire: Wire, family: FamilyAddresses, is_reset: bool
) -> None:
    """Each flow of the flood ends another one, or takes the port of a closed one, on both CPUs at once."""
    kept = clients.new()
    kept.establish()
    here, there = (Flood(kept, number, is_reset=is_reset) for number in range(2))

    cpus = os.sched_getaffinity(0)

    def flood_from_here() -> None:
        with on_cpu(min(cpus)):
            here.send(2500)

    def flood_from_the_other() -> None:
        wire.enter()
        there.send(250)

    for _ in range(4):
        with OnOtherCpu(max(cpus), flood_from_the_other):
            wire.within(flood_from_here)
        _expect_owners(clients, family)
    assert min(here.taken, there.taken) > 100
    assert kept.is_alive()


def _expect_owners(clients: Clients, family: FamilyAddresses) -> None:
    """Every open flow with a port of the node's has the replies to that port, and no two have the same."""
    entries = dict(clients.tables["conntrack"].items())
    node = ipaddress.ip_address(family.node).packed
    # The source comes first; most entries have another one, and take long to look at.
    found = (Entry(key, value) for key, value in entries.items() if value[:16].endswith(node))
    owners = [each for each in found if not each.nat.flags & NatFlags.REPLY and not each.nat.seen & Seen.RST]
    for entry in owners:
        assert Entry(entry.partner, entries[entry.partner]).partner == entry.key
    ports = [entry.nat.source_port for entry in owners]
    assert len(set(ports)) == len(ports) > 0


def test_port_that_is_claimed_is_not_freed_by_the_sweep_that_finds_it_so(
    clients: Clients, tables: MapSet
) -> None:
    """The sweep deletes by key, and the key may be that of another flow the next moment: see test_beside_a_sweep.py."""
    client = clients.new("UDP")
    client.establish()
    clients.silence(client, 125)
    clients.claim(client)
    sweeper = Sweeper(tables, Timeouts(), next(tables.folder.glob("progs-*")))
    with closing(sweeper):
        sweeper.sweep()
        assert Part.PORT in map(part_of, clients.entries(client))
        # Nothing has come of it.
        sweeper.sweep()
        assert clients.entries(client) == []


def test_sweep_claims_no_port_of_a_flow_that_stays(clients: Clients, tables: MapSet) -> None:
    client = clients.new("UDP")
    client.establish()
    with closing(Sweeper(tables, Timeouts(), next(tables.folder.glob("progs-*")))) as sweeper:
        sweeper.sweep()
    assert not any(entry.seen & ~(Seen.REPLY | Seen.MASKED) for entry in clients.entries(client))
