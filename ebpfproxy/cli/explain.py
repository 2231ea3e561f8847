"""``ebpfproxy explain``."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from ebpfproxy.agent import state
from ebpfproxy.agent.local_pages import ask_reasons
from ebpfproxy.agent.local_socket import NoAgentError
from ebpfproxy.cli import client_lookup, completion, options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.explain_text import print_report
from ebpfproxy.cli.output import emit
from ebpfproxy.datapath.dump import Dump, open_maps
from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.flows.open_now import flows_between, sockets_between
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.probe import Features
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.lookup import Lookup
from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.datapath.programs.devices import LOOPBACK, device_attachments
from ebpfproxy.datapath.programs.loader import Options
from ebpfproxy.datapath.programs.xdp import xdp_attachments
from ebpfproxy.explain.answer import Explanation, Known, explain
from ebpfproxy.explain.path import Client, Programs, Target
from ebpfproxy.explain.report import Report, report_of, without_frontend
from ebpfproxy.explain.targets import AmbiguousPortError, Asked, programmed, targets
from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.netlink.routes import Routes
from ebpfproxy.services.model import Protocol, ServicePortKey
from ebpfproxy.services.reasons import ServiceReasons
from ebpfproxy.services.values import parse_address, valid_port

#: The agent says which names exist; these can be asked for.
_NAME = re.compile("[A-Za-z0-9._-]+")


class UnexplainedError(click.ClickException):
    """There is nothing to explain with: exit code 1 would say that the connection does not work."""

    exit_code = 2


@click.command("explain")
@click.argument("source", metavar="FROM", shell_complete=completion.clients)
@click.argument("target", metavar="TO[:PORT]", shell_complete=completion.services)
@click.option(
    "--protocol",
    type=click.Choice([p.name for p in Protocol], case_sensitive=False),
    help="The protocol of an address, TCP if none is given, or that of a Service's port.",
)
@client_lookup.cni_results
@options.bpf_root
@options.output_format
def command(
    *, source: str, target: str, protocol: str | None, cni_results: Path, bpf_root: Path, output: str
) -> None:
    """Say what happens to a connection, and why, without sending anything.

    FROM is a pod of this node (NAME or NAMESPACE/NAME), "host", or an address. TO is a Service (NAME or
    NAMESPACE/NAME, with its port by number or name if it has several) or ADDRESS:PORT, an IPv6 address in
    brackets. A Service without a namespace is in that of the pod, as in its DNS, or in "default".

    \b
    ebpfproxy explain shop/client web:http
    ebpfproxy explain host 10.96.0.10:53 --protocol UDP
    ebpfproxy explain 203.0.113.7 shop/web

    The maps say what happens, as programs read them; the running agent says why. Exit code 0: it works as far
    as Services are concerned; 1: it does not; 2: the command line is wrong, or there is nothing to read.
    """
    try:
        with one_line(), Routes() as routes:
            maps = open_maps(bpf_root)
            client, namespace = client_lookup.find_client(source, cni_results, routes.device_to)
            wanted = None if protocol is None else Protocol[protocol.upper()]
            inquiry = Inquiry(maps, bpf_root, client, routes)
            report = inquiry.report(_parse(target, namespace, wanted))
    except click.UsageError:
        raise
    except click.ClickException as error:
        raise UnexplainedError(error.message) from error
    emit(report, output, print_report)
    sys.exit(0 if report.works else 1)


def _parse(text: str, namespace: str, protocol: Protocol | None) -> Target | Asked:
    """An address with a port, or a Service. Raises UsageError."""
    host, _, port = text.rpartition(":")
    address = parse_address(host.strip("[]"))
    if address is not None and (len(address) == 4 or host.startswith("[")):
        if not (port.isascii() and port.isdigit() and valid_port(int(port))):
            raise click.UsageError(f"{text!r}: {port!r} is no port of an address")
        return Target(address, int(port), protocol or Protocol.TCP)
    if parse_address(text.strip("[]")) is not None:
        raise click.UsageError(f"{text!r} needs a port: ADDRESS:PORT, an IPv6 address in brackets")
    name, _, port = text.partition(":")
    given, slash, name = name.rpartition("/")
    if not _NAME.fullmatch(name) or (slash and not _NAME.fullmatch(given)):
        raise click.UsageError(f"{text!r} is neither a Service, NAMESPACE/NAME:PORT, nor ADDRESS:PORT")
    return Asked(given or namespace, name, port, protocol)


class Inquiry:
    """One client's questions to the maps, the kernel and the agent."""

    def __init__(self, maps: MapSet, bpf_root: Path, client: Client, routes: Routes) -> None:
        """Raises ClickException in another network namespace than the agent's: its devices are not here."""
        self._maps = maps
        self._bpf_root = bpf_root
        self._client = client
        self._dump, self._tables = Dump(maps), Lookup(maps)
        self._agent = state.load_latest(pin_folder(bpf_root))
        if self._agent is not None and self._agent.netns not in (0, netns_cookie()):
            raise click.ClickException("explain has to run in the agent's network namespace")
        self._answers: dict[tuple[str, str], ServiceReasons | None] = {}
        #: Why there are no reasons; empty where the agent answers.
        self._silence = ""
        self._programs = _programs(pin_folder(bpf_root), self._agent, routes)
        self._known = Known(
            self._programs, self._tables, self._dump.names, self._reasons, time.monotonic_ns()
        )

    def report(self, asked: Target | Asked) -> Report:
        """Raises UsageError where the Service has several ports."""
        if isinstance(asked, Target):
            return report_of([self._explain(asked)], self._silence)
        service = self._service(asked.namespace, asked.name)
        frontends = programmed(self._dump.entries(), self._dump.names, asked)
        try:
            found = targets(frontends, asked, self._client, self._node_addresses())
        except AmbiguousPortError as error:
            raise click.UsageError(str(error)) from error
        if not found:
            return without_frontend(asked, frontends, service, self._client, self._silence)
        return report_of([self._explain(each) for each in found], self._silence)

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
        return explain(self._client, target, self._known, flows=flows, sockets=sockets)

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

    def _reasons(self, port: ServicePortKey) -> ServiceReasons | None:
        return self._service(port.namespace, port.name)

    def _service(self, namespace: str, name: str) -> ServiceReasons | None:
        key = namespace, name
        if key not in self._answers and not self._silence:
            try:
                self._answers[key] = ask_reasons(self._bpf_root, namespace, name)
            except NoAgentError as error:
                self._silence = str(error)
        return self._answers.get(key)


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
