"""``kubectl ebpfproxy``: the agents' commands, run on lab nodes by a stand-in API server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ebpfproxy.cli import kubectl
from tests.apiserver import ApiServer
from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.lab import Lab, clients
from tests.lab.interrupts import take_interrupts
from tests.lab.terminal import Terminal
from tests.lab.waiting import until
from tests.operator.agent_pods import agent_pod, serving

WEB = SERVICE_IPS["v4"]
_PLUGIN = [sys.executable, "-c", "from ebpfproxy.cli.kubectl import main; main()"]


class Cluster(TwoNodeCluster):
    """Two nodes with agents, and their API server."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        for node in (self.a, self.b):
            node.agent(manifests=self.manifests).start()
        self.api: ApiServer
        self.kubeconfig: Path

    def call(self, *arguments: str) -> Result:
        """Runs the plugin in this process."""
        before = signal.getsignal(signal.SIGTERM)
        try:
            return CliRunner().invoke(kubectl.main, [*arguments, "--kubeconfig", str(self.kubeconfig)])
        finally:
            signal.signal(signal.SIGTERM, before)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts the plugin, and waits until its commands in pods trace."""
        process = subprocess.Popen(
            [*_PLUGIN, *arguments],
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
            stdout=-1,
            stderr=-1,
            text=True,
            preexec_fn=take_interrupts,
        )
        assert process.stderr is not None
        names = ["node-a  ", "node-b  "] if "--all-nodes" in arguments else [""]
        said = sorted(process.stderr.readline() for _ in names)
        assert said == [f"{name}tracing\n" for name in names], said
        return process

    def terminal(self, *arguments: str) -> Terminal:
        """The plugin in a terminal."""
        return Terminal([*_PLUGIN, *arguments], env={"KUBECONFIG": str(self.kubeconfig)})

    def last_code(self) -> int | None:
        """The exit code of the last command in a pod, None while it runs."""
        return self.api.containers.calls[-1][1].poll()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        made = Cluster(lab)
        with serving([made.a, made.b], lab.folder) as (made.api, made.kubeconfig):
            yield made


def test_the_wheel_installs_the_program_under_the_name_that_kubectl_looks_for() -> None:
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["kubectl-ebpfproxy"] == f"{kubectl.__name__}:main"


@pytest.mark.root
def test_explain_runs_on_the_node_of_the_pod_that_it_names(cluster: Cluster) -> None:
    done = cluster.call("explain", "shop/client", "web:http", "-o", "json")
    assert done.exit_code == 0, done.output
    assert {each["client"] for each in json.loads(done.stdout)["explanations"]} == {"shop/client"}
    done = cluster.call("explain", cluster.w2.address, "shop/empty:http")
    assert done.exit_code == 1, "the command's exit code is the plugin's"
    assert done.stdout.startswith("shop/w2 → shop/empty:http 10.96.0.20:80/TCP  DOES NOT WORK: ECONNREFUSED")
    pods = [call.pod for call, _ in cluster.api.containers.calls[-2:]]
    assert pods == ["ebpfproxy-node-a", "ebpfproxy-node-b"]


@pytest.mark.root
def test_status_and_check_run_on_the_node_that_is_named(cluster: Cluster) -> None:
    done = cluster.call("status", "--node", "node-b", "-o", "json")
    assert json.loads(done.stdout)["agent"]["node"] == "node-b"
    done = cluster.call("check", "--node", "node-a")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "everything is as it should be")


@pytest.mark.root
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("status",), 1, "name a --node; agents are on node-a, node-b"),
        (("status", "--node", "node-c"), 1, "--node node-c: no pod of the agent is there"),
        (("status", "--node", "node-a", "--output", "xml"), 2, "'xml' is not one of"),
        (("status", "--all-nodes"), 2, "No such option '--all-nodes'"),
        (("trace", "--all-nodes", "--node", "node-a"), 2, "exclude each other"),
        (("top",), 1, "name a --node; agents are on node-a, node-b"),
        (("top", "--node", "node-a", "--sort", "size"), 2, "'size' is not one of"),
        (("explain", "shop/nobody", "web:http"), 2, "no pod shop/nobody is on any node"),
        (("explain", "203.0.113.7", "web:http"), 2, "name a --node for other clients"),
        (("status", "--daemonset", "kube-system/other"), 1, "there is no pod of DaemonSet kube-system/other"),
        (("check",), 2, "name a --node; agents are on node-a, node-b"),
        (("status", "--daemonset", "other"), 1, "is not NAMESPACE/NAME"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    cluster: Cluster, words: tuple[str, ...], code: int, said: str
) -> None:
    started = len(cluster.api.containers.calls)
    done = cluster.call(*words)
    assert done.exit_code == code
    assert said in done.stderr.splitlines()[-1]
    assert len(cluster.api.containers.calls) == started


@pytest.mark.root
def test_refusals_of_the_api_server_are_shown(cluster: Cluster) -> None:
    cluster.api.denied.add("create pods/exec")
    done = cluster.call("status", "--node", "node-a")
    cluster.api.denied.clear()
    assert done.stderr == (
        'Error: node-a: Pod kube-system/ebpfproxy-node-a: 403 Forbidden: pods "ebpfproxy-node-a" is forbidden: User "test"'
        ' cannot create resource "pods/exec"\n'
    )
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}
    broken = {"phase": "Pending", "containerStatuses": [{"name": "ebpfproxy", "state": waiting}]}
    cluster.api.cluster.put(agent_pod(cluster.a, **broken))
    done = cluster.call("status", "--node", "node-a")
    cluster.api.cluster.put(agent_pod(cluster.a))
    assert 'container not found ("ebpfproxy")' in done.stderr
    assert "(container ebpfproxy: CrashLoopBackOff: back-off 5m0s)" in done.stderr


@pytest.mark.root
def test_trace_knows_a_pod_by_its_address_and_ends_in_its_node(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pod is no endpoint, so that the agent does not know its name. Nobody else ends the command: the container
    runtime lets it run on when its connection is gone.

    A server before 1.30 does not know how to close standard input alone.
    """
    monkeypatch.setattr(cluster.api.containers, "protocols", ["v4.channel.k8s.io"])
    tracing = cluster.start("trace", "--pod", "shop/client")
    cluster.w1.call(clients.ask_tcp, "10.96.0.40", 80)
    cluster.client.call(clients.ask_tcp, WEB, 80)
    assert tracing.stdout is not None
    assert "shop/web:http 10.96.0.10:80 ⇒ " in tracing.stdout.readline()
    call, _ = cluster.api.containers.calls[-1]
    assert (call.pod, call.command[-2:]) == ("ebpfproxy-node-a", ["--pod", cluster.client.address])
    tracing.send_signal(signal.SIGINT)
    out, errors = tracing.communicate(timeout=30)
    assert (tracing.returncode, out, errors) == (0, "", "")
    until(lambda: cluster.last_code() == 0)


@pytest.mark.root
def test_lost_connection_ends_both_sides(cluster: Cluster) -> None:
    tracing = cluster.start("trace", "--node", "node-a")
    cluster.api.drop_connections()
    _, errors = tracing.communicate(timeout=30)
    assert (tracing.returncode, errors) == (1, "Error: node-a: the connection was lost\n")
    until(lambda: cluster.last_code() == 0)


@pytest.mark.root
def test_traces_of_all_nodes_are_merged_with_their_names(cluster: Cluster) -> None:
    tracing = cluster.start("trace", "--all-nodes", "-o", "json")
    cluster.client.call(clients.ask_tcp, WEB, 80)
    cluster.w2.call(clients.connect_error, "10.96.0.20", 80)
    assert tracing.stdout is not None
    rows = [json.loads(tracing.stdout.readline()) for _ in range(2)]
    assert {(row["node"], row["service"], row["kind"]) for row in rows} == {
        ("node-a", "web", "chosen"),
        ("node-b", "empty", "refused"),
    }
    tracing.send_signal(signal.SIGINT)
    _, errors = tracing.communicate(timeout=30)
    assert (tracing.returncode, errors) == (0, "")
    assert [process.poll() for _, process in cluster.api.containers.calls[-2:]] == [0, 0]


# -- top


@pytest.mark.root
def test_top_prints_what_the_command_in_the_pod_prints(cluster: Cluster) -> None:
    """Standard output is no terminal here."""
    words = ("--once", "--interval", "100ms", "-n", "shop")
    done = cluster.call("top", "--node", "node-b", *words)
    assert done.exit_code == 0, done.output
    assert "of 8 service ports active" in done.stdout
    done = cluster.call("top", "--all-nodes", *words, "-o", "json")
    assert sorted(json.loads(line)["node"] for line in done.stdout.splitlines()) == ["node-a", "node-b"]


@pytest.mark.root
def test_top_is_a_screen_of_this_terminal_with_numbers_of_the_pod(cluster: Cluster) -> None:
    with cluster.terminal("top", "--node", "node-b", "--interval", "200ms") as screen:
        assert "node-b" in screen.wait_for("of 8 service ports active")[0]
        call, _ = cluster.api.containers.calls[-1]
        assert call.pod == "ebpfproxy-node-b"
        cluster.w2.call(clients.connect_error, "10.96.0.20", 80)
        screen.wait_for("in all: shop/empty:http 1")
        screen.type("s")
        screen.wait_for("OPEN↓")
        screen.type("q")
        assert screen.wait() == 0
        assert screen.is_restored
    until(lambda: cluster.last_code() == 0)


@pytest.mark.root
def test_top_of_all_nodes_is_their_sum(cluster: Cluster) -> None:
    with cluster.terminal("top", "--all-nodes", "--interval", "200ms") as screen:
        screen.wait_for("2 of 2 nodes")
        for pod in (cluster.client, cluster.w2):
            pod.call(clients.connect_error, "10.96.0.20", 80)
        screen.wait_for("in all: shop/empty:http 2")
        screen.interrupt()
        assert screen.wait() == 0
        assert screen.is_restored
    until(lambda: [process.poll() for _, process in cluster.api.containers.calls[-2:]] == [0, 0])


@pytest.mark.root
def test_top_says_why_it_ends_once_the_screen_is_gone(cluster: Cluster) -> None:
    with cluster.terminal("top", "--node", "node-a") as screen:
        screen.wait_for("service ports active")
        cluster.api.drop_connections()
        assert screen.wait() == 1
        assert screen.is_restored
        assert screen.output.endswith(b"Error: node-a: the connection was lost\r\n")
