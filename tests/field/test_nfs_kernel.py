"""A Service whose client and servers are the kernel's own (NFS), on a kernel that has them: ``make test-kernel``."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest

from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import find_cgroup_root
from tests.field import nfs
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
#: Records of sockets that the kernel has released are looked for every minute.
SWEEP_SECONDS = 150.0

_numbers = itertools.count()


class World:
    """``w1`` on the node itself and ``w2`` on another serve one folder; ``mounter`` is a pod that may mount."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        self.a: LabNode = lab.node("node-a")
        b = lab.node("node-b")
        self.w1, self.w2 = self.a.pod("w1"), b.pod("w2")
        self.mounter: Pod = self.a.pod("mounter")
        # The node's gateway: packets to a cluster IP leave by its route before they are translated.
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
        """Open connections by backend, where there are any."""
        rows = json.loads(self.a.cli("backend", "list", "-o", "json"))
        return {row["address"]: row["open"] for row in rows if row["open"]}

    def records(self) -> int:
        """Sockets that are known to have been translated."""
        return self._maps["sock_origin"].count()

    @cached_property
    def _maps(self) -> MapSet:
        return open_maps(self.a.bpf_root)

    def chosen(self, server: Pod | LabNode) -> bool:
        """Says if new connections go to this server."""
        rows = json.loads(self.a.cli("service", "list", "-o", "json"))
        wanted = {f"{server.address}:{nfs.PORT}", f"[{server.address6}]:{nfs.PORT}"}
        found = {each["address"] for row in rows for each in row["backends"]}
        return found == wanted

    def works(self, client: nfs.Client) -> None:
        """A file goes each way, of a name that neither side has heard of."""
        number = next(_numbers)
        client.write(f"up{number}", f"from the client {number}")
        assert (self.folder / f"up{number}").read_text() == f"from the client {number}"
        (self.folder / f"down{number}").write_text(f"from the server {number}")
        assert client.read(f"down{number}") == f"from the server {number}"


def _connections(server: Space) -> int:
    said = server.run(["ss", "-Htn", "state", "established", f"( sport = :{nfs.PORT} )"])
    return len(said.splitlines())


@pytest.fixture(scope="module")
def packets() -> Iterator[World]:
    """The kernel's workers, which make its sockets, are in the root cgroup, outside of the lab's."""
    with Lab() as lab:
        yield World(lab)


@pytest.fixture(scope="module")
def sockets() -> Iterator[World]:
    """The agent serves the root cgroup, as on a node: this machine has to be the test's own."""
    if "EBPFPROXY_OWN_MACHINE" not in os.environ:
        pytest.skip("would serve the root cgroup of this machine: make test-kernel")
    with Lab() as lab:
        yield World(lab, "--cgroup-root", str(find_cgroup_root()))


def _replaced_under(world: World, client: nfs.Client, host: str, port: int = nfs.PORT) -> None:
    """Mounts by the Service, replaces the backend, and shows that the mount goes on, an open file with it."""
    world.serve(world.w1)
    until(lambda: world.chosen(world.w1), "w1 serves")
    (world.folder / "held").unlink(missing_ok=True)
    # A server that has gone from the Service may not hear of it: it keeps its half of a connection.
    before = _connections(world.w1)
    client.mount(host, port)
    world.works(client)
    client.append("one ")
    assert (_connections(world.w1), _connections(world.w2)) == (before + 1, 0)

    world.serve(world.w2)
    until(lambda: world.chosen(world.w2), "w2 serves")
    until(lambda: _reached(world, client), "the mount goes on with the new backend")
    client.append("two")
    world.works(client)
    assert (world.folder / "held").read_text() == "one two"
    assert _connections(world.w2) == 1


def _reached(world: World, client: nfs.Client) -> bool:
    world.works(client)
    return _connections(world.w2) == 1


def _address(server: Pod | LabNode, host: str) -> str:
    return f"[{server.address6}]:{nfs.PORT}" if ":" in host else f"{server.address}:{nfs.PORT}"


@pytest.mark.parametrize("family", CLUSTER)
def test_a_mount_outside_of_the_served_cgroup_lives_on_in_packets(packets: World, family: str) -> None:
    """The host mounts a cluster IP by packets alone: the mount survives the backend's replacement, and ends clean."""
    host = CLUSTER[family]
    with nfs.Client(packets.a) as client:
        _replaced_under(packets, client, host)
        assert packets.records() == 0
        assert packets.open() == {_address(packets.w2, host): 1}
        client.unmount()
    until(lambda: packets.open() == {}, "nothing is open")


def test_a_pods_mount_lives_on_in_packets(packets: World) -> None:
    """A mount within a pod's network namespace survives the backend's replacement as the host's does."""
    with nfs.Client(packets.mounter) as client:
        _replaced_under(packets, client, CLUSTER["v4"])
        client.unmount()
    until(lambda: packets.open() == {}, "nothing is open")


@pytest.mark.parametrize("family", CLUSTER)
def test_a_mount_of_a_node_is_served_at_the_socket(sockets: World, family: str) -> None:
    """The kernel's connect() asks the Service each time anew: the mount survives the backend's replacement."""
    host = CLUSTER[family]
    with nfs.Client(sockets.a) as client:
        _replaced_under(sockets, client, host)
        assert sockets.open().get(_address(sockets.w2, host)) == 1
        # The record of the connection that was ended goes, that of the one that lives stays.
        until(lambda: sockets.records() == 1, "one record", SWEEP_SECONDS)
        assert sockets.open() == {_address(sockets.w2, host): 1}
        client.unmount()
    _leaves_nothing(sockets)


def _leaves_nothing(world: World) -> None:
    """The kernel's sockets have no release hook: what they leave is swept up (needs the agent's sweep)."""
    began = time.monotonic()
    until(lambda: world.records() == 0, "no record of any socket", SWEEP_SECONDS)
    until(lambda: world.open() == {}, "nothing is open", SWEEP_SECONDS)
    assert time.monotonic() - began < SWEEP_SECONDS


def test_a_node_mounts_its_own_node_port_and_a_server_on_its_own_network(sockets: World) -> None:
    """No packet of it passes a device but the loopback: the socket has chosen before."""
    with nfs.Client(sockets.a) as client:
        _replaced_under(sockets, client, sockets.a.address, NODE_PORT)
        sockets.serve(sockets.a)
        until(lambda: sockets.chosen(sockets.a), "the node itself serves")
        until(lambda: _on_itself(sockets, client), "the mount goes on with the node's own server")
        client.unmount()
    _leaves_nothing(sockets)


def _on_itself(world: World, client: nfs.Client) -> bool:
    world.works(client)
    return _connections(world.a) == 1
