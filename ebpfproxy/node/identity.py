"""The name of this node."""

from __future__ import annotations

import os


class NodeNameError(Exception):
    """There is no usable name."""


def node_name(override: str | None) -> str:
    """``--hostname-override``, else the host's name, trimmed and in lower case, as in kube-proxy.

    Raises NodeNameError if the name is empty.
    """
    name = (override or os.uname().nodename).strip().lower()
    if not name:
        raise NodeNameError("the node has no name: set --hostname-override")
    return name
