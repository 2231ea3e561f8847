"""The kernel's bpf interface, through libbpf's low-level functions (libbpf.so.1, a dependency of bcc).

Thin: arguments as the kernel wants them, ``BpfError`` for failures. File descriptors are plain integers;
whoever gets one closes it. See bpf(2) and https://docs.kernel.org/bpf/.
"""

from __future__ import annotations

import ctypes as ct
import errno
import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

Info = TypeVar("Info", bound=ct.Structure)

_NOEXIST = 1  # of an update (BPF_NOEXIST)

#: Errors of an update where there is no room: a full hash says E2BIG, a full LPM trie ENOSPC.
NO_ROOM = (errno.E2BIG, errno.ENOSPC, errno.ENOMEM)

#: Kernels before 6.4 keep the log's beginning, not its end, where the buffer is too small.
_LOG_BYTES = 64 << 20


class BpfError(OSError):
    """A bpf(2) command failed; ``errno`` is the kernel's."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(code, f"{what}: {os.strerror(code)}")


class VerifierError(BpfError):
    """A program does not load; ``log`` has the verifier's words, and may be empty."""

    def __init__(self, code: int, what: str, log: str) -> None:
        super().__init__(code, what)
        self.log = log


class _MapCreateOpts(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("btf_fd", ct.c_uint32),
        ("btf_key_type_id", ct.c_uint32),
        ("btf_value_type_id", ct.c_uint32),
        ("btf_vmlinux_value_type_id", ct.c_uint32),
        ("inner_map_fd", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("map_extra", ct.c_uint64),
        ("numa_node", ct.c_uint32),
        ("map_ifindex", ct.c_uint32),
    )


class _ProgLoadOpts(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("attempts", ct.c_int),
        ("expected_attach_type", ct.c_int),
        ("prog_btf_fd", ct.c_uint32),
        ("prog_flags", ct.c_uint32),
        ("prog_ifindex", ct.c_uint32),
        ("kern_version", ct.c_uint32),
        ("attach_btf_id", ct.c_uint32),
        ("attach_prog_fd", ct.c_uint32),
        ("attach_btf_obj_fd", ct.c_uint32),
        ("fd_array", ct.c_void_p),
        ("func_info", ct.c_void_p),
        ("func_info_cnt", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("line_info", ct.c_void_p),
        ("line_info_cnt", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32),
        ("log_level", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_buf", ct.c_void_p),
    )


class MapInfo(ct.Structure):
    """struct bpf_map_info, the fields that every supported kernel has."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("name", ct.c_char * 16),
    )


class ProgInfo(ct.Structure):
    """struct bpf_prog_info up to and including ``load_time`` (nanoseconds since boot)."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_uint8 * 8),
        ("jited_prog_len", ct.c_uint32),
        ("xlated_prog_len", ct.c_uint32),
        ("jited_prog_insns", ct.c_uint64),
        ("xlated_prog_insns", ct.c_uint64),
        ("load_time", ct.c_uint64),
    )


class TcxLinkInfo(ct.Structure):
    """struct bpf_link_info of a tcx link. ``ifindex`` is 0 once the device is gone."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("ifindex", ct.c_uint32),
        ("attach_type", ct.c_uint32),
        ("pad2", ct.c_uint64),
    )


class CgroupLinkInfo(ct.Structure):
    """struct bpf_link_info of a cgroup link. ``cgroup_id`` is 0 once the cgroup is gone."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("cgroup_id", ct.c_uint64),
        ("attach_type", ct.c_uint32),
        ("pad2", ct.c_uint32),
    )


_INT, _U32, _POINTER = ct.c_int, ct.c_uint32, ct.c_void_p
_ARGUMENTS = {
    "libbpf_set_print": (_POINTER,),
    "bpf_map_create": (_U32, ct.c_char_p, _U32, _U32, _U32, _POINTER),
    "bpf_map_update_elem": (_INT, _POINTER, _POINTER, ct.c_uint64),
    "bpf_map_lookup_elem": (_INT, _POINTER, _POINTER),
    "bpf_map_delete_elem": (_INT, _POINTER),
    "bpf_map_lookup_and_delete_elem": (_INT, _POINTER, _POINTER),
    "bpf_map_update_batch": (_INT, _POINTER, _POINTER, _POINTER, _POINTER),
    "bpf_map_delete_batch": (_INT, _POINTER, _POINTER, _POINTER),
    "bpf_map_lookup_batch": (_INT, *(_POINTER,) * 6),
    "bpf_obj_get_info_by_fd": (_INT, _POINTER, _POINTER),
    "bpf_prog_load": (_INT, ct.c_char_p, ct.c_char_p, _POINTER, ct.c_size_t, _POINTER),
    "libbpf_probe_bpf_helper": (_INT, _INT, _POINTER),
}


@functools.cache
def _load() -> ct.CDLL:
    try:
        lib = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise SystemExit(f"ebpfproxy: libbpf.so.1 is missing ({error}); install python3-bpfcc") from error
    for name, types in _ARGUMENTS.items():
        getattr(lib, name).argtypes = types
    lib.libbpf_set_print(None)
    return lib


class _Library:
    """libbpf, opened with the first call: operators' commands also run where there is none."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(_load(), name)
        setattr(self, name, function)
        return function


_lib = _Library()


def _check(result: int, what: str) -> int:
    # libbpf 1.x returns -errno and sets errno, too.
    if result < 0:
        raise BpfError(ct.get_errno() or -result, what)
    return result


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
    opts = _MapCreateOpts(sz=ct.sizeof(_MapCreateOpts), map_flags=flags, inner_map_fd=inner_fd)
    return _check(
        _lib.bpf_map_create(kind, name.encode(), key_size, value_size, max_entries, ct.byref(opts)),
        f"create map {name}",
    )


def map_update(fd: int, key: bytes, value: bytes) -> None:
    _check(_lib.bpf_map_update_elem(fd, key, value, 0), "update map")


def map_add(fd: int, key: bytes, value: bytes) -> bool:
    """Adds an entry. Returns False if there is such a key already."""
    result = _lib.bpf_map_update_elem(fd, key, value, _NOEXIST)
    if result < 0 and ct.get_errno() == errno.EEXIST:
        return False
    _check(result, "add to map")
    return True


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value, or None where there is none. Per-CPU maps: ``value_size`` covers all possible CPUs."""
    buffer = ct.create_string_buffer(value_size)
    result = _lib.bpf_map_lookup_elem(fd, key, buffer)
    if result < 0 and ct.get_errno() == errno.ENOENT:
        return None
    _check(result, "look up in map")
    return buffer.raw


def map_delete(fd: int, key: bytes) -> bool:
    """Deletes an entry. Returns False if there was no such key."""
    result = _lib.bpf_map_delete_elem(fd, key)
    if result < 0 and ct.get_errno() == errno.ENOENT:
        return False
    _check(result, "delete from map")
    return True


def map_take(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Deletes an entry of a hash and returns its value, in one step (Linux 5.14); None without one."""
    buffer = ct.create_string_buffer(value_size)
    result = _lib.bpf_map_lookup_and_delete_elem(fd, key, buffer)
    if result < 0 and ct.get_errno() == errno.ENOENT:
        return None
    _check(result, "take from map")
    return buffer.raw


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> int:
    """Writes ``count`` entries; returns how many were written before the first for which there is no room."""
    done = ct.c_uint32(count)
    result = _lib.bpf_map_update_batch(fd, keys, values, ct.byref(done), None)
    if result < 0 and ct.get_errno() not in NO_ROOM:
        _check(result, "update map")
    return done.value


def map_delete_batch(fd: int, keys: bytes, count: int) -> int:
    """Deletes ``count`` keys; returns how many were there before the first that was not."""
    done = ct.c_uint32(count)
    result = _lib.bpf_map_delete_batch(fd, keys, ct.byref(done), None)
    if result < 0 and ct.get_errno() != errno.ENOENT:
        _check(result, "delete from map")
    return done.value


def map_lookup_batches(
    fd: int, key_size: int, value_size: int, batch: int
) -> Iterator[tuple[memoryview, memoryview, int]]:
    """Keys, values and their number, up to ``batch`` entries at a time; the views are good until the next.

    ``value_size`` as in :func:`map_lookup`. A hash that changes meanwhile may give an entry twice or not.
    """
    keys = ct.create_string_buffer(key_size * batch)
    values = ct.create_string_buffer(value_size * batch)
    token = ct.create_string_buffer(max(4, key_size))
    start: ct.Array[ct.c_char] | None = None
    while True:
        count = ct.c_uint32(batch)
        result = _lib.bpf_map_lookup_batch(fd, start, token, keys, values, ct.byref(count), None)
        last = result < 0 and ct.get_errno() == errno.ENOENT
        if not last:
            _check(result, "read map")
        if count.value:
            yield memoryview(keys).cast("B"), memoryview(values).cast("B"), count.value
        if last:
            return
        start = token


def map_info(fd: int) -> MapInfo:
    return _info(fd, MapInfo())


def prog_info(fd: int) -> ProgInfo:
    return _info(fd, ProgInfo())


def cgroup_link_info(fd: int) -> CgroupLinkInfo:
    return _info(fd, CgroupLinkInfo())


def tcx_link_info(fd: int) -> TcxLinkInfo:
    return _info(fd, TcxLinkInfo())


def _info(fd: int, info: Info) -> Info:
    size = ct.c_uint32(ct.sizeof(info))
    _check(_lib.bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(size)), "get info")
    return info


def pin(fd: int, path: Path) -> None:
    _check(_lib.bpf_obj_pin(fd, os.fsencode(path)), f"pin {path}")


def get_pinned(path: Path) -> int:
    """A file descriptor of the object pinned at ``path``; BpfError with ENOENT if there is none."""
    return _check(_lib.bpf_obj_get(os.fsencode(path)), f"open {path}")


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


def link_create(prog_fd: int, target_fd: int, attach_type: int) -> int:
    return _check(_lib.bpf_link_create(prog_fd, target_fd, attach_type, None), "attach program")


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replaces the link's program in one step."""
    _check(_lib.bpf_link_update(link_fd, prog_fd, None), "replace program")


def has_helper(prog_type: int, helper: int) -> bool:
    return bool(_lib.libbpf_probe_bpf_helper(prog_type, helper, None) == 1)


def prog_load(prog_type: int, attach_type: int, name: str, insns: bytes) -> int:
    """Loads instructions and returns the program's file descriptor. Raises VerifierError."""
    opts = _ProgLoadOpts(sz=ct.sizeof(_ProgLoadOpts), expected_attach_type=attach_type)

    def load() -> int:
        count = len(insns) // 8
        return int(_lib.bpf_prog_load(prog_type, name[:15].encode(), b"GPL", insns, count, ct.byref(opts)))

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
    return _check(_lib.libbpf_num_possible_cpus(), "count CPUs")
