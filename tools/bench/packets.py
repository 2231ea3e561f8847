"""Packets of one connection through a node's programs (BPF_PROG_TEST_RUN), with nothing between the runs.

A request comes in by one device and goes out by another, a response the other way round: each is seen at ingress
and at egress. The same four packets pass again and again, and no other work of the kernel takes their data out of
the caches.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scapy.compat import raw
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from ebpfproxy.datapath.abi.hooks import FORWARDING, PACKET_HOOKS
from ebpfproxy.datapath.kernel import bpf
from tests.packets.wire import PASS, XDP_PASS, XDP_REDIRECT, PreparedRun, ip_of
from tools.bench.operations import BATCH, Address, timed
from tools.bench.runtime import Runs
from tools.bench.sockets import ONE_CPU
from tools.bench.subjects import Subject, To

_PAYLOAD = b"x" * 64
_CLIENT_PORT = 40000
#: Seconds after which a flow counts as one that lasts.
_ESTABLISHED = 1.1
#: Seconds after which a slot of the flow cache becomes valid, and a few ticks.
_FILLED = 0.03


class Device(NamedTuple):
    ifindex: int
    mac: str


class Connection(NamedTuple):
    """``outer``: the device on the client's side; ``inner``: on the backend's.

    ``repeat``: how often the kernel runs a program at each call. Each run begins with what the last one made of the
    packet, so that a packet that is translated needs a call for each. ``port``: the client's.
    """

    client: str
    frontend: Address
    outer: Device
    inner: Device
    repeat: int
    port: int = _CLIENT_PORT

    def _request(self, flags: str, payload: bytes = b"") -> bytes:
        host, port = self.frontend
        ip = (IPv6 if ":" in host else IP)(src=self.client, dst=host)
        tcp = TCP(sport=self.port, dport=port, flags=flags, seq=1000, ack=2000)
        return bytes(raw(Ether(dst=self.outer.mac, src="02:00:00:00:00:99") / ip / tcp / Raw(payload)))

    def _response(self, seen: bytes, flags: str) -> bytes:
        """To a request as the backend sees it."""
        packet = Ether(seen)
        ip = ip_of(packet)
        back = ip.__class__(src=ip.dst, dst=ip.src)
        tcp = TCP(sport=ip[TCP].dport, dport=ip[TCP].sport, flags=flags, seq=2000, ack=1000)
        payload = bytes(ip[TCP].payload)
        return bytes(raw(Ether(dst=self.inner.mac, src="02:00:00:00:00:98") / back / tcp / Raw(payload)))

    def round_trip(
        self, programs: Mapping[str, int], flags: Sequence[str], payload: bytes
    ) -> list[PreparedRun]:
        """Sends a request, and the backend's response; what has to be run for the same once more."""
        outer, inner = self.outer.ifindex, self.inner.ifindex

        def run(program: str, packet: bytes, ifindex: int, ingress_ifindex: int) -> PreparedRun:
            return PreparedRun(programs[program], packet, ifindex, ingress_ifindex, self.repeat)

        arrives = run("from_device", self._request(flags[0], payload), outer, outer)
        leaves = run("to_device", _passed(arrives), inner, outer)
        returns = run("from_device", self._response(_passed(leaves), flags[1]), inner, inner)
        departs = run("to_device", _passed(returns), outer, inner)
        _passed(departs)
        return [arrives, leaves, returns, departs]

    def _is_open(self, programs: Mapping[str, int]) -> bool:
        """If the programs translate."""
        request = self._request("A")
        ifindex = self.outer.ifindex
        run = PreparedRun(programs["from_device"], request, ifindex, ifindex)
        run()
        return run.packet != request

    def _open(self, programs: Mapping[str, int]) -> None:
        self.round_trip(programs, ("S", "SA"), b"")
        self.round_trip(programs, ("A", "A"), b"")
        if self._is_open(programs):
            time.sleep(_ESTABLISHED)

    def pass_through(self, programs: Mapping[str, int], batches: int) -> Iterator[None]:
        """Opens the connection, unless it is. A batch is BATCH requests and responses; stops as an Operation does."""
        if not self._is_open(programs):
            self._open(programs)
        # The first packet after a pause does what is done once a second, the next one fills the flow cache, and one
        # that comes a while later makes that valid.
        for _ in range(3):
            each = self.round_trip(programs, ("PA", "PA"), _PAYLOAD)
            time.sleep(_FILLED)
        for _ in range(batches):
            yield
            for _ in range(BATCH // self.repeat):
                for run in each:
                    run()
            yield


class Passage(NamedTuple):
    """A packet passes the node, at ingress and at egress, with the port of another connection each time."""

    arrives: PreparedRun
    leaves: PreparedRun
    #: Where the port is that stands for the client.
    port_at: int

    def __call__(self, port: bytes) -> bytes:
        """Returns that port as it is when the packet has left."""
        self.arrives.change(self.port_at, port)
        self.arrives()
        self.leaves.change(0, self.arrives.packet)
        self.leaves()
        return self.leaves.packet[self.port_at : self.port_at + 2]


class ShortConnections(NamedTuple):
    """Connections that end at once, each from another port: SYN, SYN-ACK, ACK, FIN, FIN and ACK."""

    through: Connection

    def pass_through(self, programs: Mapping[str, int], batches: int) -> Iterator[None]:
        """A batch is BATCH connections; stops as an Operation does."""
        first = random.randrange(1025, 65536 - batches * BATCH)
        # The flow that lasts has a port of its own: a SYN would make it one that has just begun.
        through = self.through._replace(port=first - 1)
        opening = self._passages(through, programs, "S", "SA")
        acknowledgement, _ = self._passages(through, programs, "A", "A")
        closing = self._passages(through, programs, "FA", "FA")
        for batch in range(batches):
            yield
            for i in range(BATCH):
                client = (first + batch * BATCH + i).to_bytes(2, "big")
                seen = opening[0](client)
                opening[1](seen)
                acknowledgement(client)
                closing[0](client)
                closing[1](seen)
                acknowledgement(client)
            yield

    @staticmethod
    def _passages(through: Connection, programs: Mapping[str, int], *flags: str) -> tuple[Passage, Passage]:
        arrives, leaves, returns, departs = through.round_trip(programs, flags, b"")
        source_at = 54 if ":" in through.client else 34
        return Passage(arrives, leaves, source_at), Passage(returns, departs, source_at + 2)


class ForwardedConnection(NamedTuple):
    """Requests and responses come in by one device, and XDP forwards them by it."""

    client: str
    frontend: Address
    device: Device

    def pass_through(self, programs: Mapping[str, int], batches: int) -> Iterator[None]:
        """As that of a Connection; its first packet passes tc."""
        through = Connection(self.client, self.frontend, self.device, self.device, 1)
        ifindex = self.device.ifindex
        forward = programs["forward"]
        request = PreparedRun(forward, through._request("PA", _PAYLOAD), ifindex, is_xdp=True)
        if request() == XDP_PASS:
            PreparedRun(programs["from_device"], through._request("S"), ifindex, ifindex)()
        if request() != XDP_PASS:
            back = PreparedRun(forward, through._response(request.packet, "PA"), ifindex, is_xdp=True)
            back()
            time.sleep(_ESTABLISHED)
        else:
            back = request
        each = [request, back]
        # As at tc, the slot becomes valid a while after it was filled.
        for _ in range(3):
            for run in each:
                run()
            time.sleep(_FILLED)
        verdicts = {run() for run in each}
        assert verdicts in ({XDP_REDIRECT}, {XDP_PASS}), f"verdicts {verdicts}"
        for _ in range(batches):
            yield
            for _ in range(BATCH):
                for run in each:
                    run()
            yield


def _passed(run: PreparedRun) -> bytes:
    """What the packet becomes."""
    verdict = run()
    assert verdict == PASS, f"verdict {verdict}"
    return run.packet


def connection(subject: Subject, to: To, family: int) -> Connection:
    """From outside to one of the node's pods."""
    node = subject.node
    links = {link["ifname"]: link for link in json.loads(node.run(["ip", "-j", "link"]))}
    pod = subject.direct if to is To.DIRECT else subject.server
    names = "eth0", f"p{node.pods.index(pod) + 1}"
    outer, inner = (Device(links[name]["ifindex"], links[name]["address"]) for name in names)
    client = node.lab.outside.address if family == 4 else node.lab.outside.address6
    repeat = BATCH if to is To.DIRECT else 1
    return Connection(client, subject.peers(to, family, 1)[0], outer, inner, repeat)


def forwarded(subject: Subject, family: int) -> ForwardedConnection:
    """From outside to a backend beyond the gateway, whose link address is known from then on."""
    node, outside = subject.node, subject.node.lab.outside
    # /sys shows the devices of the namespace that it was mounted in.
    mac = json.loads(outside.run(["ip", "-j", "link", "show", "eth0"]))[0]["address"]
    for hop in (outside.address, outside.address6):
        node.run(["ip", "neighbour", "replace", hop, "lladdr", mac, "dev", "eth0", "nud", "permanent"])
    client = outside.address if family == 4 else outside.address6
    link = next(each for each in json.loads(node.run(["ip", "-j", "link"])) if each["ifname"] == "eth0")
    device = Device(link["ifindex"], link["address"])
    return ForwardedConnection(client, subject.peers(To.FAR_NODE_PORT, family, 1)[0], device)


def measure(
    pins: Path, passing: Connection | ShortConnections | ForwardedConnection, batches: int
) -> list[dict[str, Runs]]:
    """In the node's namespace: what its programs did in each batch."""
    os.sched_setaffinity(0, {ONE_CPU})
    hooks = (*PACKET_HOOKS, *FORWARDING.hooks)
    programs = {hook.name: bpf.get_pinned(pins / hook.name) for hook in hooks if (pins / hook.name).exists()}
    return timed(programs, passing.pass_through(programs, batches))
