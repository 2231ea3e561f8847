"""Kinds of devices that not every kernel has."""

from __future__ import annotations

from tests.cnis.network import ip
from tests.lab.spaces import Space


def lacking(space: Space, kinds: tuple[str, ...]) -> str:
    """Returns the first of these kinds that the kernel lacks, empty if it has all of them."""
    for kind in kinds:
        try:
            ip(space, f"link add probe type {kind}")
        except RuntimeError as error:
            if "Unknown device type" in str(error):
                return kind
        else:
            ip(space, "link del probe")
    return ""
