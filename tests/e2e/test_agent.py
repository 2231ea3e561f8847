"""Start, restart, crash, upgrade and clean-up of the agent, without loss of connections."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs.attach import attachments
from tests.e2e import connection_load
from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.lab import Agent, Lab, LabNode, clients, manifests
from tests.lab.foreign_programs import socket_programs
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IP = SERVICE_IPS["v4"]
#: Sends by an unconnected socket, waits until the reply is pending, and reads it after a line of input.
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
def cluster() -> Iterator[TwoNodeCluster]:
    with Lab() as lab:
        yield TwoNodeCluster(lab)


@pytest.fixture(scope="module")
def started() -> list[Agent]:
    """The agents with default options that tests have used; the last one may still run."""
    return []


@pytest.fixture
def agent(cluster: TwoNodeCluster, started: list[Agent]) -> Agent:
    """Returns a running agent that has programmed both endpoints: that of the last test unless it has ended."""
    cluster.write_web(cluster.w1, cluster.w2)
    if not started or started[-1].process is None or started[-1].process.poll() is not None:
        started.append(cluster.agent().start())
    until(
        lambda: len(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == 2,
        "the agent does not use both endpoints",
    )
    return started[-1]


def ids(node: LabNode) -> dict[str, int]:
    rows = json.loads(node.cli("backend", "list", "-o", "json"))
    return {row["address"] + row["protocol"]: row["id"] for row in rows}


def program_ids(node: LabNode) -> dict[str, int | None]:
    return {a.hook: a.program_id for a in attachments(pin_folder(node.bpf_root))}


def writes(agent: Agent) -> dict[str, float]:
    """Entries that this agent has written, by map; without the two maps that ``status`` reads."""
    _, text = agent.http("/metrics", 10249)
    found = {}
    for line in text.splitlines():
        if line.startswith("ebpfproxy_map_writes_total"):
            name = line.split('"')[1]
            found[name] = float(line.rpartition(" ")[2])
    del found["agent_state"], found["programmed"]
    return found


def test_sigkill_and_restart_under_load_lose_no_connection_and_write_no_map(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    before = ids(cluster.a), program_ids(cluster.a)
    with connection_load.running(cluster.client, IP, 80) as clients_load:
        agent.kill()
        time.sleep(0.3)
        again = cluster.agent().start()
        time.sleep(0.3)
    assert clients_load.result["errors"] == []
    assert clients_load.result["count"] > 50
    assert (ids(cluster.a), program_ids(cluster.a)) == before
    assert {name: n for name, n in writes(again).items() if n} == {}
    assert "changed=nothing" in again.text
    again.stop()


def test_changes_while_no_agent_ran_are_programmed_at_start(cluster: TwoNodeCluster, agent: Agent) -> None:
    before = ids(cluster.a)
    agent.kill()
    cluster.write_web(cluster.w2)
    again = cluster.agent().start()
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, 20)) == {"w2"}
    after = ids(cluster.a)
    assert after.items() <= before.items(), "remaining backends keep their ids"
    again.stop()


def test_sigterm_leaves_programs_attached_and_status_readable(cluster: TwoNodeCluster, agent: Agent) -> None:
    assert agent.stop() == 0
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    status = json.loads(cluster.a.cli("status", "-o", "json"))
    assert status["agent_running"] is False
    assert all(hook["attached"] for hook in status["attachments"])
    assert "STOPPED" in cluster.a.cli("status")
    rows = json.loads(cluster.a.cli("service", "list", "-o", "json"))
    assert {row["name"] for row in rows} == {"web", "empty", "elsewhere", "second"}


def test_second_agent_on_the_same_bpf_root_fails(cluster: TwoNodeCluster, agent: Agent) -> None:
    second = cluster.agent("--healthz-bind-address", "", "--metrics-bind-address", "").start(wait=False)
    assert second.process is not None
    assert second.process.wait(120) == 1
    assert "is in use by another ebpfproxy agent" in second.text
    assert f"--bpf-root {cluster.a.bpf_root}" in second.text


def test_socket_programs_of_a_cgroup_are_found_for_the_check_of_the_root(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    """Programs at the cgroup root would translate the sockets of all tests, so that a run fails early."""
    found = socket_programs(cluster.a.cgroup)
    assert any(each.endswith("(cgroup_inet4_connect)") for each in found)
    assert not socket_programs(cluster.a.cgroup.parent)


def test_second_agent_on_the_same_cgroup_fails(cluster: TwoNodeCluster, agent: Agent) -> None:
    other = cluster.lab.folder.name
    second = cluster.agent("--bpf-root", f"/sys/fs/bpf/{cluster.lab.id}/{other}").start(wait=False)
    assert second.process is not None
    assert second.process.wait(120) == 1
    assert f"--cgroup-root {cluster.a.cgroup} is in use" in second.text


def test_cleanup_fails_while_an_agent_runs_and_removes_everything_afterwards(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    refused = f"{sys.executable} -m ebpfproxy cleanup --bpf-root {cluster.a.bpf_root} 2>&1; true"
    assert "in use" in cluster.a.run(["sh", "-c", refused])
    agent.stop()
    output = cluster.a.cli("cleanup")
    assert "detached connect4" in output
    assert "unpinned" in output
    assert not pin_folder(cluster.a.bpf_root).exists()
    assert cluster.client.call(clients.connect_error, IP, 80, 0.3) != "connected"


def test_pending_udp_replies_have_the_service_address_during_cleanup(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    """Programs that select backends are detached first: replies to earlier requests are still translated."""
    agent.stop()
    asked = [
        (ip, cluster.client.popen([sys.executable, "-c", _READ_LATE, ip], stdin=-1, stdout=-1))
        for ip in SERVICE_IPS.values()
    ]
    for _, client in asked:
        assert client.stdout is not None
        assert client.stdout.readline() == b"answered\n"
    links = pin_folder(cluster.a.bpf_root) / "links"
    with ThreadPoolExecutor() as pool:
        cleanup = pool.submit(cluster.a.cli, "cleanup")
        until(lambda: not (links / "sendmsg6").exists(), "sendmsg6 is still attached")
        for ip, client in asked:
            assert client.communicate(b"\n", timeout=10)[0].decode().strip() == f"{ip} 53"
        output = cleanup.result().splitlines()
    assert output.index("detached sendmsg6") < output.index("detached recvmsg4")


def test_changed_options_replace_programs_under_load(cluster: TwoNodeCluster, agent: Agent) -> None:
    before = program_ids(cluster.a)
    agent.stop()
    with connection_load.running(cluster.client, IP, 80) as clients_load:
        again = cluster.agent("--no-localhost-nodeports").start()
    assert clients_load.result["errors"] == []
    assert all(before[hook] != now for hook, now in program_ids(cluster.a).items())
    assert "connect4 replaced" in again.text
    assert cluster.a.call(clients.connect_error, "127.0.0.1", 30080) == "ECONNREFUSED"
    again.stop()


def test_changed_map_sizes_create_and_fill_new_maps_before_programs_are_replaced(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    versions = {p.name for p in pin_folder(cluster.a.bpf_root).glob("v*")}
    agent.stop()
    with connection_load.running(cluster.client, IP, 80) as clients_load:
        again = cluster.agent("--max-backends", "1000", "--max-services", "500").start()
    assert clients_load.result["errors"] == []
    assert "connect4 replaced" in again.text
    now = {p.name for p in pin_folder(cluster.a.bpf_root).glob("v*")}
    assert len(now) == 1
    assert not now & versions
    again.stop()


def test_programs_that_do_not_compile_leave_the_attached_ones(
    cluster: TwoNodeCluster, agent: Agent, tmp_path: Path
) -> None:
    """With an error in the BPF sources, the agent prints the compiler's message and exits with 1.

    The error is in a header of all sources, so that none of them is compiled in vain.
    """
    before = program_ids(cluster.a)
    agent.stop()
    top = Path(__file__).parents[2]
    shutil.copytree(top / "ebpfproxy", tmp_path / "ebpfproxy")
    shutil.copytree(top / "bpf", tmp_path / "bpf")
    source = tmp_path / "bpf" / "lib" / "compat.h"
    text, broken_function = source.read_text(), "static int broken(void) { return one; }\n"
    source.write_text(text.replace("#define ETH_HLEN", f"{broken_function}#define ETH_HLEN"))
    broken = Agent(cluster.a, ["--hostname-override", "node-a", "--manifests", str(cluster.manifests)])
    broken.start(wait=False, cwd=tmp_path)
    assert broken.process is not None
    answers = set()
    while broken.process.poll() is None:
        with suppress(OSError, IndexError):
            answers.add(broken.http("/livez")[0])
        time.sleep(0.02)
    assert broken.process.returncode == 1
    assert "programmed all Services" in broken.text
    assert answers == {503}, "an agent without attached programs says that it is healthy"
    assert "does not compile" in broken.text
    assert "use of undeclared identifier 'one'" in broken.text
    assert program_ids(cluster.a) == before
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}


def test_connections_follow_removed_and_added_backends(cluster: TwoNodeCluster, agent: Agent) -> None:
    cluster.write_web(cluster.w2)
    until(
        lambda: set(cluster.client.call(clients.spread_tcp, IP, 80, 10)) == {"w2"},
        "the removed backend w1 still gets connections",
    )
    cluster.write_web(cluster.w1, cluster.w2)
    until(
        lambda: len(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == 2,
        "the added backend w1 gets no connections",
    )


def test_scaling_to_zero_refuses_connections_and_scaling_up_serves_them(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    cluster.write_web()
    until(
        lambda: cluster.client.call(clients.connect_error, IP, 80) == "ECONNREFUSED",
        "connections are still accepted",
    )
    cluster.write_web(cluster.w1)
    until(
        lambda: cluster.client.call(clients.connect_error, IP, 80) == "connected",
        "connections are still refused",
    )


def test_endpoint_changes_under_load_lose_no_connection(cluster: TwoNodeCluster, agent: Agent) -> None:
    """Slot ranges and backend ids are reused often; no connection may fail or reach a wrong backend.

    Endpoints are removed without terminating first; with ``--stale-tcp never`` their connections persist.
    """
    agent.stop()
    keeps_stale = cluster.agent("--stale-tcp", "never").start()
    with connection_load.running(cluster.client, IP, 80) as clients_load:
        for n in range(60):
            cluster.write_web(*((cluster.w1,), (cluster.w1, cluster.w2), (cluster.w2,))[n % 3])
            time.sleep(0.02)
    keeps_stale.stop()
    assert clients_load.result["errors"] == []


def test_invalid_manifest_keeps_its_last_valid_state(cluster: TwoNodeCluster, agent: Agent) -> None:
    path = cluster.manifests / "web.yaml"
    good = path.read_text()
    path.write_text(good.replace("port: 80\n", "port: eighty\n"))
    agent.wait_log("cannot read manifest")
    assert "web.yaml" in agent.text
    assert "spec.ports[0].port: Expected `int`, got `str`" in agent.text
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    path.write_text(good)
    agent.wait_log("manifest is valid again")


def test_node_port_is_served_at_an_address_added_to_the_node(cluster: TwoNodeCluster, agent: Agent) -> None:
    cluster.a.run(["ip", "address", "add", "172.18.0.99/24", "dev", "eth0"])
    until(
        lambda: cluster.client.call(clients.connect_error, "172.18.0.99", 30080) == "connected",
        "the NodePort is not served at the new address",
    )
    cluster.a.run(["ip", "address", "del", "172.18.0.99/24", "dev", "eth0"])
    until(
        lambda: cluster.client.call(clients.connect_error, "172.18.0.99", 30080, 0.2) != "connected",
        "the NodePort is still served at a removed address",
    )


def test_agents_of_two_nodes_are_independent(cluster: TwoNodeCluster, agent: Agent) -> None:
    folder = cluster.lab.folder / "other"
    manifests.write(
        folder / "web.yaml",
        manifests.service("web", clusterIPs=[IP]),
        manifests.slice_of("web", [manifests.endpoint(cluster.w1.address, "node-a")]),
    )
    other = cluster.b.agent(manifests=folder).start()
    on_b = cluster.b.pod("client-b")
    assert set(on_b.call(clients.spread_tcp, IP, 80, 20)) == {"w1"}
    other.stop()
    cluster.b.cli("cleanup")
    assert on_b.call(clients.connect_error, IP, 80, 0.3) != "connected"
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}


def test_programs_are_attached_to_a_recreated_cgroup(cluster: TwoNodeCluster, agent: Agent) -> None:
    """Links are detached with their cgroup; the next start creates new ones."""
    spare = cluster.a.cgroup.parent / "spare"
    spare.mkdir()
    agent.stop()
    moved = cluster.agent("--cgroup-root", str(spare)).start()
    assert "connect4 moved" in moved.text
    moved.stop()
    spare.rmdir()
    pins = pin_folder(cluster.a.bpf_root)
    until(lambda: not any(a.alive for a in attachments(pins)), "links of a removed cgroup are still attached")
    back = cluster.agent().start()
    assert "connect4 moved" in back.text
    assert set(cluster.client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    back.stop()


def test_service_list_prints_the_documented_json(cluster: TwoNodeCluster, agent: Agent) -> None:
    rows: list[dict[str, Any]] = json.loads(cluster.a.cli("service", "list", "-o", "json"))
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
        {"address": f"{cluster.w1.address}:8080", "state": "active"},
        {"address": f"{cluster.w2.address}:8080", "state": "active"},
    ]
    one = json.loads(cluster.a.cli("service", "get", "shop/web", "-o", "json"))
    assert one == [row for row in rows if row["name"] == "web"]


def test_service_list_shows_terminating_backends(cluster: TwoNodeCluster, agent: Agent) -> None:
    """A backend is terminating if it is in every Service that has it; only one has this."""
    path = cluster.manifests / "leaving.yaml"
    leaving = manifests.endpoint(cluster.w1.address, "node-a", ready=False, terminating=True)
    manifests.write(
        path,
        manifests.service("leaving", clusterIPs=["10.96.0.50"]),
        manifests.slice_of("leaving", [leaving], ports=[{"name": "http", "port": 9000}]),
    )

    def backends() -> list[dict[str, str]]:
        rows = json.loads(cluster.a.cli("service", "list", "-o", "json"))
        return [b for row in rows if row["name"] == "leaving" for b in row["backends"]]

    expected = {"address": f"{cluster.w1.address}:9000", "state": "terminating"}
    until(lambda: backends() == [expected] * 2, "the backend is not listed as terminating")
    assert set(cluster.client.call(clients.spread_tcp, "10.96.0.50", 80, 5)) == {"w1"}, (
        "a terminating endpoint serves if there is no ready one"
    )
    path.unlink()
