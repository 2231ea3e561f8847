"""The objects of ``deploy/base`` as kustomize renders them from the few fields in use there."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ebpfproxy import yaml_text

DEPLOY = Path(__file__).parents[2] / "deploy"
BASE = DEPLOY / "base"

Object = dict[str, Any]
Objects = dict[tuple[str, str], Object]


def base() -> Objects:
    """Returns objects by kind and name. Fails where the kustomization does more than list files."""
    return copy.deepcopy(_base())


@functools.cache
def _base() -> Objects:
    kustomization = yaml_text.load((BASE / "kustomization.yaml").read_text())
    assert set(kustomization) == {"apiVersion", "kind", "namespace", "resources"}
    found = by_name(
        each for name in kustomization["resources"] for each in yaml_text.load_all((BASE / name).read_text())
    )
    for (kind, _), each in found.items():
        # Kustomize sets it, also in subjects.
        is_global = kind.startswith("ClusterRole")
        assert each["metadata"].get("namespace") == (None if is_global else kustomization["namespace"])
    return found


def by_name(objects: Iterable[Object]) -> Objects:
    found: Objects = {}
    for each in objects:
        key = each["kind"], each["metadata"]["name"]
        assert key not in found, f"duplicate {key}"
        found[key] = each
    return found


def pod_spec(objects: Objects) -> Object:
    spec: Object = objects["DaemonSet", "ebpfproxy"]["spec"]["template"]["spec"]
    return spec


def container(objects: Objects, name: str) -> Object:
    spec = pod_spec(objects)
    (found,) = (each for each in spec["initContainers"] + spec["containers"] if each["name"] == name)
    return dict(found)
