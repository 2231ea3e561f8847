"""The same as test_handover.py, with both families: no connection of IPv6 is lost on the way over and back."""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Iterator

import pytest

from ebpfproxy.operator.migrate.node import conntrack_hold, kube_proxy_frontends, leftovers
from tests.lab import Lab, clients
from tests.operator.migrate import rules, rules6
from tests.operator.migrate.asking import Held, Load, no_request_fails
from tests.operator.migrate.world import World, how

KEPT = [f"nftables table {family} {conntrack_hold.NAME}" for family in ("ip", "ip6")]
ORDERS, DNS = rules6.address(rules.ORDERS), rules6.address(rules.DNS)


def _frame_of_nft(listed: str) -> list[str]:
    """Without elements, and without chains and sets of Services."""
    listed = re.sub(r"\n\t(?:chain|set) \S*/\S* \{.*?\n\t\}\n", "\n", listed, flags=re.DOTALL)
    listed = re.sub(r"\n\t\telements = \{.*?\}\n", "\n", listed, flags=re.DOTALL)
    return [line for line in listed.splitlines() if line.strip()]


def _frame_of_iptables(saved: str) -> list[str]:
    of_services = re.compile(
        r"KUBE-(SVC|SVL|SEP|EXT|FW)-|^#|has no endpoints|health check node port|^:|KUBE-FIREWALL"
    )
    return [line for line in saved.splitlines() if not of_services.search(line)]


def test_what_is_made_for_ipv6_has_the_frame_of_the_real_one() -> None:
    listed = rules.text("nft-list-ruleset.txt")
    real = listed[listed.index("table ip6 kube-proxy") :]
    made = rules6.of_nft(listed)
    assert list(difflib.unified_diff(_frame_of_nft(real), _frame_of_nft(made))) == []
    real = rules.text("ip6tables-legacy-save.txt")
    made = rules6.of_iptables(rules.text("iptables-legacy-save.txt"))
    assert list(difflib.unified_diff(_frame_of_iptables(real), _frame_of_iptables(made))) == []
    assert len(kube_proxy_frontends.of_iptables(made)) == 19


@pytest.fixture
def world() -> Iterator[World]:
    with Lab() as lab:
        yield World(lab, dual_stack=True)


def _found() -> tuple[bool, list[str]]:
    return bool(leftovers.find()), conntrack_hold.find()


@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", rules.MODES)
def test_over_and_back_under_load_with_long_connections(world: World, mode: str) -> None:
    world.kube_proxy(mode)
    held = world.held()
    assert how(held) == {}
    assert {each.server for each in held if ":" in each.host} == {"w1", "w2"}

    with no_request_fails(*world.loads()):
        agent = world.agent().start()
        time.sleep(0.3)
        assert how(held) == {}, "beside kube-proxy"
        planned = json.loads(world.migrate("plan", "-o", "json"))
        assert (planned["blockers"], planned["differences"]) == ([], {})
        # Node ports are one frontend for both families.
        assert planned["kube_proxy_frontends"] == 36
        assert planned["flows"] >= len(held)
        said = world.migrate("run")
        time.sleep(0.3)
        assert how(held) == {}, said
    assert world.a.call(_found) == (False, KEPT)

    agent.stop()
    agent.start()
    assert how(held) == {}, "after a restart"

    ours = [
        Held(space, kind, to, port)
        for space in (world.client, world.a)
        for kind, to, port in (("tcp", ORDERS, 80), ("udp", DNS, 53))
    ]
    agent.stop()
    world.kube_proxy(mode)
    with no_request_fails(*[each for each in world.loads() if each.space is world.client]):
        said = world.migrate("rollback")
        time.sleep(0.3)
        assert how([*held, *ours]) == {}, said
    assert world.a.call(_found) == (True, [])
    for space, to, port in (
        (world.client, ORDERS, 80),
        (world.a, ORDERS, 80),
        (world.outside, world.a.address6, rules.PAYMENTS_NODE_PORT),
    ):
        assert space.call(clients.spread_tcp, to, port, 3)


@pytest.mark.root
def test_back_without_a_failed_request_from_outside_where_connections_may_drain(world: World) -> None:
    agent = world.agent().start()
    world.kube_proxy("nftables")
    outside = [Load(world.outside, "tcp", world.a.address6, rules.PAYMENTS_NODE_PORT)]
    outside.append(Load(world.outside, "udp", world.a.address6, rules.DNS_NODE_PORT))
    agent.stop()
    with no_request_fails(*outside):
        rolling = world.start_migrate("rollback", "--drain", "20s")
        time.sleep(3)
        assert rolling.poll() is None, "the loads' long connection is still there"
    assert rolling.wait(20) == 0
    with no_request_fails(Load(world.outside, "tcp", world.a.address6, rules.PAYMENTS_NODE_PORT)):
        time.sleep(1)
