"""``ebpfproxy sysdump``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, TypeVar

import click

import ebpfproxy
from ebpfproxy.agent import state
from ebpfproxy.agent.local_pages import CHECK, CONFIG, METRICS, ask_reasons
from ebpfproxy.agent.local_socket import NoAgentError, ask
from ebpfproxy.cli import client_lookup, cluster_access, conntrack, options, sysdump_cluster
from ebpfproxy.cli.check import ask_agent
from ebpfproxy.cli.status import read_status
from ebpfproxy.cli.sysdump_cluster import of_cluster, opened
from ebpfproxy.datapath.affinity_table import affinity_rows
from ebpfproxy.datapath.dump import Dump, open_maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.kube.access import TOKEN_FILE
from ebpfproxy.netlink.namespaces import names_by_cookie
from ebpfproxy.operator.api import Api
from ebpfproxy.operator.check.all_checks import check
from ebpfproxy.operator.sysdump import node_files
from ebpfproxy.operator.sysdump.archive import Archive, Source, rows
from ebpfproxy.operator.sysdump.secrets import Secrets

T = TypeVar("T")
#: The agent is waited for so long, and once more for check.
_AGENT_SECONDS = 10.0
#: The rest of larger tables is left out.
_MOST_FLOWS, _MOST_SERVICES = 10_000, 1_000
_KUBERNETES = Path("/etc/kubernetes")


@click.command("sysdump")
@sysdump_cluster.file_argument
@click.option("--kubeconfig", metavar="FILE", help="Of all nodes, by this kubeconfig.")
@cluster_access.context
@cluster_access.master
@cluster_access.nodes
@cluster_access.daemon_set
@client_lookup.cni_results
@options.bpf_root
def command(
    *,
    file: Path,
    kubeconfig: str | None,
    context: str | None,
    master: str | None,
    nodes: tuple[str, ...],
    daemonset: str,
    cni_results: Path,
    bpf_root: Path,
) -> None:
    """Collect everything that says what this node does in an archive, for a bug report.

    It has status, maps, flows, what check finds and explain reads, configuration, metrics, logs where they
    can be reached, devices, routes, netfilter's rules, all BPF programs, sysctls and kernel features. With
    --kubeconfig it has the same of all nodes, made by the agents' pods there, their logs and Events.

    Secrets are taken out: keys, certificates, tokens, passwords, and values of variables and annotations.
    Names and addresses of Services and pods are not. A node has 10 MB at most. What cannot be read, as where
    no agent runs, is a line in errors.txt. FILE.tgz may be - for standard output.
    """
    if kubeconfig is not None or master is not None:
        with cluster_access.cluster_errors():
            # A server that asks for no credentials needs no kubeconfig.
            api = Api.from_options(None, master) if kubeconfig is None else None
            api = api or Api.from_kubeconfigs(kubeconfig or "", context, master)
            of_cluster(api, file, nodes, daemonset, kubeconfig or "")
        return
    if nodes:
        raise click.UsageError("--node needs --kubeconfig")
    with opened(file) as out:
        _of_node(out, _Node(bpf_root, cni_results))


def _of_node(out: IO[bytes], here: _Node) -> None:
    secrets = Secrets()
    with Archive(out, secrets) as archive:
        folder = archive.folder(here.name)
        # What others may not know is found before anything is written.
        folder.add("secrets of the agent", lambda: here.learn(secrets))
        for name, source in here.sources():
            folder.add(name, source)
        folder.close()


class _Node:
    """What is asked for several files; each of them may fail."""

    def __init__(self, bpf_root: Path, cni_results: Path) -> None:
        self._root, self._cni_results = bpf_root, cni_results
        self._silence: NoAgentError | None = None

    def sources(self) -> Iterator[tuple[str, Source]]:
        """Files, those first that say most: of what does not fit the last ones are left out."""
        yield "about.json", lambda: rows([self._about()])
        yield "status.json", lambda: rows([read_status(self._root, self._maps)])
        yield "check.json", self._check
        yield "config.json", lambda: [self._ask(CONFIG)]
        yield "config-file.json", lambda: node_files.configuration_file(self._agent)
        yield "command-line.txt", lambda: node_files.command_line(self._agent)
        yield "agent.log", lambda: node_files.log_file(self._agent)
        yield "journal.log", node_files.journal
        yield "services.json", lambda: rows(Dump(self._maps).frontends())
        yield "backends.json", lambda: rows(Dump(self._maps).backends())
        yield "counters.json", lambda: rows(Dump(self._maps).service_counters())
        yield "reasons.json", self._reasons
        yield "conntrack.json", self._flows
        yield "affinity.json", self._affinity
        yield "metrics.txt", lambda: [self._ask(METRICS)]
        yield "kernel.txt", node_files.kernel
        yield "features.json", node_files.features
        yield "sysctls.txt", node_files.sysctls
        yield "devices.json", node_files.devices
        yield "routes.json", node_files.routes
        yield "neighbours.json", node_files.neighbours
        yield "namespaces.json", lambda: node_files.namespaces(self._cni_results)
        yield "bpf.json", node_files.programs
        yield "pins.txt", lambda: node_files.pins(pin_folder(self._root))
        yield "iptables.txt", node_files.netfilter
        yield "nftables.txt", node_files.nftables
        try:
            each_map = self._maps.maps
        except (Exception, SystemExit):  # services.json and others have said so.
            return
        for name, each in sorted(each_map.items(), key=lambda item: item[1].spec.max_entries):
            yield f"maps/{name}.txt", partial(node_files.content, each)

    @cached_property
    def name(self) -> str:
        """The Node's; this host's where no agent has left it."""
        try:
            agent = self._agent
        except (Exception, SystemExit):  # A file says so.
            agent = None
        return agent.node if agent is not None else os.environ.get("NODE_NAME") or os.uname().nodename

    @cached_property
    def _maps(self) -> MapSet:
        return open_maps(self._root)

    @cached_property
    def _agent(self) -> state.AgentState | None:
        return state.load_latest(pin_folder(self._root))

    def learn(self, secrets: Secrets) -> Iterator[str]:
        """Reads secrets that logs may have, too. There is no file of them."""
        secrets.learn_files([*sorted(_KUBERNETES.glob("*.conf")), TOKEN_FILE])
        secrets.learn_variables(os.environ)
        if self._agent is not None:
            # With its name anybody on the node could keep the agent's socket busy.
            secrets.learn([self._agent.socket])
        secrets.learn_variables(node_files.variables(self._agent))
        secrets.learn_files(node_files.kubeconfigs(self._agent))
        yield from ()

    def _about(self) -> dict[str, Any]:
        about = {"version": ebpfproxy.__version__, "node": self.name, "time": time.time()}
        return {**about, "bpf_root": str(self._root)}

    def _check(self) -> Iterator[str]:
        return rows([check(self._root, self._maps, *ask_agent(self._root, CHECK, _AGENT_SECONDS))])

    def _ask(self, page: str) -> str:
        reply = self._answered(lambda: ask(self._root, page, _AGENT_SECONDS))
        if reply.status != 200:
            raise NoAgentError(reply.body.decode(errors="replace"))
        return reply.body.decode(errors="replace")

    def _answered(self, question: Callable[[], T]) -> T:
        """An agent that is silent is asked once: who asks waits."""
        if self._silence is not None:
            raise self._silence
        try:
            return question()
        except NoAgentError as error:
            self._silence = error
            raise

    def _reasons(self) -> Iterator[str]:
        """Of each endpoint why it is used, or is not, as explain asks the agent for it."""
        found = sorted({(each.namespace, each.name) for each in Dump(self._maps).names.values()})
        for key in found[:_MOST_SERVICES]:
            yield from rows([self._answered(partial(ask_reasons, self._root, *key, _AGENT_SECONDS))])
        if len(found) > _MOST_SERVICES:
            yield f"[cut here: {len(found) - _MOST_SERVICES} more Services]\n"

    def _flows(self) -> Iterator[str]:
        found = conntrack.read(self._maps, most=2 * _MOST_FLOWS)
        yield from rows(row for row, _ in found[:_MOST_FLOWS])
        if len(found) > _MOST_FLOWS:
            yield f"[cut here: a file has {_MOST_FLOWS} flows at most]\n"

    def _affinity(self) -> Iterator[str]:
        return rows(row for row, _ in affinity_rows(self._maps, time.monotonic_ns(), names_by_cookie()))
