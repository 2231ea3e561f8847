"""Managers of fields and server-side apply (KEP-555, sigs.k8s.io/structured-merge-diff).

A field is a path: names, and for lists with keys ``k:{"name":"x"}``; a value that is replaced as a whole is one
field. The schema covers lists and maps of the kinds that tests apply.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Object = dict[str, Any]
Path = tuple[str, ...]
Manager = tuple[str, str]
"""Its name, and ``Apply`` or ``Update``."""

#: These lists have items with keys; the values are defaults of keys.
_KEYED: dict[str, dict[str, Any]] = {
    "containers": {"name": None},
    "initContainers": {"name": None},
    "env": {"name": None},
    "volumes": {"name": None},
    "imagePullSecrets": {"name": None},
    "volumeMounts": {"mountPath": None},
    "ports": {"containerPort": None, "protocol": "TCP"},
}
#: These maps are replaced as a whole.
_ATOMIC = (
    "selector",
    "nodeSelector",
    "roleRef",
    "fieldRef",
    "configMapKeyRef",
    "secretKeyRef",
    "nodeAffinity",
)
#: These fields have no managers.
_NOBODYS = (
    ("apiVersion",),
    ("kind",),
    *(
        ("metadata", name)
        for name in (
            "name",
            "namespace",
            "uid",
            "resourceVersion",
            "generation",
            "creationTimestamp",
            "managedFields",
        )
    ),
)


class Conflict(NamedTuple):
    manager: Manager
    api_version: str
    path: Path

    @property
    def words(self) -> str:
        """Returns a real server's text (apimachinery, util/managedfields/internal/conflict.go)."""
        name, operation = self.manager
        return f'"{name}"' + (f" using {self.api_version}" if operation == "Update" else "")


class ConflictError(Exception):
    def __init__(self, conflicts: list[Conflict]) -> None:
        self.conflicts = conflicts
        if len(conflicts) == 1:
            message = f"1 conflict: conflict with {conflicts[0].words}: {shown(conflicts[0].path)}"
        else:
            lines = []
            for words in sorted({each.words for each in conflicts}):
                lines.append(f"conflicts with {words}:")
                lines += [f"- {shown(each.path)}" for each in conflicts if each.words == words]
            message = f"{len(conflicts)} conflicts: " + "\n".join(lines)
        super().__init__(f"Apply failed with {message}")


class Managed:
    """An object with the managers of its fields."""

    def __init__(self, item: Object, owned: dict[Manager, frozenset[Path]]) -> None:
        self.item = item
        self.owned = owned

    def managed_fields(self) -> list[Object]:
        return [
            {
                "manager": name,
                "operation": operation,
                "apiVersion": self.item["apiVersion"],
                "time": "2026-11-20T23:45:46Z",
                "fieldsType": "FieldsV1",
                "fieldsV1": _fields_v1(paths),
            }
            for (name, operation), paths in sorted(self.owned.items())
        ]


def updated(before: Managed | None, item: Object, name: str) -> Managed:
    """Records a create, replace or patch: its manager becomes the only one of each changed field."""
    was = dict(leaves(before.item)) if before else {}
    now = dict(leaves(item))
    changed = {path for path, value in now.items() if path not in was or was[path] != value}
    owned = {}
    for manager, paths in (before.owned if before else {}).items():
        owned[manager] = frozenset(path for path in paths if path in now and path not in changed)
    me = (name, "Update")
    owned[me] = owned.get(me, frozenset()) | changed
    return Managed(item, {manager: paths for manager, paths in owned.items() if paths})


def applied(before: Managed | None, wanted: Object, name: str, *, force: bool) -> Managed:
    """Raises ConflictError."""
    me = (name, "Apply")
    asked = dict(leaves(wanted))
    made = copy.deepcopy(before.item if before else {key: wanted[key] for key in ("apiVersion", "kind")})
    made.setdefault("metadata", {}).update(
        {key: wanted["metadata"][key] for key in ("name", "namespace") if key in wanted["metadata"]}
    )
    owned = dict(before.owned) if before else {}
    was = dict(leaves(made))
    conflicts = [
        Conflict(manager, wanted["apiVersion"], path)
        for path, value in sorted(asked.items(), key=lambda each: each[0])
        if path in was and was[path] != value
        for manager, paths in owned.items()
        if manager != me and path in paths
    ]
    if conflicts and not force:
        raise ConflictError(conflicts)
    for each in conflicts:
        owned[each.manager] -= {each.path}
    others = frozenset[Path]().union(*(paths for manager, paths in owned.items() if manager != me))
    # An item's keys are removed last, as it is found by them.
    for path in sorted(owned.get(me, frozenset()) - asked.keys() - others, key=_is_key):
        _delete(made, path)
    for path, value in asked.items():
        # Fields of an empty map are not listed.
        if value not in ({}, []) or not _step(made, path, make=False):
            _set(made, path, value)
    owned[me] = frozenset(asked)
    return Managed(made, {manager: paths for manager, paths in owned.items() if paths})


def leaves(item: Object) -> Iterator[tuple[Path, Any]]:
    """Returns all fields that can have managers."""
    for path, value in _leaves(item, ()):
        if path not in _NOBODYS and path[:2] != ("metadata", "managedFields"):
            yield path, value


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    name = path[-1] if path else ""
    if isinstance(value, dict) and value and name not in _ATOMIC:
        for key, each in value.items():
            yield from _leaves(each, (*path, key))
    elif isinstance(value, list) and value and name in _KEYED and isinstance(value[0], dict):
        for each in value:
            yield from _leaves(each, (*path, _key(name, each)))
    else:
        yield path, value


def _key(name: str, item: Object) -> str:
    keys = {key: item.get(key, default) for key, default in _KEYED[name].items()}
    return "k:" + json.dumps(keys, separators=(",", ":"), sort_keys=True)


def _step(holder: Any, path: Path, *, make: bool) -> Any:
    """Returns what is at a path; None where it is missing and not to be created."""
    for at, part in enumerate(path):
        is_list = path[at + 1 : at + 2] and path[at + 1].startswith("k:")
        if part.startswith("k:"):
            found = next((each for each in holder if _key(path[at - 1], each) == part), None)
            if found is None and make:
                found = {}
                holder.append(found)
                found.update(json.loads(part[2:]))
        else:
            found = holder.get(part)
            # An empty map is a field by itself until something is in it.
            if make and (found is None or (found == {} and is_list)):
                found = holder[part] = [] if is_list else {}
        if found is None:
            return None
        holder = found
    return holder


def _set(item: Object, path: Path, value: Any) -> None:
    *above, last = path
    _step(item, tuple(above), make=True)[last] = copy.deepcopy(value)


def _delete(item: Object, path: Path) -> None:
    """Deletes a field and parents that become empty; an item with only its keys is empty."""
    *above, last = path
    holder = _step(item, tuple(above), make=False)
    if holder is None:
        return
    if isinstance(holder, list):
        holder[:] = [each for each in holder if _key(above[-1], each) != last]
    else:
        if _is_key(path):
            if set(holder) <= set(json.loads(above[-1][2:])):
                _delete(item, tuple(above))
            return
        holder.pop(last, None)
    if above and not holder:
        _delete(item, tuple(above))


def _is_key(path: Path) -> bool:
    return len(path) > 1 and path[-2].startswith("k:") and path[-1] in json.loads(path[-2][2:])


def shown(path: Iterable[str]) -> str:
    """``.spec.template.spec.containers[name="ebpfproxy"].image``"""
    made = ""
    for part in path:
        if part.startswith("k:"):
            keys = json.loads(part[2:])
            made += "[" + ",".join(f"{name}={json.dumps(value)}" for name, value in keys.items()) + "]"
        else:
            made += f".{part}"
    return made


def _fields_v1(paths: Iterable[Path]) -> Object:
    made: Object = {}
    for path in sorted(paths):
        holder = made
        for part in path:
            holder = holder.setdefault(part if part.startswith("k:") else f"f:{part}", {})
    return made
