"""The agent's life: start, restart, crash, upgrade, refusal, clean-up; traffic must not notice."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs.attach import attachments
from tests.e2e import load
from tests.e2e.world import SERVICE_IPS, World
from tests.lab import Agent, Lab, LabNode, clients, manifests
from tests.lab.machine import socket_programs
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IP = SERVICE_IPS["v4"]
#: Asks by a socket that is not connected, and reads the answer, which is there, when a line comes.
_READ_LATE = """
import select, socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.sendto(b"?", (sys.argv[1], 53))
    assert select.select([sock], [], [], 10)[0]
    print("answered", flush=True)
    sys.stdin.readline()
    print(*sock.recvfrom(4096)[1][:2], flush=True)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        yield World(lab)


@pytest.fixture
def agent(world: World) -> Iterator[Agent]:
    world.write_web(world.w1, world.w2)
    started = world.agent().start()
    yield started
    if started.process is not None and started.process.poll() is None:
        started.stop()
    world.a.cli("cleanup")


def ids(node: LabNode) -> dict[str, int]:
    rows = json.loads(node.cli("backend", "list", "-o", "json"))
    return {row["address"] + row["protocol"]: row["id"] for row in rows}


def program_ids(node: LabNode) -> dict[str, int | None]:
    return {a.hook: a.program_id for a in attachments(pin_folder(node.bpf_root))}


def writes(agent: Agent) -> dict[str, float]:
    """Entries written by this agent, of all maps but its own two records, for `status`."""
    _, text = agent.http("/metrics", 10249)
    found = {}
    for line in text.splitlines():
        if line.startswith("ebpfproxy_map_writes_total"):
            name = line.split('"')[1]
            found[name] = float(line.rpartition(" ")[2])
    del found["agent_state"], found["programmed"]
    return found


def test_kill_9_under_load_and_a_new_start_lose_nothing_and_write_nothing(world: World, agent: Agent) -> None:
    before = ids(world.a), program_ids(world.a)
    with load.running(world.client, IP, 80) as clients_load:
        agent.kill()
        time.sleep(0.3)
        again = world.agent().start()
        time.sleep(0.3)
    assert clients_load.result["errors"] == []
    assert clients_load.result["count"] > 50
    assert (ids(world.a), program_ids(world.a)) == before
    assert {name: n for name, n in writes(again).items() if n} == {}
    assert "changed=nothing" in again.text
    again.stop()


def test_what_changed_while_no_agent_ran_is_caught_up_with(world: World, agent: Agent) -> None:
    before = ids(world.a)
    agent.kill()
    world.write_web(world.w2)
    again = world.agent().start()
    assert set(world.client.call(clients.spread_tcp, IP, 80, 20)) == {"w2"}
    after = ids(world.a)
    assert after.items() <= before.items(), "those that stay keep their ids"
    again.stop()


def test_sigterm_leaves_traffic_flowing_and_status_readable(world: World, agent: Agent) -> None:
    assert agent.stop() == 0
    assert set(world.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    status = json.loads(world.a.cli("status", "-o", "json"))
    assert status["agent_running"] is False
    assert all(hook["attached"] for hook in status["attachments"])
    assert "STOPPED" in world.a.cli("status")
    rows = json.loads(world.a.cli("service", "list", "-o", "json"))
    assert {row["name"] for row in rows} == {"web", "empty", "elsewhere", "second"}


def test_a_second_agent_on_the_same_roots_is_refused(world: World, agent: Agent) -> None:
    second = world.agent("--healthz-bind-address", "", "--metrics-bind-address", "").start(wait=False)
    assert second.process is not None
    assert second.process.wait(120) == 1
    assert "is in use by another ebpfproxy agent" in second.text
    assert f"--bpf-root {world.a.bpf_root}" in second.text


def test_a_lab_would_notice_an_agent_at_the_root(world: World, agent: Agent) -> None:
    """What is attached there sees the sockets of all tests: a run says so at once."""
    found = socket_programs(world.a.cgroup)
    assert any(each.endswith("(cgroup_inet4_connect)") for each in found)
    assert not socket_programs(world.a.cgroup.parent)


def test_a_second_agent_on_the_same_cgroup_is_refused(world: World, agent: Agent) -> None:
    other = world.lab.folder.name
    second = world.agent("--bpf-root", f"/sys/fs/bpf/{world.lab.id}/{other}").start(wait=False)
    assert second.process is not None
    assert second.process.wait(120) == 1
    assert f"--cgroup-root {world.a.cgroup} is in use" in second.text


def test_cleanup_is_refused_while_an_agent_runs_and_removes_everything_after(
    world: World, agent: Agent
) -> None:
    refused = f"{sys.executable} -m ebpfproxy cleanup --bpf-root {world.a.bpf_root} 2>&1; true"
    assert "in use" in world.a.run(["sh", "-c", refused])
    agent.stop()
    said = world.a.cli("cleanup")
    assert "detached connect4" in said
    assert "unpinned" in said
    assert not pin_folder(world.a.bpf_root).exists()
    assert world.client.call(clients.connect_error, IP, 80, 0.3) != "connected"


def test_a_datagram_under_way_is_answered_by_the_service_while_programs_go(
    world: World, agent: Agent
) -> None:
    """What chooses backends goes first: what was sent before is answered from the address that was asked."""
    agent.stop()
    asked = [
        (ip, world.client.popen([sys.executable, "-c", _READ_LATE, ip], stdin=-1, stdout=-1))
        for ip in SERVICE_IPS.values()
    ]
    for _, client in asked:
        assert client.stdout is not None
        assert client.stdout.readline() == b"answered\n"
    links = pin_folder(world.a.bpf_root) / "links"
    with ThreadPoolExecutor() as pool:
        cleanup = pool.submit(world.a.cli, "cleanup")
        until(lambda: not (links / "sendmsg6").exists(), "nothing chooses any more")
        for ip, client in asked:
            assert client.communicate(b"\n", timeout=10)[0].decode().strip() == f"{ip} 53"
        said = cleanup.result().splitlines()
    assert said.index("detached sendmsg6") < said.index("detached recvmsg4")


def test_other_options_replace_the_programs_in_one_step(world: World, agent: Agent) -> None:
    before = program_ids(world.a)
    agent.stop()
    with load.running(world.client, IP, 80) as clients_load:
        again = world.agent("--no-localhost-nodeports").start()
    assert clients_load.result["errors"] == []
    assert all(before[hook] != now for hook, now in program_ids(world.a).items())
    assert "connect4 replaced" in again.text
    assert world.a.call(clients.connect_error, "127.0.0.1", 30080) == "ECONNREFUSED"
    again.stop()


def test_other_sizes_make_new_maps_that_are_full_before_programs_move(world: World, agent: Agent) -> None:
    versions = {p.name for p in pin_folder(world.a.bpf_root).glob("v*")}
    agent.stop()
    with load.running(world.client, IP, 80) as clients_load:
        again = world.agent("--max-backends", "1000", "--max-services", "500").start()
    assert clients_load.result["errors"] == []
    assert "connect4 replaced" in again.text
    now = {p.name for p in pin_folder(world.a.bpf_root).glob("v*")}
    assert len(now) == 1
    assert not now & versions
    again.stop()


def test_programs_that_do_not_load_leave_the_attached_ones(
    world: World, agent: Agent, tmp_path: Path
) -> None:
    """With a source tree that has an error in it: the compiler's own message, exit code 1."""
    before = program_ids(world.a)
    agent.stop()
    top = Path(__file__).parents[2]
    shutil.copytree(top / "ebpfproxy", tmp_path / "ebpfproxy")
    shutil.copytree(top / "bpf", tmp_path / "bpf")
    source = tmp_path / "bpf" / "lib" / "socket.h"
    source.write_text(source.read_text().replace("#define PROCEED 1", "#define PROCEED one"))
    broken = Agent(world.a, ["--hostname-override", "node-a", "--manifests", str(world.manifests)])
    broken.start(wait=False, cwd=tmp_path)
    assert broken.process is not None
    assert broken.process.wait(120) == 1
    assert "does not compile" in broken.text
    assert "use of undeclared identifier 'one'" in broken.text
    assert program_ids(world.a) == before
    assert set(world.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}


def test_a_removed_backend_gets_no_connection_and_a_new_one_gets_its_share(
    world: World, agent: Agent
) -> None:
    world.write_web(world.w2)
    until(lambda: set(world.client.call(clients.spread_tcp, IP, 80, 10)) == {"w2"}, "w1 is still used")
    world.write_web(world.w1, world.w2)
    until(
        lambda: len(world.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == 2,
        "w1 is not used again",
    )


def test_scaling_to_nothing_refuses_and_scaling_up_serves(world: World, agent: Agent) -> None:
    world.write_web()
    until(lambda: world.client.call(clients.connect_error, IP, 80) == "ECONNREFUSED", "still served")
    world.write_web(world.w1)
    until(lambda: world.client.call(clients.connect_error, IP, 80) == "connected", "not served again")


def test_thousands_of_changes_under_load_never_show_a_mixture(world: World, agent: Agent) -> None:
    """Ranges and ids are used again and again; a connection must never fail or go elsewhere.

    Endpoints vanish without terminating first: their connections go on where that is asked for.
    """
    agent.stop()
    patient = world.agent("--stale-tcp", "never").start()
    with load.running(world.client, IP, 80) as clients_load:
        for n in range(60):
            world.write_web(*((world.w1,), (world.w1, world.w2), (world.w2,))[n % 3])
            time.sleep(0.02)
    patient.stop()
    assert clients_load.result["errors"] == []


def test_a_broken_manifest_keeps_its_last_good_state(world: World, agent: Agent) -> None:
    path = world.manifests / "web.yaml"
    good = path.read_text()
    path.write_text(good.replace("port: 80\n", "port: eighty\n"))
    agent.wait_log("cannot read manifest")
    assert "web.yaml" in agent.text
    assert "spec.ports[0].port: Expected `int`, got `str`" in agent.text
    assert set(world.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    path.write_text(good)
    agent.wait_log("manifest is valid again")


def test_an_address_added_to_the_node_serves_node_ports(world: World, agent: Agent) -> None:
    world.a.run(["ip", "address", "add", "172.18.0.99/24", "dev", "eth0"])
    until(
        lambda: world.client.call(clients.connect_error, "172.18.0.99", 30080) == "connected",
        "no NodePort on the new address",
    )
    world.a.run(["ip", "address", "del", "172.18.0.99/24", "dev", "eth0"])
    until(
        lambda: world.client.call(clients.connect_error, "172.18.0.99", 30080, 0.2) != "connected",
        "still a NodePort on an address that is gone",
    )


def test_two_nodes_do_not_touch_each_other(world: World, agent: Agent) -> None:
    folder = world.lab.folder / "other"
    manifests.write(
        folder / "web.yaml",
        manifests.service("web", clusterIPs=[IP]),
        manifests.slice_of("web", [manifests.endpoint(world.w1.address, "node-a")]),
    )
    other = world.b.agent(manifests=folder).start()
    on_b = world.b.pod("client-b")
    assert set(on_b.call(clients.spread_tcp, IP, 80, 20)) == {"w1"}
    other.stop()
    world.b.cli("cleanup")
    assert on_b.call(clients.connect_error, IP, 80, 0.3) != "connected"
    assert set(world.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}


def test_the_cgroup_made_again_is_attached_again(world: World, agent: Agent) -> None:
    """Links die with their cgroup; the next start sees that and makes new ones."""
    spare = world.a.cgroup.parent / "spare"
    spare.mkdir()
    agent.stop()
    moved = world.agent("--cgroup-root", str(spare)).start()
    assert "connect4 moved" in moved.text
    moved.stop()
    spare.rmdir()
    pins = pin_folder(world.a.bpf_root)
    until(lambda: not any(a.alive for a in attachments(pins)), "attached to a cgroup that is gone")
    back = world.agent().start()
    assert "connect4 moved" in back.text
    assert set(world.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    back.stop()


def test_service_list_is_the_documented_json(world: World, agent: Agent) -> None:
    rows: list[dict[str, Any]] = json.loads(world.a.cli("service", "list", "-o", "json"))
    web = [row for row in rows if row["name"] == "web" and row["port_name"] == "http"]
    assert list(web[0]) == [
        "namespace",
        "name",
        "port_name",
        "type",
        "scope",
        "frontend",
        "algorithm",
        "affinity",
        "backends",
        "own",
    ]
    found = {(row["type"], row["scope"], row["frontend"]) for row in web}
    assert {
        ("ClusterIP", "internal", "10.96.0.10:80/TCP"),
        ("ClusterIP", "external", "[fd00:10:96::10]:80/TCP"),
        ("ExternalIP", "internal", "192.0.2.80:80/TCP"),
        ("LoadBalancer", "external", "203.0.113.10:80/TCP"),
        ("NodePort", "internal", "0.0.0.0:30080/TCP"),
        ("NodePort", "external", "[::]:30080/TCP"),
    } <= found
    assert len(web) == len(found)
    assert web[0]["backends"] == [
        {"address": f"{world.w1.address}:8080", "state": "active"},
        {"address": f"{world.w2.address}:8080", "state": "active"},
    ]
    one = json.loads(world.a.cli("service", "get", "shop/web", "-o", "json"))
    assert one == [row for row in rows if row["name"] == "web"]


def test_terminating_backends_are_shown_as_such(world: World, agent: Agent) -> None:
    """A backend is terminating when every Service that has it says so: this one has it alone."""
    path = world.manifests / "leaving.yaml"
    leaving = manifests.endpoint(world.w1.address, "node-a", ready=False, terminating=True)
    manifests.write(
        path,
        manifests.service("leaving", clusterIPs=["10.96.0.50"]),
        manifests.slice_of("leaving", [leaving], ports=[{"name": "http", "port": 9000}]),
    )

    def backends() -> list[dict[str, str]]:
        rows = json.loads(world.a.cli("service", "list", "-o", "json"))
        return [b for row in rows if row["name"] == "leaving" for b in row["backends"]]

    expected = {"address": f"{world.w1.address}:9000", "state": "terminating"}
    until(lambda: backends() == [expected] * 2, "not shown as terminating")
    assert set(world.client.call(clients.spread_tcp, "10.96.0.50", 80, 5)) == {"w1"}, "nothing else is left"
    path.unlink()
