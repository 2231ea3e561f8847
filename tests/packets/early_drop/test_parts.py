"""Flows that lack an entry, or whose key another flow has: they end whole, or are in nobody's way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.datapath.abi.flow_layout import Seen
from ebpfproxy.datapath.abi.hooks import PACKETS
from ebpfproxy.datapath.kernel import probe
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs import bytecode, loader
from tests.datapath.altered import altered_sources
from tests.packets.early_drop.clients import COUNT, FIRST, LAST, Client, Clients, Part, part_of
from tests.packets.wire import Wire

pytestmark = pytest.mark.root


#: With --bypass-netfilter a flow has one pair.
of_two_pairs = pytest.mark.parametrize("bypass", [False], ids=["masquerade"], indirect=True, scope="package")


@pytest.fixture
def overtaken(wire: Wire, tables: MapSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """Programs that another CPU overtakes (``altered``), for the same maps."""
    sources = altered_sources(tmp_path)
    monkeypatch.setattr(loader, "source_folder", lambda: sources)
    # In an emulator clang takes minutes.
    monkeypatch.setattr(bytecode, "_SECONDS", 800)
    made = Wire(wire.node)
    options = loader.Options(probe.probe(), host_netns_cookie=1, masquerade_ports=(FIRST, LAST))
    made.programs = loader.ensure_loaded(tables, options, (PACKETS,))
    yield made
    made.close()
    # The next test takes any folder of programs for the agent's.
    shutil.rmtree(made.programs)


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
def test_port_that_another_cpu_takes_first_is_left_to_its_new_flow(clients: Clients, overtaken: Wire) -> None:
    """The element of the closed flow's entry is the open one's when it is claimed. A claim that stays would keep that flow
    from ever losing its port."""
    client = clients.new()
    client.establish()
    assert client.original("R", 1001)
    port, client.wire = client.snat_port, overtaken
    assert client.original(seq=9000)
    assert client.snat_port != port
    (open_flow,) = (each for each in clients.entries(client) if each.flow.destination_port == port)
    assert open_flow.seen == Seen.REPLY


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
