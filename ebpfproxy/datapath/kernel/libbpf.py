"""libbpf.so.1 by ctypes: its functions, the structures of its calls, and its errors.

The structures are those of linux/bpf.h and of libbpf's own header up to the last field that is used; fields
are in host byte order. :mod:`ebpfproxy.datapath.kernel.bpf` makes the calls.
"""

from __future__ import annotations

import ctypes as ct
import functools
import os
from typing import Any


class BpfError(OSError):
    """A bpf(2) command failed; ``errno`` is the kernel's."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(code, f"{what}: {os.strerror(code)}")


class VerifierError(BpfError):
    """A program does not load; ``log`` has the verifier's words, and may be empty."""

    def __init__(self, code: int, what: str, log: str) -> None:
        super().__init__(code, what)
        self.log = log


class MapCreateOpts(ct.Structure):
    """struct bpf_map_create_opts of libbpf."""

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


class ProgLoadOpts(ct.Structure):
    """struct bpf_prog_load_opts of libbpf."""

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


class ProgRunOpts(ct.Structure):
    """struct bpf_test_run_opts of libbpf."""

    _fields_ = (
        ("sz", ct.c_size_t),
        ("data_in", ct.c_char_p),
        ("data_out", ct.c_void_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
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
    """struct bpf_prog_info up to and including ``name``. ``load_time`` is in nanoseconds since boot."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_uint8 * 8),
        ("jited_prog_len", ct.c_uint32),
        ("xlated_prog_len", ct.c_uint32),
        ("jited_prog_insns", ct.c_uint64),
        ("xlated_prog_insns", ct.c_uint64),
        ("load_time", ct.c_uint64),
        ("created_by_uid", ct.c_uint32),
        ("nr_map_ids", ct.c_uint32),
        ("map_ids", ct.c_uint64),
        ("name", ct.c_char * 16),
    )


class LinkCreateOpts(ct.Structure):
    """struct bpf_link_create_opts of libbpf, before what depends on the kind of link."""

    _fields_ = (
        ("sz", ct.c_size_t),
        ("flags", ct.c_uint32),
        ("iter_info", ct.c_void_p),
        ("iter_info_len", ct.c_uint32),
        ("target_btf_id", ct.c_uint32),
    )


class LinkInfo(ct.Structure):
    """struct bpf_link_info of any link. ``target``: what its type has there, as below."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("target", ct.c_uint32 * 4),
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


class XdpLinkInfo(ct.Structure):
    """struct bpf_link_info of an XDP link. ``ifindex`` is 0 once the device is gone."""

    _fields_ = (
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("ifindex", ct.c_uint32),
        ("pad2", ct.c_uint32 * 3),
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
#: ring_buffer_sample_fn: a context, the record and its size.
RING_CALLBACK = ct.CFUNCTYPE(_INT, _POINTER, _POINTER, ct.c_size_t)
_ARGUMENTS = {
    "libbpf_set_print": (_POINTER,),
    "bpf_map_create": (_U32, ct.c_char_p, _U32, _U32, _U32, _POINTER),
    "bpf_map_update_elem": (_INT, _POINTER, _POINTER, ct.c_uint64),
    "bpf_map_lookup_elem": (_INT, _POINTER, _POINTER),
    "bpf_map_delete_elem": (_INT, _POINTER),
    "bpf_map_update_batch": (_INT, _POINTER, _POINTER, _POINTER, _POINTER),
    "bpf_map_delete_batch": (_INT, _POINTER, _POINTER, _POINTER),
    "bpf_map_lookup_batch": (_INT, *(_POINTER,) * 6),
    "bpf_obj_get_info_by_fd": (_INT, _POINTER, _POINTER),
    "bpf_prog_test_run_opts": (_INT, _POINTER),
    "bpf_prog_query": (_INT, _INT, _U32, _POINTER, _POINTER, _POINTER),
    "bpf_prog_get_fd_by_id": (_U32,),
    "bpf_prog_get_next_id": (_U32, _POINTER),
    "bpf_link_get_fd_by_id": (_U32,),
    "bpf_link_get_next_id": (_U32, _POINTER),
    "bpf_btf_load": (_POINTER, ct.c_size_t, _POINTER),
    "bpf_prog_load": (_INT, ct.c_char_p, ct.c_char_p, _POINTER, ct.c_size_t, _POINTER),
    "bpf_link_detach": (_INT,),
    "libbpf_probe_bpf_helper": (_INT, _INT, _POINTER),
    "ring_buffer__new": (_INT, RING_CALLBACK, _POINTER, _POINTER),
    "ring_buffer__consume": (_POINTER,),
    "ring_buffer__free": (_POINTER,),
    "btf__load_vmlinux_btf": (),
    "btf__find_by_name_kind": (_POINTER, ct.c_char_p, _U32),
    "btf__type_by_id": (_POINTER, _U32),
    "btf__name_by_offset": (_POINTER, _U32),
    "btf__free": (_POINTER,),
}


@functools.cache
def _load() -> ct.CDLL:
    try:
        lib = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise SystemExit(f"ebpfproxy: libbpf.so.1 is missing ({error}); install libbpf1") from error
    for name, types in _ARGUMENTS.items():
        getattr(lib, name).argtypes = types
    for name in ("ring_buffer__new", "btf__load_vmlinux_btf", "btf__type_by_id"):
        getattr(lib, name).restype = _POINTER
    lib.btf__name_by_offset.restype = ct.c_char_p
    lib.libbpf_set_print(None)
    return lib


class _Library:
    """libbpf, opened with the first call: operators' commands also run where there is none."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(_load(), name)
        setattr(self, name, function)
        return function


lib = _Library()


def check(result: int, what: str) -> int:
    """Returns a result that is no error; raises BpfError, which says what was tried."""
    # libbpf 1.x returns -errno and sets errno, too.
    if result < 0:
        raise BpfError(ct.get_errno() or -result, what)
    return result
