"""The programs that are measured: an agent's, or empty ones; on a node of the lab each, with pods of its own.

Servers are in no node's cgroup: what programs there run for is done by the client. Empty programs show what the
kernel's statistics count for a run of nothing: two readings of the clock, and the call.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterable
from enum import Enum, auto
from pathlib import Path

from ebpfproxy.datapath.abi.hooks import FORWARDING, OPTIONAL_HOOKS, PACKET_HOOKS, SOCKET_HOOKS, Hook
from ebpfproxy.datapath.kernel import bpf
from tests.apiserver.objects import pod_address, service_address
from tests.lab import Lab, LabNode
from tools.bench.operations import Address, Client
from tools.bench.sockets import PORT, serve, start_api

SERVICE, SERVICE6 = "10.96.250.10", "fd00:10:96:250::10"
NODE_PORT, NODE_PORT6 = 30777, 31777
#: Their backends are on no node: only programs run for packets to them.
FAR_PORT, FAR_PORT6, FAR_BACKEND, FAR_BACKEND6 = 30787, 31787, "198.18.0.1", "2001:db8:18::1"
#: The client's own pod listens there.
LISTENED = 9000
#: The load Services of the API's stand-in (tests.apiserver) have so many endpoints each, all in this network.
ENDPOINTS = 10
LOAD_PORT, LOAD_TARGET_PORT, LOAD_BACKENDS = 80, 8080, "11.0.0.0/8"
_PROCEED = bytes.fromhex("b700000001000000 9500000000000000")  # return 1
_TCX_NEXT = bytes.fromhex("b7000000ffffffff 9500000000000000")  # return -1
_XDP_PASS = bytes.fromhex("b700000002000000 9500000000000000")  # return 2
_XDP_NATIVE = 1 << 2  # XDP_FLAGS_DRV_MODE


class To(Enum):
    """What a socket is connected to, or sends to."""

    SERVICE = auto()
    RANDOM_SERVICE = auto()  # of the load's, another for each operation
    NODE_PORT = auto()
    FAR_NODE_PORT = auto()  # its backend is reached by way of the gateway
    SERVER = auto()
    DIRECT = auto()  # a pod that is behind no Service
    ITSELF = auto()  # the client's own pod


class Subject:
    """A node with its pods. ``programs``: the folder with pins of what is attached to it, by hooks' names.

    ``server`` is behind all Services, ``direct`` behind none. Where programs do not translate, its own address
    takes the place of the Service's.
    """

    def __init__(self, node: LabNode, load: Path, services: int, *, translates: bool) -> None:
        self.node = node
        self._translates = translates
        self._order = random.Random(0)
        self._services = services
        self.programs = node.bpf_root
        self.client, self.server, self.direct = (node.pod(name) for name in ("client", "server", "direct"))
        for pod, port in ((self.server, PORT), (self.server, LOAD_TARGET_PORT), (self.direct, PORT)):
            serve(pod, load, port, join_cgroup=False)
        # The server has the addresses of all the load's backends.
        self.server.run(["ip", "route", "add", "local", LOAD_BACKENDS, "dev", "lo"])
        node.run(["ip", "route", "add", LOAD_BACKENDS, "via", self.server.address])

    @property
    def names(self) -> list[str]:
        """The hooks that have a program."""
        hooks = SOCKET_HOOKS + OPTIONAL_HOOKS + PACKET_HOOKS + FORWARDING.hooks
        return [hook.name for hook in hooks if (self.programs / hook.name).exists()]

    def clients(self) -> tuple[Client, Client]:
        """One in the client's pod with the programs of sockets, and one outside with those of packets."""
        inside, outside = (
            {name: self.programs / name for name in self.names if name in {hook.name for hook in hooks}}
            for hooks in (SOCKET_HOOKS + OPTIONAL_HOOKS, PACKET_HOOKS)
        )
        return Client(self.client, inside), Client(self.node.lab.outside, outside)

    def peers(self, to: To, family: int, count: int) -> list[Address]:
        """An address for each of so many operations."""
        if to is To.RANDOM_SERVICE:
            return self._random(count)
        v6 = family == 6
        if to is To.SERVICE and self._translates:
            peer = SERVICE6 if v6 else SERVICE, PORT
        elif to is To.NODE_PORT and self._translates:
            peer = (self.node.address6, NODE_PORT6) if v6 else (self.node.address, NODE_PORT)
        elif to is To.FAR_NODE_PORT:
            peer = (self.node.address6, FAR_PORT6) if v6 else (self.node.address, FAR_PORT)
        elif to is To.ITSELF:
            peer = self.client.address6 if v6 else self.client.address, LISTENED
        else:
            pod = self.direct if to is To.DIRECT else self.server
            peer = pod.address6 if v6 else pod.address, PORT
        return [peer] * count

    def _random(self, count: int) -> list[Address]:
        chosen = self._order.sample(range(self._services), count)
        if self._translates:
            return [(service_address(i), LOAD_PORT) for i in chosen]
        backends = [i * ENDPOINTS + self._order.randrange(ENDPOINTS) for i in chosen]
        return [(pod_address(i), LOAD_TARGET_PORT) for i in backends]


def agent(
    lab: Lab,
    name: str,
    load: Path,
    services: int,
    checkout: Path | None = None,
    *,
    arguments: Iterable[str] = (),
) -> Subject:
    """An agent with so many Services, and a cluster IP and a NodePort of each family for the server.

    ``checkout``: whose agent it is, if not this one's. ``arguments``: options of the agent.
    """
    made = Subject(lab.node(name), load, services, translates=True)
    node, server = made.node, made.server
    url = start_api(
        node,
        services,
        (f"{SERVICE}={server.address}", f"{SERVICE6}={server.address6}"),
        node_ports=(
            f"{NODE_PORT}={server.address}",
            f"{NODE_PORT6}={server.address6}",
            f"{FAR_PORT}={FAR_BACKEND}",
            f"{FAR_PORT6}={FAR_BACKEND6}",
        ),
        endpoints=ENDPOINTS,
    )
    node.agent("--master", url, *arguments).start(cwd=checkout)
    made.programs = next((node.bpf_root / "ebpfproxy").glob("v*/progs-*"))
    return made


def empty(lab: Lab, load: Path, services: int) -> Subject:
    """Programs that only return, at the hooks that an agent's are at."""
    made = Subject(lab.node("empty"), load, services, translates=False)
    made.programs.mkdir(parents=True)
    for hook in SOCKET_HOOKS:
        os.close(_load(hook, _PROCEED, made.programs))
    attach(made, SOCKET_HOOKS)
    for hook in PACKET_HOOKS:
        program = _load(hook, _TCX_NEXT, made.programs)
        made.node.call(_attach_to_devices, program, hook, made.programs)
        os.close(program)
    (forward,) = FORWARDING.hooks
    program = _load(forward, _XDP_PASS, made.programs)
    made.node.call(_attach_xdp, program, forward, made.programs)
    os.close(program)
    return made


def attach(subject: Subject, hooks: Iterable[Hook]) -> None:
    """Attaches pinned programs to the cgroup of the subject's node."""
    cgroup = os.open(subject.node.cgroup, os.O_RDONLY | os.O_DIRECTORY)
    for hook in hooks:
        with bpf.opened(subject.programs / hook.name) as program:
            _attach(program, cgroup, hook, subject.programs / f"link-{hook.name}")
    os.close(cgroup)


def _load(hook: Hook, code: bytes, folder: Path) -> int:
    program = bpf.prog_load(hook.program_type, hook.attach_type, hook.name, code)
    bpf.pin(program, folder / hook.name)
    return program


def _attach(program: int, target: int, hook: Hook, pin: Path, flags: int = 0) -> None:
    link = bpf.link_create(program, target, hook.attach_type, flags)
    bpf.pin(link, pin)
    os.close(link)


def _attach_to_devices(program: int, hook: Hook, folder: Path) -> None:
    for index, name in socket.if_nameindex():
        if name != "lo":
            _attach(program, index, hook, folder / f"link-{hook.name}-{name}")


def _attach_xdp(program: int, hook: Hook, folder: Path) -> None:
    _attach(program, socket.if_nametoindex("eth0"), hook, folder / f"link-{hook.name}", _XDP_NATIVE)
