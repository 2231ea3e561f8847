"""The programs, where they attach, and in which source they are: names and numbers as the kernel has them."""

from __future__ import annotations

from typing import NamedTuple

from ebpfproxy.datapath.abi import uapi


class Hook(NamedTuple):
    """A program by its function's name, and its type and attach type (enum bpf_attach_type)."""

    name: str
    attach_type: int
    program_type: int = uapi.PROG_CGROUP_SOCK_ADDR


#: They are attached in this order, so that replies are translated before the first connection is.
SOCKET_HOOKS = (
    Hook("sock_release", 34, uapi.PROG_CGROUP_SOCK),
    Hook("getpeername4", 29),
    Hook("getpeername6", 30),
    Hook("recvmsg4", 19),
    Hook("recvmsg6", 20),
    Hook("sendmsg4", 14),
    Hook("sendmsg6", 15),
    Hook("connect4", 10),
    Hook("connect6", 11),
)

#: They read what the others have recorded of sockets, or remove it.
RECORD_READERS = SOCKET_HOOKS[:5]

#: Attached only where the option asks for it: bind() then costs nothing elsewhere.
GUARD_HOOKS = (Hook("bind4", 8), Hook("bind6", 9))
#: Attached only where connections are measured: TCP calls it for all connections of the node.
MEASURE_HOOKS = (Hook("sock_ops", 3, uapi.PROG_SOCK_OPS),)
#: Those that some option asks for.
OPTIONAL_HOOKS = GUARD_HOOKS + MEASURE_HOOKS
#: Attached by agents of earlier versions.
FORMER_HOOKS = ("post_bind4", "post_bind6")

TCX_INGRESS, TCX_EGRESS = 46, 47
XDP_ATTACH = 37

#: Attached nowhere: the agent runs them.
RECORD_HOOKS = (
    Hook("forget_socket", 0, uapi.PROG_SCHED_CLS),
    Hook("forget_pages", 0, uapi.PROG_SCHED_CLS),
    Hook("restore_socket", 0, uapi.PROG_SCHED_CLS),
    Hook("cache_frontend", 0, uapi.PROG_SCHED_CLS),
)

#: They are attached to every device but the loopback, at ingress and egress.
PACKET_HOOKS = (
    Hook("from_device", TCX_INGRESS, uapi.PROG_SCHED_CLS),
    Hook("to_device", TCX_EGRESS, uapi.PROG_SCHED_CLS),
)

#: They go on with it where they translate a packet in place, see bpf/lib/in_place.h.
WRITER = Hook("write_packet", 0, uapi.PROG_SCHED_CLS)


class Module(NamedTuple):
    """One compilation: a source, its programs, and what their pins' names end with.

    ``called``: a program that the others go on with (BPF_MAP_TYPE_PROG_ARRAY).
    """

    source: str
    hooks: tuple[Hook, ...]
    defines: tuple[str, ...] = ()
    suffix: str = ""
    called: Hook | None = None

    @property
    def programs(self) -> tuple[Hook, ...]:
        """Those that are attached, and the one that is called."""
        return (*self.hooks, *((self.called,) if self.called else ()))


SOCKETS = Module("sock.c", SOCKET_HOOKS)
RECORDS = Module("records.c", RECORD_HOOKS)
GUARD = Module("bind.c", GUARD_HOOKS)
MEASURE = Module("sock_ops.c", MEASURE_HOOKS)
PACKETS = Module("tc.c", PACKET_HOOKS, ("-DL3_OFFSET=14",), called=WRITER)
#: It is attached to the loopback device if NodePorts answer on it: what leaves there comes in there.
LOOPBACK = Module("loopback.c", (Hook("to_loopback", TCX_EGRESS, uapi.PROG_SCHED_CLS),), ("-DL3_OFFSET=14",))
#: Run by the agent itself, see ``datapath.flows.sweeper``.
SWEEP = Module(
    "sweep.c",
    (Hook("sweep_entries", 0, uapi.PROG_SCHED_CLS), Hook("sweep_filter", 0, uapi.PROG_SCHED_CLS)),
    ("-DL3_OFFSET=14",),
)
#: For devices whose packets begin with the IP header (tun, wireguard, ipip).
RAW_PACKETS = Module("tc.c", PACKET_HOOKS, ("-DL3_OFFSET=0",), "-raw", WRITER)
#: Attached to uplinks where the option asks for it, see ``datapath.programs.xdp``.
FORWARDING = Module("xdp.c", (Hook("forward", XDP_ATTACH, uapi.PROG_XDP),), ("-DL3_OFFSET=14",))

#: Run by the agent itself, while programs report decisions.
REPORT = Module("report.c", (Hook("report_decision", 0, uapi.PROG_SCHED_CLS),))

#: Every compilation that some option needs.
MODULES = (SOCKETS, RECORDS, GUARD, MEASURE, PACKETS, SWEEP, LOOPBACK, RAW_PACKETS, REPORT, FORWARDING)
