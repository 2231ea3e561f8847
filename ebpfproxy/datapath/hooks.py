"""The hooks that programs attach to: names as in ``bpf/sock.c``, numbers as in enum bpf_attach_type."""

from __future__ import annotations

from typing import NamedTuple

from ebpfproxy.datapath import bpf


class Hook(NamedTuple):
    name: str
    attach_type: int
    program_type: int = bpf.PROG_CGROUP_SOCK_ADDR


#: In the order of attachment: answers are translated before the first question is.
SOCKET_HOOKS = (
    Hook("sock_release", 34, bpf.PROG_CGROUP_SOCK),
    Hook("getpeername4", 29),
    Hook("getpeername6", 30),
    Hook("recvmsg4", 19),
    Hook("recvmsg6", 20),
    Hook("sendmsg4", 14),
    Hook("sendmsg6", 15),
    Hook("connect4", 10),
    Hook("connect6", 11),
)
