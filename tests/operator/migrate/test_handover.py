"""Connections that kube-proxy began outlive its rules, and no request fails on the way over and back."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from ebpfproxy.netlink import conntrack
from ebpfproxy.operator.migrate.node import conntrack_hold, leftovers, nftables, tools
from tests.lab import Lab, clients
from tests.operator.migrate import rules
from tests.operator.migrate.asking import Held, Load, no_request_fails
from tests.operator.migrate.world import World, how

pytestmark = pytest.mark.root

KEPT = [f"nftables table {family} {conntrack_hold.NAME}" for family in ("ip", "ip6")]


@pytest.fixture
def world() -> Iterator[World]:
    with Lab() as lab:
        yield World(lab)


def _found() -> tuple[bool, list[str]]:
    return bool(leftovers.find()), conntrack_hold.find()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", rules.MODES)
def test_over_and_back_under_load_with_long_connections(world: World, mode: str) -> None:
    world.kube_proxy(mode)
    held = world.held()
    assert how(held) == {}
    assert {each.server for each in held} == {"w1", "w2"}

    with no_request_fails(*world.loads()):
        agent = world.agent().start()
        time.sleep(0.3)
        assert how(held) == {}, "beside kube-proxy"
        planned = json.loads(world.migrate("plan", "-o", "json"))
        assert (planned["blockers"], planned["differences"]) == ([], {})
        assert planned["flows"] >= len(held)
        said = world.migrate("run")
        time.sleep(0.3)
        assert how(held) == {}, said
    assert "established flows of kube-proxy, left to netfilter: " in said
    assert world.a.call(_found) == (False, KEPT)

    # A restart during the handover leaves them alone, too.
    agent.stop()
    agent.start()
    assert how(held) == {}

    # Back. What sockets chose by us lives on, what packets did ends.
    ours = [Held(world.client, "tcp", rules.ORDERS, 80), Held(world.a, "tcp", rules.ORDERS, 80)]
    assert "in use by another ebpfproxy agent" in _refused(world, mode)
    agent.stop()
    with no_request_fails(*world.loads()[:2]):
        said = world.migrate("rollback")
        time.sleep(0.3)
        assert how([*held, *ours]) == {}, said
    steps = said.splitlines()
    assert steps.index("detached sendmsg6") < steps.index("detached recvmsg4"), "answers come first"
    assert world.a.call(_found) == (True, [])
    assert world.outside.call(clients.spread_tcp, world.a.address, rules.PAYMENTS_NODE_PORT, 5)


def _refused(world: World, mode: str) -> str:
    """kube-proxy is back, but the agent still runs."""
    assert "start kube-proxy, then call this again" in world.fails("rollback", "--timeout", "1s")
    world.kube_proxy(mode)
    return world.fails("rollback")


def test_back_without_a_failed_request_from_outside_where_connections_may_drain(world: World) -> None:
    agent = world.agent().start()
    world.kube_proxy("nftables")
    outside = [Load(world.outside, "tcp", world.a.address, rules.PAYMENTS_NODE_PORT)]
    outside.append(Load(world.outside, "udp", world.a.address, rules.DNS_NODE_PORT))
    agent.stop()
    with no_request_fails(*outside):
        rolling = world.start_migrate("rollback", "--drain", "20s")
        time.sleep(3)
        assert rolling.poll() is None, "the loads' long connection is still there"
    assert rolling.wait(20) == 0
    with no_request_fails(Load(world.outside, "tcp", world.a.address, rules.PAYMENTS_NODE_PORT)):
        time.sleep(1)


def test_cleanup_beside_kube_proxy_loses_no_request_of_pods(world: World) -> None:
    """The first step ends new translations, and replies on their way arrive before the last."""
    world.kube_proxy("nftables")
    world.agent().start().stop()
    with no_request_fails(*world.loads()[:2]):
        said = world.a.cli("cleanup").splitlines()
        time.sleep(0.3)
    assert said.index("detached sendmsg6") < said.index("detached recvmsg4")
    assert world.outside.call(clients.spread_tcp, world.a.address, rules.PAYMENTS_NODE_PORT, 5)


def test_cleanup_takes_what_a_migration_keeps_too(world: World) -> None:
    world.kube_proxy("nftables")
    held = [Held(world.client, "tcp", rules.ORDERS, 80)]
    agent = world.agent().start()
    world.migrate("run")
    assert how(held) == {}
    agent.stop()
    assert world.a.call(_found) == (False, KEPT)
    said = world.a.cli("cleanup")
    assert all(f"removed {each}" in said for each in KEPT)
    assert world.a.call(_found) == (False, [])
    assert "nothing is pinned" in world.a.cli("cleanup")


def _remove(how_many_keep: bool) -> int:
    """kube-proxy's tables, as its own --cleanup removes them, or as ours."""
    if how_many_keep:
        assert not leftovers.remove(leftovers.find()).failed
    else:
        nftables.remove(nftables.find())
    return len(conntrack.find())


@pytest.mark.parametrize("kept", [True, False])
def test_connections_need_somebody_who_asks_for_conntrack(world: World, kept: bool) -> None:
    """A node with nftables mode's rules alone: conntrack knows its flows in any case, and sees no packet."""
    world.kube_proxy("nftables")
    held = [Held(world.client, "tcp", rules.ORDERS, 80), Held(world.a, "tcp", rules.ORDERS, 80)]
    assert world.a.call(_remove, kept) == 2
    assert set(how(held)) == (set() if kept else {each.name for each in held})


def _without_nft() -> tuple[list[str], list[str]]:
    has = tools.has
    tools.has = lambda tool: tool != "nft" and has(tool)
    try:
        removed = leftovers.remove(leftovers.find())
        assert not removed.failed
    finally:
        tools.has = has
    nftables.remove(nftables.find())
    return list(removed.done[:2]), conntrack_hold.find()


def test_without_nft_a_chain_of_iptables_keeps_them(world: World) -> None:
    """Both modes' rules, as after a change of mode."""
    world.kube_proxy("nftables")
    world.kube_proxy("iptables-legacy")
    held = [Held(world.client, "tcp", rules.ORDERS, 80), Held(world.a, "tcp", rules.ORDERS, 80)]
    made = [
        f"{family}-legacy chain {conntrack_hold.CHAIN} of table nat" for family in ("iptables", "ip6tables")
    ]
    assert world.a.call(_without_nft) == ([f"made {each}" for each in made], made)
    assert how(held) == {}
    assert world.a.call(conntrack_hold.end) == made
    assert set(how(held)) == {each.name for each in held}


def test_ports_that_stand_for_kube_proxys_clients_are_not_taken_for_ours(world: World) -> None:
    """Both masquerade by the same few ports; a port of a connection that lives must not be given to another."""
    world.a.call(_load_with_ports, "20000-20029")
    port = rules.PAYMENTS_NODE_PORT
    held = [Held(world.outside, "tcp", world.a.address, port) for _ in range(10)]
    world.agent("--masquerade-ports", "20000-20059").start()
    ours = [Held(world.outside, "tcp", world.a.address, port) for _ in range(35)]
    assert how([*held, *ours]) == {}
    world.migrate("run")
    assert how([*held, *ours]) == {}


def _load_with_ports(ports: str) -> None:
    rules.load("iptables-legacy", lab=True)
    chain = ["iptables-legacy", "-t", "nat", "-R", "KUBE-POSTROUTING", "3"]
    subprocess.run([*chain, "-p", "tcp", "-j", "MASQUERADE", "--to-ports", ports, "--random"], check=True)
