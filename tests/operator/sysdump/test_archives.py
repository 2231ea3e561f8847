"""Archives of lab nodes: with an agent, with a broken one, without any, and of all nodes by their API server."""

from __future__ import annotations

import io
import json
import signal
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from ebpfproxy.cli import kubectl, sysdump
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.operator.sysdump.archive import ERRORS, MOST, TOP
from tests.apiserver import ApiServer
from tests.e2e.two_node_cluster import NODE_PORT, TwoNodeCluster
from tests.lab import Agent, Lab, LabNode, clients, command, manifests
from tests.lab.waiting import until
from tests.operator.agent_pods import TOKEN, agent_pod, serving

pytestmark = pytest.mark.root

#: Nothing that has this may be in an archive.
PLANTED = "planted"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_LOG = """
error failed error="exec: planted-key-data was refused"
error failed request={"Authorization": "Bearer planted-bearer"}
warning proxy url=https://user:planted@proxy:3128
-----BEGIN PRIVATE KEY-----
planted
-----END PRIVATE KEY-----
warning the environment's planted-by-environment is wrong
"""
_USER = {
    "token": "planted-agent-token",
    "client-key-data": "planted-key-data",
    "exec": {"env": [{"name": "API_KEY", "value": "planted-by-exec"}]},
}


def files(data: bytes, node: str) -> dict[str, str]:
    """The texts of one node's folder. No secret may be anywhere in the archive."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for each in tar:
            file = tar.extractfile(each)
            assert file is not None
            text = file.read().decode()
            assert PLANTED not in text, each.name
            if each.name.startswith(f"{TOP}/{node}/"):
                found[each.name.removeprefix(f"{TOP}/{node}/")] = text
    assert len(data) < MOST
    return found


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class Cluster(TwoNodeCluster):
    """Two nodes with a client outside the cluster, and an agent on node-a that has secrets."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        secret = manifests.service("secret", clusterIPs=["10.96.0.50"], ports=[{"port": 80}])
        secret["metadata"]["annotations"] = {_LAST_APPLIED: "planted-annotation"}
        manifests.write(self.manifests / "secret.yaml", secret)
        config = lab.folder / "config.yaml"
        config.write_text(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
            f"clientConnection: {{kubeconfig: {lab.folder}/agent.conf}}\n"
        )
        (lab.folder / "agent.conf").write_text(yaml.safe_dump({"users": [{"name": "u", "user": _USER}]}))
        # Its command line and environment are in the archive.
        self.started: Agent = self.agent("--config", str(config)).start(executes=True)
        with self.started.log.open("a") as log:
            log.write(_LOG)
        assert self.started.process is not None
        #: A flow that stays.
        lab.outside.call(clients.ask_tcp, self.a.address, NODE_PORT)

    def dump(self, node: LabNode, folder: str) -> dict[str, str]:
        """What ``ebpfproxy sysdump`` writes on a node."""
        command.import_commands()
        file = self.lab.folder / "dump.tgz"
        words = ["sysdump", str(file), "--bpf-root", str(node.bpf_root)]
        done = node.call(command.run, [*words, "--cni-results", str(node.cni_results)])
        assert done == (0, "", ""), done
        assert file.stat().st_mode & 0o777 == 0o600
        return files(file.read_bytes(), folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTS_PASSWORD", "planted-by-environment")
        with Lab() as lab:
            yield Cluster(lab)


def test_the_archive_of_a_node_has_all_of_it(cluster: Cluster) -> None:
    found = cluster.dump(cluster.a, "node-a")
    failed = {line.partition(":")[0] for line in found.pop(ERRORS, "").splitlines()}
    assert failed <= {"journal.log", "iptables.txt", "nftables.txt"}, "what this machine does not have"
    (status,) = rows(found["status.json"])
    assert status["healthy"] and status["agent"]["node"] == "node-a"
    assert status["agent"]["socket"] == "(removed)"
    (check,) = rows(found["check.json"])
    assert check["agent"] == "answered"
    services = rows(found["services.json"])
    assert {each["name"] for each in services} == {"web", "empty", "elsewhere", "second", "secret"}
    assert {each["address"] for each in rows(found["backends.json"])} > {f"{cluster.w1.address}:8080"}
    (flow,) = rows(found["conntrack.json"])
    assert (flow["service"], flow["frontend"]) == ("shop/web", f"{cluster.a.address}:{NODE_PORT}")
    reasons = {each["name"]: each for each in rows(found["reasons.json"])}
    assert [each["local"] for each in reasons["elsewhere"]["ports"][0]["endpoints"]] == ["other-node"]
    (config,) = rows(found["config.json"])
    assert config["ebpfproxy.io"]["manifests"] == str(cluster.manifests)
    assert rows(found["config-file.json"])[0]["kind"] == "KubeProxyConfiguration"
    assert "programs are attached" in found["agent.log"]
    assert found["agent.log"].count("(removed)") == 5
    assert "--config" in found["command-line.txt"]
    assert "kubeproxy_sync_proxy_rules" in found["metrics.txt"]
    assert "net/ipv4/ip_forward = 1\n" in found["sysctls.txt"]
    names = [
        dict(each["attrs"]).get("IFLA_IFNAME") for each in rows(found["devices.json"]) if "attrs" in each
    ]
    assert {"lo", "eth0", "p1", "p2"} <= set(names)
    gateways = [dict(each["attrs"]).get("RTA_GATEWAY") for each in rows(found["routes.json"])]
    assert "172.18.0.254" in gateways
    clients_here = rows(found["namespaces.json"])
    assert {"pod": "shop/client", "netns": cluster.client.netns} in clients_here
    assert {each["type"] for each in rows(found["bpf.json"]) if "program" in each} >= {
        "cgroup_sock_addr",
        "sched_cls",
    }
    assert rows(found["features.json"])[0]["tcx"] in (True, False)
    assert len(found["maps/services4.txt"].splitlines()) > 5
    assert any(line.startswith("00000000+") for line in found["maps/address_filter.txt"].splitlines())
    assert "/maps/services4\n" in found["pins.txt"]


def test_broken_agent_and_maps_are_lines(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent hangs, and a map of its set is gone."""
    monkeypatch.setattr(sysdump, "_AGENT_SECONDS", 0.3)
    agent = cluster.started
    assert agent.process is not None
    agent.process.send_signal(signal.SIGSTOP)
    try:
        found = cluster.dump(cluster.a, "node-a")
        (check,) = rows(found["check.json"])
        assert check["agent"] == "no answer"
        for name in ("config.json", "reasons.json", "metrics.txt"):
            assert f"{name}: the agent does not answer: " in found[ERRORS]
        assert len(rows(found["services.json"])) > 10
        assert found["agent.log"]
        (pin,) = pin_folder(cluster.a.bpf_root).glob("v*/maps/members")
        pin.unlink()
        found = cluster.dump(cluster.a, "node-a")
        for name in ("status.json", "check.json", "services.json", "conntrack.json"):
            assert f"{name}: {pin.parent} lacks members: somebody has removed pins" in found[ERRORS]
        assert {"pins.txt", "bpf.json", "routes.json", "agent.log", "kernel.txt"} <= found.keys()
    finally:
        agent.process.send_signal(signal.SIGCONT)
    until(pin.exists)


def test_node_that_never_had_an_agent(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_NAME", "node-b")
    found = cluster.dump(cluster.b, "node-b")
    assert "status.json: nothing is pinned below " in found[ERRORS]
    assert "agent.log: no agent has left its process id\n" in found[ERRORS]
    assert {"about.json", "kernel.txt", "features.json", "devices.json", "bpf.json"} <= found.keys()


def put_objects(server: ApiServer, cluster: Cluster) -> None:
    """What an installation has, with secrets where users put them."""
    secrets = {_LAST_APPLIED: "planted-last-applied"}
    env = [{"name": "HTTPS_PROXY", "value": "planted-proxy"}]
    meta = {"name": "ebpfproxy", "namespace": "kube-system"}
    server.cluster.put(
        {
            "kind": "DaemonSet",
            "apiVersion": "apps/v1",
            "metadata": {**meta, "annotations": secrets},
            "spec": {
                "selector": {},
                "template": {"spec": {"containers": [{"name": "ebpfproxy", "env": env}]}},
            },
        }
    )
    config = "clientConnection:\n  token: |\n    planted-in-yaml\n"
    server.cluster.put(
        {"kind": "ConfigMap", "apiVersion": "v1", "metadata": meta, "data": {"config.yaml": config}}
    )
    event = {"kind": "Event", "apiVersion": "v1", "reason": "BackOff", "message": "token=planted-event"}
    about = {"kind": "Pod", "namespace": "kube-system", "name": "ebpfproxy-node-b"}
    server.cluster.put({**event, "metadata": {**meta, "name": "event"}, "involvedObject": about})
    waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
    state = {"name": "ebpfproxy", "restartCount": 3, "state": waiting}
    server.cluster.put(agent_pod(cluster.b, phase="Pending", containerStatuses=[state]))
    for previous, text in ((False, "starts"), (True, f"ended: {TOKEN}")):
        server.containers.logs["ebpfproxy-node-b", "ebpfproxy", previous] = f"it {text}\n"


def test_all_nodes_of_a_cluster(cluster: Cluster) -> None:
    """node-b's agent does not start: what the API server has of it is there."""
    out = cluster.lab.folder / "all.tgz"
    with serving([cluster.a, cluster.b], cluster.lab.folder) as (server, kubeconfig):
        put_objects(server, cluster)
        done = CliRunner().invoke(kubectl.main, ["sysdump", str(out), "--kubeconfig", str(kubeconfig)])
        assert done.exit_code == 0, done.output
        one = cluster.lab.folder / "one.tgz"
        words = ["sysdump", str(one), "--kubeconfig", str(kubeconfig), "--node", "node-b"]
        again = CliRunner().invoke(kubectl.main, words)
        assert again.exit_code == 0, again.output
        assert files(one.read_bytes(), "node-a") == {}
    said = sorted(done.stderr.splitlines())
    assert said[0] == "node-a: done"
    assert said[1].startswith("node-b: unable to upgrade connection: container not found")
    data = out.read_bytes()
    found = files(data, "node-a")
    assert rows(found["status.json"])[0]["agent"]["node"] == "node-a"
    assert {"maps/services4.txt", "agent.log", "reasons.json"} <= found.keys()
    found = files(data, "node-b")
    assert found["logs/ebpfproxy.log"] == "it starts\n"
    assert found["logs/ebpfproxy.previous.log"] == "it ended: (removed)\n"
    assert "(container ebpfproxy: CrashLoopBackOff)\n" in found[ERRORS]
    found = files(data, "cluster")
    assert rows(found["pods.json"])[1]["status"]["phase"] == "Pending"
    assert rows(found["events.json"])[0]["reason"] == "BackOff"
    assert rows(found["daemonset.json"])[0]["spec"]["template"]["spec"]["containers"][0]["env"] == [
        {"name": "HTTPS_PROXY", "value": "(removed)"}
    ]
    assert rows(found["configmap.json"])[0]["data"]["config.yaml"] == [
        {"clientConnection": {"token": "(removed)"}}
    ]
    assert {"nodes.json", "version.json"} <= found.keys()
