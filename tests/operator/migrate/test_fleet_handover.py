"""Two nodes go over and back by the cluster's command, while clients of both ask and stay connected."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.operator.migrate.node import conntrack_hold, leftovers
from tests.lab import Lab, manifests, waiting
from tests.operator.migrate import control_plane, rules
from tests.operator.migrate.asking import Held, Load, no_request_fails
from tests.operator.migrate.control_plane import ControlPlane, serving
from tests.operator.migrate.kubelet import LabKubelet
from tests.operator.migrate.world import World, how
from tests.operator.migrate.world import cluster as cluster_objects

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

NAMES = ["node-a1", "node-b1"]


class Cluster(World):
    """Both nodes have a kube-proxy, by a DaemonSet."""

    def __init__(self, lab: Lab, mode: str) -> None:
        super().__init__(lab)
        self.client_b = self.b.pod("client-b")
        self.plane = ControlPlane(LabKubelet([self.a, self.b], self.manifests, mode), *NAMES)
        self.plane.put(control_plane.kube_proxy())
        self.wait_pods("kube-proxy")
        self.url = ""

    def write(self) -> None:
        """Without hints and policies: the rules are those of one node, and are loaded on both."""
        documents = cluster_objects()
        for each in documents:
            each.get("spec", {}).pop("internalTrafficPolicy", None)
            for endpoint in each.get("endpoints") or ():
                endpoint.pop("hints", None)
        manifests.write(self.manifests / "cluster.yaml", *documents)

    def start_agents(self) -> None:
        self.plane.put(control_plane.agent())
        self.wait_pods("ebpfproxy")

    def wait_pods(self, owner: str) -> None:
        def ready() -> bool:
            found = [pod for name in NAMES for pod in self.plane.pods(owner, name)]
            return len(found) == len(NAMES) and all(pod["status"]["phase"] == "Running" for pod in found)

        waiting.until(ready, f"no pods of {owner}", 60)

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The operator's command, of a process of its own outside of all nodes."""
        command = [sys.executable, "-m", "ebpfproxy", "migrate", *arguments, "--master", self.url]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    def good(self, *arguments: str) -> str:
        done = self.call(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        print(f"$ ebpfproxy migrate {' '.join(arguments)}\n{done.stdout}")
        return done.stdout

    def all_held(self) -> list[Held]:
        more = [
            (self.client_b, "tcp", rules.ORDERS, 80),
            (self.client_b, "udp", rules.DNS, 53),
            (self.b, "tcp", rules.ORDERS, 80),
            (self.outside, "tcp", self.b.address, rules.PAYMENTS_NODE_PORT),
        ]
        return [*self.held(), *(Held(*way) for way in more for _ in range(3))]

    def socket_loads(self) -> list[Load]:
        return [
            *self.loads()[:2],
            Load(self.client_b, "tcp", rules.ORDERS, 80),
            Load(self.client_b, "udp", rules.DNS, 53),
        ]

    def all_loads(self) -> list[Load]:
        outside = Load(self.outside, "tcp", self.b.address, rules.PAYMENTS_NODE_PORT)
        return [*self.socket_loads(), *self.loads()[2:], outside]

    def left(self) -> list[tuple[bool, bool]]:
        """Returns, by node, if something of kube-proxy is left, and if conntrack is kept enabled."""
        return [node.call(_left) for node in (self.a, self.b)]


def _left() -> tuple[bool, bool]:
    return bool(leftovers.find()), bool(conntrack_hold.find())


@contextmanager
def cluster(mode: str) -> Iterator[Cluster]:
    with Lab() as lab:
        made = Cluster(lab, mode)
        with serving(made.plane) as made.url:
            yield made


@pytest.mark.parametrize("mode", ["iptables-legacy", "nftables"])
def test_two_nodes_over_and_back_under_load_with_long_connections(mode: str) -> None:
    with cluster(mode) as world:
        refused = world.call("plan", "--all-nodes", "--image", "x")
        assert refused.returncode == 1
        assert "node-a1: nothing is pinned below /host/bpf/ebpfproxy: no agent has run" in refused.stdout, (
            refused.stdout + refused.stderr
        )
        held = world.all_held()
        assert how(held) == {}
        with no_request_fails(*world.all_loads()):
            world.start_agents()
            planned = json.loads(world.good("plan", "--all-nodes", "-o", "json"))
            for each in planned["nodes"]:
                assert (each["state"], each["blockers"]) == ("to do", []), each
                assert each["found"]["kube_proxy_frontends"] == 20
                assert list(each["found"]["processes"].values()) == ["process"]
            world.good("plan", "--all-nodes")
            world.good("run", "--all-nodes")
        assert how(held) == {}
        assert world.left() == [(False, True)] * 2
        assert world.plane.restarted == []
        assert not any(world.plane.pods("kube-proxy", name) for name in NAMES)
        again = world.good("run", "--all-nodes")
        assert "node-a1: done already" in again
        assert "node-b1: done already" in again

        ours = [Held(client, "tcp", rules.ORDERS, 80) for client in (world.client, world.client_b)]
        with no_request_fails(*world.socket_loads()):
            said = world.good("rollback", "--all-nodes")
        assert said.count("waiting for the agent to end") == 2
        assert how([*held, *ours]) == {}
        assert world.left() == [(True, False)] * 2
        assert not any(pin_folder(node.bpf_root).exists() for node in (world.a, world.b))
        assert not any(world.plane.pods("ebpfproxy", name) for name in NAMES)
