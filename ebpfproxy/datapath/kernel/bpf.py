"""The kernel's bpf interface, through libbpf's low-level functions (libbpf.so.1).

Thin: arguments as the kernel wants them, ``BpfError`` for failures. File descriptors are plain integers;
whoever gets one closes it. See bpf(2) and https://docs.kernel.org/bpf/.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from ebpfproxy.datapath.kernel.libbpf import (
    BpfError,
    CgroupLinkInfo,
    LinkCreateOpts,
    LinkInfo,
    MapCreateOpts,
    MapInfo,
    ProgInfo,
    ProgLoadOpts,
    ProgRunOpts,
    TcxLinkInfo,
    VerifierError,
    XdpLinkInfo,
    check,
    lib,
)

Info = TypeVar("Info", bound=ct.Structure)

_QUERY_EFFECTIVE = 1  # of a query (BPF_F_QUERY_EFFECTIVE)
#: More programs than the kernel lets attach to a cgroup's hook.
_MOST_PROGRAMS = 256
_NOEXIST = 1  # of an update (BPF_NOEXIST)

#: Errors of an update where there is no room: a full hash says E2BIG, a full LPM trie ENOSPC.
NO_ROOM = (errno.E2BIG, errno.ENOSPC, errno.ENOMEM)

#: Kernels before 6.4 keep the log's beginning, not its end, where the buffer is too small.
_LOG_BYTES = 64 << 20
#: A signal ends the verifier with EAGAIN, also one that stops or freezes the process. Where they come again
#: and again, none of the 5 attempts that libbpf makes by itself need be quick enough.
_LOAD_ATTEMPTS = 200


def map_create(
    kind: int,
    name: str,
    key_size: int,
    value_size: int,
    max_entries: int,
    *,
    flags: int = 0,
    inner_fd: int = 0,
) -> int:
    """Creates a map and returns its file descriptor."""
    opts = MapCreateOpts(sz=ct.sizeof(MapCreateOpts), map_flags=flags, inner_map_fd=inner_fd)
    return check(
        lib.bpf_map_create(kind, name.encode(), key_size, value_size, max_entries, ct.byref(opts)),
        f"create map {name}",
    )


def map_update(fd: int, key: bytes, value: bytes) -> None:
    check(lib.bpf_map_update_elem(fd, key, value, 0), "update map")


def map_add(fd: int, key: bytes, value: bytes) -> bool:
    """Adds an entry. Returns False if there is such a key already."""
    result = lib.bpf_map_update_elem(fd, key, value, _NOEXIST)
    if result < 0 and ct.get_errno() == errno.EEXIST:
        return False
    check(result, "add to map")
    return True


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value, or None where there is none. Per-CPU maps: ``value_size`` covers all possible CPUs."""
    buffer = ct.create_string_buffer(value_size)
    result = lib.bpf_map_lookup_elem(fd, key, buffer)
    if result < 0 and ct.get_errno() == errno.ENOENT:
        return None
    check(result, "look up in map")
    return buffer.raw


def map_delete(fd: int, key: bytes) -> bool:
    """Deletes an entry. Returns False if there was no such key."""
    result = lib.bpf_map_delete_elem(fd, key)
    if result < 0 and ct.get_errno() == errno.ENOENT:
        return False
    check(result, "delete from map")
    return True


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> int:
    """Writes ``count`` entries; returns how many were written before the first for which there is no room."""
    done = ct.c_uint32(count)
    result = lib.bpf_map_update_batch(fd, keys, values, ct.byref(done), None)
    if result < 0 and ct.get_errno() not in NO_ROOM:
        check(result, "update map")
    return done.value


def map_delete_batch(fd: int, keys: bytes, count: int) -> int:
    """Deletes ``count`` keys; returns how many were there before the first that was not."""
    done = ct.c_uint32(count)
    result = lib.bpf_map_delete_batch(fd, keys, ct.byref(done), None)
    if result < 0 and ct.get_errno() != errno.ENOENT:
        check(result, "delete from map")
    return done.value


def map_lookup_batches(
    fd: int, key_size: int, value_size: int, batch: int
) -> Iterator[tuple[memoryview, memoryview, int]]:
    """Keys, values and their number, up to ``batch`` entries at a time; the views are good until the next.

    ``value_size`` as in :func:`map_lookup`. A hash that changes meanwhile may give an entry twice or not.
    """
    keys = ct.create_string_buffer(key_size * batch)
    values = ct.create_string_buffer(value_size * batch)
    for count in map_lookup_batches_into(fd, keys, values, key_size, batch):
        yield memoryview(keys).cast("B"), memoryview(values).cast("B"), count


def map_lookup_batches_into(
    fd: int, keys: ct.Array[ct.c_char], values: ct.Array[ct.c_char], key_size: int, batch: int
) -> Iterator[int]:
    """The same for memory of the caller's own, which has room for ``batch`` entries."""
    token = ct.create_string_buffer(max(4, key_size))
    start: ct.Array[ct.c_char] | None = None
    while True:
        count = ct.c_uint32(batch)
        result = lib.bpf_map_lookup_batch(fd, start, token, keys, values, ct.byref(count), None)
        last = result < 0 and ct.get_errno() == errno.ENOENT
        if not last:
            check(result, "read map")
        if count.value:
            yield count.value
        if last:
            return
        start = token


def prog_run(fd: int, packet: bytes, times: int = 1) -> int:
    """Runs a tc program with a packet of 14 to 3,500 bytes (BPF_PROG_TEST_RUN); returns its last result.

    A signal may end several runs early (BpfError with EINTR).
    """
    opts = ProgRunOpts(sz=ct.sizeof(ProgRunOpts), data_in=packet, data_size_in=len(packet), repeat=times)
    check(lib.bpf_prog_test_run_opts(fd, ct.byref(opts)), "run program")
    return int(opts.retval)


def map_info(fd: int) -> MapInfo:
    return _info(fd, MapInfo())


def prog_info(fd: int) -> ProgInfo:
    return _info(fd, ProgInfo())


def prog_name(number: int) -> str:
    """The name of the program with this id, empty if it is gone by now."""
    fd = lib.bpf_prog_get_fd_by_id(number)
    if fd < 0:
        return ""
    try:
        return str(prog_info(fd).name.decode(errors="replace"))
    finally:
        os.close(fd)


def programs() -> Iterator[ProgInfo]:
    """All programs that are loaded on this machine, whosever they are; needs CAP_SYS_ADMIN."""
    return _all(lib.bpf_prog_get_next_id, lib.bpf_prog_get_fd_by_id, ProgInfo)


def links() -> Iterator[LinkInfo]:
    """All links of this machine; needs CAP_SYS_ADMIN."""
    return _all(lib.bpf_link_get_next_id, lib.bpf_link_get_fd_by_id, LinkInfo)


def _all(next_id: Callable[..., int], open_id: Callable[[int], int], info: type[Info]) -> Iterator[Info]:
    number = ct.c_uint32(0)
    while True:
        result = next_id(number, ct.byref(number))
        if result < 0 and ct.get_errno() == errno.ENOENT:
            return
        check(result, "list ids")
        fd = open_id(number.value)
        # It may be gone since.
        if fd >= 0:
            try:
                yield _info(fd, info())
            finally:
                os.close(fd)


def attached_programs(target: int, attach_type: int, *, effective: bool = False) -> list[int]:
    """The ids of the programs at a hook, in the order in which they run.

    ``target``: a descriptor of a cgroup, or a device's index for tcx. ``effective``: with those of the
    cgroups above, which run for this one, too.
    """
    ids, count = (ct.c_uint32 * _MOST_PROGRAMS)(), ct.c_uint32(_MOST_PROGRAMS)
    flags = _QUERY_EFFECTIVE if effective else 0
    check(lib.bpf_prog_query(target, attach_type, flags, None, ids, ct.byref(count)), "query programs")
    return list(ids[: count.value])


def cgroup_link_info(fd: int) -> CgroupLinkInfo:
    return _info(fd, CgroupLinkInfo())


def tcx_link_info(fd: int) -> TcxLinkInfo:
    return _info(fd, TcxLinkInfo())


def xdp_link_info(fd: int) -> XdpLinkInfo:
    return _info(fd, XdpLinkInfo())


def _info(fd: int, info: Info) -> Info:
    size = ct.c_uint32(ct.sizeof(info))
    check(lib.bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(size)), "get info")
    return info


def pin(fd: int, path: Path) -> None:
    check(lib.bpf_obj_pin(fd, os.fsencode(path)), f"pin {path}")


def get_pinned(path: Path) -> int:
    """A file descriptor of the object pinned at ``path``; BpfError with ENOENT if there is none."""
    return check(lib.bpf_obj_get(os.fsencode(path)), f"open {path}")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The same as :func:`get_pinned`, closed afterwards."""
    fd = get_pinned(path)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def pinned(path: Path) -> Iterator[int | None]:
    """The same as :func:`opened`, but None if nothing is pinned there."""
    with ExitStack() as stack:
        fd = None
        try:
            fd = stack.enter_context(opened(path))
        except BpfError as error:
            if error.errno != errno.ENOENT:
                raise
        yield fd


def link_create(prog_fd: int, target_fd: int, attach_type: int, flags: int = 0) -> int:
    """``target_fd``: a cgroup's descriptor, or a device's index. ``flags`` are those of the attach type."""
    opts = LinkCreateOpts(sz=ct.sizeof(LinkCreateOpts), flags=flags)
    return check(lib.bpf_link_create(prog_fd, target_fd, attach_type, ct.byref(opts)), "attach program")


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replaces the link's program in one step."""
    check(lib.bpf_link_update(link_fd, prog_fd, None), "replace program")


def link_detach(link_fd: int) -> None:
    """Detaches the program now: what follows a link's last reference is done by the kernel a moment later."""
    check(lib.bpf_link_detach(link_fd), "detach program")


def has_helper(prog_type: int, helper: int) -> bool:
    return bool(lib.libbpf_probe_bpf_helper(prog_type, helper, None) == 1)


class Typed(NamedTuple):
    """BTF, by its descriptor, and in it the type of a program's only function."""

    btf: int
    function: int


class Extended(NamedTuple):
    """A program, and in its BTF the type of the function that an extension replaces."""

    program: int
    function: int


def btf_load(data: bytes) -> int:
    """Loads BTF and returns its file descriptor."""
    return check(lib.bpf_btf_load(data, len(data), None), "load BTF")


def prog_load(
    prog_type: int,
    attach_type: int,
    name: str,
    insns: bytes,
    *,
    typed: Typed | None = None,
    extends: Extended | None = None,
) -> int:
    """Loads instructions and returns the program's file descriptor. Raises VerifierError."""
    opts = ProgLoadOpts(sz=ct.sizeof(ProgLoadOpts), attempts=_LOAD_ATTEMPTS, expected_attach_type=attach_type)
    if typed is not None:
        # struct bpf_func_info: the function's first instruction, and its type.
        function = (ct.c_uint32 * 2)(0, typed.function)
        opts.prog_btf_fd, opts.func_info = typed.btf, ct.addressof(function)
        opts.func_info_cnt, opts.func_info_rec_size = 1, ct.sizeof(function)
    if extends is not None:
        opts.attach_prog_fd, opts.attach_btf_id = extends

    def load() -> int:
        count = len(insns) // 8
        return int(lib.bpf_prog_load(prog_type, name[:15].encode(), b"GPL", insns, count, ct.byref(opts)))

    fd = load()
    if fd >= 0:
        return fd
    code = ct.get_errno() or -fd
    # Again, to hear why: the log costs as much as the work.
    log = ct.create_string_buffer(_LOG_BYTES)
    opts.log_level, opts.log_buf, opts.log_size = 1, ct.addressof(log), _LOG_BYTES
    fd = load()
    if fd >= 0:
        return fd
    raise VerifierError(code, f"load program {name}", log.value.decode(errors="replace"))


def possible_cpus() -> int:
    """How many values a per-CPU map holds for each key."""
    return check(lib.libbpf_num_possible_cpus(), "count CPUs")
