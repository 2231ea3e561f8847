"""The command as a process: its address, its end, and one trace for all who look, while there are any."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.traces import Trace, connect_again, programs
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import Agent, Lab, clients
from tests.lab.waiting import AT_ONCE, until
from tests.ui.server import Ui

pytestmark = pytest.mark.root

WEB = SERVICE_IPS["v4"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        yield OutsideClientCluster(lab)


@pytest.fixture(scope="module")
def agent(cluster: OutsideClientCluster) -> Agent:
    return cluster.agent().start()


@pytest.fixture(scope="module")
def plain(cluster: OutsideClientCluster, agent: Agent) -> dict[str, int | None]:
    """The programs while nobody looks."""
    return programs(cluster)


@pytest.fixture
def ui(cluster: OutsideClientCluster, agent: Agent, plain: dict[str, int | None]) -> Iterator[Ui]:
    made = Ui(cluster.a)
    yield made
    made.end()
    until(lambda: programs(cluster) == plain, "the programs that report stay")


def connect(cluster: OutsideClientCluster) -> None:
    """A decision of each sort: chosen, and refused."""
    cluster.client.call(clients.ask_tcp, WEB, 80)
    cluster.client.call(clients.connect_error, "10.96.0.20", 80)


# -- the trace


def test_decisions_are_shown_while_somebody_looks(
    cluster: OutsideClientCluster, ui: Ui, plain: dict[str, int | None]
) -> None:
    """Programs are replaced for the first who looks, and the usual ones come back after the last."""
    ui.get("/api/status")
    assert programs(cluster) == plain
    stream = ui.stream().wait_tracing()
    assert not set(programs(cluster).values()) & set(plain.values())
    connect(cluster)
    until(lambda: len(stream.lines()) == 2)
    chosen, refused = stream.lines()
    assert (chosen["service"], chosen["frontend"], chosen["good"]) == ("shop/web:http", f"{WEB}:80", True)
    assert chosen["client"] in (cluster.client.netns, "shop/client")
    assert chosen["outcome"].startswith("⇒ 10.244.")
    assert chosen["details"].startswith("1 of 2, random; ")
    assert (refused["service"], refused["good"]) == ("shop/empty:http", False)
    assert refused["outcome"] == "✗ refused: no-endpoint"
    stream.close()
    until(lambda: programs(cluster) == plain, "the programs that report stay")


def test_all_who_look_share_one_trace_and_each_has_its_own_filter(
    cluster: OutsideClientCluster, ui: Ui
) -> None:
    everything = ui.stream().wait_tracing()
    errors = ui.stream("?errors=1").wait_tracing()
    web = ui.stream("?namespace=shop&service=web").wait_tracing()
    reporting = programs(cluster)
    connect(cluster)
    until(lambda: len(everything.lines()) == 2 and len(errors.lines()) == 1 and len(web.lines()) == 1)
    assert [line["service"] for line in errors.lines()] == ["shop/empty:http"]
    assert [line["service"] for line in web.lines()] == ["shop/web:http"]
    everything.close()
    errors.close()
    connect(cluster)
    until(lambda: len(web.lines()) == 2)
    assert {line["service"] for line in web.lines()} == {"shop/web:http"}
    # Another who looks goes on with the same programs.
    again = ui.stream("?errors=1").wait_tracing()
    connect(cluster)
    until(lambda: len(again.lines()) == 1 and len(web.lines()) == 3)
    assert programs(cluster) == reporting


def test_the_page_waits_for_a_trace_of_the_command(cluster: OutsideClientCluster, ui: Ui) -> None:
    trace = Trace(cluster.a)
    stream = ui.stream()
    until(lambda: stream.states() and "another ebpfproxy trace runs" in stream.states()[-1]["text"])
    connect(cluster)
    assert len(trace.end()) == 2
    stream.wait_tracing()
    connect(cluster)
    until(lambda: len(stream.lines()) == 2)
    # And the command says that it is the page's turn.
    assert cluster.a.cli("trace", "--count", "1", check=False) == ""
    stream.close()


def test_an_agent_that_ends_is_said_and_the_next_one_is_followed(
    cluster: OutsideClientCluster, ui: Ui, agent: Agent
) -> None:
    stream = ui.stream().wait_tracing()
    agent.stop()
    until(lambda: not stream.is_tracing)
    assert "the agent has ended" in stream.states()[-1]["text"]
    late = ui.stream()
    until(late.states)
    agent.start()
    stream.wait_tracing()
    connect(cluster)
    until(lambda: len(stream.lines()) == 2 and len(late.lines()) == 2)


def test_without_an_agent_no_trace_begins(cluster: OutsideClientCluster, ui: Ui, agent: Agent) -> None:
    agent.stop()
    stream = ui.stream()
    until(lambda: stream.states() and "the agent is not running" in stream.states()[-1]["text"])
    agent.start()
    stream.wait_tracing()


def is_leased(cluster: OutsideClientCluster) -> bool:
    """Somebody traces, or waits for programs that report."""
    for folder in cluster.a.bpf_root.glob("ebpfproxy/v*/maps"):
        opened = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(opened)
    return False


def test_a_trace_ends_with_its_viewers_while_the_agent_hangs(
    cluster: OutsideClientCluster, ui: Ui, agent: Agent
) -> None:
    assert agent.process is not None
    until(lambda: not is_leased(cluster))
    agent.process.send_signal(signal.SIGSTOP)
    try:
        stream = ui.stream()
        until(lambda: stream.states() and "waiting for programs" in stream.states()[-1]["text"])
        until(lambda: is_leased(cluster))
        stream.close()
        # The agent may take a minute for its programs.
        until(lambda: not is_leased(cluster), seconds=AT_ONCE)
    finally:
        agent.process.send_signal(signal.SIGCONT)


def test_more_than_a_page_has_lines_for_is_counted(cluster: OutsideClientCluster, ui: Ui) -> None:
    """Whatever the rate, no decision is missed silently."""
    stream = ui.stream().wait_tracing()
    cluster.client.call(connect_again, WEB, 53, 5000)

    def told() -> int:
        lost = [event.data for event in stream.poll() if event.name == "lost"]
        return len(stream.lines()) + sum(sum(each.values()) for each in lost)

    until(lambda: told() == 5000, f"{told()} are known of")


# -- the process


def test_a_stream_does_not_keep_the_command_from_ending(
    cluster: OutsideClientCluster, agent: Agent, plain: dict[str, int | None]
) -> None:
    ui = Ui(cluster.a)
    stream = ui.stream().wait_tracing()
    assert ui.end() == (0, "")
    stream.poll()
    assert stream.ended
    until(lambda: programs(cluster) == plain, "the programs that report stay")


def test_a_killed_page_leaves_plain_programs(
    cluster: OutsideClientCluster, agent: Agent, plain: dict[str, int | None]
) -> None:
    ui = Ui(cluster.a)
    ui.stream().wait_tracing()
    ui.process.kill()
    until(lambda: programs(cluster) == plain, "the programs that report stay")


def test_it_ends_with_its_input(cluster: OutsideClientCluster, agent: Agent) -> None:
    """As with `kubectl exec -i`, whose container goes on when the connection is gone."""
    ui = Ui(cluster.a, "--end-with-input", stdin=-1)
    stdin = ui.process.stdin
    assert stdin is not None
    assert ui.get("/")[0] == 200
    stdin.close()
    assert ui.process.wait(30) == 0


def test_each_run_has_a_key_of_its_own(cluster: OutsideClientCluster, ui: Ui) -> None:
    other = Ui(cluster.a)
    assert other.key != ui.key
    assert json.loads(ui.get("/api/clients")[1])[0] == "host"
    status, _ = ui.get("/api/clients", Authorization=f"Bearer {other.key}")
    assert status == 401
    assert ui.get("/api/clients", Host="evil.example")[0] == 421
    other.end()


def test_only_loopback_is_listened_at(cluster: OutsideClientCluster, ui: Ui) -> None:
    listening = cluster.a.run(["ss", "-Hltn", f"sport = :{ui.port}"]).split()
    assert f"127.0.0.1:{ui.port}" in listening
    assert cluster.client.call(clients.connect_error, cluster.a.address, ui.port) == "ECONNREFUSED"


def _run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)


def test_without_its_libraries_one_line_says_what_to_install() -> None:
    """As in an image without them: an import of them fails."""
    script = (
        "from importlib.machinery import PathFinder\n"
        "found = PathFinder.find_spec\n"
        "PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None: None "
        "if name.partition('.')[0] in ('starlette', 'uvicorn') else found(name, path, target))\n"
        "from ebpfproxy.cli import main\n"
        "main(['ui'], prog_name='ebpfproxy')\n"
    )
    done = _run("-c", script)
    assert done.returncode == 1
    assert done.stderr == "Error: ui needs starlette and uvicorn: pip install 'ebpfproxy[ui]'\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--listen", "nowhere"), "'nowhere' is not ADDRESS:PORT"),
        (("--listen", "localhost:80"), "'localhost:80' is not ADDRESS:PORT"),
        (("--listen", "::1:80"), "'::1:80' is not ADDRESS:PORT"),
        (("--listen", "127.0.0.1:http"), "'http' is no port"),
        (("--listen", "127.0.0.1:65536"), "'65536' is no port"),
        (("--listen", f"127.0.0.1:{'1' * 5000}"), "is no port"),
        (("--bpf-root", "/nowhere"), "nothing is pinned below /nowhere"),
    ],
)
def test_what_cannot_be_served_is_said(words: tuple[str, ...], said: str) -> None:
    done = _run("-m", "ebpfproxy", "ui", *words)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(cluster: OutsideClientCluster, ui: Ui) -> None:
    words = ["ui", "--listen", f"127.0.0.1:{ui.port}"]
    with pytest.raises(RuntimeError, match="Address already in use"):
        cluster.a.cli(*words)
