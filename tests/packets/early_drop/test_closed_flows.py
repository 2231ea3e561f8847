"""The port of a closed connection rests while its backend may be in TIME_WAIT, unless a new flow finds no other one."""

from __future__ import annotations

import pytest

from tests.packets.early_drop.clients import COUNT, Client, Clients

pytestmark = pytest.mark.root

#: Seconds since a connection was closed: longer than Timeouts.tcp_time_wait, and shorter.
LONG_AGO, RECENTLY = 75, 40


def established(clients: Clients, count: int = 1) -> list[Client]:
    made = [clients.new() for _ in range(count)]
    for each in made:
        each.establish()
    return made


def close(client: Client) -> None:
    """Both sides close the connection."""
    assert client.original("FA", 1001, 5001)
    assert client.reply("FA", 5001, 1002) == client.address
    assert client.original("A", 1002, 5002)


def test_port_of_a_closed_connection_rests_while_another_one_is_free(clients: Clients) -> None:
    """A backend in TIME_WAIT answers another client's SYN with an ACK, which that client resets."""
    (first,) = established(clients)
    close(first)
    others = established(clients, COUNT - 1)
    assert first.snat_port not in [each.snat_port for each in others]


def test_port_that_rests_is_used_where_no_other_one_is_free(clients: Clients) -> None:
    """No flow ends for it."""
    (first,) = established(clients)
    close(first)
    others = established(clients, COUNT - 1)
    before = clients.early_drops()
    (last,) = established(clients)
    assert last.snat_port == first.snat_port
    assert clients.early_drops() == before
    assert all(each.is_alive() for each in [*others, last])


@pytest.mark.parametrize("by_client", [True, False], ids=["client", "backend"])
def test_port_of_a_connection_that_was_reset_does_not_rest(clients: Clients, by_client: bool) -> None:
    """Nothing is left of it, whichever side has reset it."""
    first, *others = established(clients, COUNT)
    for each in others:
        close(each)
        clients.silence(each, RECENTLY)
    if by_client:
        assert first.original("R", 1001)
    else:
        assert first.reply("R", 5001) == first.address
    (last,) = established(clients)
    assert last.snat_port == first.snat_port


@pytest.mark.parametrize(("seconds", "expected"), [(RECENTLY, {False}), (LONG_AGO, {False, True})])
def test_port_rests_for_the_time_of_a_socket_in_time_wait(
    clients: Clients, seconds: int, expected: set[bool]
) -> None:
    """Then it is as good as one that was reset: a new flow takes either of them."""
    kept = established(clients, COUNT - 2)
    found = set()
    for _ in range(30):
        (first,) = established(clients)
        close(first)
        clients.silence(first, seconds)
        (client,) = established(clients)
        found.add(client.snat_port == first.snat_port)
        assert client.original("R", 1001)
        # The agent may have ended it.
        first.original("R", 1002)
    assert found == expected
    assert all(each.is_alive() for each in kept)


def test_client_that_uses_its_port_again_gets_the_same_one_again(clients: Clients) -> None:
    """The backend in TIME_WAIT knows this client, whose sequence numbers and timestamps go on."""
    (client,) = established(clients)
    close(client)
    port = client.snat_port
    assert client.original(seq=1 << 20)
    assert client.snat_port == port
    assert client.reply("SA", 1 << 30, (1 << 20) + 1) == client.address
