"""The agent with a configuration file: effective values, validation errors, a new start when the file changes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab import Lab, LabNode, choices, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

KUBE_PROXY = {
    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
    "kind": "KubeProxyConfiguration",
    "mode": "ipvs",
    "ipvs": {"scheduler": "wrr", "strictARP": True},
    "healthzBindAddress": "127.0.0.1:10300",
    "conntrack": {"udpTimeout": "7s"},
}
BACKENDS = [f"10.244.2.{i}" for i in range(1, 6)]


class ConfiguredNode:
    def __init__(self, lab: Lab) -> None:
        self.node: LabNode = lab.node("node-a")
        self.pod = self.node.pod("client")
        self.folder: Path = lab.folder / "manifests"
        self.config: Path = lab.folder / "config.yaml"
        manifests.write(
            self.folder / "all.yaml",
            manifests.service(
                "web", clusterIPs=["10.96.7.1"], ports=[{"name": "dns", "port": 53, "protocol": "UDP"}]
            ),
            manifests.slice_of(
                "web",
                [manifests.endpoint(a, "node-b") for a in BACKENDS],
                ports=[{"name": "dns", "port": 8053, "protocol": "UDP"}],
            ),
        )

    def write(self, *documents: object) -> None:
        beside = self.config.with_suffix(".new")
        beside.write_text(yaml.safe_dump_all(documents))
        beside.rename(self.config)


@pytest.fixture
def cluster() -> Iterator[ConfiguredNode]:
    with Lab() as lab:
        yield ConfiguredNode(lab)


def test_configuration_file_is_used_flags_override_it_and_the_agent_starts_anew_when_it_changes(
    cluster: ConfiguredNode,
) -> None:
    own = {
        "apiVersion": "ebpfproxy.io/v1alpha1",
        "kind": "EbpfProxyConfiguration",
        "manifests": str(cluster.folder),
        "maxAffinity": 1000,
    }
    cluster.write(KUBE_PROXY, own)
    agent = cluster.node.agent("--config", str(cluster.config), "--max-affinity", "2000").start()
    until(lambda: agent.http("/livez", 10300)[0] == 200, "the agent is not healthy")
    assert "ipvs.strictARP" in agent.text, "the ignored field is not logged"
    used = json.loads(agent.http("/configz", 10249)[1])
    assert used["kubeproxy.config.k8s.io"]["ipvs"]["scheduler"] == "wrr"
    assert used["ebpfproxy.io"]["maxAffinity"] == 2000
    chosen = cluster.pod.call(choices.choices, "10.96.7.1", 53, 50)
    assert all(set(chosen[n : n + 5]) == set(BACKENDS) for n in range(45)), (
        "ipvs.scheduler selects round robin"
    )
    cluster.write({**KUBE_PROXY, "ipvs": {"scheduler": "sh"}}, own)
    agent.wait_log("programs are attached", times=2)
    assert "the configuration has changed" in agent.text
    assert len(set(cluster.pod.call(choices.choices, "10.96.7.1", 53, 50))) == 1, (
        "ipvs.scheduler selects source hash"
    )
    # What it cannot read ends it, with all that is wrong.
    cluster.write({**KUBE_PROXY, "ipvs": {"scheduler": 7}}, own)
    assert agent.process is not None
    assert agent.process.wait(120) == 1
    assert "ipvs.scheduler" in agent.text


def test_agent_that_stands_by_uses_the_configuration_as_it_is_when_it_takes_over(
    cluster: ConfiguredNode,
) -> None:
    """A change while it waits, which has no limit, is noticed before anything is programmed."""
    first = cluster.node.agent("--standby", manifests=cluster.folder).start()
    cluster.write(KUBE_PROXY)
    second = cluster.node.agent("--standby", "--config", str(cluster.config), manifests=cluster.folder)
    second.start(wait=False)
    second.wait_log("waiting for the other agent to end")
    cluster.write({**KUBE_PROXY, "healthzBindAddress": "127.0.0.1:10301"})
    assert first.stop() == 0
    second.wait_log("programs are attached")
    until(lambda: second.http("/livez", 10301)[0] == 200, "the agent is not healthy")
    assert second.text.count("the configuration has changed") == 1
    assert second.text.count("reusing pinned maps") == 1, "something was programmed as the old one says"
    assert second.stop() == 0


def test_all_invalid_fields_of_a_configuration_file_are_reported_at_once(cluster: ConfiguredNode) -> None:
    cluster.write({**KUBE_PROXY, "conntrack": {"maxPerCore": "many"}, "nodePortAddreses": []})
    agent = cluster.node.agent("--config", str(cluster.config)).start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(120) == 1
    assert "conntrack.maxPerCore" in agent.text
    assert "nodePortAddreses" in agent.text


def test_bind_address_hard_fail_ends_the_agent_if_the_address_is_in_use(cluster: ConfiguredNode) -> None:
    first = cluster.node.agent(manifests=cluster.folder).start()
    other = cluster.node.agent("--bind-address-hard-fail", manifests=cluster.folder)
    other.start(wait=False)
    assert other.process is not None
    assert other.process.wait(120) == 1
    first.stop()
    blocker = cluster.node.popen(["socat", "TCP-LISTEN:10256,fork", "/dev/null"], join_cgroup=False)
    other = cluster.node.agent("--bind-address-hard-fail", manifests=cluster.folder).start(wait=False)
    assert other.process is not None
    assert other.process.wait(120) == 1
    assert "healthz: 0.0.0.0:10256: [Errno 98]" in other.text
    blocker.kill()


def _listens(host: str, port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((host, port)) == 0


def test_servers_move_to_other_addresses_at_their_ports_and_back(cluster: ConfiguredNode) -> None:
    """A port at all addresses excludes the same port at one of them, also in the agent's own inherited socket."""
    one, every = "127.0.0.1", "0.0.0.0"

    def write(health: str, metrics: str) -> None:
        addresses = {"healthzBindAddress": f"{health}:10300", "metricsBindAddress": f"{metrics}:10301"}
        cluster.write({**KUBE_PROXY, **addresses, "bindAddressHardFail": True})

    write(one, every)
    agent = cluster.node.agent("--config", str(cluster.config), manifests=cluster.folder).start()
    for times, (health, metrics) in enumerate(((every, one), (one, every)), 2):
        write(health, metrics)
        agent.wait_log("programs are attached", times=times)
        until(lambda: agent.http("/livez", 10300)[0] == 200, "the agent is not healthy")
        until(lambda: agent.http("/metrics", 10301)[0] == 200, "metrics are not served")
        open_ports = [
            port for port in (10300, 10301) if cluster.node.call(_listens, cluster.node.address, port)
        ]
        assert open_ports == [10300 if health == every else 10301]
    assert "cannot bind" not in agent.text
    assert agent.stop() == 0


def test_init_only_pins_programs_that_the_agent_reuses(cluster: ConfiguredNode) -> None:
    first = cluster.node.agent("--init-only", manifests=cluster.folder).start(wait=False)
    assert first.process is not None
    assert first.process.wait(120) == 0
    made = {path.name for path in (cluster.node.bpf_root / "ebpfproxy").glob("v*/progs-*/*")}
    assert {"connect4", "from_device"} <= made
    agent = cluster.node.agent(manifests=cluster.folder).start()
    assert {path.name for path in (cluster.node.bpf_root / "ebpfproxy").glob("v*/progs-*/*")} == made
    agent.stop()
