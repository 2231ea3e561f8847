"""``python -m tests.monitoring FOLDER``: pictures of the dashboards after two minutes of a small cluster's life.

Two nodes and a client outside; rollouts, a Service without endpoints, a backend that refuses, UDP, an address that
no Service has, and an entry that somebody deletes. ``--seconds`` makes it longer or shorter.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

from ebpfproxy.datapath.kernel import bpf
from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import BALANCER, SERVICE_IPS
from tests.field.records import key_of, maps_of
from tests.lab import Lab, LabNode, Pod, clients, manifests
from tests.lab.browser import Browser
from tests.monitoring import pictures
from tests.monitoring.files import NODES, RULES, SERVICE
from tests.monitoring.prometheus import Prometheus

WEB, REFUSING, EMPTY, NOBODYS = SERVICE_IPS["v4"], "10.96.0.50", "10.96.0.20", "10.96.7.7"
#: A Service that nobody asks.
UNASKED = "10.96.0.40"
_OPTIONS = (
    *["--measure-connections", "--measure-traffic", "--metrics-backends"],
    *["--metrics-bind-address", "0.0.0.0:10249", "--service-cidr", "10.96.0.0/16"],
)


class Life:
    """What happens in each second."""

    def __init__(self, lab: Lab) -> None:
        self.cluster = OutsideClientCluster(lab)
        self.on_b: Pod = self.cluster.b.pod("other-client")
        # Nothing listens at this port of w1.
        manifests.write(
            self.cluster.manifests / "refusing.yaml",
            manifests.service("refusing", clusterIPs=[REFUSING]),
            manifests.slice_of(
                "refusing",
                [self.cluster.endpoint_on_a()],
                ports=[{"name": "http", "port": 9, "protocol": "TCP"}],
            ),
        )
        nodes: tuple[LabNode, LabNode] = (self.cluster.a, self.cluster.b)
        self.agents = [node.agent(*_OPTIONS, manifests=self.cluster.manifests).start() for node in nodes]
        self.held = [HeldConnection(self.on_b, WEB, 80) for _ in range(3)]
        targets = [f"{node.address}:10249" for node in nodes]
        self.prometheus = Prometheus(self.cluster.a, RULES, targets=targets)
        self.prometheus.until(self.prometheus.rules, "it does not start")

    def live(self, second: int) -> None:
        cluster = self.cluster
        cluster.client.call(clients.spread_tcp, WEB, 80, 6 + round(5 * math.sin(second / 8)))
        self.on_b.call(clients.spread_tcp, WEB, 80, 3)
        cluster.client.call(clients.spread_udp, WEB, 53, 2)
        if second % 2 == 0:
            cluster.outside.call(clients.spread_tcp, BALANCER, 80, 2)
        if second % 5 == 0:
            self.agents[0].http("/healthz")
            cluster.client.call(clients.connect_error, EMPTY, 80)
            cluster.client.call(clients.connect_error, REFUSING, 80)
            cluster.client.call(clients.connect_error, NOBODYS, 80)
        match second % 40:
            case 15:
                cluster.write_web(cluster.w1)
            case 20:
                cluster.write_web(cluster.w1, cluster.w2)
            case 25:
                cluster.write_web(cluster.w2)
            case 30:
                cluster.write_web(cluster.w1, cluster.w2)
        if second % 60 == 35:
            with maps_of(cluster.a) as maps:
                bpf.map_delete(maps["services4"].fd, key_of(UNASKED, 80))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.monitoring", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, default=120)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        life = Life(lab)
        for second in range(arguments.seconds):
            began = time.monotonic()
            life.live(second)
            time.sleep(max(0.0, began + 1 - time.monotonic()))
        browser = Browser(life.cluster.a, Path(folder) / "profile")
        for name in (NODES, SERVICE):
            data = pictures.read(life.prometheus, name, arguments.seconds, "10s")
            print(pictures.take(browser, name, data, arguments.folder))
        browser.close()
        life.prometheus.stop()


if __name__ == "__main__":
    main()
