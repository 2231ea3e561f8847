"""``ebpfproxy check``: with an agent that repairs nothing by itself, and without any agent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ebpfproxy.agent import state
from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import is_locked, pin_folder
from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.netlink.traffic_control import INGRESS, Place, put_filter
from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.field.records import key_of, maps_of
from tests.lab import Agent, LabNode, clients
from tests.lab.processes import Served
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IP = SERVICE_IPS["v4"]
#: A cgroup program of two instructions that lets everything proceed.
_PROCEED = bytes.fromhex("b700000001000000 9500000000000000")


@pytest.fixture(scope="module")
def agent(cluster: TwoNodeCluster) -> Iterator[Agent]:
    """An agent without periodic checks: it compares only at a request."""
    started = cluster.agent("--drift-check-seconds", "0").start()
    yield started
    started.stop()


def check(node: LabNode, *arguments: str, good: bool) -> dict[str, Any]:
    """The JSON of the command, whose exit code tells what ``good`` says."""
    done = node.run_command(["check", "-o", "json", *arguments, "--bpf-root", str(node.bpf_root)])
    assert done.code == (0 if good else 1), done.output + done.errors
    found: dict[str, Any] = json.loads(done.output)
    assert found["good"] == good
    return found


def findings_of(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (each["where"], each["kind"], each["what"], each["service"])
        for each in found["findings"]
        if not each["warning"]
    ]


def test_healthy_node_has_no_findings(cluster: TwoNodeCluster, agent: Agent) -> None:
    found = check(cluster.a, good=True)
    assert found["agent"] == "answered"
    assert found["unchecked"] == []
    text = cluster.a.cli("check")
    assert "everything is as it should be" in text


def test_check_reports_differences_and_repair_removes_them(cluster: TwoNodeCluster, agent: Agent) -> None:
    pin = pin_folder(cluster.a.bpf_root) / "links" / "connect4"
    with maps_of(cluster.a) as maps:
        entry = maps["services4"].lookup(key_of(IP, 80))
        assert entry is not None
        bpf.map_delete(maps["services4"].fd, key_of(IP, 80))
        bpf.map_update(maps["services4"].fd, key_of("192.0.2.99", 443), entry)
        subprocess.run(["bpftool", "link", "detach", "pinned", str(pin)], check=True)
        expected = [
            ("services4", "foreign", "192.0.2.99:443/TCP (internal)", "shop/web:http"),
            ("services4", "missing", f"{IP}:80/TCP (internal)", "shop/web:http"),
            ("programs", "detached", "connect4", ""),
        ]
        found = check(cluster.a, good=False)
        assert sorted(findings_of(found)) == sorted(expected)
        assert all(each["consequence"] and each["mend"] for each in found["findings"])
        assert maps["services4"].lookup(key_of(IP, 80)) is None, "looking repairs nothing"
        text = cluster.a.cli("check", check=False)
        assert "mend: ebpfproxy check --repair" in text

        found = check(cluster.a, "--repair", good=True)
        repaired = [(e["where"], e["kind"], e["what"], e["service"]) for e in found["repaired"]]
        assert sorted(repaired) == sorted(expected)
        assert maps["services4"].lookup(key_of(IP, 80)) == entry
    assert check(cluster.a, good=True)["repaired"] == []
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}


def test_entry_that_the_map_has_no_room_for_is_not_repaired(cluster: TwoNodeCluster, agent: Agent) -> None:
    """Foreign entries have taken the place of one that is missing; they are deleted after it is written."""
    with maps_of(cluster.a) as maps:
        table = maps["node_addresses"]
        known = [key for key, _ in table.items()]
        bpf.map_delete(table.fd, known[0])
        taken = 0
        while len(known) - 1 + taken < table.spec.max_entries:
            bpf.map_update(table.fd, b"\xfd" + taken.to_bytes(15, "big"), U32.pack(1))
            taken += 1
        found = check(cluster.a, "--repair", good=False)
        assert [each[:2] for each in findings_of(found)] == [("node_addresses", "missing")]
        assert {each["kind"] for each in found["repaired"]} == {"foreign"}
        assert len(found["repaired"]) + found["more"] == taken
        assert len(check(cluster.a, "--repair", good=True)["repaired"]) == 1
        assert sorted(key for key, _ in table.items()) == sorted(known)


def test_agent_without_a_socket_is_reported(cluster: TwoNodeCluster, agent: Agent) -> None:
    """Its record names no socket."""
    with maps_of(cluster.a) as maps:
        record = state.load(maps)
        assert record is not None
        assert agent.process is not None
        agent.process.send_signal(signal.SIGSTOP)
        try:
            state.save(maps, msgspec.structs.replace(record, socket=""))
            found = check(cluster.a, "--timeout", "1", good=False)
        finally:
            state.save(maps, record)
            agent.process.send_signal(signal.SIGCONT)
    assert ("agent", "missing", "the agent is of another version", "") in findings_of(found)


def test_the_agent_answers_in_another_network_namespace_too(cluster: TwoNodeCluster, agent: Agent) -> None:
    """The rest of the node is looked at in the agent's only."""
    done = cluster.client.run_command(["check", "-o", "json", "--bpf-root", str(cluster.a.bpf_root)])
    found = json.loads(done.output)
    assert (done.code, found["agent"]) == (0, "answered")
    assert "not the agent's network namespace" in found["unchecked"][0]


def _start_check(node: LabNode, *arguments: str) -> Served:
    words = ["check", "-o", "json", "--bpf-root", str(node.bpf_root), *arguments]
    return node.start_command(words, stdout=-1)


def test_concurrent_checks_get_separate_answers(cluster: TwoNodeCluster, agent: Agent) -> None:
    """Those that only look do not repair, and say nothing of what another repairs."""
    running = [_start_check(cluster.a, *words) for words in ((), ("--repair",), (), ("--repair",))]
    for each in running:
        found = json.loads(each.communicate(timeout=30)[0])
        assert (each.returncode, found["agent"], found["repaired"]) == (0, "answered", [])


def test_check_waits_for_an_agent_that_starts(cluster: TwoNodeCluster, agent: Agent) -> None:
    """What somebody has changed meanwhile is repaired by its start."""
    agent.stop()
    with maps_of(cluster.a) as maps:
        bpf.map_delete(maps["services4"].fd, key_of(IP, 80))
    running = threading.Thread(target=agent.start)
    running.start()
    until(lambda: is_locked(cluster.a.bpf_root))
    found = check(cluster.a, "--repair", good=True)
    running.join()
    assert (found["agent"], found["repaired"]) == ("answered", [])


def test_agent_that_hangs_is_reported(cluster: TwoNodeCluster, agent: Agent) -> None:
    assert agent.process is not None
    agent.process.send_signal(signal.SIGSTOP)
    try:
        found = check(cluster.a, "--timeout", "1", good=False)
    finally:
        agent.process.send_signal(signal.SIGCONT)
    assert found["agent"] == "no answer"
    assert ("agent", "missing", "the agent does not answer: timed out", "") in findings_of(found)


def test_programs_are_compared_while_a_trace_replaces_them(cluster: TwoNodeCluster, agent: Agent) -> None:
    """A check that is asked for meanwhile is made when they are attached."""
    words = ["trace", "--bpf-root", str(cluster.a.bpf_root)]
    trace = cluster.a.start_command(words, stdout=subprocess.DEVNULL, stderr=-1)
    try:
        for _ in range(5):
            subprocess.run(
                [
                    "bpftool",
                    "link",
                    "detach",
                    "pinned",
                    pin_folder(cluster.a.bpf_root) / "links" / "connect4",
                ],
                check=True,
            )
            repaired = check(cluster.a, "--repair", good=True)["repaired"]
            assert [(each["where"], each["kind"]) for each in repaired] in ([("programs", "detached")], [])
            assert {each.hook for each in attachments(pin_folder(cluster.a.bpf_root)) if each.alive} >= {
                "connect4"
            }
    finally:
        trace.terminate()
        trace.communicate(timeout=20)
    check(cluster.a, good=True)


def test_disabled_ip_forwarding_is_reported(cluster: TwoNodeCluster, agent: Agent) -> None:
    cluster.a.call(_forward, "0")
    try:
        (found,) = findings_of(check(cluster.a, good=False))
    finally:
        cluster.a.call(_forward, "1")
    assert found == ("node", "setting", "net.ipv4.ip_forward is 0", "")


def _forward(value: str) -> None:
    Path("/proc/sys/net/ipv4/ip_forward").write_text(value)


def test_programs_of_others_that_run_first_are_warnings(cluster: TwoNodeCluster) -> None:
    """One was at the cgroup before the agent came. A filter has a lower priority: ours is moved before it."""
    fd = os.open(cluster.b.cgroup, os.O_RDONLY | os.O_DIRECTORY)
    program = bpf.prog_load(18, 10, "a_mesh", _PROCEED)
    link = bpf.link_create(program, fd, 10)
    # The agent would move its own programs before the filter.
    options = ["--without", "tcx", "--drift-check-seconds", "0"]
    agent = cluster.b.agent(*options, manifests=cluster.manifests).start()
    try:
        cluster.b.call(_add_filter)
        found = check(cluster.b, good=False)["findings"]
        assert ("devices", "overtaken", "eth0 ingress") in {(e["where"], e["kind"], e["what"]) for e in found}
        warnings = [e for e in found if e["kind"] == "foreign"]
        assert {(e["where"], e["what"].split(":")[0]) for e in warnings} == {
            ("programs", "connect4"),
            ("devices", "eth0 ingress, priority 1 a_cni"),
        }
        assert any("a_mesh" in e["what"] for e in warnings)
        cluster.b.cli("check", "--repair", check=False)
        warnings = [e for e in check(cluster.b, good=True)["findings"] if e["kind"] == "foreign"]
        assert {e["where"] for e in warnings} == {"programs"}
    finally:
        agent.stop()
        for each in (link, program, fd):
            os.close(each)


def _add_filter() -> None:
    program = bpf.prog_load(3, 0, "a_cni", _PROCEED)
    with Rtnetlink() as netlink:
        place = Place(socket.if_nametoindex("eth0"), INGRESS, 1)
        put_filter(netlink, place, program, "a_cni")


def _contradict(maps: MapSet) -> None:
    entry = layout.unpack_service(maps["services4"].lookup(key_of(IP, 80)) or b"")
    unknown = entry._replace(id=4711)
    bpf.map_update(maps["services4"].fd, key_of("192.0.2.99", 443), layout.pack_service(*unknown))
    records = maps.shared("backends")
    number = maps.backends().ids()[0]
    records.bytes[number * records.stride : (number + 1) * records.stride] = bytes(records.stride)
    bpf.map_update(maps["services4"].fd, b"\x01" * 8, b"\xff" * 16)
    bpf.map_update(maps["members"].fd, U32.pack(9000) + U32.pack(0), U32.pack(1))


def test_contradictory_maps_are_reported_without_an_agent_and_repaired_at_its_start(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    agent.stop()
    found = check(cluster.a, good=False)
    assert findings_of(found) == [("agent", "missing", "not running", "")]
    assert found["agent"] == "not running"
    assert "only the agent knows" in found["unchecked"][0]
    with maps_of(cluster.a) as maps:
        _contradict(maps)
    subprocess.run(
        ["bpftool", "link", "detach", "pinned", str(pin_folder(cluster.a.bpf_root) / "links" / "connect6")],
        check=True,
    )
    named = {(where, kind) for where, kind, _, _ in findings_of(check(cluster.a, good=False))}
    assert named == {
        ("agent", "missing"),
        ("services4", "foreign"),
        ("services4", "changed"),
        ("backends", "missing"),
        ("members", "foreign"),
        ("programs", "detached"),
    }
    with maps_of(cluster.a) as maps:
        bpf.map_delete(maps["services4"].fd, b"\x01" * 8)
    again = cluster.agent("--drift-check-seconds", "0").start()
    assert findings_of(check(cluster.a, good=True)) == []
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    again.stop()
