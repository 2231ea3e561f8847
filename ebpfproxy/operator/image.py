"""The agents' image, which temporary pods of commands use as well: nodes have it."""

from __future__ import annotations

import msgspec

from ebpfproxy.operator.api import Object


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image, and how nodes get it."""

    name: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


def image_of(daemon_set: Object) -> Image:
    pod = daemon_set["spec"]["template"]["spec"]
    container = pod["containers"][0]
    return Image(
        name=container["image"],
        pull_policy=container.get("imagePullPolicy", "IfNotPresent"),
        pull_secrets=tuple(each["name"] for each in pod.get("imagePullSecrets") or ()),
    )
