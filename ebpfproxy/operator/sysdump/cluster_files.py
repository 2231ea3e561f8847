"""The same of other nodes: each agent's pod makes its node's archive; the API server has pods and logs."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import yaml

from ebpfproxy import yaml_text
from ebpfproxy.kube.events.event import CONTROLLER
from ebpfproxy.kube.exec import Channel
from ebpfproxy.kube.failures import Failure
from ebpfproxy.operator import pod_status
from ebpfproxy.operator.agents import Agents
from ebpfproxy.operator.api import Api, ApiError, Object
from ebpfproxy.operator.printing import Say
from ebpfproxy.operator.sysdump.archive import ERRORS, MOST, Archive, Folder, last, members, rows
from ebpfproxy.operator.sysdump.secrets import without

#: Nodes that are asked at the same time.
_PARALLEL = 8
_LOG_LINES = "20000"
#: An agent of another version may keep another limit.
_MOST_RECEIVED = 2 * MOST


def dump(api: Api, agents: Agents, nodes: Sequence[str], archive: Archive, say: Say) -> None:
    """Adds a folder for each node, and one for the cluster; a node that does not answer is a line in it."""
    cluster = archive.folder("cluster")
    namespace, name = agents.namespace, agents.name
    for kind in ("DaemonSet", "ConfigMap"):
        cluster.add(f"{kind.lower()}.json", partial(_object, api, kind, namespace, name))
    cluster.add("version.json", lambda: rows([api.version()]))
    cluster.add("nodes.json", lambda: _objects(api.list("Node", "")))
    cluster.add("pods.json", lambda: _objects(pod_status.of_daemon_set(api, namespace, name)))
    cluster.add("events.json", lambda: _events(api, namespace, name))
    cluster.close()
    with ThreadPoolExecutor(_PARALLEL) as workers:
        asked = {workers.submit(_ask, agents, node): node for node in nodes}
        for done in as_completed(asked):
            node = asked.pop(done)
            folder = archive.folder(node)
            try:
                _merge(folder, done.result())
                say(f"{node}: done")
            except (ApiError, Failure, tarfile.TarError, OSError, EOFError) as error:
                told = agents.told(node, error) if isinstance(error, Failure) else str(error)
                folder.fail("sysdump", told)
                say(f"{node}: {told}; only what the API server has of it is in the archive")
            _of_api(api, agents, node, folder)
            folder.close()


def _ask(agents: Agents, node: str) -> bytes:
    """Returns the archive that the node's agent makes. Raises ApiError and Failure."""
    running = agents.start(node, ("sysdump", "-"))
    received, said = bytearray(), bytearray()
    for channel, data in running.output():
        into = received if channel is Channel.STDOUT else said
        into += data
        if len(into) > _MOST_RECEIVED:
            running.end_input()
            raise Failure("exec", f"it sends more than {_MOST_RECEIVED} bytes")
    if running.code != 0:
        lines = said.decode(errors="replace").strip().splitlines() or ["the connection was lost"]
        raise Failure("exec", lines[-1])
    return bytes(received)


def _merge(folder: Folder, data: bytes) -> None:
    for name, text in members(data):
        if name == ERRORS:
            for line in text.splitlines():
                what, _, error = line.partition(": ")
                folder.fail(what, error)
        else:
            folder.add(name, partial(_only, text))


def _only(text: str) -> list[str]:
    return [text]


def _log(api: Api, namespace: str, pod: str, query: dict[str, str]) -> Iterator[str]:
    return last(api.log(namespace, pod, **query))


def _of_api(api: Api, agents: Agents, node: str, folder: Folder) -> None:
    pod = agents.pods[node]
    namespace, name = agents.namespace, pod["metadata"]["name"]
    spec = pod.get("spec") or {}
    for each in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        container = each["name"]
        for previous in (False, True):
            query = {"container": container, "tailLines": _LOG_LINES}
            if previous:
                if not pod_status.has_restarted(pod, container):
                    continue
                query["previous"] = "true"
            file = f"logs/{container}{'.previous' * previous}.log"
            folder.add(file, partial(_log, api, namespace, name, query))


def _object(api: Api, kind: str, namespace: str, name: str) -> Iterator[str]:
    found = api.get(kind, namespace, name)
    if found is None:
        raise LookupError(f"there is no {kind} {namespace}/{name}")
    if kind == "ConfigMap":
        found = {**found, "data": {key: _parsed(text) for key, text in (found.get("data") or {}).items()}}
    yield from _objects([found])


def _parsed(text: str) -> Any:
    """A file of YAML as objects, whose fields have names."""
    try:
        found = yaml_text.load_all(text)
    except yaml.YAMLError:
        return text
    return found if any(isinstance(each, dict | list) for each in found) else text


def _objects(found: Iterable[Object]) -> Iterator[str]:
    return rows(map(without, found))


def _events(api: Api, namespace: str, name: str) -> Iterator[str]:
    """Those of the agents' objects, and of what agents say of Services and Nodes."""
    yield from _objects(api.list("Event", "", fieldSelector=f"reportingComponent={CONTROLLER}"))
    for each in api.list("Event", namespace):
        if str((each.get("involvedObject") or {}).get("name", "")).startswith(name):
            yield from _objects([each])
