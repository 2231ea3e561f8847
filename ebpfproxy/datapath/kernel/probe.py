"""The features of this kernel, found by trying them once: a version number says little."""

from __future__ import annotations

import errno
import gzip
import os
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from ebpfproxy.config.datapath import Feature
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import OPTIONAL_HOOKS, SOCKET_HOOKS, TCX_INGRESS
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.socket_fields import SocketFields, find_socket_fields

#: docs/tested.md shows it.
OLDEST_KERNEL = "6.1"


class UnsupportedKernelError(Exception):
    """The agent does not run on this kernel; the message says why, and ``mend`` what helps."""

    def __init__(self, message: str, mend: str = "boot a newer kernel") -> None:
        super().__init__(message)
        self.mend = mend


class UnprobedKernelError(UnsupportedKernelError):
    """This process may not find out what the kernel has."""

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__(
            f"what this kernel has cannot be found out without {', '.join(missing)}", "run it as root"
        )


class Features(msgspec.Struct, frozen=True):
    set_retval: bool
    tcx: bool = True
    mptcp: bool = True
    socket_fields: SocketFields | None = None

    def without(self, names: frozenset[Feature]) -> Features:
        """The same features without some, so that the fallbacks can be tried."""
        return Features(
            set_retval=self.set_retval and Feature.SET_RETVAL not in names,
            tcx=self.tcx and Feature.TCX not in names,
            mptcp=self.mptcp and Feature.MPTCP not in names,
            socket_fields=None if Feature.SOCKET_FIELDS in names else self.socket_fields,
        )


# Two instructions that let everything proceed (return 1).
_PROCEED = bytes.fromhex("b700000001000000 9500000000000000")


#: r1 = ctx->sk; bpf_skc_to_mptcp_sock(r1); then as above.
_MPTCP_SOCKET = bytes.fromhex("7911400000000000 85000000c4000000") + _PROCEED
_CONNECT4 = 10

_NO_DEVICE = 0x7FFFFFFE


class _MustHave(NamedTuple):
    what: str
    since: str
    check: Callable[[], bool]


def _creates(kind: int, key_size: int, value_size: int, entries: int, flags: int = 0) -> bool:
    try:
        os.close(bpf.map_create(kind, "probe", key_size, value_size, entries, flags=flags))
    except BpfError:
        return False
    return True


def _attach_types_load() -> bool:
    try:
        for hook in SOCKET_HOOKS + OPTIONAL_HOOKS:
            os.close(bpf.prog_load(hook.program_type, hook.attach_type, "probe", _PROCEED))
    except BpfError:
        return False
    return True


def _batch_works() -> bool:
    fd = bpf.map_create(uapi.MAP_PERCPU_ARRAY, "probe", 4, 8, 1)
    try:
        for _ in bpf.map_lookup_batches(fd, 4, 8 * bpf.possible_cpus(), 1):
            pass
    except BpfError:
        return False
    finally:
        os.close(fd)
    return True


#: bpf(2) asks for one of these (linux/capability.h).
_FOR_BPF = {"CAP_BPF": 39, "CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_SYS_ADMIN": 21}
_CAPABILITIES = {**_FOR_BPF, "CAP_DAC_OVERRIDE": 1, "CAP_SYS_PTRACE": 19}


def has_capability(name: str) -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(found and int(found[1], 16) & 1 << _CAPABILITIES[name])


def missing_capabilities() -> list[str]:
    """Those of bpf(2) that this process lacks; CAP_SYS_ADMIN stands for all of them."""
    missing = [name for name in _FOR_BPF if not has_capability(name)]
    return missing if "CAP_SYS_ADMIN" in missing else []


def may_calculate_with_pointers() -> bool:
    """True if the verifier lets this process's programs do it: perfmon_capable() of linux/capability.h."""
    return "CAP_PERFMON" not in missing_capabilities()


_MUST_HAVES = (
    _MustHave(
        "BPF hash maps (CONFIG_BPF_SYSCALL, CAP_BPF or root)", "4.4", lambda: _creates(uapi.MAP_HASH, 4, 4, 1)
    ),
    _MustHave("cgroup socket programs up to sock_release (CONFIG_CGROUP_BPF)", "5.9", _attach_types_load),
    _MustHave("mmap of BPF arrays", "5.5", lambda: _creates(uapi.MAP_ARRAY, 4, 8, 1, uapi.F_MMAPABLE)),
    _MustHave(
        "bpf_get_netns_cookie in cgroup programs",
        "5.7",
        lambda: bpf.has_helper(uapi.PROG_CGROUP_SOCK_ADDR, uapi.FUNC_GET_NETNS_COOKIE),
    ),
    _MustHave("batched lookup in per-CPU arrays", "5.13", _batch_works),
    _MustHave(
        "bpf_redirect_neigh in tc programs (CONFIG_NET_CLS_BPF)",
        "5.10",
        lambda: bpf.has_helper(uapi.PROG_SCHED_CLS, uapi.FUNC_REDIRECT_NEIGH),
    ),
)


#: Since then sections with bottom halves disabled exclude each other with PREEMPT_RT only if it is built so.
_BH_LOCK_IS_AN_OPTION = (6, 18)
_BH_LOCK = "CONFIG_PREEMPT_RT_NEEDS_BH_LOCK"


def packet_programs_are_preempted(release: str, version: str, configuration: Callable[[], str]) -> bool:
    """True if a program at tc or XDP may run on a CPU while another one there is interrupted.

    They share memory (bpf/lib/scratch.h): the packet of one would get the addresses of the other's.
    ``release`` and ``version`` are uname(2)'s; ``configuration`` returns the kernel's, empty if unknown.
    """
    if not re.search(r"\bPREEMPT_RT\b", version):
        return False
    found = re.match(r"(\d+)\.(\d+)", release)
    is_newer = found is None or (int(found[1]), int(found[2])) >= _BH_LOCK_IS_AN_OPTION
    return is_newer and re.search(rf"^{_BH_LOCK}=y$", configuration(), re.MULTILINE) is None


def _configuration() -> str:
    for path, opened in (
        (Path("/proc/config.gz"), gzip.open),
        (Path("/boot", f"config-{platform.release()}"), open),
    ):
        with suppress(OSError), opened(path, "rt") as file:
            return str(file.read())
    return ""


def probe() -> Features:
    """The features of the running kernel. Raises UnsupportedKernelError."""
    if packet_programs_are_preempted(platform.release(), platform.version(), _configuration):
        raise UnsupportedKernelError(
            f"this kernel ({platform.release()}) lets packet programs preempt each other: "
            f"it has PREEMPT_RT without {_BH_LOCK}",
            "boot a kernel without PREEMPT_RT, or with this option",
        )
    for must in _MUST_HAVES:
        if not must.check():
            if missing := [name for name in missing_capabilities() if name in ("CAP_BPF", "CAP_NET_ADMIN")]:
                raise UnprobedKernelError(missing)
            raise UnsupportedKernelError(
                f"this kernel ({platform.release()}) lacks {must.what}: Linux {must.since} has it; "
                f"the oldest tested kernel is {OLDEST_KERNEL}"
            )
    return Features(
        set_retval=bpf.has_helper(uapi.PROG_CGROUP_SOCK_ADDR, uapi.FUNC_SET_RETVAL),
        tcx=_has_tcx(),
        mptcp=_finds_mptcp_sockets(),
        socket_fields=find_socket_fields(),
    )


def _finds_mptcp_sockets() -> bool:
    """True if a program that calls the helper loads: it needs the kernel's own BTF, which no probe tells."""
    try:
        os.close(bpf.prog_load(uapi.PROG_CGROUP_SOCK_ADDR, _CONNECT4, "probe", _MPTCP_SOCKET))
    except BpfError:
        return False
    return True


def _has_tcx() -> bool:
    """True if the kernel knows tcx links: for a device that cannot exist it then says that it is missing."""
    program = bpf.prog_load(uapi.PROG_SCHED_CLS, 0, "probe", _PROCEED)
    try:
        os.close(bpf.link_create(program, _NO_DEVICE, TCX_INGRESS))
    except BpfError as error:
        return error.errno == errno.ENODEV
    finally:
        os.close(program)
    return True
