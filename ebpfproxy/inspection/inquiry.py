"""A question to ``explain``: from its words, to what maps, kernel and agent say about it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from ebpfproxy.agent import state
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.flows.open_now import flows_between, sockets_between
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.probe import Features
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.lookup import Lookup
from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.datapath.programs.devices import LOOPBACK, device_attachments
from ebpfproxy.datapath.programs.loader import Options
from ebpfproxy.datapath.programs.xdp_places import xdp_attachments
from ebpfproxy.explain.answer import Explanation, Known, explain
from ebpfproxy.explain.path import Client, Place, Programs, Target
from ebpfproxy.explain.report import Report, report_of, without_frontend
from ebpfproxy.explain.targets import AmbiguousPortError, Asked, programmed, targets
from ebpfproxy.inspection.agent import AskedOnce
from ebpfproxy.inspection.clients import find_client
from ebpfproxy.inspection.failures import QuestionError, WrongNamespaceError
from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.netlink.routes import Routes
from ebpfproxy.services.model import Protocol, format_address
from ebpfproxy.services.values import parse_address, parse_port

#: The agent says which names exist; these can be asked for.
_NAME = re.compile("[A-Za-z0-9._-]+")


def explained(
    maps: MapSet, source: str, target: str, protocol: Protocol | None, *, bpf_root: Path, cni_results: Path
) -> Report:
    """Explains a connection whose ends are given in words.

    Raises QuestionError, WrongNamespaceError and ClosedNamespacesError.
    """
    with Routes() as routes:
        client, namespace, doubt = find_client(source, cni_results, routes.device_to)
        inquiry = Inquiry(maps, bpf_root, client, routes, doubt)
        return inquiry.report(parse(target, namespace, protocol))


def parse(text: str, namespace: str, protocol: Protocol | None) -> Target | Asked:
    """An address with a port, or a Service. Raises QuestionError."""
    host, _, port = text.rpartition(":")
    address = parse_address(host.strip("[]"))
    if address is not None and (len(address) == 4 or host.startswith("[")):
        if (number := parse_port(port)) is None:
            raise QuestionError(f"{text!r}: {port!r} is no port of an address")
        return Target(address, number, protocol or Protocol.TCP)
    if parse_address(text.strip("[]")) is not None:
        raise QuestionError(f"{text!r} needs a port: ADDRESS:PORT, an IPv6 address in brackets")
    name, _, port = text.partition(":")
    given, slash, name = name.rpartition("/")
    if not _NAME.fullmatch(name) or (slash and not _NAME.fullmatch(given)):
        raise QuestionError(f"{text!r} is neither a Service, NAMESPACE/NAME:PORT, nor ADDRESS:PORT")
    return Asked(given or namespace, name, port, protocol)


class Inquiry:
    """One client's questions to the maps, the kernel and the agent."""

    def __init__(self, maps: MapSet, bpf_root: Path, client: Client, routes: Routes, doubt: str = "") -> None:
        """``doubt``: why the client may be another one.

        Raises WrongNamespaceError: devices of another network namespace than the agent's are not its.
        """
        self._maps = maps
        self._client, self._doubt = client, doubt
        self._dump, self._tables = Dump(maps), Lookup(maps)
        self._agent = state.load_latest(pin_folder(bpf_root))
        if self._agent is not None and self._agent.netns not in (0, netns_cookie()):
            raise WrongNamespaceError("explain has to run in the agent's network namespace")
        self._asked = AskedOnce(bpf_root)
        self._programs = _programs(pin_folder(bpf_root), self._agent, routes)
        self._known = Known(
            self._programs, self._tables, self._dump.names, self._asked.of_port, time.monotonic_ns()
        )

    def report(self, asked: Target | Asked) -> Report:
        """Raises QuestionError where the Service has several ports, and for an address of another family."""
        if isinstance(asked, Target):
            is_outside = self._client.place is Place.OUTSIDE
            if is_outside and not self._client.address(len(asked.address)):
                address = format_address(asked.address)
                raise QuestionError(f"{self._client.name} sends no packet to {address}, of the other family")
            return report_of([self._explain(asked)], self._asked.silence)
        service = self._asked.service(asked.namespace, asked.name)
        frontends = programmed(self._dump.entries(), self._dump.names, asked)
        try:
            found = targets(frontends, asked, self._client, self._node_addresses())
        except AmbiguousPortError as error:
            raise QuestionError(str(error)) from error
        if not found:
            return without_frontend(asked, frontends, service, self._client, self._asked.silence)
        return report_of([self._explain(each) for each in found], self._asked.silence)

    def _explain(self, target: Target) -> Explanation:
        agent, names = self._agent, self._dump.names
        timeouts = agent.timeouts if agent is not None else None
        flows = flows_between(
            self._maps,
            self._client.addresses,
            target,
            timeouts=timeouts or Timeouts(),
            now=self._known.now,
            names=names,
        )
        sockets = sockets_between(self._maps, self._client.netns, target, names)
        found = explain(self._client, target, self._known, flows=flows, sockets=sockets)
        return replace(found, notes=(self._doubt, *found.notes)) if self._doubt else found

    def _node_addresses(self) -> dict[int, bytes]:
        """Where the client reaches NodePorts: this host's address towards it, if they answer there."""
        found: dict[int, bytes] = {}
        for address in self._tables.node_addresses():
            found.setdefault(len(address), address)
        for each in self._client.addresses:
            own = self._programs.source_towards(each)
            if own and self._tables.is_node_address(own):
                found[len(own)] = own
        return found


def _programs(pins: Path, agent: state.AgentState | None, routes: Routes) -> Programs:
    devices = {
        each.ifindex
        for each in device_attachments(pins)
        if each.direction == ("egress" if each.ifindex == LOOPBACK.ifindex else "ingress")
    }
    known = agent.programs if agent is not None else None
    towards: Callable[[bytes], bytes] = routes.source_towards
    return Programs(
        options=known or Options(features=Features(set_retval=True), host_netns_cookie=netns_cookie()),
        socket_hooks=frozenset(each.hook for each in attachments(pins) if each.alive),
        devices=frozenset(devices),
        xdp=frozenset(each.ifindex for each in xdp_attachments(pins)),
        source_towards=towards,
        device_to=routes.device_to,
    )
