"""``ebpfproxy top`` on a node with real connections: its numbers, its screen, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS
from tests.lab import Agent, Lab, clients
from tests.lab.terminal import Terminal
from tests.lab.waiting import until

pytestmark = pytest.mark.root

WEB = SERVICE_IPS["v4"]
Found = dict[str, Any]
_COMMAND = ["top", "--interval", "200ms"]
_PROGRAM = [sys.executable, "-m", "ebpfproxy", *_COMMAND]


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        yield OutsideClientCluster(lab)


@pytest.fixture(scope="module", autouse=True)
def agent(cluster: OutsideClientCluster) -> Agent:
    return cluster.agent().start()


class Lines:
    """A running ``ebpfproxy top -o json``. Its first line says that it has begun to count."""

    def __init__(self, cluster: OutsideClientCluster, *arguments: str) -> None:
        command = [*_COMMAND, "-o", "json", "--bpf-root", str(cluster.a.bpf_root), *arguments]
        self.process = cluster.a.start_command(command, stdout=-1, stderr=-1)
        self.seen: list[Found] = [self.next()]

    def next(self) -> Found:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        found: Found = json.loads(line)
        return found

    def until(self, condition: Callable[[Found], bool]) -> Found:
        """Reads on, to the first line of this kind."""
        for _ in range(100):
            self.seen.append(self.next())
            if condition(self.seen[-1]):
                return self.seen[-1]
        raise AssertionError(f"not seen in 100 lines; the last is {self.seen[-1]}")

    def sum(self, service: str, name: str) -> int:
        """How often something has happened, by the rates of all lines."""
        total: float = sum(row_of(each, service)[name] * each["seconds"] for each in self.seen)
        return round(total)

    def end(self) -> tuple[int, bytes]:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=30)
        return self.process.wait(), errors


def row_of(found: Found, service: str, port: str = "http") -> Found:
    (row,) = (row for row in found["rows"] if (row["service"], row["port"]) == (service, port))
    return dict(row)


@pytest.fixture
def top(cluster: OutsideClientCluster) -> Iterator[Lines]:
    lines = Lines(cluster)
    yield lines
    assert lines.end() == (0, b"")


def test_connections_of_both_families_are_counted(cluster: OutsideClientCluster, top: Lines) -> None:
    before = row_of(top.seen[0], "web")
    names = cluster.client.call(clients.spread_tcp, WEB, 80, 12)
    names += cluster.client.call(clients.spread_tcp, SERVICE_IPS["v6"], 80, 8)
    found = row_of(
        top.until(lambda now: row_of(now, "web")["connections"] >= before["connections"] + 20), "web"
    )
    assert found["connections"] == before["connections"] + 20
    assert top.sum("web", "connections_per_second") == 20
    assert found["endpoints"] == 4, "two pods with two addresses"
    assert len(found["backends"]) == 3, "the busiest"
    assert names.total() == 20


def test_backends_have_their_share(cluster: OutsideClientCluster) -> None:
    lines = Lines(cluster, "--backends", "1", "--service", "shop/second")
    (before,) = row_of(lines.seen[0], "second")["backends"]
    assert before["address"] == f"{cluster.w1.address}:8080"
    assert before["shared"], "web has it, too"
    cluster.client.call(clients.spread_tcp, "10.96.0.40", 80, 5)

    def has_all(now: Found) -> bool:
        (backend,) = row_of(now, "second")["backends"]
        return bool(backend["connections"] == before["connections"] + 5)

    lines.until(has_all)
    assert lines.sum("second", "connections_per_second") == 5
    assert {row["service"] for row in lines.seen[-1]["rows"]} == {"second"}
    assert lines.end() == (0, b"")


def test_open_connections_are_counted_until_they_end(cluster: OutsideClientCluster, top: Lines) -> None:
    held = HeldConnection(cluster.client, WEB, 80)
    row = row_of(top.until(lambda now: row_of(now, "web")["open"] >= 1), "web")
    assert sum(each["open"] for each in row["backends"]) == row["open"]
    held.process.kill()
    top.until(lambda now: row_of(now, "web")["open"] == 0)


def test_flows_of_packets_are_counted(cluster: OutsideClientCluster, top: Lines) -> None:
    before = row_of(top.seen[0], "web")["connections"]
    cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, 4)
    top.until(lambda now: row_of(now, "web")["connections"] == before + 4)


def test_refused_and_dropped_ones_are_counted_and_named(cluster: OutsideClientCluster, top: Lines) -> None:
    for _ in range(3):
        assert cluster.client.call(clients.connect_error, "10.96.0.20", 80) == "ECONNREFUSED"
    assert cluster.client.call(clients.connect_error, "10.96.0.30", 80) == "EHOSTUNREACH"
    found = top.until(
        lambda now: (
            (row_of(now, "empty")["recently_refused"], row_of(now, "elsewhere")["recently_dropped"]) == (3, 1)
        )
    )
    assert [row["service"] for row in found["trouble"]] == ["empty", "elsewhere"]
    assert top.sum("empty", "refused_per_second") == 3
    assert top.sum("elsewhere", "dropped_per_second") == 1
    assert row_of(found, "empty")["endpoints"] == 0


def test_packets_that_no_service_counts_are_named(cluster: OutsideClientCluster, top: Lines) -> None:
    cluster.outside.call(clients.connect_error, WEB, 81, 0.5)
    found = top.until(lambda now: bool(now["packets"]))
    assert {(row["action"], row["reason"]) for row in found["packets"]} == {("rejected", "no-such-port")}


def test_once_prints_a_table_and_exits(cluster: OutsideClientCluster) -> None:
    said = cluster.a.cli("top", "--once", "--interval", "100ms", "--rows", "2", "--sort", "name").splitlines()
    assert "of 8 service ports active" in said[0]
    (head,) = (n for n, line in enumerate(said) if line.startswith("SERVICE "))
    assert [line.split()[0] for line in said[head + 1 :] if line.startswith("shop/")] == [
        "shop/elsewhere:http",
        "shop/elsewhere:udp",
    ]
    found = json.loads(cluster.a.cli("top", "--once", "--interval", "100ms", "-o", "json", "-n", "none"))
    assert (found["rows"], found["services"]) == ([], 0)


def test_json_needs_no_library_of_screens(cluster: OutsideClientCluster) -> None:
    script = (
        "import sys\n"
        "from ebpfproxy.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit('rich' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "top", "--once", "-i", "100ms", "-o", "json"]
    done = subprocess.run([*command, "--bpf-root", str(cluster.a.bpf_root)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["services"] == 8


def test_a_reader_that_has_read_enough_is_no_error(cluster: OutsideClientCluster) -> None:
    """As in ``| head -1``."""
    lines = Lines(cluster)
    assert lines.process.stdout is not None and lines.process.stderr is not None
    lines.process.stdout.close()
    assert lines.process.wait() == 0
    assert lines.process.stderr.read() == b""


# -- the screen


def terminal(cluster: OutsideClientCluster, *arguments: str, columns: int = 100, rows: int = 30) -> Terminal:
    command = [*_PROGRAM, "--bpf-root", str(cluster.a.bpf_root), *arguments]
    return Terminal(command, columns=columns, rows=rows)


def test_the_screen_shows_connections_and_refusals_as_they_happen(cluster: OutsideClientCluster) -> None:
    with terminal(cluster) as screen:
        screen.wait_for("of 8 service ports active")
        held = HeldConnection(cluster.client, WEB, 80)
        page = screen.wait_for(f"{cluster.w1.address}:8080/TCP")
        assert any(line.startswith("shop/web:http") for line in page)
        cluster.client.call(clients.connect_error, "10.96.0.20", 80)
        screen.wait_for("in all: shop/empty:http 1")
        held.process.kill()
        screen.type("q")
        assert screen.wait() == 0
        assert screen.is_restored


def test_keys_change_order_and_rows(cluster: OutsideClientCluster) -> None:
    held = HeldConnection(cluster.client, WEB, 80)
    with terminal(cluster) as screen:
        screen.wait_for("NEW/S↓")
        screen.wait_for(":8080/TCP")
        screen.type("s")
        screen.wait_for("OPEN↓")
        screen.type("b")
        until(lambda: not any(":8080/TCP" in line for line in screen.page))
        screen.type("xyz\x1b[A")
        screen.type("s")
        screen.wait_for("REFUSED/S↓")
        screen.type("Q")
        assert screen.wait() == 0
        assert screen.is_restored
    held.process.kill()


@pytest.mark.parametrize("how", ["key", "SIGINT", "SIGTERM"])
def test_it_ends_cleanly_when_it_is_interrupted(cluster: OutsideClientCluster, how: str) -> None:
    with terminal(cluster) as screen:
        screen.wait_for("service ports active")
        if how == "key":
            screen.interrupt()
        else:
            screen.kill(signal.Signals[how])
        assert screen.wait() == 0
        assert screen.is_restored
        assert b"Traceback" not in screen.output


def test_a_terminal_may_be_small_and_change(cluster: OutsideClientCluster) -> None:
    with terminal(cluster, columns=30, rows=6) as screen:
        page = screen.wait_for("SERVICE")
        assert max(map(len, page)) <= 30
        assert "OPEN" not in "".join(page)
        screen.resize(120, 40)
        screen.wait_for("BACKENDS")
        screen.resize(8, 2)
        until(lambda: max(map(len, screen.page)) <= 8)
        screen.type("q")
        assert screen.wait() == 0


def test_a_terminal_that_can_show_no_screen_gets_lines(cluster: OutsideClientCluster) -> None:
    command = [*_PROGRAM, "--bpf-root", str(cluster.a.bpf_root)]
    with Terminal(command, env={"TERM": "dumb"}) as screen:
        until(lambda: screen.page and screen.output.count(b"service ports active") >= 2)
        assert b"\x1b" not in screen.output
        screen.interrupt()
        assert screen.wait() == 0


def test_it_works_without_an_agent(cluster: OutsideClientCluster, agent: Agent) -> None:
    """Programs go on counting. The order of tests does not matter: the agent is started again."""
    agent.stop()
    lines = Lines(cluster)
    before = row_of(lines.seen[0], "web")["connections"]
    cluster.client.call(clients.spread_tcp, WEB, 80, 2)
    lines.until(lambda now: row_of(now, "web")["connections"] == before + 2)
    agent.start()
    assert lines.end() == (0, b"")


def test_it_follows_an_agent_that_makes_other_maps(cluster: OutsideClientCluster, agent: Agent) -> None:
    """With other sizes programs count elsewhere: it begins anew there."""
    lines = Lines(cluster)
    agent.stop()
    other = cluster.agent("--max-backends", "2048").start()
    cluster.client.call(clients.spread_tcp, WEB, 80, 2)
    lines.until(lambda now: row_of(now, "web")["connections"] == 2)
    assert lines.end() == (0, b"")
    other.stop()
    agent.start()
