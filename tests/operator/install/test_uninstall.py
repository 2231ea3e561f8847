"""Uninstallation: when it is refused, what it leaves and what it cleans."""

from __future__ import annotations

from threading import Timer

import pytest

from tests.lab.waiting import until
from tests.operator.install.site import IMAGE, INSTALLED, SYSTEM, StandIn, kube_proxy

ADDRESS = ("--api-server", "https://cp.example:6443", "--no-inherit")
CLEANUP = ("DaemonSet", SYSTEM, "ebpfproxy-cleanup")


@pytest.fixture
def installed(site: StandIn) -> StandIn:
    """Installs beside a kube-proxy that is ready on both nodes."""
    for item in kube_proxy():
        site.create(item)
    assert site.install(*ADDRESS).exit_code == 0
    return site


def there(site: StandIn) -> int:
    return sum(site.get(*place) is not None for place in INSTALLED)


def labels(site: StandIn, node: str) -> dict[str, str]:
    found = site.get("Node", "", node)
    assert found is not None
    return dict(found["metadata"]["labels"])


def refused(site: StandIn, *arguments: str) -> str:
    done = site.uninstall(*arguments)
    assert done.exit_code == 1, done.output
    assert there(site) == 5, "no object is deleted"
    *_, reason, hint = done.stderr.splitlines()
    assert hint == "--force continues anyway"
    return reason


def test_uninstall_is_refused_without_a_kube_proxy(installed: StandIn) -> None:
    installed.delete("DaemonSet", SYSTEM, "kube-proxy")
    assert refused(installed) == (
        "Error: there is no DaemonSet kube-system/kube-proxy: nobody would follow changes of Services"
    )
    done = installed.uninstall("--force")
    assert done.exit_code == 0
    assert "warning: there is no DaemonSet kube-system/kube-proxy" in done.stderr
    assert there(installed) == 0


def test_uninstall_is_refused_where_migrate_keeps_kube_proxy_away(installed: StandIn) -> None:
    installed.add_node("node-c", **{"ebpfproxy.io__kube-proxy": "off"})
    reason = refused(installed)
    assert "is kept from node-c (label ebpfproxy.io/kube-proxy=off): `ebpfproxy migrate rollback`" in reason


def test_uninstall_is_refused_while_kube_proxy_is_not_ready_on_all_nodes(installed: StandIn) -> None:
    installed.controller.status["kube-proxy", "node-b"] = {"phase": "Pending"}
    assert installed.install(*ADDRESS).exit_code == 0
    path = "/apis/apps/v1/namespaces/kube-system/daemonsets/kube-proxy"
    until(lambda: installed.request("GET", path)["status"]["numberAvailable"] == 1)
    assert refused(installed, "--cleanup").endswith("kube-system/kube-proxy is ready on 1 of 2 nodes")
    # kube-proxy may have become ready a moment ago.
    ready = Timer(1, lambda: installed.controller.status.pop(("kube-proxy", "node-b")))
    ready.start()
    assert installed.uninstall().exit_code == 0
    ready.join()


def test_helm_release_is_left_to_helm(installed: StandIn) -> None:
    path = "/apis/apps/v1/namespaces/kube-system/daemonsets/ebpfproxy"
    installed.request("PATCH", path, {"metadata": {"annotations": {"meta.helm.sh/release-name": "proxy"}}})
    assert refused(installed) == (
        "Error: DaemonSet kube-system/ebpfproxy is of the Helm release proxy: `helm uninstall proxy`"
    )


def test_permissions_of_agents_in_another_namespace_are_kept(installed: StandIn) -> None:
    message = refused(installed, "-n", "other")
    assert message.endswith(
        "ebpfproxy is in namespace kube-system, and its agents would lose their rights: -n kube-system"
    )


def test_leftovers_on_nodes_are_reported(installed: StandIn) -> None:
    done = installed.uninstall()
    assert done.exit_code == 0
    assert there(installed) == 0
    assert "`ebpfproxy uninstall --cleanup --image REF`" in done.stderr
    assert ("ebpfproxy-cleanup", "node-a") not in installed.controller.started
    assert installed.get("DaemonSet", SYSTEM, "kube-proxy") is not None


def test_labels_are_removed_from_nodes_once_unused(
    installed: StandIn,
) -> None:
    """Labels of a rollback are removed with the agent, the label against kube-proxy once there is no kube-proxy."""
    installed.add_node("node-c", **{"ebpfproxy.io__agent": "off", "ebpfproxy.io__kube-proxy": "off"})
    planned = installed.uninstall("--force", "--dry-run")
    assert "Node node-c: label ebpfproxy.io/agent would be removed" in planned.stdout
    assert "ebpfproxy.io/agent" in labels(installed, "node-c")
    done = installed.uninstall("--force")
    assert "Node node-c: label ebpfproxy.io/agent removed" in done.stdout
    assert not {"ebpfproxy.io/agent"} & {*labels(installed, "node-c")}
    assert "ebpfproxy.io/kube-proxy" in labels(installed, "node-c")
    assert installed.uninstall().stdout == "ebpfproxy is not installed in the cluster\n"
    installed.delete("DaemonSet", SYSTEM, "kube-proxy")
    assert installed.uninstall().stdout == "Node node-c: label ebpfproxy.io/kube-proxy removed\n"
    assert installed.uninstall().stdout == "ebpfproxy is not installed in the cluster\n"


def test_labels_that_cannot_be_removed_are_reported(installed: StandIn) -> None:
    """The rest is deleted, and each remaining label is named with the reason."""
    installed.add_node("node-c", **{"ebpfproxy.io__agent": "off"})
    installed.server.denied.add("patch nodes")
    done = installed.uninstall("--force")
    assert done.exit_code == 1
    assert "Error: label ebpfproxy.io/agent: Node node-c: 403 Forbidden: " in done.stderr
    assert there(installed) == 0


def test_nodes_can_be_cleaned_after_uninstall(installed: StandIn) -> None:
    assert installed.uninstall().exit_code == 0
    done = installed.uninstall("--cleanup")
    assert done.exit_code == 2
    assert "--cleanup needs an --image" in done.stderr
    done = installed.uninstall("--cleanup", "--image", IMAGE)
    assert done.exit_code == 0, done.output
    assert "nothing of ebpfproxy is left on 2 nodes" in done.stdout


def test_dry_run_deletes_nothing(installed: StandIn) -> None:
    done = installed.uninstall("--dry-run")
    assert done.exit_code == 0
    assert done.stdout.count("would be deleted") == 5
    assert there(installed) == 5
    installed.delete("DaemonSet", SYSTEM, "kube-proxy")
    done = installed.uninstall("--dry-run")
    assert (done.exit_code, done.stdout.count("would be deleted")) == (1, 5)


def test_node_that_is_down_is_reported_and_the_rest_is_deleted(installed: StandIn) -> None:
    installed.controller.down.add("node-b")
    done = installed.uninstall("--timeout", "0.5s", "--force")
    assert done.exit_code == 1
    assert done.stderr.splitlines(keepends=True)[-1] == (
        "Error: pods of DaemonSet kube-system/ebpfproxy are still on node-b after 0.5 s: are the nodes up?\n"
    )
    assert there(installed) == 0


def test_node_that_is_down_does_not_block_cleanup_of_others(installed: StandIn) -> None:
    installed.controller.down.add("node-b")
    done = installed.uninstall("--cleanup", "--timeout", "0.5s", "--force")
    assert done.exit_code == 1
    assert installed.controller.started[-2:] == [
        ("ebpfproxy-cleanup", "node-a"),
        ("ebpfproxy-cleanup", "node-b"),
    ]
    assert "still on node-b after 0.5 s" in done.stderr
    assert "node node-b: its pod is not started: is the node up?" in done.stderr
    assert "node-a:" not in done.stderr
    assert "ebpfproxy-cleanup stays for these" in done.stderr


def test_nodes_are_not_cleaned_if_agents_cannot_be_deleted(installed: StandIn) -> None:
    installed.server.denied.add("delete daemonsets")
    done = installed.uninstall("--cleanup")
    assert done.exit_code == 1
    assert "Error: DaemonSet kube-system/ebpfproxy: 403 Forbidden: " in done.stderr
    assert installed.get(*CLEANUP) is None
    assert there(installed) == 5, "agents need the other objects"


def test_object_that_cannot_be_deleted_is_reported_and_others_are_deleted(installed: StandIn) -> None:
    installed.server.denied.add("delete clusterroles")
    done = installed.uninstall()
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ClusterRole ebpfproxy: 403 Forbidden: ")
    assert there(installed) == 1
    installed.server.denied.clear()
    assert installed.uninstall().exit_code == 0
    assert there(installed) == 0


def test_cleanup_daemon_set_of_an_uncleaned_node_remains_until_the_next_install(installed: StandIn) -> None:
    ended = {"terminated": {"exitCode": 1, "message": "Error: an agent runs there", "reason": "Error"}}
    installed.controller.status["ebpfproxy-cleanup", "node-b"] = {
        "phase": "Pending",
        "initContainerStatuses": [
            {
                "name": "cleanup",
                "image": IMAGE,
                "imageID": "",
                "ready": False,
                "restartCount": 4,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": ended,
            }
        ],
    }
    done = installed.uninstall("--cleanup", "--timeout", "1s")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-2:] == [
        "  node node-b: container cleanup: CrashLoopBackOff, ended with 1: Error: an agent runs there",
        "DaemonSet kube-system/ebpfproxy-cleanup stays for these; `ebpfproxy uninstall` deletes it",
    ]
    assert installed.get(*CLEANUP) is not None
    done = installed.install(*ADDRESS)
    assert done.exit_code == 0
    assert done.stdout.startswith("DaemonSet kube-system/ebpfproxy-cleanup deleted\n")
    assert installed.get(*CLEANUP) is None
