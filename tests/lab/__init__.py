"""Nodes and pods simulated on one machine: network namespaces, veth pairs, cgroups, real processes."""

from tests.lab.lab import Agent, Lab, LabNode, Outside, Pod

__all__ = ["Agent", "Lab", "LabNode", "Outside", "Pod"]
