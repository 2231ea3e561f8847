"""Single objects of a few kinds beside the watched ones, and the requests of clients such as kubectl.

Get, list, create, replace, delete, merge patches and server-side apply, with managed fields, generations and dry runs;
discovery. Nodes, Services and EndpointSlices, which are watched, can be created, read by name, merge-patched and
deleted; Services get addresses and NodePorts. A namespace is deleted with everything in it. Responses have the texts
of a real API server. No controller runs here.
"""

from __future__ import annotations

import copy
import itertools
import json
import threading
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.apiserver import bodies, fields
from tests.apiserver.fields import ConflictError, Managed, Object
from tests.apiserver.selectors import Selector
from tests.apiserver.store import Store, encode


class Resource(NamedTuple):
    group: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/v1" if self.group else "v1"

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


_NODES = Resource("", "nodes", "Node", False)
_SERVICES = Resource("", "services", "Service")
_SLICES = Resource("discovery.k8s.io", "endpointslices", "EndpointSlice")
#: The store has these, and notifies their watches.
_WATCHED = (_NODES, _SERVICES, _SLICES)
RESOURCES = (
    Resource("", "configmaps", "ConfigMap"),
    Resource("", "events", "Event"),
    Resource("", "namespaces", "Namespace", False),
    _NODES,
    Resource("", "pods", "Pod"),
    Resource("", "secrets", "Secret"),
    Resource("", "serviceaccounts", "ServiceAccount"),
    _SERVICES,
    _SLICES,
    Resource("apps", "daemonsets", "DaemonSet"),
    Resource("rbac.authorization.k8s.io", "clusterroles", "ClusterRole", False),
    Resource("rbac.authorization.k8s.io", "clusterrolebindings", "ClusterRoleBinding", False),
)
_VERBS = ["create", "delete", "get", "list", "patch", "update"]
_IMMUTABLE = {"DaemonSet": ("spec", "selector"), "ClusterRoleBinding": ("roleRef",)}
_DEFAULTS = {"DaemonSet": ("spec", "revisionHistoryLimit", 10)}


class Answer(NamedTuple):
    code: int
    body: bytes
    headers: Mapping[str, str] = {}


class _Error(Exception):
    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        self.answer = Answer(code, bodies.status(code, reason, message, details or {}))


class _Request(NamedTuple):
    method: str
    resource: Resource
    namespace: str
    name: str
    part: str
    query: Mapping[str, str]
    body: bytes
    content_type: str
    user: str
    agent: str

    @property
    def verb(self) -> str:
        reading = "get" if self.name else "list"
        return {"GET": reading, "POST": "create", "PUT": "update"}.get(self.method, self.method.lower())


class Cluster:
    """All objects by resource, namespace and name. Any thread may use it.

    ``denied``: ``daemonsets``, or with a verb ``patch daemonsets``; ``warnings``: a header's text by resource.
    """

    def __init__(self, store: Store, denied: set[str]) -> None:
        self._store = store
        self._denied = denied
        self._lock = threading.RLock()
        self._objects: dict[tuple[str, str, str], Managed] = {}
        self.namespaces = {"default", "kube-public", "kube-system"}
        self.warnings: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self.version = {"major": "1", "minor": "36", "gitVersion": "v1.36.2"}

    # -- for tests

    def put(self, item: Object, manager: str = "kubeadm") -> Object:
        """Creates or replaces an object, as the update of another manager."""
        resource = next(each for each in RESOURCES if each.kind == item["kind"])
        key = (resource.plural, item["metadata"].get("namespace", ""), item["metadata"]["name"])
        with self._lock:
            before = self._objects.get(key)
            return self._write(key, before, fields.updated(before, copy.deepcopy(item), manager), resource)

    def get(self, plural: str, namespace: str, name: str) -> Object | None:
        with self._lock:
            found = self._objects.get((plural, namespace, name))
            return copy.deepcopy(found.item) if found is not None else None

    def all(self, plural: str) -> list[Object]:
        with self._lock:
            return [copy.deepcopy(each.item) for key, each in self._objects.items() if key[0] == plural]

    # -- requests

    def answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes,
        headers: Mapping[str, str],
        user: str,
    ) -> Answer:
        parts = path.strip("/").split("/")
        if method == "GET" and (found := self._discovery(parts)) is not None:
            return Answer(200, encode(found))
        try:
            request = self._read(method, parts, query, body, headers, user)
            with self._lock:
                return self._serve(request)
        except _Error as error:
            return error.answer

    def resource_of(self, path: str) -> str:
        """Returns the plural, for faults; empty for other paths than resources."""
        parts = path.strip("/").split("/")
        return next((each.plural for each in RESOURCES if each.plural in parts[2:6]), "")

    def _read(
        self,
        method: str,
        parts: list[str],
        query: Mapping[str, str],
        body: bytes,
        headers: Mapping[str, str],
        user: str,
    ) -> _Request:
        if parts[0] == "api":
            parts = ["apis", "", *parts[1:]]
        group, version, rest = "".join(parts[1:2]), parts[2:3], parts[3:]
        namespace = ""
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        for each in RESOURCES:
            if rest and version == ["v1"] and each.group == group and each.plural == rest[0]:
                return _Request(
                    method,
                    each,
                    namespace,
                    rest[1] if len(rest) > 1 else "",
                    "/".join(rest[2:]),
                    query,
                    body,
                    headers.get("Content-Type", "").partition(";")[0],
                    user,
                    headers.get("User-Agent", "").partition("/")[0],
                )
        raise _Error(404, "NotFound", bodies.NOT_FOUND)

    def _serve(self, request: _Request) -> Answer:
        self._authorize(request)
        if request.method == "GET" and not request.name:
            return self._list(request)
        if request.name == "" and request.method == "POST":
            request = request._replace(name=json.loads(request.body)["metadata"]["name"])
        if request.resource in _WATCHED:
            return self._watched(request)
        key = (request.resource.plural, request.namespace, request.name)
        before = self._objects.get(key)
        creates = request.method == "POST" or request.content_type == "application/apply-patch+yaml"
        if before is None and not creates:
            raise self._missing(request)
        if request.resource.namespaced and request.namespace not in self.namespaces and creates:
            raise _Error(404, "NotFound", f'namespaces "{request.namespace}" not found')
        if request.method == "GET":
            assert before is not None
            return Answer(200, encode(before.item))
        dry_run = request.query.get("dryRun") == "All"
        if request.method == "DELETE":
            if not dry_run:
                del self._objects[key]
                if request.resource.kind == "Namespace":
                    self._empty(request.name)
            return Answer(200, encode({"kind": "Status", "apiVersion": "v1", "status": "Success"}))
        if request.method == "POST" and before is not None:
            raise _Error(
                409, "AlreadyExists", f'{request.resource.qualified} "{request.name}" already exists'
            )
        made = self._write(key, before, self._change(request, before), request.resource, dry_run=dry_run)
        if request.resource.kind == "Namespace" and not dry_run:
            self.namespaces.add(request.name)
        warning = self.warnings.get(request.resource.plural)
        headers = {"Warning": f'299 - "{warning}"'} if warning else {}
        return Answer(201 if before is None else 200, encode(made), headers)

    def _watched(self, request: _Request) -> Answer:
        """Changes an object of the store, which notifies its watches."""
        plural, key = request.resource.plural, (request.namespace, request.name)
        found = [each.body for each in self._store.items(plural)[1] if each.key == key]
        if request.method == "POST" and not found:
            item = json.loads(request.body)
            item["metadata"] |= {"namespace": request.namespace, "uid": str(uuid.uuid4())}
            if request.resource == _SERVICES:
                self._allocate(item["spec"])
            self._store.put(plural, item)
            return Answer(201, encode(item))
        if not found:
            raise self._missing(request)
        item = json.loads(found[0])
        if request.method == "PATCH":
            made = _merged(item, json.loads(request.body))
            if made != item:
                self._store.put(plural, made)
            item = made
        elif request.method == "DELETE":
            self._store.delete(plural, *key)
        return Answer(200, encode(item))

    def _allocate(self, spec: Object) -> None:
        """Gives a Service addresses of both families if it prefers that, and NodePorts."""
        spec.setdefault("type", "ClusterIP")
        if spec.get("clusterIP") != "None":
            number = next(self._numbers)
            both = [f"10.96.200.{number}", f"fd00:10:96::200:{number:x}"]
            spec["clusterIPs"] = both if spec.get("ipFamilyPolicy") == "PreferDualStack" else both[:1]
            spec["clusterIP"] = both[0]
        else:
            spec["clusterIPs"] = ["None"]
        if spec["type"] == "NodePort":
            for port in spec["ports"]:
                port.setdefault("nodePort", 31000 + next(self._numbers))

    def _empty(self, namespace: str) -> None:
        self.namespaces.discard(namespace)
        for key in [key for key in self._objects if key[1] == namespace]:
            del self._objects[key]
        for resource in (_SERVICES, _SLICES):
            for each in self._store.items(resource.plural)[1]:
                if each.key[0] == namespace:
                    self._store.delete(resource.plural, *each.key)

    def _authorize(self, request: _Request) -> None:
        resource, verb = request.resource, request.verb
        denied = {resource.plural, f"{verb} {resource.plural}"} & self._denied
        if not denied and request.user != "system:anonymous":
            return
        what = f'{resource.qualified} "{request.name}"' if request.name else resource.qualified
        where = f'in the namespace "{request.namespace}"' if request.namespace else "at the cluster scope"
        raise _Error(
            403,
            "Forbidden",
            f'{what} is forbidden: User "{request.user}" cannot {verb} resource "{resource.plural}"'
            f' in API group "{resource.group}" {where}',
        )

    @staticmethod
    def _missing(request: _Request) -> _Error:
        return _Error(404, "NotFound", f'{request.resource.qualified} "{request.name}" not found')

    def _list(self, request: _Request) -> Answer:
        chosen = Selector(request.query.get("labelSelector", ""))
        wanted = [part.partition("=") for part in request.query.get("fieldSelector", "").split(",") if part]
        items = [
            managed.item
            for (plural, namespace, name), managed in sorted(self._objects.items())
            if plural == request.resource.plural
            and request.namespace in ("", namespace)
            and chosen((namespace, name), managed.item["metadata"].get("labels") or {})
            and all(_at(managed.item, path.split(".")) == value for path, _, value in wanted)
        ]
        head = {"kind": f"{request.resource.kind}List", "apiVersion": request.resource.api_version}
        meta = {"resourceVersion": str(self._store.version)}
        return Answer(200, encode({**head, "metadata": meta, "items": items}))

    def _change(self, request: _Request, before: Managed | None) -> Managed:
        item = json.loads(request.body)
        if request.content_type == "application/apply-patch+yaml":
            manager = request.query.get("fieldManager")
            if not manager:
                raise _Error(
                    422,
                    "Invalid",
                    'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: is required for'
                    " apply patch",
                )
            item["metadata"].setdefault("namespace", request.namespace)
            if not request.resource.namespaced:
                item["metadata"].pop("namespace", None)
            try:
                return fields.applied(before, item, manager, force=request.query.get("force") == "true")
            except ConflictError as error:
                causes = [
                    {
                        "reason": "FieldManagerConflict",
                        "message": f"conflict with {each.words}",
                        "field": fields.shown(each.path),
                    }
                    for each in error.conflicts
                ]
                raise _Error(409, "Conflict", str(error), {"causes": causes}) from error
        if request.method == "PATCH":
            assert before is not None
            item = _merged(before.item, {"status": item["status"]} if request.part == "status" else item)
        item.setdefault("kind", request.resource.kind)
        item.setdefault("apiVersion", request.resource.api_version)
        if request.resource.namespaced:
            item["metadata"]["namespace"] = request.namespace
        return fields.updated(before, item, request.query.get("fieldManager") or request.agent)

    def _write(
        self,
        key: tuple[str, str, str],
        before: Managed | None,
        made: Managed,
        resource: Resource,
        *,
        dry_run: bool = False,
    ) -> Object:
        """Writes only changes, as a real server does."""
        if path := _IMMUTABLE.get(resource.kind):
            was, now = (_at(each.item, path) if each else None for each in (before, made))
            if before is not None and was != now:
                kind = f"{resource.kind}.{resource.group}"
                raise _Error(
                    422,
                    "Invalid",
                    f'{kind} "{key[2]}" is invalid: {".".join(path)}: Invalid value: {json.dumps(now)}: field is'
                    " immutable",
                )
        if resource.kind in _DEFAULTS:
            section, name, value = _DEFAULTS[resource.kind]
            made.item[section].setdefault(name, value)
        meta = made.item["metadata"]
        if before is None:
            meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-11-21T10:00:00Z"}
        if resource.kind in ("DaemonSet", "Pod"):
            same = before is not None and before.item.get("spec") == made.item.get("spec")
            meta["generation"] = meta.get("generation", 0) + (not same)
        meta["managedFields"] = made.managed_fields()
        if before is not None and before.item == made.item:
            return before.item
        if not dry_run:
            with self._store.changed:
                self._store.version += 1
                meta["resourceVersion"] = str(self._store.version)
            self._objects[key] = made
        return made.item

    # -- discovery

    def _discovery(self, parts: list[str]) -> Object | None:
        groups = sorted({each.group for each in RESOURCES if each.group})
        match parts:
            case ["version"]:
                return dict(self.version)
            case ["api"]:
                return {"kind": "APIVersions", "versions": ["v1"]}
            case ["apis"]:
                versions = {name: [{"groupVersion": f"{name}/v1", "version": "v1"}] for name in groups}
                listed = [
                    {"name": name, "versions": each, "preferredVersion": each[0]}
                    for name, each in versions.items()
                ]
                return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
            case ["api", "v1"]:
                return _resources("")
            case ["apis", group, "v1"] if group in groups:
                return _resources(group)
        return None


def _resources(group: str) -> Object:
    listed = [
        {
            "name": each.plural,
            "singularName": each.kind.lower(),
            "namespaced": each.namespaced,
            "kind": each.kind,
            "verbs": _VERBS,
        }
        for each in RESOURCES
        if each.group == group
    ]
    version = f"{group}/v1" if group else "v1"
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": listed}


def _at(item: Any, path: Any) -> Any:
    for part in path:
        item = item.get(part) if isinstance(item, dict) else None
    return item


def _merged(below: Any, above: Any) -> Any:
    """RFC 7396."""
    if not isinstance(above, dict):
        return above
    made = dict(below) if isinstance(below, dict) else {}
    for key, each in above.items():
        if each is None:
            made.pop(key, None)
        else:
            made[key] = _merged(made.get(key), each)
    return made
