"""Drift: maps and programs that another process has changed are detected and repaired."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs.attach import attachments
from tests.e2e import connection_load
from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.field.records import key_of, maps_of
from tests.lab import Agent, LabNode, clients, manifests
from tests.lab.spaces import enter_namespace, namespace_restored
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IP, OTHER = SERVICE_IPS["v4"], "10.96.0.40"
#: The time within which the default has repaired what it finds.
SECONDS = 10.0
_DRIFT = re.compile(r'^ebpfproxy_drift_total\{kind="([^"]+)",map="([^"]+)"\} ([0-9.e+]+)$', re.M)


@pytest.fixture(scope="module")
def agent(cluster: TwoNodeCluster) -> Iterator[Agent]:
    started = cluster.agent().start()
    yield started
    started.stop()


def repaired_differences(agent: Agent) -> dict[tuple[str, str], int]:
    """Repaired differences so far, by map and kind."""
    _, text = agent.http("/metrics", 10249)
    return {(where, kind): int(float(n)) for kind, where, n in _DRIFT.findall(text) if float(n)}


def repaired_since(agent: Agent, before: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    return {
        key: n - before.get(key, 0)
        for key, n in repaired_differences(agent).items()
        if n != before.get(key, 0)
    }


def service_id(maps: MapSet, name: str, port_name: str = "http") -> int:
    return next(
        int(U32.unpack(key)[0])
        for key, value in maps["service_names"].items()
        if (found := layout.unpack_name(value)).name == name
        and found.port_name == port_name
        and found.family.name == "IPV4"
    )


# -- ways to tamper, each with what is counted


def _frontend_deleted(maps: MapSet) -> set[tuple[str, str]]:
    bpf.map_delete(maps["services4"].fd, key_of(IP, 80))
    return {("services4", "missing")}


def _frontend_redirected(maps: MapSet) -> set[tuple[str, str]]:
    """The frontend leads to another Service, whose endpoints receive its requests."""
    key = key_of(IP, 80)
    entry = layout.unpack_service(maps["services4"].lookup(key) or b"")
    other = entry._replace(id=service_id(maps, "second"))
    bpf.map_update(maps["services4"].fd, key, layout.pack_service(*other))
    return {("services4", "changed")}


def _frontend_added(maps: MapSet) -> set[tuple[str, str]]:
    entry = maps["services4"].lookup(key_of(IP, 80))
    assert entry is not None
    bpf.map_update(maps["services4"].fd, key_of("8.8.8.8", 80), entry)
    return {("services4", "foreign")}


def _selection_emptied(maps: MapSet) -> set[tuple[str, str]]:
    maps.shared("selections").words()[service_id(maps, "web") * layout.POLICIES] = 0
    return {("selections", "missing")}


def _slot_rewritten(maps: MapSet) -> set[tuple[str, str]]:
    (base, _), _ = maps.selections().ranges(service_id(maps, "web"))
    maps.shared("slots").words()[base] = layout.slot(4711)
    return {("slots", "changed")}


def _backend_rewritten(maps: MapSet) -> set[tuple[str, str]]:
    """All backends get an address that no pod has."""
    records = maps.shared("backends")
    for number in maps.backends().ids():
        records.bytes[number * records.stride + 15] ^= 0xFF
    return {("backends", "changed")}


def _filters_cleared(maps: MapSet) -> set[tuple[str, str]]:
    for name in ("address_filter", "port_filter"):
        maps.shared(name).bytes[:] = bytes(len(maps.shared(name).bytes))
    return {("address_filter", "missing"), ("port_filter", "missing")}


def _everything_deleted(maps: MapSet) -> set[tuple[str, str]]:
    names = ("services4", "services6", "service_names", "devices", "node_addresses")
    for name in names:
        for key, _ in list(maps[name].items()):
            bpf.map_delete(maps[name].fd, key)
    return {(name, "missing") for name in names}


@pytest.mark.parametrize(
    "tamper",
    [
        _frontend_deleted,
        _frontend_redirected,
        _frontend_added,
        _selection_emptied,
        _slot_rewritten,
        _backend_rewritten,
        _filters_cleared,
        _everything_deleted,
    ],
)
def test_changed_entries_are_repaired_without_errors_of_another_service(
    cluster: TwoNodeCluster, agent: Agent, tamper: Callable[[MapSet], set[tuple[str, str]]]
) -> None:
    """Connections to a Service whose entries are unchanged do not fail."""
    is_general = tamper in (_backend_rewritten, _filters_cleared, _everything_deleted)
    before = repaired_differences(agent)
    with maps_of(cluster.a) as maps, connection_load.running(cluster.client, OTHER, 80) as traffic:
        owned = ("services4", "services6", "service_names", "selections", "slots", "backends", "devices")
        contents = {name: _content(maps, name) for name in owned}
        expected = tamper(maps)
        began = time.monotonic()
        until(lambda: repaired_since(agent, before), f"{tamper.__name__} is not noticed", SECONDS, every=0.2)
        assert time.monotonic() - began < SECONDS
        assert repaired_since(agent, before).keys() == expected
        assert {name: _content(maps, name) for name in owned} == contents
    if not is_general:
        assert traffic.result["errors"] == []
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    assert cluster.client.call(clients.ask_tcp, OTHER, 80)["name"] == "w1"


def _content(maps: MapSet, name: str) -> object:
    """The content of a map without counters, which programs write in the records of backends."""
    if name == "backends":
        records = maps.backends()
        return {number: records.read(number) for number in records.ids()}
    table = maps[name]
    return bytes(maps.shared(name).bytes) if table.spec.kind == 2 else dict(table.items())


# -- programs


def hooks(node: LabNode) -> dict[str, bool]:
    return {each.hook: each.alive for each in attachments(pin_folder(node.bpf_root))}


def test_a_detached_socket_program_is_attached_again(cluster: TwoNodeCluster, agent: Agent) -> None:
    before = repaired_differences(agent)
    pin = pin_folder(cluster.a.bpf_root) / "links" / "connect4"
    subprocess.run(["bpftool", "link", "detach", "pinned", str(pin)], check=True)
    assert not hooks(cluster.a)["connect4"]
    until(lambda: hooks(cluster.a)["connect4"], "connect4 is not attached again", SECONDS)
    until(lambda: repaired_since(agent, before) == {("programs", "detached"): 1}, seconds=5)
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}


def test_a_replaced_socket_program_is_replaced_again(cluster: TwoNodeCluster, agent: Agent) -> None:
    before = repaired_differences(agent)
    home = pin_folder(cluster.a.bpf_root)
    wrong = next(home.glob("v*/progs-*/connect6"))
    with bpf.opened(home / "links" / "connect6") as link:
        right = bpf.cgroup_link_info(link).prog_id
        code = bytes.fromhex("b700000001000000 9500000000000000")
        with bpf.opened(wrong):
            program = bpf.prog_load(18, 11, "impostor", code)
            bpf.link_update(link, program)
        assert bpf.cgroup_link_info(link).prog_id != right
        until(lambda: bpf.cgroup_link_info(link).prog_id == right, "connect6 stays replaced", SECONDS)
    until(lambda: repaired_since(agent, before) == {("programs", "replaced"): 1}, seconds=5)


def test_a_detached_packet_program_is_attached_again(cluster: TwoNodeCluster, agent: Agent) -> None:
    before = repaired_differences(agent)
    pin = min((pin_folder(cluster.a.bpf_root) / "links").glob("tc-*-ingress"))
    subprocess.run(["bpftool", "link", "detach", "pinned", str(pin)], check=True)
    until(lambda: repaired_since(agent, before) == {("devices", "detached"): 1}, seconds=SECONDS, every=0.2)
    with bpf.opened(pin) as link:
        assert bpf.tcx_link_info(link).ifindex


_TCX_INGRESS, _BEFORE = 46, 8


def _attach_first(program: int) -> int:
    """Attaches a program before all others at eth0's ingress; returns the link."""
    return bpf.link_create(program, socket.if_nametoindex("eth0"), _TCX_INGRESS, _BEFORE)


def _at_eth0() -> list[int]:
    return bpf.attached_programs(socket.if_nametoindex("eth0"), _TCX_INGRESS)


def test_packet_programs_are_moved_once_before_one_that_has_overtaken_them(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    """A program that ends with TC_ACT_OK leaves no turn to those after it. One that comes first again stays there: two
    that want to be first do not fight."""
    before = repaired_differences(agent)
    program = bpf.prog_load(3, 0, "first", bytes.fromhex("b700000000000000 9500000000000000"))
    number = bpf.prog_info(program).id
    with namespace_restored():
        enter_namespace(f"/run/netns/{cluster.a.netns}")
        link = _attach_first(program)
        assert _at_eth0()[0] == number
        until(lambda: _at_eth0()[1:] == [number], seconds=SECONDS)
        until(lambda: repaired_since(agent, before) == {("devices", "overtaken"): 1}, seconds=SECONDS)
        bpf.link_detach(link)
        os.close(link)
        link = _attach_first(program)
    # Each compares once more, and the agent repairs what it may.
    cluster.a.cli("check", "--repair")
    found = json.loads(cluster.a.cli("check", "-o", "json"))["findings"]
    at_devices = [(each["kind"], each["warning"]) for each in found if each["where"] == "devices"]
    assert at_devices == [("foreign", True)]
    assert repaired_since(agent, before) == {("devices", "overtaken"): 1}
    for each in (link, program):
        os.close(each)


def test_removed_pins_are_made_again_with_the_programs_that_ended_with_them(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    before = repaired_differences(agent)
    shutil.rmtree(pin_folder(cluster.a.bpf_root))
    until(lambda: all(hooks(cluster.a).values()) if _has_links(cluster.a) else False, seconds=2 * SECONDS)
    until(lambda: cluster.client.call(clients.connect_error, IP, 80) == "connected", seconds=2 * SECONDS)
    assert repaired_since(agent, before)["pins", "missing"]
    cluster.a.cli("status")


def _has_links(node: LabNode) -> bool:
    return (pin_folder(node.bpf_root) / "links").is_dir()


# -- no false alarm


def test_thousands_of_changes_are_not_taken_for_drift(cluster: TwoNodeCluster, agent: Agent) -> None:
    """The maps are compared ten times a second during the changes."""
    agent.stop()
    again = cluster.agent("--drift-check-seconds", "0.1").start()
    changed = 0
    try:
        until_time = time.monotonic() + 15
        while time.monotonic() < until_time:
            for n in range(60):
                ports = [{"name": "http", "port": 80 + changed % 3, "protocol": "TCP"}]
                affinity = {"sessionAffinity": "ClientIP"} if (changed + n) % 2 else {}
                endpoints = [
                    manifests.endpoint(f"10.244.9.{1 + (changed + n + i) % 200}", "node-b")
                    for i in range((changed + n) % 5)
                ]
                documents = [manifests.service(f"s{n}", clusterIPs=[f"10.96.7.{n}"], ports=ports, **affinity)]
                if endpoints:
                    documents.append(manifests.slice_of(f"s{n}", endpoints, ports=ports))
                if (changed + n) % 7:
                    manifests.write(cluster.manifests / f"storm-{n}.yaml", *documents)
                else:
                    (cluster.manifests / f"storm-{n}.yaml").unlink(missing_ok=True)
            changed += 1
            cluster.a.run(["ip", "link", "add", "storm", "type", "veth", "peer", "name", "storm-peer"])
            cluster.a.run(["ip", "link", "set", "storm", "up"])
            cluster.write_web(*((cluster.w1, cluster.w2) if changed % 2 else (cluster.w1,)))
            time.sleep(0.05)
            cluster.a.run(["ip", "link", "del", "storm"])
        for path in cluster.manifests.glob("storm-*.yaml"):
            path.unlink()
        cluster.write_web(cluster.w1, cluster.w2)
        until(lambda: set(cluster.client.call(clients.spread_tcp, IP, 80, 20)) == {"w1", "w2"})
        assert repaired_differences(again) == {}
        assert "somebody else" not in again.text
    finally:
        again.stop()


def test_deleted_tc_filters_are_attached_again(cluster: TwoNodeCluster) -> None:
    """Devices have filters where the kernel has no tcx."""
    cluster.a.cli("cleanup")
    started = cluster.agent("--without", "tcx", "--drift-check-seconds", "0.5").start()
    try:

        def there() -> bool:
            return "ebpfproxy:" in cluster.a.run(["tc", "filter", "show", "dev", "eth0", "ingress"])

        assert there()
        cluster.a.run(["tc", "filter", "del", "dev", "eth0", "ingress"])
        until(there, "the filter does not come back", 5)
        cluster.a.run(["tc", "qdisc", "del", "dev", "eth0", "clsact"])
        until(there, "the filter does not come back", 5)
        until(lambda: repaired_differences(started).get(("devices", "detached")), seconds=5)
    finally:
        started.stop()


def test_interval_0_disables_the_check(cluster: TwoNodeCluster) -> None:
    started = cluster.agent("--drift-check-seconds", "0").start()
    try:
        with maps_of(cluster.a) as maps:
            bpf.map_update(maps["services4"].fd, key_of("8.8.8.8", 80), bytes(16))
            time.sleep(3)
            assert maps["services4"].lookup(key_of("8.8.8.8", 80)) == bytes(16)
            bpf.map_delete(maps["services4"].fd, key_of("8.8.8.8", 80))
        assert repaired_differences(started) == {}
    finally:
        started.stop()
