"""The kernels, and the tests that run on each."""

from __future__ import annotations

from typing import NamedTuple

#: This group has a table of its own.
DEVICES = "kinds of devices"
ESSENTIALS = "all ways of traffic"
_DATAPATH = (
    "loading",
    "measures",
    "socket_records",
    "flow_filter",
    "flow_cache",
    "counters",
    "tables",
    "state",
)
#: Paths of tests by what they show, in the order of their run.
GROUPS = {
    "packets": ("tests/packets",),
    "maps and programs": tuple(f"tests/datapath/test_{name}.py" for name in _DATAPATH),
    "sockets": ("tests/e2e/test_sockets.py", "tests/field/test_mptcp.py"),
    "measures": ("tests/e2e/test_measures.py",),
    "start": ("tests/field/test_start.py",),
    ESSENTIALS: ("tests/field/test_every_kernel.py",),
    "XDP": ("tests/field/test_xdp_forwarding.py",),
    "XDP on virtio-net": ("tests/field/test_xdp_virtio.py",),
    "libxdp": ("tests/field/test_xdp_chain.py",),
    "devices": ("tests/field/test_devices.py",),
    DEVICES: ("tests/cnis/test_devices.py",),
    "clients outside": ("tests/e2e/test_outside.py",),
    "AppArmor": ("tests/deploy/test_apparmor.py",),
    "IPVS": ("tests/operator/migrate/test_ipvs_kernel.py",),
    "NFS": ("tests/field/test_nfs_kernel.py",),
}
#: They run for minutes in an emulator and depend on the kernel no more than others of their group, or do without tcx what
#: kernels before 6.6 do anyway.
LEFT_OUT = "fifty_thousand or thousands_of or masqueraded_flows_have_distinct or clsact"
#: In place of groups: single tests, see ``Root.write_tests``.
AGAIN = "again"
_SOME = ("IPVS", "NFS")
_OF_ALL = tuple(name for name in GROUPS if name not in _SOME)


def group_of(test: str) -> str:
    """Returns the group of a test, by its path."""
    return next((name for name, paths in GROUPS.items() if test.startswith(paths)), "other")


def network_of(test: str) -> str:
    """Returns the network that a test of tests/cnis/test_devices.py is about: its name ends with a semicolon there."""
    title, is_network, _ = test.partition("[")[2].partition(";")
    return title if is_network and group_of(test) == DEVICES else ""


class Kernel(NamedTuple):
    """``flavour``: the end of the package's name. ``arguments``: of the kernel. ``machine``: of qemu.

    ``refused``: what the agent's refusal has to contain; no test runs then.
    """

    name: str
    suite: str
    flavour: str
    groups: tuple[str, ...] = _OF_ALL
    arguments: str = ""
    machine: tuple[str, ...] = ("-smp", "2")
    refused: str = ""

    @property
    def package(self) -> str:
        return f"linux-image-{self.flavour}-amd64".replace("--", "-")


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("5.10-cloud", "bullseye", "cloud", refused="batched lookup in per-CPU arrays"),
        Kernel("6.1-cloud", "bookworm", "cloud", (*_OF_ALL, *_SOME)),
        Kernel("6.1-rt", "bookworm", "rt"),
        Kernel("6.12-cloud", "trixie", "cloud"),
        Kernel("6.12-rt", "trixie", "rt"),
        Kernel("7-cloud", "sid", "cloud"),
        Kernel("7-rt", "sid", "rt", refused="PREEMPT_RT without CONFIG_PREEMPT_RT_NEEDS_BH_LOCK"),
    )
}

_FEW = (ESSENTIALS, "start")
_NETFILTER = "nf_tables,x_tables,ip_tables,ip6_tables,nf_conntrack,nf_nat,nf_defrag_ipv4,nf_defrag_ipv6"
#: Kernels that are built or booted otherwise, and only run the tests of all ways of traffic.
SETTINGS = {
    kernel.name: kernel
    for kernel in (
        Kernel("6.1", "bookworm", "", _FEW),
        Kernel("6.12", "trixie", "", _FEW),
        Kernel("7", "sid", "", _FEW),
        Kernel("no IPv6", "trixie", "cloud", _FEW, "ipv6.disable=1"),
        Kernel("no netfilter", "trixie", "cloud", _FEW, f"module_blacklist={_NETFILTER}"),
        Kernel("no JIT", "trixie", "cloud", _FEW, "sysctl.net.core.bpf_jit_enable=0"),
        Kernel("JIT hardened", "trixie", "cloud", _FEW, "sysctl.net.core.bpf_jit_harden=2"),
        Kernel(
            "lockdown",
            "trixie",
            "cloud",
            _FEW,
            "lockdown=confidentiality sysctl.kernel.unprivileged_bpf_disabled=0",
        ),
        Kernel("128 CPUs", "trixie", "cloud", _FEW, machine=("-smp", "2,maxcpus=128")),
    )
}
