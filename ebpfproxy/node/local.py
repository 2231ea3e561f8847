"""Recognizes packets of this node's pods: kube-proxy's detectLocalMode, and a mode without settings."""

from __future__ import annotations

import enum

import msgspec

from ebpfproxy.node.network import Device
from ebpfproxy.node.roles import Role


class LocalMode(enum.StrEnum):
    """``Devices`` is our own mode: packets from a device that leads to a pod or VM of this node are local."""

    DEVICES = "Devices"
    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class LocalPods(msgspec.Struct, frozen=True):
    """``value``: the bridge's name or the prefix of names, for the modes that need one."""

    mode: LocalMode = LocalMode.DEVICES
    value: str = ""

    @property
    def by_cidr(self) -> bool:
        """Whether addresses decide, not devices."""
        return self.mode in (LocalMode.CLUSTER_CIDR, LocalMode.NODE_CIDR)

    def is_behind(self, device: Device) -> bool:
        """Whether packets from this device come from this node's pods."""
        # kube-proxy's rules are in netfilter, where packets of a bridge's port come from the bridge.
        seen_as = device.bridge or device.name
        if self.mode is LocalMode.BRIDGE_INTERFACE:
            return seen_as == self.value
        if self.mode is LocalMode.INTERFACE_NAME_PREFIX:
            return seen_as.startswith(self.value)
        return device.role is Role.LOCAL
