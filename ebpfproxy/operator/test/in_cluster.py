"""The test in a cluster, step by step, in a namespace of its own that is removed in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from ebpfproxy.operator import pod_status
from ebpfproxy.operator.api import Api, ApiError, Object
from ebpfproxy.operator.printing import Say
from ebpfproxy.operator.test import objects, questions
from ebpfproxy.operator.test.objects import CLIENT, HOST, LOAD, SERVER
from ebpfproxy.operator.test.questions import Client, Cluster, Question, Server, Service
from ebpfproxy.operator.test.results import Failure, Report, Result, failure, report
from ebpfproxy.operator.test.site import CannotTestError, Node, Site, Wanted, read
from ebpfproxy.operator.waiting import Wait

#: Seconds for which a client and a server wait for the first right answer: controllers have to make
#: endpoints, and agents to program them. Where namespaces of pods come and go all the time the kernel's lock
#: of devices (rtnl) keeps an agent for more than 15 seconds.
_PATIENCE = 45
#: Under load a client's line comes each second.
_LOAD_LINES = 3
_EXISTS, _FORBIDDEN = 409, 403
RESTART = "agent restart under load"

Lines = list[dict[str, Any]]


def run(api: Api, wanted: Wanted, say: Say) -> Report:
    """Raises CannotTestError and ApiError; nothing is left then either, nor after KeyboardInterrupt."""
    site = read(api, wanted)
    for remark in site.remarks:
        say(remark)
    made = _Test(api, wanted, site, say)
    try:
        return made.run()
    finally:
        made.remove()


class _Test:
    def __init__(self, api: Api, wanted: Wanted, site: Site, say: Say) -> None:
        self._api, self._wanted, self._site, self._say = api, wanted, site, say
        self._namespace = wanted.namespace
        self._exists = False
        #: The agents' pods by node, and addresses of pods by name, for explain.
        self._agents = {node.name: node.agent for node in site.nodes}
        self._addresses: dict[str, tuple[str, ...]] = {}

    def run(self) -> Report:
        self._make_namespace()
        services = {each.name: each for each in self._make(objects.services(self._namespace))}
        servers, asking = self._start_servers(services[objects.LOCAL])
        cluster = Cluster(self._site.nodes, servers, services, self._site.nodes[0].name)
        if self._label_sctp(servers):
            (sctp,) = self._make([objects.over_sctp(self._namespace)])
            services[sctp.name] = sctp
        self._wait_for_endpoints(cluster)
        results = [*self._restart(cluster)] if self._wanted.restart else []
        for role, number, node in self._each_node(CLIENT, HOST):
            client = Client(f"{role}-{number}", role, node)
            asking[client] = questions.of_client(client, cluster)
            self._start(client, {"patience": _PATIENCE, "questions": questions.plain(asking[client])})
        for client, asked in asking.items():
            results += self._answers(client, asked)
        results += _skipped(cluster, self._wanted)
        return report(_in_order(results), _nodes(len(self._site.nodes)), self._site.remarks)

    # -- objects

    def _make_namespace(self) -> None:
        try:
            # What an interrupted request has made is removed as well.
            self._exists = True
            self._api.create(objects.namespace(self._namespace))
        except ApiError as error:
            self._exists = error.status == 0
            if error.status == _EXISTS:
                raise CannotTestError(
                    f"namespace {self._namespace} exists: another test runs, or was killed; `kubectl delete"
                    f" namespace {self._namespace}` removes it, and --namespace names another"
                ) from error
            raise
        self._say(f"namespace {self._namespace} created")
        for name in self._site.image.pull_secrets:
            secret = self._api.get("Secret", self._wanted.agent_namespace, name)
            if secret is not None:
                meta = {"name": name, "namespace": self._namespace}
                self._api.create({**secret, "metadata": meta})

    def remove(self) -> None:
        """Deletes the namespace with everything in it, and waits until it is gone."""
        if not self._exists:
            return
        hint = f"`kubectl delete namespace {self._namespace}` removes it"
        if self._wanted.keep:
            self._say(f"namespace {self._namespace} stays: {hint}")
            return
        try:
            self._api.delete("Namespace", "", self._namespace)
            wait = Wait(self._wanted.seconds)
            for _ in wait:
                if self._api.within(wait).get("Namespace", "", self._namespace) is None:
                    self._say(f"namespace {self._namespace} removed")
                    return
            self._say(f"namespace {self._namespace} is deleted, but not gone yet: are all nodes up?")
        except ApiError as error:
            self._say(f"namespace {self._namespace} is not removed: {error}; {hint}")
        except KeyboardInterrupt:
            self._say(f"namespace {self._namespace} may not be removed: {hint}")
            raise

    def _make(self, items: Iterable[Object]) -> list[Service]:
        made = [self._api.create(item) for item in items]
        return [
            Service(
                item["metadata"]["name"],
                tuple(each for each in item["spec"].get("clusterIPs") or () if each != "None"),
                {each["protocol"]: each["nodePort"] for each in item["spec"]["ports"] if "nodePort" in each},
            )
            for item in made
        ]

    def _each_node(self, *roles: str) -> Iterator[tuple[str, int, Node]]:
        for number, node in enumerate(self._site.nodes, 1):
            for role in roles:
                yield role, number, node

    def _start(self, client: Client, plan: Object, **labels: str) -> None:
        item = objects.pod(
            (self._namespace, client.name), client.role, client.node.name, self._site.image, plan, **labels
        )
        wait = Wait(self._wanted.seconds)
        for is_last in wait:
            try:
                self._api.within(wait).create(item)
                return
            except ApiError as error:
                # A new namespace gets its service account after a moment.
                if is_last or error.status != _FORBIDDEN or "serviceaccount" not in str(error):
                    raise

    # -- servers

    def _start_servers(self, local: Service) -> tuple[tuple[Server, ...], dict[Client, list[Question]]]:
        """One on each node; two on an only node, for session affinity. Returns also what each asks."""
        nodes = self._site.nodes if len(self._site.nodes) > 1 else self._site.nodes * 2
        asking = {}
        for number, node in enumerate(nodes, 1):
            server = Client(f"{SERVER}-{number}", SERVER, node)
            asked = questions.hairpin(local, server.name, node, len(self._site.nodes) > 1)
            asking[server] = asked
            plan = {
                "serve": {"name": server.name, "port": objects.TARGET_PORT},
                "patience": _PATIENCE,
                "questions": questions.plain(asked),
            }
            first = {objects.FIRST: objects.YES} if node == nodes[0] else {}
            self._start(server, plan, **first)
        found = self._wait_ready(SERVER, len(nodes))
        self._say(f"servers run on {_nodes(len(self._site.nodes))}")
        servers = [Server(each.name, each.node.name, found[each.name]) for each in asking]
        return tuple(servers), asking

    def _wait_ready(self, role: str, count: int) -> dict[str, tuple[str, ...]]:
        """Returns the addresses of the pods by name, once all are ready. Raises CannotTestError."""
        found: list[Object] = []
        wait = Wait(self._wanted.seconds)
        for _ in wait:
            found = self._api.within(wait).list(
                "Pod", self._namespace, labelSelector=f"{objects.LABEL}={role}"
            )
            if len(found) >= count and all(map(pod_status.is_ready, found)):
                break
            if any(pod_status.cannot_start(pod) or pod_status.has_ended(pod) for pod in found):
                raise CannotTestError(self._why(found))
        else:
            raise CannotTestError(self._why(found))
        self._note(found)
        return {pod["metadata"]["name"]: self._addresses[pod["metadata"]["name"]] for pod in found}

    def _note(self, found: Iterable[Object]) -> None:
        for pod in found:
            ips = (pod.get("status") or {}).get("podIPs") or ()
            self._addresses[pod["metadata"]["name"]] = tuple(each["ip"] for each in ips)

    def _why(self, found: Iterable[Object]) -> str:
        lines = ["pods of the test are not ready:"]
        for pod in found:
            if trouble := pod_status.trouble(pod):
                warning = pod_status.last_warning(self._api, self._namespace, "Pod", pod["metadata"]["name"])
                more = f" ({warning})" if warning else ""
                lines.append(f"  node {pod_status.node_of(pod)}: {trouble}{more}")
        return "\n".join(lines)

    def _label_sctp(self, servers: Iterable[Server]) -> bool:
        """Marks the servers whose kernel has SCTP; returns whether any is."""
        found = False
        for server in servers:
            lines = self._lines(server.name, bool)
            if lines and "SCTP" in lines[0].get("serving", ()):
                self._api.patch(
                    "Pod", self._namespace, server.name, {"metadata": {"labels": {objects.SCTP: objects.YES}}}
                )
                found = True
        return found

    def _wait_for_endpoints(self, cluster: Cluster) -> None:
        """Until the Service of all servers has them all, in each family; others follow at once."""
        addresses = cluster.services[objects.ANY].addresses
        families = set(map(questions.family, addresses))
        wanted = {
            a for server in cluster.servers for a in server.addresses if questions.family(a) in families
        }
        missing = wanted
        wait = Wait(self._wanted.seconds)
        for _ in wait:
            slices = self._api.within(wait).list(
                "EndpointSlice", self._namespace, labelSelector=f"kubernetes.io/service-name={objects.ANY}"
            )
            endpoints = [each for item in slices for each in item.get("endpoints") or ()]
            missing = wanted - {each["addresses"][0] for each in endpoints if each["conditions"].get("ready")}
            if not missing:
                return
        raise CannotTestError(
            f"EndpointSlices of Service {objects.ANY} lack {', '.join(sorted(missing))}: does the control"
            " plane's controller manager run?"
        )

    # -- results

    def _lines(self, name: str, complete: Callable[[Lines], bool]) -> Lines:
        """Returns what a pod has printed, once it is complete or the time is over."""
        lines: Lines = []
        wait = Wait(self._wanted.seconds)
        for _ in wait:
            try:
                text = self._api.within(wait).log(self._namespace, name)
            except ApiError as error:
                # The container may still be created.
                if error.status == 0:
                    raise
                continue
            complete_text = text[: text.rfind("\n") + 1]
            lines = [msgspec.json.decode(line) for line in complete_text.splitlines() if line.startswith("{")]
            if complete(lines):
                break
        return lines

    def _answers(self, client: Client, asked: list[Question]) -> Iterator[Result]:
        lines = self._lines(client.name, lambda lines: any("done" in line for line in lines))
        pod = self._api.get("Pod", self._namespace, client.name)
        self._note([pod] if pod else [])
        by_id = {line["id"]: line for line in lines if "id" in line}
        silent = (
            f"its pod said nothing: {pod_status.trouble(pod) or 'it has not finished'}"
            if pod
            else "its pod is gone"
        )
        for number, question in enumerate(asked):
            line = by_id.get(number, {"asked": 1, "wrong": silent})
            wrong = line.get("wrong", "")
            yield Result(
                check=question.check,
                protocol=question.protocol,
                family=question.family,
                asked=line.get("asked", 0),
                skipped=line.get("skipped", ""),
                failure=self._failure(client, question, wrong) if wrong else None,
            )

    def _failure(self, client: Client, question: Question, came: str) -> Failure:
        node = client.node.name
        return failure(
            f"{node} itself" if client.role == HOST else f"pod {client.name} on {node}",
            "the server" if question.check == questions.DIRECT else f"Service {question.service}",
            f"{questions.endpoint(question)}/{question.protocol}",
            questions.expected(question),
            came,
            explain=self._explain(client, question),
        )

    def _explain(self, client: Client, question: Question) -> str:
        """The command, on the node that decides: there the client is a pod, the host, or an address."""
        is_host = client.role == HOST
        source = "host" if is_host else f"{self._namespace}/{client.name}"
        if question.decided_on != client.node.name:
            known = client.node.addresses if is_host else self._addresses.get(client.name, ())
            source = next((each for each in known if questions.family(each) == question.family), source)
        command = f"ebpfproxy explain {source} {questions.endpoint(question)} --protocol {question.protocol}"
        agent = self._agents[question.decided_on]
        if not agent:
            return f"{command}, on {question.decided_on}"
        return f"kubectl -n {self._wanted.agent_namespace} exec {agent} -- {command}"

    # -- load

    def _restart(self, cluster: Cluster) -> Iterator[Result]:
        """Ends the agents' pods one after the other, while clients on all nodes ask all the time."""
        asked = [
            question
            for service, protocol in cluster.protocols(objects.ANY, objects.ANY)
            for question in questions.at_cluster_ips(RESTART, self._site.nodes[0], service, protocol)
        ]
        clients = [Client(f"{LOAD}-{number}", LOAD, node) for _, number, node in self._each_node(LOAD)]
        for client in clients:
            self._start(client, {"patience": _PATIENCE, "load": questions.plain(asked)})
        for client in clients:
            self._load_line(client, 1)
        for node in self._site.nodes:
            failed = self._restart_agent(node) if node.agent else None
            if failed is not None:
                yield Result(check=RESTART, failure=failed)
        for client in clients:
            line = self._load_line(client, len(self._lines(client.name, bool)) + _LOAD_LINES)
            wrong = f"of {line['asked']} times {line['failed']} failed, the last: {line['wrong']}"
            question = msgspec.structs.replace(asked[line["id"]], decided_on=client.node.name)
            failed = self._failure(client, question, wrong) if line["failed"] else None
            yield Result(check=RESTART, asked=line["asked"], failure=failed)

    def _load_line(self, client: Client, count: int) -> dict[str, Any]:
        lines = self._lines(client.name, lambda lines: len(lines) >= count)
        if len(lines) < count:
            raise CannotTestError(f"pod {client.name} on {client.node.name} makes no load")
        return dict(lines[-1]["load"])

    def _restart_agent(self, node: Node) -> Failure | None:
        namespace, name = self._wanted.agent_namespace, self._wanted.daemon_set
        self._api.delete("Pod", namespace, node.agent)
        why = "no pod followed"
        wait = Wait(self._wanted.seconds)
        for _ in wait:
            found = self._api.within(wait).list("Pod", namespace, fieldSelector=f"spec.nodeName={node.name}")
            for pod in found:
                if pod_status.is_owned_by(pod, name) and pod["metadata"]["name"] != node.agent:
                    self._agents[node.name] = pod["metadata"]["name"]
                    why = pod_status.trouble(pod)
                    if not why:
                        self._say(f"agent of {node.name} restarted")
                        return None
        return Failure(
            sentence=f"The agent of {node.name} is not ready after its restart: {why}.",
            explain=f"kubectl -n {namespace} describe pod {self._agents[node.name]}",
        )


def _skipped(cluster: Cluster, wanted: Wanted) -> Iterator[Result]:
    """What this cluster does not have, and what nobody asked for."""
    if objects.OVER_SCTP not in cluster.services:
        for check in (questions.CLUSTER_IP, questions.NODE_PORT):
            yield Result(check=check, protocol="SCTP", skipped="no node's kernel has SCTP")
    addresses = cluster.services[objects.ANY].addresses
    for family in ("IPv4", "IPv6"):
        if family not in map(questions.family, addresses):
            yield Result(
                check=questions.CLUSTER_IP, family=family, skipped="the cluster's Services have none"
            )
        elif not any(questions.family(a) == family for node in cluster.nodes for a in node.node_ports):
            why = "no node has an InternalIP where NodePorts answer"
            yield Result(check=questions.NODE_PORT, family=family, skipped=why)
    if len(cluster.nodes) == 1:
        yield Result(check=questions.EXTERNAL, skipped="clients on other nodes need a second node")
    if not wanted.restart:
        yield Result(check=RESTART, skipped="only with --restart")


_ORDER = (
    questions.DIRECT,
    questions.CLUSTER_IP,
    questions.NODE_PORT,
    questions.AFFINITY,
    questions.INTERNAL,
    questions.EXTERNAL,
    questions.HAIRPIN,
    RESTART,
)


def _in_order(results: Iterable[Result]) -> list[Result]:
    """By check, IPv4 first, and TCP first."""
    protocols = ("TCP", "UDP", "SCTP", "")
    return sorted(
        results, key=lambda r: (_ORDER.index(r.check), not r.family, r.family, protocols.index(r.protocol))
    )


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
