"""The emulator's network devices, all of them virtio-net and connected to each other, not to the machine."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Nic(NamedTuple):
    """One NIC. ``wire``: those with the same number share an Ethernet. ``options``: of qemu's device.

    ``queues``: pairs of them. Programs of a driver need one pair for each CPU beside those of the stack.
    """

    wire: int
    queues: int = 1
    options: str = ""


#: The other ends of the wires, and uplinks of a node.
NICS = {
    "switch": Nic(0),
    "client": Nic(1),
    "uplink": Nic(0, queues=4),
    "second": Nic(1, queues=4),
    "one-queue": Nic(0),
    "large": Nic(0, queues=4),
    # The host merges segments and leaves checksums out, and the driver cannot tell it to stop.
    "fixed": Nic(0, options="ctrl_guest_offloads=off"),
    "unmerged": Nic(
        0,
        options="ctrl_guest_offloads=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off",
    ),
    # A packet has to fit into one buffer.
    "small": Nic(0, options="mrg_rxbuf=off"),
}
#: Taps and bridges would else be seen by the whole machine.
_IN_A_NAMESPACE = """
sysctl -q -w net.ipv6.conf.default.disable_ipv6=1
for wire in $WIRES; do
	ip link add wire$wire mtu 9000 type bridge mcast_snooping 0
	ip link set wire$wire up
done
exec "$@"
"""


def address_of(name: str) -> str:
    """Returns the link address of a NIC, by which it is found."""
    return f"52:54:00:00:00:{list(NICS).index(name):02x}"


def in_a_namespace() -> list[str]:
    """Returns the beginning of a command that has the wires."""
    wires = " ".join(sorted({str(nic.wire) for nic in NICS.values()}))
    return ["unshare", "--net", "env", f"WIRES={wires}", "sh", "-e", "-c", _IN_A_NAMESPACE, "sh"]


def arguments() -> list[str]:
    """Returns the arguments of qemu."""
    script = Path(__file__).with_name("tap-up")
    found = []
    for name, nic in NICS.items():
        tap = f"tap,id={name},ifname={nic.wire}-{name},script={script},downscript=no"
        options = f",{nic.options}" if nic.options else ""
        if nic.queues > 1:
            tap += f",queues={nic.queues}"
            options += f",mq=on,vectors={2 * nic.queues + 2}"
        device = f"virtio-net-pci,netdev={name},mac={address_of(name)},romfile={options}"
        found += ["-netdev", tap, "-device", device]
    return found
