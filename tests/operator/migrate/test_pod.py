"""A work pod's container needs all permissions and mounts of its manifest, and no others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from ebpfproxy.operator.image import Image, image_of
from ebpfproxy.operator.migrate.cluster import work_pod
from tests.lab import Lab
from tests.operator.migrate import rules
from tests.operator.migrate.kube_proxy_cluster import KubeProxyCluster
from tests.operator.migrate.kubelet import PodContainer
from tests.operator.migrate.test_running_kube_proxy import start

ADDED = work_pod._security()["capabilities"]["add"]
_numbers = itertools.count()
Run = Callable[..., tuple[int, str]]


def runner(cluster: KubeProxyCluster, image: Path | None = None) -> Run:
    """Runs ``ebpfproxy migrate`` in a work pod's container; returns its exit code and output."""

    def run(*arguments: str, without: Iterable[str] = (), seccomp: bool = True) -> tuple[int, str]:
        folder = cluster.lab.folder / f"pod-{next(_numbers)}"
        folder.mkdir()
        pod = work_pod.manifest(cluster.a.name, "kube-system", Image(name="x"), arguments, seconds=60)
        held = [f"CAP_{each}" for each in ADDED if each not in without]
        container = PodContainer(pod, cluster.a, folder, capabilities=held, seccomp=seccomp, image=image)
        done = container.run()
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def cluster() -> Iterator[KubeProxyCluster]:
    """Runs an agent beside a kube-proxy whose rules are in both backends of iptables and in nftables."""
    with Lab() as lab:
        made = KubeProxyCluster(lab)
        for mode in rules.MODES:
            made.kube_proxy(mode)
        start(made.a, "--proxy-mode=iptables")
        made.agent().start()
        made.wait_frontends(20)
        yield made


PLAN = ("plan", "--brief", "-o", "json")


@pytest.mark.root
def test_work_pod_sees_kube_proxy_its_rules_and_the_agents_maps(cluster: KubeProxyCluster) -> None:
    code, output = runner(cluster)(*PLAN)
    found = json.loads(output)
    assert code == 0, output
    assert (found["modes"], found["blockers"], found["differences"]) == (["iptables", "nftables"], [], 0)
    assert (found["kube_proxy_frontends"], found["agent_frontends"]) == (20, 20)
    assert list(found["processes"].values()) == ["process"]


@pytest.mark.root
@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("BPF", "what this kernel has cannot be found out without CAP_BPF"),
        (
            "NET_ADMIN",
            "iptables-legacy-save: iptables-save v1.8.9 (legacy): Cannot initialize: Permission denied",
        ),
        (
            "NET_RAW",
            "iptables-legacy-save: iptables-save v1.8.9 (legacy): Cannot initialize: Permission denied",
        ),
        ("SYS_ADMIN", "Operation not permitted (this process lacks CAP_PERFMON, CAP_SYS_ADMIN)"),
        ("SYS_PTRACE", "/ns/net' (this process lacks CAP_SYS_PTRACE)"),
    ],
)
def test_work_pod_fails_without(cluster: KubeProxyCluster, missing: str, words: str) -> None:
    """SYS_ADMIN includes BPF, which remains where a runtime's seccomp profile knows it."""
    run = runner(cluster)
    if missing == "BPF":
        code, output = run(*PLAN, without=["BPF", "SYS_ADMIN"], seccomp=False)
    else:
        code, output = run(*PLAN, without=[missing])
    assert code == 1
    assert words in output
    assert {"BPF", "NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE"} == set(ADDED)


@pytest.mark.root
def test_sys_admin_is_not_needed_where_the_seccomp_profile_knows_bpf(cluster: KubeProxyCluster) -> None:
    code, output = runner(cluster)(*PLAN, without=["SYS_ADMIN"], seccomp=False)
    assert code == 0, output


# -- the manifest


def test_restrictions_of_the_work_pods_manifest() -> None:
    made = work_pod.manifest(
        "node-a", "kube-system", Image(name="x/y:1", pull_secrets=("s",)), ["plan"], seconds=90.5
    )
    spec, (container,) = made["spec"], made["spec"]["containers"]
    assert made["metadata"]["name"] == "ebpfproxy-migrate-node-a"
    assert "k8s-app" not in made["metadata"]["labels"], "otherwise the DaemonSet would adopt the pod"
    assert spec["nodeName"] == "node-a"
    assert (spec["hostNetwork"], spec["hostPID"], spec["automountServiceAccountToken"]) == (True, True, False)
    assert (spec["restartPolicy"], spec["activeDeadlineSeconds"]) == ("Never", 90)
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["imagePullSecrets"] == [{"name": "s"}]
    assert container["command"] + container["args"] == ["ebpfproxy", "migrate", "plan"]
    security = container["securityContext"]
    assert not security["allowPrivilegeEscalation"]
    assert security["readOnlyRootFilesystem"]
    assert "privileged" not in security
    assert security["capabilities"]["drop"] == ["ALL"]


def test_image_is_that_of_the_daemon_set() -> None:
    spec = {
        "containers": [{"name": "ebpfproxy", "image": "r/e:2", "imagePullPolicy": "Always"}],
        "imagePullSecrets": [{"name": "s"}],
    }
    found = image_of({"spec": {"template": {"spec": spec}}})
    assert found == Image(name="r/e:2", pull_policy="Always", pull_secrets=("s",))


def test_long_node_name_gives_a_unique_pod_name() -> None:
    names = {work_pod.name_of("n" * 250 + each) for each in "abc"}
    assert len(names) == 3
    assert {len(name) for name in names} == {253}
