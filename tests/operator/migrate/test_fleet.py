"""Migration of many nodes: their order, skipped nodes, resuming after failures, and one-line errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from ebpfproxy.cli.migrate import command
from ebpfproxy.operator.image import Image
from ebpfproxy.operator.migrate.cluster import work_pod
from ebpfproxy.operator.migrate.cluster.fleet import State, brief_of, judge
from ebpfproxy.operator.migrate.cluster.jobs import Done, JobError
from ebpfproxy.operator.migrate.cluster.selection import Node, NodesError, choose
from ebpfproxy.operator.migrate.node.preflight import Brief
from tests.lab import waiting
from tests.operator.migrate import control_plane
from tests.operator.migrate.control_plane import ControlPlane, Item, node, serving
from tests.operator.migrate.scripted_fleet import (
    AFTER,
    BEFORE,
    NODES,
    Fleet,
    Scripted,
    ended,
    stuck,
    until_ready,
)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr("ebpfproxy.operator.waiting.API_SECONDS", 0.02)
    monkeypatch.setattr("ebpfproxy.kube.client._BACKOFF_FIRST", 0.02)
    kubelet = Scripted()
    plane = ControlPlane(kubelet, *NODES)
    plane.put(control_plane.kube_proxy())
    plane.put(control_plane.agent())
    with serving(plane) as url:
        made = Fleet(url, plane, kubelet, tmp_path)
        until_ready(plane)
        made.happened()
        yield made


# -- plan


def test_plan_inspects_all_nodes_and_changes_nothing(fleet: Fleet) -> None:
    output = fleet.good("plan", "--all-nodes")
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == ["NODE", "STATE", "KUBE-PROXY", "FRONTENDS", "EBPFPROXY", "MISSING", "FLOWS"]
    assert lines[1:4] == [[name, *["to", "do", "iptables", "20", "21", "0", "3"]] for name in NODES]
    assert "  node-a and 2 more: something" in output
    assert f"  {'kubectl'}" not in output
    assert "kubectl -n kube-system delete daemonset/kube-proxy configmap/kube-proxy" in output
    assert {method for method, _ in fleet.plane.requests} == {"POST", "DELETE"}
    waiting.until(lambda: not fleet.work_pods(), "a work pod is left")
    found = json.loads(fleet.good("plan", "--node", "node-b", "-o", "json"))
    assert [each["node"] for each in found["nodes"]] == ["node-b"]
    assert found["nodes"][0]["found"]["kube_proxy_frontends"] == 20
    assert json.loads(fleet.good("run", "--dry-run", "--node", "node-b", "-o", "json")) == found


def test_ten_nodes_are_inspected_at_once(fleet: Fleet) -> None:
    for i in range(25):
        fleet.plane.put(node(f"worker-{i}"))
    barrier = threading.Barrier(10, timeout=5)
    do = fleet.kubelet._do

    def together(where: str, *rest: Any) -> tuple[int, str]:
        if int(where.partition("-")[2] or "99", 36) < 10:
            barrier.wait()
        return do(where, *rest)

    fleet.kubelet._do = together  # type: ignore[method-assign, assignment]
    names = [f"--node=worker-{i}" for i in range(10)]
    fleet.good("plan", *names)
    assert fleet.kubelet.most == 10
    fleet.kubelet._do = do  # type: ignore[method-assign]
    fleet.good("plan", "--all-nodes")
    assert fleet.kubelet.most == 10


def test_plan_warns_of_an_owner_that_would_revert_the_daemon_set(fleet: Fleet) -> None:
    mine = control_plane.kube_proxy()
    mine["metadata"]["labels"] = {"kustomize.toolkit.fluxcd.io/name": "system"}
    fleet.plane.put(mine)
    config = {"kind": "ConfigMap", "metadata": {"namespace": "kube-system", "name": "kubeadm-config"}}
    fleet.plane.put({**config, "data": {"ClusterConfiguration": "kind: ClusterConfiguration"}})
    conf = {**config, "metadata": {"namespace": "kube-system", "name": "kube-proxy"}}
    fleet.plane.put(
        {**conf, "data": {"config.conf": "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: X\n"}}
    )
    output = fleet.good("plan", "--all-nodes")
    assert "DaemonSet kube-system/kube-proxy seems to be Flux's" in output
    assert "--skip-phases=addon/kube-proxy" in output
    assert "ConfigMap kube-system/kube-proxy" in output
    del fleet.plane.objects["DaemonSet"]["kube-system", "kube-proxy"]
    assert "there is no DaemonSet kube-system/kube-proxy" in fleet.call("plan", "--all-nodes").output


@pytest.mark.parametrize(
    ("found", "has_pod", "state", "words"),
    [
        (BEFORE, True, State.TODO, ""),
        (AFTER, False, State.DONE, ""),
        (msgspec.structs.replace(AFTER, flows=0), False, State.TODO, ""),
        (msgspec.structs.replace(AFTER, flows=0, kept=()), False, State.DONE, ""),
        (msgspec.structs.replace(AFTER, has_leftovers=True), False, State.TODO, ""),
        (msgspec.structs.replace(BEFORE, blockers=("no",)), True, State.BLOCKED, "no"),
        (msgspec.structs.replace(BEFORE, embedded="k3s"), False, State.BLOCKED, "k3s runs kube-proxy"),
        (BEFORE, False, State.BLOCKED, "kube-proxy, pid 7, is not of DaemonSet kube-system/kube-proxy"),
    ],
    ids=["before", "after", "keeper", "ended", "half", "blocked", "embedded", "static pod"],
)
def test_action_for_a_node(found: Brief, has_pod: bool, state: State, words: str) -> None:
    here = Node(name="a", ready=True, kube_proxy_off=False, agent_off=False)
    planned = judge(here, found, ["kube-proxy-1"] if has_pod else [])
    assert planned.state is state
    assert words in "".join(planned.blockers)
    assert bool(planned.blockers) == bool(words)


def test_log_without_a_plan_is_an_error() -> None:
    with pytest.raises(JobError, match="KeyError"):
        brief_of(Done(1, "Traceback\nKeyError: 1\n"))
    with pytest.raises(JobError, match="another version"):
        brief_of(Done(0, '{\n  "node": "a"\n}'))


# -- nodes


def test_workers_come_first_by_name_and_named_nodes_keep_their_order() -> None:
    control_plane = node("b")
    control_plane["metadata"]["labels"]["node-role.kubernetes.io/control-plane"] = ""
    windows = node("a")
    windows["metadata"]["labels"]["kubernetes.io/os"] = "windows"
    found = [control_plane, node("d"), node("c"), windows]
    assert [each.name for each in choose(found, [])] == ["c", "d", "b"]
    assert [each.name for each in choose(found, ["d", "b", "d"])] == ["d", "b"]
    with pytest.raises(NodesError, match="--node a: no such node with Linux"):
        choose(found, ["a"])
    with pytest.raises(NodesError, match="no node with Linux is selected"):
        choose([], [])


# -- run


def test_nodes_are_migrated_one_by_one(fleet: Fleet) -> None:
    output = fleet.good("run", "--all-nodes")
    assert fleet.happened()[3:] == [
        step for name in NODES for step in (f"{name}: plan", f"{name}: kube-proxy ends", f"{name}: run")
    ]
    assert fleet.plane.restarted == []
    assert all(fleet.plane.labels(name)["ebpfproxy.io/kube-proxy"] == "off" for name in NODES)
    lines = output.splitlines()
    assert lines[0].startswith("gave DaemonSet kube-system/kube-proxy an affinity against nodes")
    assert "node-b: labelled node node-b ebpfproxy.io/kube-proxy=off" in lines
    assert "node-b: removed 7 chains" in lines
    assert lines[-2] == "all 3 chosen nodes are without kube-proxy"
    assert lines[-1].startswith("left to you, once no node is to go back: kubectl")
    waiting.until(lambda: not fleet.work_pods(), "a work pod is left")

    assert fleet.good("run", "--all-nodes").splitlines()[:3] == [f"{name}: done already" for name in NODES]
    assert fleet.happened() == unordered([f"{name}: plan" for name in NODES])


class unordered(list[str]):  # noqa: N801 - reads as an expression
    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and sorted(self) == sorted(other)

    __hash__ = None


def test_canary_changes_no_other_node(fleet: Fleet) -> None:
    output = fleet.good("run", "--node", "node-c")
    assert {line.partition(":")[0] for line in fleet.happened()} == {"node-c"}
    assert "left to you" not in output
    assert fleet.plane.restarted == []


def test_selector_selects_nodes(fleet: Fleet) -> None:
    fleet.plane.put(node("node-b", pool="x"))
    assert "all 1 chosen nodes" in fleet.good("run", "-l", "pool=x")
    assert {line.partition(":")[0] for line in fleet.happened()} == {"node-b"}


def test_parallel_option_migrates_several_nodes_at_once(fleet: Fleet) -> None:
    fleet.good("run", "--all-nodes", "--parallel", "3")
    assert [line for line in fleet.happened() if line.endswith("run")] == unordered(
        [f"{name}: run" for name in NODES]
    )


def test_blocked_node_stops_the_run_unless_it_is_skipped(fleet: Fleet) -> None:
    blocked = msgspec.structs.replace(BEFORE, blockers=("Cilium is here", "and more"))
    fleet.kubelet.instead["node-b", "plan"] = (1, msgspec.json.format(msgspec.json.encode(blocked)).decode())
    output = fleet.bad("run", "--all-nodes")
    assert "node-b: blocked: Cilium is here; and more" in output
    assert "Error: 1 of 3 nodes are blocked: nothing was changed." in output
    assert {method for method, _ in fleet.plane.requests} == {"POST", "DELETE"}
    fleet.happened()
    output = fleet.bad("run", "--all-nodes", "--skip-blocked")
    assert "Error: 1 nodes were left unchanged: see above" in output
    assert [line for line in fleet.happened() if line.endswith("run")] == ["node-a: run", "node-c: run"]
    output = fleet.bad("plan", "--all-nodes")
    assert "BLOCKERS\n  node-b: Cilium is here\n  node-b: and more\n" in output


def test_node_that_is_not_ready_is_reported_and_skipped(fleet: Fleet) -> None:
    fleet.plane.put(node("node-b", ready=False))
    output = fleet.bad("run", "--all-nodes")
    assert "node-b: not ready: the node is not Ready" in output
    assert not any(line.startswith("node-b") for line in fleet.happened())
    assert len(fleet.plane.pods("kube-proxy", "node-b")) == 1
    output = fleet.bad("rollback", "--all-nodes")
    assert "node-b: not ready: left unchanged" in output


def test_run_stops_at_the_first_failure_and_resumes_when_repeated(fleet: Fleet) -> None:
    fleet.kubelet.instead["node-b", "run"] = (1, "made a table\nError: nft: no such thing\n")
    output = fleet.bad("run", "--all-nodes")
    assert (
        "Error: node-b: nft: no such thing. kube-proxy is stopped there, and the agent serves what it served:"
        " call this again, or migrate rollback --node node-b\ndone: 1 of 3 nodes" in output
    )
    assert "node-c: run" not in fleet.happened()
    assert len(fleet.plane.pods("kube-proxy", "node-c")) == 1
    waiting.until(lambda: not fleet.work_pods(), "a work pod is left")

    del fleet.kubelet.instead["node-b", "run"]
    fleet.plane.worked.clear()
    output = fleet.good("run", "--all-nodes")
    assert "node-a: done already" in output
    assert [line for line in fleet.happened() if line.endswith("run")] == ["node-b: run", "node-c: run"]
    planned = {name: arguments for name, arguments in fleet.plane.worked if arguments[0] == "plan"}
    assert "--stopped" in planned["node-b"], "kube-proxy has stopped and only its rules remain"
    assert "--stopped" not in planned["node-c"]


def test_change_since_the_inspection_stops_the_run(fleet: Fleet) -> None:
    do, count = fleet.kubelet._do, iter(range(100))

    def changes(where: str, what: str, *rest: Any) -> tuple[int, str]:
        code, output = do(where, what, *rest)
        if (where, what) == ("node-b", "plan") and next(count):
            output = output.replace('"blockers": []', '"blockers": ["new"]')
        return code, output

    fleet.kubelet._do = changes  # type: ignore[method-assign, assignment]
    output = fleet.bad("run", "--all-nodes")
    assert "Error: node-b: left unchanged: new\ndone: 1 of 3 nodes" in output
    assert "ebpfproxy.io/kube-proxy" not in fleet.plane.labels("node-b")


def test_removed_affinity_stops_the_run(fleet: Fleet) -> None:
    do = fleet.kubelet._do

    def writes_back(where: str, what: str, *rest: Any) -> tuple[int, str]:
        if (where, what) == ("node-a", "run"):
            done = do(where, what, *rest)
            fleet.plane.put(control_plane.kube_proxy())
            return done
        return do(where, what, *rest)

    fleet.kubelet._do = writes_back  # type: ignore[method-assign, assignment]
    output = fleet.bad("run", "--all-nodes")
    assert "DaemonSet kube-system/kube-proxy has lost its affinity: somebody writes it back" in output
    assert "ebpfproxy.io/kube-proxy" not in fleet.plane.labels("node-b")


def test_disabled_agent_is_enabled_first(fleet: Fleet) -> None:
    fleet.good("rollback", "--all-nodes")
    fleet.happened()
    output = fleet.good("plan", "--node", "node-a")
    assert "node-a: the agent is switched off here since a rollback" in output
    fleet.happened()
    fleet.good("run", "--all-nodes")
    assert fleet.happened()[:3] == [f"{name}: ebpfproxy starts" for name in NODES]
    mine = fleet.plane.get("DaemonSet", "kube-system", "ebpfproxy")
    assert mine["spec"] == control_plane.agent()["spec"], "its label is no longer needed"


# -- rollback


def test_rollback_starts_kube_proxy_before_the_agent_ends(fleet: Fleet) -> None:
    fleet.good("run", "--all-nodes")
    fleet.happened()
    output = fleet.good("rollback", "--all-nodes")
    log = fleet.happened()
    assert (
        log[: 4 * 3]
        == [
            step
            for name in NODES
            for step in (
                f"{name}: kube-proxy starts",
                f"{name}: rollback",
                f"{name}: ebpfproxy ends",
            )
        ]
        + log[9:12]
    )
    assert all("ebpfproxy.io/kube-proxy" not in fleet.plane.labels(name) for name in NODES)
    assert all(fleet.plane.labels(name)["ebpfproxy.io/agent"] == "off" for name in NODES)
    assert output.splitlines()[-1] == "kube-proxy serves all 3 nodes"
    spec = fleet.plane.get("DaemonSet", "kube-system", "kube-proxy")["spec"]
    assert spec == control_plane.kube_proxy()["spec"]


def test_rollback_of_one_node_keeps_the_others(fleet: Fleet) -> None:
    fleet.good("run", "--all-nodes")
    fleet.good("rollback", "--node", "node-b")
    assert [bool(fleet.plane.pods("kube-proxy", name)) for name in NODES] == [False, True, False]
    assert [bool(fleet.plane.pods("ebpfproxy", name)) for name in NODES] == [True, False, True]
    kept = fleet.plane.get("DaemonSet", "kube-system", "kube-proxy")["spec"]["updateStrategy"]
    assert kept == {"type": "OnDelete"}


def test_failed_rollback_keeps_the_agent(fleet: Fleet) -> None:
    fleet.good("run", "--all-nodes")
    fleet.kubelet.instead["node-a", "rollback"] = (
        1,
        "Error: kube-proxy's rules do not serve 10.0.0.1:80/TCP",
    )
    output = fleet.bad("rollback", "--all-nodes")
    assert (
        "Error: node-a: kube-proxy's rules do not serve 10.0.0.1:80/TCP. kube-proxy runs there again, and the"
        " agent goes on beside it: call this again\ndone: 0 of 3 nodes" in output
    )
    assert "ebpfproxy.io/agent" not in fleet.plane.labels("node-a")
    assert fleet.plane.pods("ebpfproxy", "node-a")
    del fleet.kubelet.instead["node-a", "rollback"]
    fleet.good("rollback", "--all-nodes")


def test_rollback_without_kube_proxys_daemon_set_is_an_error(fleet: Fleet) -> None:
    del fleet.plane.objects["DaemonSet"]["kube-system", "kube-proxy"]
    output = fleet.bad("rollback", "--all-nodes")
    assert "there is no DaemonSet kube-system/kube-proxy to come back: kubeadm init phase addon" in output


# -- failing pods


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            stuck("ImagePullBackOff", 'Back-off pulling image "x"'),
            'cannot start: ImagePullBackOff: Back-off pulling image "x"',
        ),
        (stuck("CreateContainerError", "no"), "cannot start: CreateContainerError: no"),
        (
            {"phase": "Failed", "reason": "OutOfcpu", "message": "Node has no cpu"},
            "failed: OutOfcpu: Node has no cpu",
        ),
        (ended(137, "OOMKilled"), "its container ended: OOMKilled"),
        ((2, "Usage: …\nError: No such option: --brief\n"), "No such option: --brief"),
        ((1, "Traceback\nKeyError: 'x'\n"), "KeyError: 'x'"),
        ((0, "nothing\n"), "nothing"),
    ],
)
def test_failing_pod_is_reported_at_once_with_its_reason(
    fleet: Fleet, status: Item | tuple[int, str], words: str
) -> None:
    fleet.kubelet.instead["node-b", "plan"] = status
    output = fleet.bad("plan", "--all-nodes")
    assert words in output
    assert sum(line.startswith("  node-b: ") for line in output.splitlines()) == 1, output
    assert "node-a" in output
    waiting.until(lambda: not fleet.work_pods(), "a work pod is left")


def test_pod_that_does_not_start_is_reported_with_its_last_event(fleet: Fleet) -> None:
    fleet.kubelet.instead["node-b", "plan"] = {"phase": "Pending"}
    warning = {
        "metadata": {},
        "type": "Warning",
        "reason": "FailedMount",
        "message": "hostPath type check failed",
    }
    output = fleet.bad("plan", "--node", "node-b", timeout="0.3s")
    assert "has not started after 0.3 s: its kubelet says nothing" in output
    fleet.plane.events = [warning]
    output = fleet.bad("plan", "--node", "node-b", timeout="0.3s")
    assert "has not started after 0.3 s: FailedMount: hostPath type check failed" in output
    waiting.until(lambda: not fleet.work_pods(), "a work pod is left")


def test_forbidden_pod_is_reported_with_the_servers_message(fleet: Fleet) -> None:
    words = 'pods "ebpfproxy-migrate-node-a" is forbidden: violates PodSecurity "baseline:latest": host namespaces'
    fleet.plane.refusals["POST", "/pods"] = (403, words)
    output = fleet.bad("plan", "--node", "node-a")
    assert f"403 Forbidden: {words}" in output


def test_message_of_kubelet_is_reported_if_the_log_is_forbidden(fleet: Fleet) -> None:
    fleet.plane.refusals["GET", "/log"] = (403, "pods/log is forbidden")
    fleet.kubelet.instead["node-a", "plan"] = ended(1, message="Error: nft is not installed\n")
    assert "node-a: nft is not installed" in fleet.bad("plan", "--node", "node-a")
    del fleet.kubelet.instead["node-a", "plan"]
    output = fleet.bad("plan", "--node", "node-a")
    refused = "log of Pod kube-system/ebpfproxy-migrate-node-a: 403 Forbidden: pods/log is forbidden"
    assert f"it ended well; {refused}" in output


def test_ended_pod_of_an_earlier_call_is_deleted(fleet: Fleet) -> None:
    left = work_pod.manifest("node-a", "kube-system", Image(name="x"), ["plan"], seconds=5)
    left["metadata"]["namespace"] = "kube-system"
    with fleet.plane.lock:
        fleet.plane.objects["Pod"]["kube-system", left["metadata"]["name"]] = left
    left["status"] = {"phase": "Running"}
    output = fleet.bad("plan", "--node", "node-a")
    assert "pod kube-system/ebpfproxy-migrate-node-a runs already: another call works on this node" in output
    left["status"] = ended(0)
    fleet.good("plan", "--node", "node-a")


def test_terminating_pod_of_an_earlier_call_is_waited_for(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = work_pod.manifest("node-a", "kube-system", Image(name="x"), ["plan"], seconds=5)
    left["metadata"] |= {"namespace": "kube-system", "deletionTimestamp": "x"}
    with fleet.plane.lock:
        fleet.plane.objects["Pod"]["kube-system", left["metadata"]["name"]] = left
    threading.Timer(0.2, fleet.plane.objects["Pod"].pop, [("kube-system", left["metadata"]["name"])]).start()
    fleet.good("plan", "--node", "node-a")


# -- usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--all-nodes", "--force"], "--force applies to one node only: run it there"),
        (["run", "--all-nodes", "--terminate"], "--terminate applies to one node"),
        (["plan", "--all-nodes", "--hostname-override", "x"], "--hostname-override applies to one node"),
        (["plan", "--all-nodes", "--node", "x"], "--all-nodes and --node exclude each other"),
        (["plan", "--all-nodes", "--daemonset", "x"], "--daemonset x is not NAMESPACE/NAME"),
        (["plan", "--all-nodes", "--kubeconfig", "/nowhere"], "/nowhere"),
        (
            ["plan", "--all-nodes", "--daemonset", "a/b"],
            "there is no DaemonSet a/b: set --daemonset or --image",
        ),
        (["plan", "--node", "x"], "--node x: no such node"),
    ],
)
def test_invalid_options_are_named(fleet: Fleet, arguments: list[str], words: str) -> None:
    result = fleet.call(*arguments)
    assert result.exit_code in (1, 2)
    assert words in result.output


def test_several_nodes_need_an_api_server() -> None:
    result = CliRunner().invoke(command, ["plan", "--all-nodes"])
    assert result.exit_code == 2
    assert "many nodes need --kubeconfig" in result.output
