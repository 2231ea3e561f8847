"""Simulated nodes and pods on one machine: network namespaces, veth pairs, cgroups and processes in them.

The lab is imported lazily, because importing pyroute2 takes 0.2 s of CPU and programs such as
``python -m tests.lab.sidecar`` do not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.lab.lab import Agent, Lab, LabNode, Outside, Pod

__all__ = ["Agent", "Lab", "LabNode", "Outside", "Pod"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tests.lab import lab  # noqa: PLC0415

    return getattr(lab, name)
