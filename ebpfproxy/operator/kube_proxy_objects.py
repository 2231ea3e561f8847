"""kube-proxy as the cluster's API shows it: its DaemonSet, and the file that it is configured by."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ebpfproxy.operator.api import Api, Object, shown
from ebpfproxy.operator.names import KUBE_PROXY, SYSTEM

_FLAG = re.compile(r"--config[= ](\S+)")


class File(NamedTuple):
    """A text of a ConfigMap; ``where`` names object and key."""

    text: str
    where: str


def find(api: Api) -> Object | None:
    """Returns its DaemonSet. Raises ApiError."""
    return api.get("DaemonSet", SYSTEM, KUBE_PROXY)


def configuration(api: Api, daemon_set: Object) -> File | None:
    """Returns what its ``--config`` names; None where no ConfigMap has it. Raises ApiError."""
    place = config_map_of(daemon_set)
    if place is None:
        return None
    text = api.config(SYSTEM, *place)
    return File(text, f"{shown('ConfigMap', SYSTEM, place[0])}: {place[1]}") if text else None


def config_map_of(daemon_set: Object) -> tuple[str, str] | None:
    """Returns name and key of what is mounted where ``--config`` points to: kubeadm's are ``kube-proxy`` and
    ``config.conf``, others' are not. None where it is no ConfigMap's."""
    pod = daemon_set["spec"]["template"]["spec"]
    for container in pod.get("containers") or ():
        flag = _FLAG.search(" ".join([*(container.get("command") or ()), *(container.get("args") or ())]))
        if flag is None:
            continue
        path = PurePosixPath(flag[1].strip("'\""))
        for mount in container.get("volumeMounts") or ():
            if not path.is_relative_to(mount["mountPath"]):
                continue
            inside = PurePosixPath(mount.get("subPath") or "") / path.relative_to(mount["mountPath"])
            for volume in pod.get("volumes") or ():
                if volume["name"] == mount["name"] and (found := _key(volume.get("configMap"), str(inside))):
                    return found
    return None


def _key(config_map: Any, path: str) -> tuple[str, str] | None:
    if not config_map:
        return None
    items = config_map.get("items")
    keys = {each["path"]: each["key"] for each in items} if items else {path: path}
    return (config_map["name"], keys[path]) if path in keys else None
