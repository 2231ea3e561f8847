"""Which packets are of this node's own pods: kube-proxy's detectLocalMode, and a mode without settings."""

from __future__ import annotations

import enum

import msgspec

from ebpfproxy.node.network import Device
from ebpfproxy.node.roles import Role


class LocalMode(enum.StrEnum):
    """``Devices`` is ours: what comes from a device that leads to this node's pods or VMs is a pod's."""

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
        """Whether addresses tell, and not devices."""
        return self.mode in (LocalMode.CLUSTER_CIDR, LocalMode.NODE_CIDR)

    def is_behind(self, device: Device) -> bool:
        """Whether packets from this device are of this node's pods."""
        # Netfilter, where kube-proxy's rules are, sees a bridge's packets come from the bridge, not the port.
        seen_as = device.bridge or device.name
        if self.mode is LocalMode.BRIDGE_INTERFACE:
            return seen_as == self.value
        if self.mode is LocalMode.INTERFACE_NAME_PREFIX:
            return seen_as.startswith(self.value)
        return device.role is Role.LOCAL
