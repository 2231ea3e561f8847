"""Applies the objects by the server, one after the other, and reports what became of each."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

from ebpfproxy.operator.api import Api, ApiError, Object, shown
from ebpfproxy.operator.printing import Say

#: The server writes these fields of the metadata at every change.
_SERVERS = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "uid")
_CONFLICT = 409


class Result(NamedTuple):
    """``changed``: kinds of objects that were created or changed; ``failed``: one line for each error."""

    changed: tuple[str, ...]
    failed: tuple[str, ...]


def name_of(item: Object) -> str:
    meta = item["metadata"]
    return shown(item["kind"], meta.get("namespace", ""), meta["name"])


def apply(
    api: Api, objects: Iterable[Object], say: Say, warn: Say, *, force: bool = False, dry_run: bool = False
) -> Result:
    """``say`` is told of each object that it was created, configured or unchanged; ``warn`` what the server
    warns of. A DaemonSet is sent only if all before it were taken. Raises ApiError where the server cannot be
    reached.
    """
    changed: list[str] = []
    failed: list[str] = []
    for item in objects:
        name, kind = name_of(item), item["kind"]
        if kind == "DaemonSet" and failed:
            failed.append(f"{name}: not sent: its pods need what has failed")
            continue
        try:
            before = api.get(kind, item["metadata"].get("namespace", ""), item["metadata"]["name"])
            applied = api.apply(item, force=force, dry_run=dry_run)
        except ApiError as error:
            if error.status == 0:
                raise
            hint = " (--force-conflicts takes the fields over)" if error.status == _CONFLICT else ""
            failed.append(f"{error}{hint}")
            continue
        for text in applied.warnings:
            warn(f"warning: {name}: {text}")
        if before is None:
            what = "created"
        else:
            what = "unchanged" if _content(before) == _content(applied.item) else "configured"
        if what != "unchanged":
            changed.append(kind)
        say(f"{name} {what}" + (" (server dry run)" if dry_run else ""))
    return Result(tuple(changed), tuple(failed))


def _content(item: Object) -> Object:
    made = copy.deepcopy(item)
    made.pop("status", None)
    for each in _SERVERS:
        made["metadata"].pop(each, None)
    return made
