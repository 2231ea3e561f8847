"""The lab: connectivity, namespaces and cgroups of processes, and removal of everything at the end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyroute2 import netns

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.kernel.roots import find_cgroup_root
from tests.lab import Lab, Pod, clients, servers
from tests.lab.interrupts import take_interrupts
from tests.lab.lab import clean_dead_labs
from tests.lab.processes import read_line
from tests.lab.spaces import Space

pytestmark = pytest.mark.root

PORT = 8080


class Cluster:
    """One node with a client and a server pod, and one with a server pod."""

    def __init__(self, lab: Lab) -> None:
        self.a = lab.node("node-a")
        self.b = lab.node("node-b")
        self.client = self.a.pod("client")
        self.here = self.a.pod("here")
        self.there = self.b.pod("there")
        for pod in (self.here, self.there):
            servers.start(pod, pod.name, PORT)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        yield Cluster(lab)


@pytest.mark.parametrize("ask", [clients.ask_tcp, clients.ask_udp])
@pytest.mark.parametrize("server", ["here", "there"])
def test_pod_reaches_pods_of_both_nodes_with_its_own_address(
    cluster: Cluster, server: str, ask: Callable[[str, int], dict[str, object]]
) -> None:
    pod: Pod = getattr(cluster, server)
    for address, mine in (
        (pod.address, cluster.client.address),
        (pod.address6, cluster.client.address6),
    ):
        reply = cluster.client.call(ask, address, PORT)
        assert (reply["name"], reply["peer"]) == (server, mine)


def test_node_reaches_pods_of_both_nodes(cluster: Cluster) -> None:
    for pod in (cluster.here, cluster.there):
        for address in (pod.address, pod.address6):
            assert cluster.a.call(clients.ask_tcp, address, PORT)["name"] == pod.name


def test_connect_to_a_closed_port_is_refused(cluster: Cluster) -> None:
    assert cluster.client.call(clients.connect_error, cluster.there.address, 9) == "ECONNREFUSED"


def _memberships() -> tuple[str, str]:
    found = Path("/proc/self/cgroup").read_text().splitlines()
    v2 = next(line.removeprefix("0::") for line in found if line.startswith("0::"))
    return v2, str(Path("/proc/self/ns/net").readlink())


def test_processes_are_in_the_cgroup_of_their_node_and_the_namespace_of_their_pod(cluster: Cluster) -> None:
    spaces: list[Space] = [cluster.client, cluster.a, cluster.there, cluster.b]
    seen = [space.call(_memberships) for space in spaces]
    for space, (cgroup, _) in zip(spaces, seen, strict=True):
        assert find_cgroup_root() / cgroup.lstrip("/") == space.cgroup
    assert len({namespace for _, namespace in [*seen, _memberships()]}) == 5
    assert cluster.client.run(["cat", "/proc/self/cgroup"]).count(cluster.a.cgroup.name) == 1


def test_a_program_without_cgroup_is_in_the_namespace_from_its_beginning(cluster: Cluster) -> None:
    process = cluster.client.popen(
        ["readlink", "/proc/self/ns/net"], join_cgroup=False, stdout=subprocess.PIPE
    )
    assert read_line(process) == cluster.client.call(_memberships)[1]


def test_a_program_that_does_not_exist_leaves_the_thread_in_its_namespace(cluster: Cluster) -> None:
    before = _memberships()
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        cluster.client.run(["no-such-program"])
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        cluster.client.popen(["no-such-program"], join_cgroup=False)
    assert _memberships() == before


def test_output_and_exit_code_of_a_program_are_its_own(cluster: Cluster) -> None:
    assert cluster.client.run(["printf", "%s|", "a b", "$0", "-n", ""]) == "a b|$0|-n||"
    with pytest.raises(RuntimeError, match=r"failed \(-15\)"):
        cluster.client.run(["sh", "-c", "kill -TERM $$"])
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.client.run(["sleep", "30"], timeout=0.2)


def test_ip_local_port_range_excludes_ports_of_the_agent(cluster: Cluster) -> None:
    for space in (cluster.a, cluster.client):
        first, _ = space.run(["sysctl", "-n", "net.ipv4.ip_local_port_range"]).split()
        assert int(first) > 10256


def test_call_returns_the_result_or_raises_the_exception(cluster: Cluster) -> None:
    assert cluster.client.call(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError) as caught:
        cluster.client.call(divmod, 7, 0)
    assert any("Traceback" in note for note in caught.value.__notes__)


class _UnpicklableError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("only one argument is kept")


def _raise_unpicklable() -> None:
    raise _UnpicklableError(1, 2)


def test_call_of_a_client_returns_the_result_or_raises_the_exception(cluster: Cluster) -> None:
    """Clients are called by the fork server."""
    pod = cluster.client
    replies = pod.call(clients.repeated, 2, clients.ask_tcp, cluster.there.address, PORT)
    assert [each["name"] for each in replies] == ["there"] * 2
    with pytest.raises(ConnectionRefusedError) as caught:
        pod.call(clients.ask_tcp, cluster.there.address, 9)
    assert any("Traceback" in note for note in caught.value.__notes__)
    with pytest.raises(TimeoutError, match=r"ask_tcp in .* longer than 0\.2 s"):
        pod.call(clients.ask_tcp, "10.244.1.250", PORT, 30.0, timeout=0.2)


def test_calls_of_clients_run_at_the_same_time(cluster: Cluster) -> None:
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(cluster.client.call, clients.connect_error, "10.244.1.250", PORT, 1.0)
        names = []
        while not waits.done():
            names.append(cluster.client.call(clients.ask_tcp, cluster.there.address, PORT)["name"])
    assert set(names) == {"there"}
    assert waits.result() in {"TimeoutError", "EHOSTUNREACH"}


@pytest.mark.parametrize("arguments", [["config", "defaults"], ["run", "--no-such-option"], ["status", "-h"]])
def test_a_command_that_is_forked_does_what_a_new_interpreter_does(
    cluster: Cluster, arguments: list[str]
) -> None:
    made = subprocess.run([sys.executable, "-m", "ebpfproxy", *arguments], capture_output=True, check=False)
    forked = cluster.a.start_command(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert forked.communicate(timeout=60) == (made.stdout, made.stderr)
    assert forked.returncode == made.returncode
    done = cluster.a.run_command(arguments)
    assert (done.code, done.output.encode(), done.errors.encode()) == (
        made.returncode,
        made.stdout,
        made.stderr,
    )


def test_a_command_that_is_forked_has_environment_and_folder_of_its_caller(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EBPFPROXY_PROXY_MODE", "no-such-mode")
    monkeypatch.chdir(tmp_path)
    forked = cluster.a.start_command(["run", "--write-config-to", "here"], stderr=subprocess.PIPE)
    assert b"no-such-mode" in forked.communicate(timeout=60)[1]
    monkeypatch.delenv("EBPFPROXY_PROXY_MODE")
    assert (
        cluster.a.start_command(["run", "--write-config-to", "here"], stdout=subprocess.DEVNULL).wait(60) == 0
    )
    assert (tmp_path / "here").exists()


def test_a_client_is_told_and_killed_as_a_program(cluster: Cluster) -> None:
    held = cluster.client.fork(clients.hold, cluster.there.address, PORT)
    other = cluster.client.fork(clients.hold, cluster.there.address, PORT)
    assert [read_line(each) for each in (held, other)] == ["ready"] * 2
    held.stdin.write(b"\n")
    held.stdin.flush()
    assert read_line(held) == "alive"
    assert held.poll() is None
    held.kill()
    assert (held.wait(), held.poll()) == (-signal.SIGKILL, -signal.SIGKILL)
    held.terminate()
    # Nothing but this process has the other end of the pipe.
    other.stdin.close()
    assert other.wait() == 0
    with pytest.raises(RuntimeError, match=r"'tests\.lab\.clients\.hold' ended with 1"):
        read_line(cluster.client.fork(clients.hold, cluster.there.address, 9))


_CALLS = """
import os, time
from tests.lab import Lab, clients
with Lab() as lab:
    lab.node("a").call(clients.connect_error, "127.0.0.1", 9)
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    print(*children, flush=True)
    time.sleep(300)
"""


def test_fork_server_exits_with_the_process_that_uses_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", _CALLS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        (server,) = process.stdout.readline().split()
        watched = os.pidfd_open(int(server))
        process.kill()
        process.wait(60)
    try:
        assert select.select([watched], [], [], 60)[0]
    finally:
        os.close(watched)
    clean_dead_labs()


def test_call_raises_the_reason_of_a_missing_result(cluster: Cluster) -> None:
    with pytest.raises(TimeoutError, match=r"sleep .* longer than 0\.2 s"):
        cluster.client.call(time.sleep, 30, timeout=0.2)
    with pytest.raises(RuntimeError, match="wait status 1792"):
        cluster.client.call(os._exit, 7)
    with pytest.raises(RuntimeError, match="_UnpicklableError: only one argument"):
        cluster.client.call(_raise_unpicklable)


def _terminate_itself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_signal_to_a_forked_child_does_not_end_the_lab_of_its_parent(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match="ended with wait status"):
        cluster.client.call(_terminate_itself)
    assert cluster.client.call(clients.ask_tcp, cluster.there.address, PORT)["name"] == "there"


def _traces(lab_id: str) -> list[str]:
    """The namespaces, folders and processes of a lab."""
    found = [name for name in netns.listnetns() if name.startswith(f"{lab_id}-")]
    homes = (find_cgroup_root(), BPFFS, Path(tempfile.gettempdir()))
    found += [str(p) for home in homes for p in home.glob(f"{lab_id}*")]
    for process in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"LAB={lab_id}".encode() in process.read_bytes().split(b"\0"):
                found.append(str(process))
        except OSError:
            continue
    return found


_LAB = """
import os, sys, time
from tests.lab import Lab
with Lab() as lab:
    os.environ["LAB"] = lab.id
    pod = lab.node("node-a").pod("pod")
    pod.popen(["sh", "-c", "setsid sleep 300 & sleep 300"])
    lab.node("node-b").popen(["sleep", "300"], join_cgroup=False)
    print(lab.id, flush=True)
    if sys.argv[1] == "raise":
        raise LookupError("something is wrong")
    time.sleep(300)
"""


def _start(how: str) -> tuple[subprocess.Popen[str], str]:
    """Starts a lab in another process, with a server that leaves a child process.

    SIGINT has its default handler there; it is ignored in background jobs of a shell and under nohup.
    """
    command = [sys.executable, "-c", _LAB, how]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=take_interrupts,
        )
        assert process.stdout is not None
        with process.stdout:
            lab_id = process.stdout.readline().strip()
        errors.seek(0)
        assert lab_id, errors.read()
    return process, lab_id


@pytest.mark.parametrize("how", ["raise", "SIGTERM", "SIGINT"])
def test_exit_by_exception_or_signal_removes_everything(how: str) -> None:
    process, lab_id = _start(how)
    if how != "raise":
        assert _traces(lab_id)
        process.send_signal(signal.Signals[how])
    assert process.wait(60) != 0
    assert _traces(lab_id) == []


def test_clean_dead_labs_removes_leftovers_of_killed_labs_only(cluster: Cluster) -> None:
    process, lab_id = _start("kill")
    process.kill()
    process.wait(60)
    assert _traces(lab_id)
    assert lab_id in clean_dead_labs()
    assert _traces(lab_id) == []
    assert cluster.client.call(clients.ask_tcp, cluster.there.address, PORT)["name"] == "there"


def test_buffered_output_is_not_duplicated_by_a_forked_child() -> None:
    script = 'from tests.lab import Lab\nwith Lab() as lab:\n    print("once")\n    lab.node("a").call(int)\n'
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert done.stdout == "once\n"


def test_many_processes_clean_at_once() -> None:
    """Workers of a run do when they begin."""
    process, lab_id = _start("kill")
    process.kill()
    process.wait(60)
    assert _traces(lab_id)
    cleaners = [subprocess.Popen([sys.executable, "-m", "tests.lab"]) for _ in range(4)]
    assert [each.wait(60) for each in cleaners] == [0] * 4
    assert _traces(lab_id) == []
