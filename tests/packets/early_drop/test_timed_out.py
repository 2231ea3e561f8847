"""A flow that cannot go on begins anew: no sweep has ended it when it timed out, or the full table took its entries."""

from __future__ import annotations

from contextlib import closing

import pytest

from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.flows.sweeper import Sweeper
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.early_drop.clients import COUNT, Client, Clients, Part, part_of

pytestmark = pytest.mark.root

#: Just longer than a flow may be silent (Timeouts): in UDP and SCTP one with a reply, in TCP one without.
SILENT = {"UDP": 32, "TCP": 62, "SCTP": 302}


def begun(clients: Clients, client: Client) -> dict[Part, int]:
    """When each entry of a flow was made."""
    return {part_of(entry): entry.nat.created for entry in clients.entries(client)}


def lose_masquerade(clients: Clients, client: Client, bypass: bool) -> None:
    if not bypass:
        clients.lose(client, Part.MASQUERADE)
        clients.lose(client, Part.PORT)


def make(clients: Clients, protocol: str) -> Client:
    client = clients.new(protocol)
    assert client.original()
    if protocol != "TCP":
        assert client.reply() == client.address
    return client


@pytest.fixture(params=SILENT)
def protocol(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.mark.parametrize("evicted", [(), (Part.MASQUERADE, Part.PORT), (Part.PORT,), (Part.REPLY,)])
def test_flow_that_has_timed_out_begins_anew(
    clients: Clients, protocol: str, bypass: bool, evicted: tuple[Part, ...]
) -> None:
    """Without its masquerade, which the full table may have evicted, the backend would see the client."""
    client = make(clients, protocol)
    clients.silence(client, SILENT[protocol])
    before = begun(clients, client)
    for part in evicted:
        if part in before:
            clients.lose(client, part)
    assert client.original()
    assert client.reply() == client.address
    after = begun(clients, client)
    assert after.keys() == before.keys()
    made_anew = (Part.MASQUERADE, Part.PORT) if bypass else (Part.ORIGINAL, Part.REPLY)
    assert all(after[part] > before[part] for part in made_anew)


@pytest.mark.parametrize("evicted", [(Part.MASQUERADE, Part.PORT), (Part.MASQUERADE,)])
def test_flow_that_has_lost_its_masquerade_begins_anew(
    clients: Clients, protocol: str, evicted: tuple[Part, ...]
) -> None:
    """It has not timed out. A packet looks for it at most once a second."""
    client = make(clients, protocol)
    for part in evicted:
        clients.lose(client, part)
    clients.silence(client, 2)
    assert client.original()
    assert client.reply() == client.address


def test_flow_whose_port_is_another_one_s_by_now_begins_anew(clients: Clients, protocol: str) -> None:
    """The table has evicted the entry of its reply. The other flow keeps the port."""
    client = make(clients, protocol)
    clients.give_away(client, Part.PORT)
    clients.silence(client, 2)
    port = client.snat_port
    assert client.original()
    assert client.snat_port != port
    assert client.reply() == client.address


def test_half_open_connection_begins_anew_when_it_has_timed_out(clients: Clients, bypass: bool) -> None:
    """The client has never acknowledged the answer: a SYN flood fills the table with such."""
    client = clients.new()
    assert client.original()
    assert client.reply() == client.address
    clients.silence(client, SILENT["TCP"])
    lose_masquerade(clients, client, bypass)
    assert client.original("S", 7_000_000)


def test_flow_goes_on_until_it_has_timed_out(clients: Clients, protocol: str) -> None:
    client = make(clients, protocol)
    clients.silence(client, SILENT[protocol] - 5)
    before = begun(clients, client), client.snat_port
    assert client.original()
    assert (begun(clients, client), client.snat_port) == before


def test_flow_goes_on_while_its_backend_sends(clients: Clients, protocol: str, bypass: bool) -> None:
    """The client of a stream need not answer."""
    client = make(clients, protocol)
    sent_by_backend = [Part.PORT] if bypass else [Part.REPLY, Part.PORT]
    for entry in clients.entries(client):
        if part_of(entry) not in sent_by_backend:
            clients.silence_entry(entry, SILENT[protocol])
    before = begun(clients, client), client.snat_port
    assert client.original()
    assert (begun(clients, client), client.snat_port) == before


def test_flow_that_begins_anew_leaves_no_port_behind(clients: Clients, protocol: str) -> None:
    """Nor does it need another one."""
    client = make(clients, protocol)
    others = [clients.new(protocol) for _ in range(COUNT - 1)]
    for each in others:
        each.establish()
    before = clients.early_drops()
    for _ in range(2 * COUNT):
        clients.silence(client, SILENT[protocol])
        for each in others:
            assert each.is_alive()
        assert client.original()
        assert client.reply() == client.address
    assert clients.early_drops() == before


def test_port_at_another_backend_is_free_for_others(clients: Clients, protocol: str) -> None:
    """A flow that begins anew chooses any backend, and need not come back to the one that it has left."""
    for _ in range(4 * COUNT):
        client, backends = clients.new(protocol, of_two=True), set[str]()
        while len(backends) < 2:
            assert client.original(), "there is a port for it"
            backends.add(client.backend)
            clients.silence(client, SILENT[protocol])


def test_port_stays_while_one_side_sends_after_a_connection_that_one_side_had_closed(
    clients: Clients,
) -> None:
    """The backend knows by it which of the two connections it is."""
    client = clients.new()
    client.establish()
    assert client.original("FA", 1001, 5001)
    clients.silence(client, 3602)
    assert client.original("S", 900000)
    assert client.reply("SA", 7000, 900001) == client.address
    assert client.original("A", 900001, 7001)
    for _ in range(COUNT - 1):
        clients.new().establish()
    assert client.reply("FA", 7001, 900001) == client.address
    assert client.original("A", 900001, 7002)
    other = clients.new()
    assert not other.original() or other.snat_port != client.snat_port


def test_masquerade_of_a_connection_that_began_anew_is_half_open_again(
    clients: Clients, tables: MapSet
) -> None:
    """Nobody has answered the new SYN: what the former one's answer was says nothing."""
    client = clients.new()
    assert client.original()
    assert client.reply() == client.address
    for _ in range(2):
        clients.silence(client, SILENT["TCP"])
        port = client.snat_port
        assert client.original("S", 7_000_000)
        assert client.snat_port == port or client.bypass
    clients.silence(client, SILENT["TCP"])
    with closing(Sweeper(tables, Timeouts(), next(tables.folder.glob("progs-*")))) as sweeper:
        sweeper.sweep()
    assert clients.entries(client) == []


def open_flows(tables: MapSet) -> int:
    loads = tables.loads()
    counted = [loads[number] for number in loads.counted(len(loads))]
    return sum(each.flows_begun - each.flows_ended for each in counted)


def test_association_goes_on_until_a_chunk_begins_one(clients: Clients, tables: MapSet) -> None:
    """Data alone does not."""
    client = clients.new("SCTP")
    client.establish()
    clients.silence(client, SILENT["SCTP"])
    before, flows = begun(clients, client), open_flows(tables)
    assert client.is_alive()
    assert begun(clients, client) == before
    clients.silence(client, SILENT["SCTP"])
    assert client.original()
    assert max(begun(clients, client).values()) > max(before.values())
    assert open_flows(tables) == flows


def test_flow_that_begins_anew_is_counted_once(clients: Clients, tables: MapSet, protocol: str) -> None:
    client = clients.new(protocol, of_two=True)
    assert client.original()
    flows = open_flows(tables)
    for _ in range(6):
        clients.silence(client, SILENT[protocol])
        assert client.original()
        assert open_flows(tables) == flows


def test_established_connection_goes_on(clients: Clients) -> None:
    client = clients.new("TCP")
    client.establish()
    clients.silence(client, 1000)
    before = begun(clients, client)
    assert client.original("S", 1001)
    assert client.is_alive()
    assert begun(clients, client) == before
