"""A flow has timed out, and no sweep has ended it, as while no agent runs: its next packet begins another one."""

from __future__ import annotations

import pytest

from tests.packets.early_drop.clients import COUNT, Client, Clients, Part, part_of

pytestmark = pytest.mark.root

#: Just longer than a flow may be silent (Timeouts): in UDP one with a reply, in TCP one without.
SILENT = {"UDP": 31, "TCP": 61}


def begun(clients: Clients, client: Client) -> dict[Part, int]:
    """When each entry of a flow was made."""
    return {part_of(entry): entry.nat.created for entry in clients.entries(client)}


def make(clients: Clients, protocol: str) -> Client:
    client = clients.new(protocol)
    assert client.original()
    if protocol == "UDP":
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


def test_association_goes_on(clients: Clients) -> None:
    """Its chunks alone do not begin one."""
    client = clients.new("SCTP")
    client.establish()
    clients.silence(client, 301)
    before = begun(clients, client)
    assert client.is_alive()
    assert begun(clients, client) == before


def test_established_connection_goes_on(clients: Clients) -> None:
    client = clients.new("TCP")
    client.establish()
    clients.silence(client, 1000)
    before = begun(clients, client)
    assert client.original("S", 1001)
    assert client.is_alive()
    assert begun(clients, client) == before
