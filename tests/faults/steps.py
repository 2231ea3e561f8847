"""The steps of a process from outside: each system call by which it changes maps, programs, attachments, pins or sysctls.

Attachments are made by bpf(2), and without tcx by netlink: its messages (send(2), which all of ebpfproxy/netlink
uses) are told by the socket that sends them, and those that only ask are no steps. A sysctl is changed where its file is opened to be written. The kernel stops the process at each
(seccomp's user notification), so that none is forgotten and the product has no failpoints. A step has a name, such as ``OBJ_PIN links/connect4``; the first and the second one with a name are
different steps. At a step the process can be killed before the call is made, stopped for a while, or told that the
call has failed.
"""

from __future__ import annotations

import ctypes as ct
import errno
import fcntl
import functools
import os
import re
import select
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import lib

#: x86_64's numbers, by name.
_CALLS = {
    "bpf": 321,
    "unlink": 87,
    "unlinkat": 263,
    "mkdir": 83,
    "rmdir": 84,
    "rename": 82,
    "mount": 165,
    "umount2": 166,
    "sendto": 44,
    "openat": 257,
}
#: Where a call has the path that it changes.
_PATHS = {"unlink": 0, "unlinkat": 1, "mkdir": 0, "rmdir": 0, "rename": 1, "mount": 1, "umount2": 0}
#: Files of sysctls begin so.
_SYSCTLS = "/proc/sys/"
#: Protocols of netlink (linux/netlink.h) whose messages change the kernel's state: NETLINK_ROUTE, _SOCK_DIAG, _NETFILTER.
_ROUTE, _SOCK_DIAG, _NETFILTER = 0, 4, 12
#: Types of messages of linux/rtnetlink.h, of which every fourth asks only.
_RTM = {
    16: "NEWLINK",
    19: "SETLINK",
    24: "NEWROUTE",
    36: "NEWQDISC",
    37: "DELQDISC",
    44: "NEWTFILTER",
    45: "DELTFILTER",
}
_RTM_GET = 2
_PARENTS = {0xFFFFFFF1: "clsact", 0xFFFFFFF2: "ingress", 0xFFFFFFF3: "egress"}
#: Messages of conntrack, the first of their subsystem.
_CONNTRACK = {0x100: "NEW", 0x102: "DELETE"}
_SOCK_DESTROY = 21
#: enum bpf_cmd of linux/bpf.h.
_COMMANDS = """
MAP_CREATE MAP_LOOKUP_ELEM MAP_UPDATE_ELEM MAP_DELETE_ELEM MAP_GET_NEXT_KEY PROG_LOAD OBJ_PIN OBJ_GET PROG_ATTACH
PROG_DETACH PROG_TEST_RUN PROG_GET_NEXT_ID MAP_GET_NEXT_ID PROG_GET_FD_BY_ID MAP_GET_FD_BY_ID OBJ_GET_INFO_BY_FD
PROG_QUERY RAW_TRACEPOINT_OPEN BTF_LOAD BTF_GET_FD_BY_ID TASK_FD_QUERY MAP_LOOKUP_AND_DELETE_ELEM MAP_FREEZE
BTF_GET_NEXT_ID MAP_LOOKUP_BATCH MAP_LOOKUP_AND_DELETE_BATCH MAP_UPDATE_BATCH MAP_DELETE_BATCH LINK_CREATE
LINK_UPDATE LINK_GET_FD_BY_ID LINK_GET_NEXT_ID ENABLE_STATS ITER_CREATE LINK_DETACH PROG_BIND_MAP
""".split()  # noqa: SIM905
#: Commands that change nothing: a process that ends there ends as it would at the next one that does.
_READS = frozenset(
    """
    MAP_LOOKUP_ELEM MAP_GET_NEXT_KEY OBJ_GET PROG_GET_NEXT_ID MAP_GET_NEXT_ID PROG_GET_FD_BY_ID MAP_GET_FD_BY_ID
    OBJ_GET_INFO_BY_FD PROG_QUERY BTF_GET_FD_BY_ID TASK_FD_QUERY BTF_GET_NEXT_ID MAP_LOOKUP_BATCH LINK_GET_FD_BY_ID
    LINK_GET_NEXT_ID PROG_TEST_RUN BTF_LOAD
    """.split()  # noqa: SIM905
)
#: Parts of paths that differ from run to run.
_VARIABLE = re.compile(r"^.*/epl\d+x\d+[^/]*/[^/]*/|progs-[0-9a-f]+|v\d+-[0-9a-f]+|(?<=tmp)[a-z0-9_]{8}")

_NOTIF, _RESP = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_RECV, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_libc = ct.CDLL(None, use_errno=True)


class Step(NamedTuple):
    """``occurrence``: 1 for the first with this name."""

    name: str
    occurrence: int = 1

    def __str__(self) -> str:
        return f"{self.name} #{self.occurrence}"


#: Says what happens at a step; None for nothing.
Choose = Callable[[Step], "Fault | None"]


class Fault(NamedTuple):
    """``signal`` is sent before the call is made, SIGSTOP for so many ``seconds``; or the call fails with ``error``.

    ``held``: only the thread that makes the call waits, until this is set.
    """

    signal: signal.Signals | None = None
    seconds: float = 0.0
    error: int = 0
    held: threading.Event | None = None


#: Instructions of classic BPF, by what they do: load a word of struct seccomp_data, jump, and return a verdict.
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
#: SECCOMP_RET_ALLOW and SECCOMP_RET_USER_NOTIF.
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
#: Where the call's number and its arguments are.
_NUMBER_AT, _FIRST_AT, _THIRD_AT = 0, 16, 32


def _filter() -> bytes:
    """Instructions of classic BPF: the calls notify, all others are allowed.

    What only reads is allowed here, too: a change of map sizes has it 100,000 times, and each notification takes two
    switches to the thread that follows.
    """
    # Labels, and instructions with the value and the label that they jump to.
    code: list[str | tuple[int, int, str]] = [(_LOAD, _NUMBER_AT, "")]
    for name, number in _CALLS.items():
        code.append((_JUMP_IF_EQUAL, number, name if name in ("bpf", "openat") else "notify"))
    code += [(_RETURN, _ALLOW, ""), "bpf", (_LOAD, _FIRST_AT, "")]
    code += [(_JUMP_IF_EQUAL, _COMMANDS.index(name), "allow") for name in sorted(_READS)]
    code += [(_RETURN, _NOTIFY, ""), "openat", (_LOAD, _THIRD_AT, "")]
    code += [(_JUMP_IF_SET, os.O_WRONLY | os.O_RDWR, "notify")]
    code += ["allow", (_RETURN, _ALLOW, ""), "notify", (_RETURN, _NOTIFY, "")]
    places: dict[str, int] = {}
    instructions: list[tuple[int, int, str]] = []
    for each in code:
        if isinstance(each, str):
            places[each] = len(instructions)
        else:
            instructions.append(each)
    return b"".join(
        struct.pack("=HBBI", kind, places[label] - at - 1 if label else 0, 0, value)
        for at, (kind, value, label) in enumerate(instructions)
    )


def _listen(there: socket.socket) -> None:
    """In the child: from now on the other end of the socket is notified."""
    code = _filter()
    buffer = ct.create_string_buffer(code, len(code))
    program = struct.pack("=HxxxxxxQ", len(code) // 8, ct.addressof(buffer))
    # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER
    fd = _libc.syscall(317, 1, 8, program)
    if fd < 0:
        raise OSError(ct.get_errno(), "seccomp")
    socket.send_fds(there, [b"x"], [fd])


class Stepped:
    """A process whose steps are recorded; ``choose`` is asked at each."""

    def __init__(self, choose: Choose) -> None:
        self.steps: list[Step] = []
        #: The step at which something has happened last.
        self.hit: Step | None = None
        self.choose = choose
        self._seen: Counter[str] = Counter()
        self._here, self._there = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._pid = 0

    def enter(self) -> None:
        """In the child, before exec."""
        _listen(self._there)

    def follow(self, pid: int) -> None:
        """In the parent, after exec."""
        self._pid = pid
        self._there.close()
        self._thread.start()

    def recount(self) -> None:
        """From now on steps are counted from 1 again."""
        self._seen.clear()
        self.steps.clear()

    def join(self) -> None:
        """Waits until the process has ended, and its children, too."""
        self._thread.join()

    # -- the thread

    def _run(self) -> None:
        try:
            _, (fd, *_), _, _ = socket.recv_fds(self._here, 1, 1)
        except (OSError, ValueError):
            return
        finally:
            self._here.close()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        try:
            while True:
                ((_, events),) = poll.poll()
                if not events & select.POLLIN:
                    return  # The process has ended.
                buffer = bytearray(_NOTIF.size)
                try:
                    fcntl.ioctl(fd, _RECV, buffer)
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.EINTR):
                        continue
                    raise
                self._notified(fd, buffer)
        finally:
            os.close(fd)

    def _notified(self, fd: int, buffer: bytearray) -> None:
        number, pid, _, call, _, _, *arguments = _NOTIF.unpack(buffer)
        fault = None
        # The process may be killed by others at any time, and another thread of it may close the descriptor.
        with suppress(OSError, ValueError):
            name = _name(pid, call, arguments)
            if name:
                self._seen[name] += 1
                step = Step(name, self._seen[name])
                self.steps.append(step)
                fault = self.choose(step)
                if fault is not None:
                    self.hit = step
        if fault is not None and fault.held is not None:
            # Calls of other threads go on, which are notified here, too.
            threading.Thread(target=_answer, args=(fd, number, fault, self._pid), daemon=True).start()
        else:
            _answer(fd, number, fault or Fault(), self._pid)


def _answer(fd: int, number: int, fault: Fault, pid: int) -> None:
    """Does what is to happen at a step, and lets the call be made, or fail."""
    if fault.held is not None:
        fault.held.wait()
    with suppress(OSError):
        if fault.signal is not None:
            os.kill(pid, fault.signal)
        if fault.seconds:
            time.sleep(fault.seconds)
            os.kill(pid, signal.SIGCONT)
        fcntl.ioctl(fd, _SEND, _RESP.pack(number, 0, -fault.error, 0 if fault.error else _CONTINUE))


def _name(pid: int, call: int, arguments: list[int]) -> str:
    """Empty for what changes nothing of the kernel's."""
    kind = next(name for name, number in _CALLS.items() if number == call)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        if kind == "openat":
            path = _path(memory, arguments[1])
            return f"write {path}" if path.startswith(_SYSCTLS) else ""
        if kind == "sendto":
            return _message(pid, memory, *arguments[:3])
        if kind != "bpf":
            return f"{kind} {_path(memory, arguments[_PATHS[kind]])}"
        command = _COMMANDS[arguments[0]] if arguments[0] < len(_COMMANDS) else str(arguments[0])
        attributes = os.pread(memory, min(arguments[2], 64), arguments[1]).ljust(64, b"\0")
        if command == "OBJ_PIN":
            return f"{command} {_path(memory, struct.unpack_from('=Q', attributes)[0])}"
        if command in ("MAP_CREATE", "PROG_LOAD"):
            at = 28 if command == "MAP_CREATE" else 48
            return f"{command} {attributes[at : at + 16].split(bytes(1))[0].decode()}"
        if command in ("LINK_UPDATE", "LINK_DETACH"):
            return f"{command} {_id(pid, struct.unpack_from('=I', attributes)[0], 'link_id')}"
        if command == "LINK_CREATE":
            _, target, kind_of = struct.unpack_from("=III", attributes)
            return f"{command} type {kind_of} at {target}"
        if command.startswith("MAP_"):
            (fd,) = struct.unpack_from("=I", attributes, 36 if command.endswith("BATCH") else 0)
            return f"{command} {_name_of_map(_id(pid, fd, 'map_id'))}"
        return command
    finally:
        os.close(memory)


def _message(pid: int, memory: int, fd: int, address: int, length: int) -> str:
    """What a netlink message changes."""
    data = os.pread(memory, min(length, 32), address).ljust(32, b"\0")
    (said, of_kind) = struct.unpack_from("=IH", data)
    if said != length:
        return ""
    protocol = _protocol(pid, fd)
    if protocol == _ROUTE and of_kind % 4 != _RTM_GET:
        ifindex, _, parent = struct.unpack_from("=iII", data, 20)
        at = f" {ifindex} {_PARENTS.get(parent, parent)}" if of_kind >= 36 else ""
        return f"{_RTM.get(of_kind, f'rtnetlink {of_kind}')}{at}"
    if protocol == _NETFILTER and of_kind in _CONNTRACK:
        return f"conntrack {_CONNTRACK[of_kind]}"
    return "SOCK_DESTROY" if protocol == _SOCK_DIAG and of_kind == _SOCK_DESTROY else ""


def _protocol(pid: int, fd: int) -> int | None:
    """Of netlink, None for another socket."""
    inode = re.fullmatch(r"socket:\[(\d+)\]", str(Path(f"/proc/{pid}/fd/{fd}").readlink()))
    _, *rows = Path(f"/proc/{pid}/net/netlink").read_text().splitlines()
    found = {columns[-1]: int(columns[1]) for columns in map(str.split, rows)}
    return found.get(inode[1]) if inode else None


def _id(pid: int, fd: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
    (number,) = (int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return number


@functools.cache
def _name_of_map(number: int) -> str:
    fd = lib.bpf_map_get_fd_by_id(number)
    try:
        return str(bpf.map_info(fd).name.decode())
    finally:
        os.close(fd)


def _path(memory: int, address: int) -> str:
    # Not beyond the page, behind which there may be none.
    data = os.pread(memory, 4096 - address % 4096, address)
    if b"\0" not in data:
        data += os.pread(memory, 4096, address + len(data))
    return _VARIABLE.sub("*", os.fsdecode(data.split(b"\0")[0]))
