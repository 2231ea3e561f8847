"""A Service with NFS clients and servers in the kernel, on a kernel that has them: ``make test-kernels``."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.datapath.kernel.roots import find_cgroup_root
from tests.field import nfs
from tests.field.records import origins
from tests.lab import Lab, LabNode, Outside, Pod, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(nfs.lacking()), reason=nfs.lacking()),
    pytest.mark.timeout(900),
]

CLUSTER = {"v4": "10.97.0.20", "v6": "fd00:10:97::20"}
NODE_PORT = 32049
PORTS = [{"name": "nfs", "port": nfs.PORT, "protocol": "TCP", "nodePort": NODE_PORT}]
#: The sweep of records of closed sockets runs every minute.
SWEEP_SECONDS = 150.0

_numbers = itertools.count()


class NfsCluster:
    """``w1`` on node-a and ``w2`` on node-b serve one folder; ``mounter`` is a client pod."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        self.a: LabNode = lab.node("node-a")
        b = lab.node("node-b")
        self.w1, self.w2 = self.a.pod("w1"), b.pod("w2")
        self.mounter: Pod = self.a.pod("mounter")
        # The default gateway has to exist: packets to a cluster IP are routed to it before they are translated.
        self.outside: Outside = lab.outside
        self.folder: Path = lab.folder / "export"
        self.folder.mkdir()
        clients = [self.mounter.address, self.mounter.address6]
        clients += [self.a.address, self.a.address6, "10.244.1.1", "fd00:10:244:1::1"]
        for each in (self.w1, self.w2, self.a):
            nfs.start(each, self.folder, clients)
        self._manifests = lab.folder / "manifests"
        self.serve(self.w1)
        self.agent = self.a.agent(*arguments, manifests=self._manifests).start()

    def serve(self, server: Pod | LabNode) -> None:
        """Makes this server the Service's only endpoint."""
        on = server.node.name if isinstance(server, Pod) else server.name
        slices = [
            manifests.slice_of(
                "nfs", [manifests.endpoint(address, on)], ports=[{**PORTS[0], "port": nfs.PORT}]
            )
            for address in (server.address, server.address6)
        ]
        service = manifests.service("nfs", type="NodePort", clusterIPs=list(CLUSTER.values()), ports=PORTS)
        manifests.write(self._manifests / "nfs.yaml", service, *slices)

    def open(self) -> dict[str, int]:
        """The number of open connections of each backend that has any."""
        rows = json.loads(self.a.cli("backend", "list", "-o", "json"))
        return {row["address"]: row["open"] for row in rows if row["open"]}

    def records(self) -> int:
        """The number of records of translated sockets."""
        return sum(origins(self.a))

    def is_only_backend(self, server: Pod | LabNode) -> bool:
        """Returns True if new connections go to this server only."""
        rows = json.loads(self.a.cli("service", "list", "-o", "json"))
        wanted = {f"{server.address}:{nfs.PORT}", f"[{server.address6}]:{nfs.PORT}"}
        found = {each["address"] for row in rows for each in row["backends"]}
        return found == wanted

    def check_files(self, client: nfs.Client) -> None:
        """Writes and reads a file with names that no side has cached."""
        number = next(_numbers)
        client.write(f"up{number}", f"from the client {number}")
        assert (self.folder / f"up{number}").read_text() == f"from the client {number}"
        (self.folder / f"down{number}").write_text(f"from the server {number}")
        assert client.read(f"down{number}") == f"from the server {number}"


def _connections(server: Space) -> int:
    output = server.run(["ss", "-Htn", "state", "established", f"( sport = :{nfs.PORT} )"])
    return len(output.splitlines())


@pytest.fixture(scope="module")
def packets() -> Iterator[NfsCluster]:
    """Kernel workers, which create the sockets, are in the root cgroup and so outside the agent's."""
    with Lab() as lab:
        yield NfsCluster(lab)


@pytest.fixture(scope="module")
def sockets() -> Iterator[NfsCluster]:
    """The agent serves the root cgroup, as on a node, so that no other test may run on this machine."""
    if "EBPFPROXY_OWN_MACHINE" not in os.environ:
        pytest.skip("would serve the root cgroup of this machine: make test-kernels")
    with Lab() as lab:
        yield NfsCluster(lab, "--cgroup-root", str(find_cgroup_root()))


def _replaced_under(cluster: NfsCluster, client: nfs.Client, host: str, port: int = nfs.PORT) -> None:
    """Mounts through the Service and replaces the backend; asserts that the mount and an open file survive."""
    cluster.serve(cluster.w1)
    until(lambda: cluster.is_only_backend(cluster.w1), "new connections do not go to w1")
    (cluster.folder / "held").unlink(missing_ok=True)
    # A removed server may miss the end of a connection and keep its half open.
    before = _connections(cluster.w1)
    client.mount(host, port)
    cluster.check_files(client)
    client.append("one ")
    assert (_connections(cluster.w1), _connections(cluster.w2)) == (before + 1, 0)

    cluster.serve(cluster.w2)
    until(lambda: cluster.is_only_backend(cluster.w2), "new connections do not go to w2")
    until(lambda: _reached(cluster, client), "the mount does not reach the new backend")
    client.append("two")
    cluster.check_files(client)
    assert (cluster.folder / "held").read_text() == "one two"
    assert _connections(cluster.w2) == 1


def _reached(cluster: NfsCluster, client: nfs.Client) -> bool:
    cluster.check_files(client)
    return _connections(cluster.w2) == 1


def _address(server: Pod | LabNode, host: str) -> str:
    return f"[{server.address6}]:{nfs.PORT}" if ":" in host else f"{server.address}:{nfs.PORT}"


@pytest.mark.parametrize("family", CLUSTER)
def test_nfs_mount_outside_the_cgroup_survives_backend_replacement_in_packets(
    packets: NfsCluster, family: str
) -> None:
    """The host mounts a cluster IP without a socket hook; after unmount no connection is counted as open."""
    host = CLUSTER[family]
    with nfs.Client(packets.a) as client:
        _replaced_under(packets, client, host)
        assert packets.records() == 0
        until(lambda: packets.open() == {_address(packets.w2, host): 1}, "not only one is counted as open")
        client.unmount()
    until(lambda: packets.open() == {}, "connections are still counted as open")


def test_nfs_mount_of_a_pod_survives_backend_replacement_in_packets(packets: NfsCluster) -> None:
    """The mount is in the network namespace of a pod."""
    with nfs.Client(packets.mounter) as client:
        _replaced_under(packets, client, CLUSTER["v4"])
        client.unmount()
    until(lambda: packets.open() == {}, "connections are still counted as open")


@pytest.mark.parametrize("family", CLUSTER)
def test_nfs_mount_of_the_host_uses_the_socket_hooks(sockets: NfsCluster, family: str) -> None:
    """connect() of the kernel passes the hook at each reconnect: the mount survives backend replacement."""
    host = CLUSTER[family]
    with nfs.Client(sockets.a) as client:
        _replaced_under(sockets, client, host)
        assert sockets.open().get(_address(sockets.w2, host)) == 1
        # The record of the closed connection is removed, the one of the open connection is kept.
        until(lambda: sockets.records() == 1, "there is not exactly one record", SWEEP_SECONDS)
        assert sockets.open() == {_address(sockets.w2, host): 1}
        client.unmount()
    _leaves_nothing(sockets)


def _leaves_nothing(cluster: NfsCluster) -> None:
    """Waits for the agent's sweep, because kernel sockets call no sock_release program."""
    began = time.monotonic()
    until(lambda: cluster.records() == 0, "records of sockets are left", SWEEP_SECONDS)
    until(lambda: cluster.open() == {}, "connections are still counted as open", SWEEP_SECONDS)
    assert time.monotonic() - began < SWEEP_SECONDS


def test_nfs_mount_of_a_node_port_and_a_host_network_server(sockets: NfsCluster) -> None:
    """The socket hook selects the backend; with a host-network server, packets pass lo only."""
    with nfs.Client(sockets.a) as client:
        _replaced_under(sockets, client, sockets.a.address, NODE_PORT)
        sockets.serve(sockets.a)
        until(lambda: sockets.is_only_backend(sockets.a), "new connections do not go to the node")
        until(lambda: _on_itself(sockets, client), "the mount does not reach the server of the node")
        client.unmount()
    _leaves_nothing(sockets)


def _on_itself(cluster: NfsCluster, client: nfs.Client) -> bool:
    cluster.check_files(client)
    return _connections(cluster.a) == 1
