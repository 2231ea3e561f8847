"""Flows that lack an entry, or whose key another flow has: they end whole, or are in nobody's way."""

from __future__ import annotations

import pytest

from tests.packets.early_drop.clients import COUNT, Client, Clients, Part, part_of

pytestmark = pytest.mark.root


#: With --bypass-netfilter a flow has one pair.
of_two_pairs = pytest.mark.parametrize("bypass", [False], ids=["masquerade"], indirect=True, scope="package")


def _spoiled(clients: Clients, protocol: str, bypass: bool) -> list[Client]:
    """Flows that cannot end whole: the table was full, a sweep has ended a half, or another CPU is ending them."""
    flows = [clients.new(protocol) for _ in range(COUNT - 1)]
    for each in flows:
        assert each.original()
    clients.lose(flows[0], Part.MASQUERADE)
    clients.give_away(flows[1], Part.MASQUERADE)
    if bypass:
        clients.claim(flows[2])
    else:
        clients.lose(flows[2], Part.REPLY)
    return flows


def test_flow_that_cannot_end_keeps_its_port(clients: Clients, protocol: str, bypass: bool) -> None:
    """Its backend would see the client, or another flow would lose what is its own."""
    _spoiled(clients, protocol, bypass)
    last = clients.new(protocol)
    assert last.original()
    clients.claim(last)
    before = clients.early_drops()
    assert not clients.new(protocol).original()
    assert clients.early_drops() == before


def test_flow_that_cannot_end_is_in_nobody_s_way(clients: Clients, protocol: str, bypass: bool) -> None:
    """However long it is silent: one ends that can."""
    for number, each in enumerate(_spoiled(clients, protocol, bypass)):
        clients.silence(each, 100 + number)
    flood = clients.new(protocol)
    assert flood.original()
    client = clients.new(protocol)
    client.establish()
    assert client.snat_port == flood.snat_port
    assert not clients.entries(flood)
    assert client.is_alive()


def test_flow_that_another_cpu_is_ending_is_left_to_it(clients: Clients, protocol: str) -> None:
    """Two new flows at the same time end two others."""
    flood = [clients.new(protocol) for _ in range(COUNT)]
    for number, each in enumerate(flood):
        assert each.original()
        clients.silence(each, COUNT - number)
    clients.claim(flood[0])
    client = clients.new(protocol)
    client.establish()
    assert client.snat_port == flood[1].snat_port


def test_port_of_a_closed_flow_that_another_cpu_is_taking_is_left_to_it(clients: Clients) -> None:
    """The client's next connection tries the port of its former one first; there are others."""
    client = clients.new()
    client.establish()
    assert client.original("R", 1001)
    port = client.snat_port
    clients.claim(client)
    assert client.original(seq=9000)
    assert client.snat_port != port


@of_two_pairs
def test_flow_that_lacks_the_entry_of_its_frontend_loses_its_port(clients: Clients, protocol: str) -> None:
    """A full table takes that one first: only the first packet looks for it. The client's next one begins another flow."""
    flood = [clients.new(protocol) for _ in range(COUNT)]
    for each in flood:
        assert each.original()
        clients.lose(each, Part.ORIGINAL)
    client = clients.new(protocol)
    client.establish()
    (lost,) = (each for each in flood if not clients.entries(each))
    assert client.snat_port == lost.snat_port
    assert lost.original()
    assert lost.snat_port != client.snat_port
    assert client.is_alive()


@of_two_pairs
def test_later_flow_of_the_client_stays(clients: Clients, protocol: str) -> None:
    """It has the key of the entry of the ended flow's frontend, and another backend."""
    flood = [clients.new(protocol) for _ in range(COUNT)]
    for each in flood:
        assert each.original()
        clients.give_away(each, Part.ORIGINAL)
    clients.new(protocol).establish()
    left = sorted(([part_of(entry) for entry in clients.entries(each)] for each in flood), key=len)
    assert left[0] == [Part.ORIGINAL]
    assert [len(each) for each in left[1:]] == [4] * (COUNT - 1)


@of_two_pairs
def test_client_that_begins_anew_keeps_its_port_unless_another_cpu_is_ending_it(
    clients: Clients, protocol: str
) -> None:
    """The table had no room for the pair of the frontend, or a sweep has ended it and is at that of the masquerade."""
    client = clients.new(protocol)
    client.establish()
    port = client.snat_port
    for is_claimed in (False, True):
        clients.lose(client, Part.ORIGINAL)
        clients.lose(client, Part.REPLY)
        if is_claimed:
            clients.claim(client)
        assert client.original()
        assert (client.snat_port != port) == is_claimed
        assert client.reply() == client.address
