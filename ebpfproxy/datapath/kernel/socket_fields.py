"""Fields of the kernel's sockets that programs read by themselves: bpf/lib/kernel_socket.h."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import msgspec

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import SOCKET_HOOKS
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.btf import FUNCTION, STRUCT, KernelTypes, MissingTypeError, kernel_types
from ebpfproxy.datapath.kernel.libbpf import BpfError


class SocketFields(msgspec.Struct, frozen=True):
    """BTF ids of the function that permits to read and of structures, and where their fields begin."""

    rdonly_cast: int
    sock_common: int
    skc_cookie: int
    skc_net: int
    net_cookie: int
    tcp_sock: int
    tcp_is_mptcp: int
    inet_sock: int
    inet_uc_index: int

    def constants(self) -> dict[str, int]:
        """The constants of bpf/lib/options.h by name."""
        return {name.upper(): value for name, value in msgspec.structs.asdict(self).items()}


NO_SOCKET_FIELDS = SocketFields(*[0] * len(SocketFields.__struct_fields__))


def _found(types: KernelTypes) -> SocketFields:
    return SocketFields(
        rdonly_cast=types.id_of("bpf_rdonly_cast", FUNCTION),
        sock_common=types.id_of("sock_common", STRUCT),
        skc_cookie=types.offset("sock_common", "skc_cookie", 8),
        skc_net=types.offset("sock_common", "skc_net", 8),
        net_cookie=types.offset("net", "net_cookie", 8),
        tcp_sock=types.id_of("tcp_sock", STRUCT),
        tcp_is_mptcp=types.offset("tcp_sock", "is_mptcp", 1),
        inet_sock=types.id_of("inet_sock", STRUCT),
        inet_uc_index=types.offset("inet_sock", "uc_index", 4),
    )


#: offsetof(struct bpf_sock_addr, sk)
_SOCKET_OF_ADDRESS = 64


def _instruction(opcode: int, registers: int, offset: int, value: int) -> bytes:
    return struct.pack("=BBhi", opcode, registers, offset, value)


def are_readable(fields: SocketFields) -> bool:
    """True if the verifier lets programs read each of them where bpf/lib/kernel_socket.h does."""
    proceed = _instruction(0xB7, 0x00, 0, 1), _instruction(0x95, 0x00, 0, 0)  # return 1

    def cast(kind: int) -> Iterator[bytes]:
        yield _instruction(0xBF, 0x61, 0, 0)  # r1 = r6, the socket
        yield _instruction(0xB7, 0x02, 0, kind)  # r2 = the type
        yield _instruction(0x85, 0x20, 0, fields.rdonly_cast)  # r0 = bpf_rdonly_cast(r1, r2)

    cookie = *cast(fields.sock_common), _instruction(0x79, 0x07, fields.skc_cookie, 0)
    at_release = _instruction(0xBF, 0x16, 0, 0), *cookie, *proceed  # r6 = r1: the context is the socket
    at_connect = (
        _instruction(0x79, 0x16, _SOCKET_OF_ADDRESS, 0),  # r6 = r1->sk
        *cookie,
        _instruction(0x79, 0x07, fields.skc_net, 0),  # r7 = r0->skc_net
        _instruction(0x79, 0x77, fields.net_cookie, 0),
        *cast(fields.tcp_sock),
        _instruction(0x71, 0x07, fields.tcp_is_mptcp, 0),
        *cast(fields.inet_sock),
        _instruction(0x61, 0x07, fields.inet_uc_index, 0),
        *proceed,
    )
    programs = {uapi.PROG_CGROUP_SOCK: at_release, uapi.PROG_CGROUP_SOCK_ADDR: at_connect}
    try:
        for kind, code in programs.items():
            hook = next(hook for hook in SOCKET_HOOKS if hook.program_type == kind)
            os.close(bpf.prog_load(kind, hook.attach_type, "probe", b"".join(code)))
    except BpfError:
        return False
    return True


def find_socket_fields() -> SocketFields | None:
    """None where helpers have to do: the kernel has no BTF, is older than 6.2, or has no MPTCP."""
    try:
        with kernel_types() as types:
            fields = _found(types)
    except MissingTypeError:
        return None
    return fields if are_readable(fields) else None
