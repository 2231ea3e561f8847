"""The manifests of ``deploy/base``: the wheel has them as package data, a checkout where they are."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

from ebpfproxy import yaml_text
from ebpfproxy.operator.api import Object


def folder() -> Traversable:
    """Raises FileNotFoundError for an installation without them."""
    package = resources.files("ebpfproxy")
    for found in (package / "deploy", package / ".." / "deploy" / "base"):
        if (found / "kustomization.yaml").is_file():
            return found
    raise FileNotFoundError("deploy/base is not installed with the package")


def objects() -> list[Object]:
    """Returns them in the kustomization's order: what others need comes first. Each call reads anew."""
    place = folder()
    kustomization = yaml_text.load((place / "kustomization.yaml").read_text(encoding="utf-8"))
    return [
        each
        for name in kustomization["resources"]
        for each in yaml_text.load_all((place / name).read_text(encoding="utf-8"))
    ]
