"""XDP programs that replace a function of another one (BPF_PROG_TYPE_EXT), as libxdp's dispatcher needs them.

The kernel compares the types of both functions, which it knows from BTF (Documentation/bpf/btf.rst). The
compiler's is not kept; all that is needed is ``int NAME(struct xdp_md *ctx)``.
"""

from __future__ import annotations

import os
import struct

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import XDP_ATTACH
from ebpfproxy.datapath.kernel import bpf

_HEADER = struct.Struct(
    "=HBBIIIII"
)  # magic, version, flags, length; offsets and lengths of types and strings
_MAGIC, _VERSION = 0xEB9F, 1
_TYPE = struct.Struct("=III")  # name, kind and number of parts, size or type
_INT, _PTR, _ARRAY, _STRUCT, _FUNC, _FUNC_PROTO, _VAR, _DATASEC = 1, 2, 3, 4, 12, 13, 14, 15
_SIGNED_32 = 1 << 24 | 32
_POINTER_BYTES = 8
_GLOBAL = 1
#: Where libxdp looks for a program's place among others.
_RUN_CONFIG = ".xdp_run_config"
# Types by their place below, from 1.
_INTEGER, _CONTEXT, _POINTER, _PROTOTYPE, FUNCTION, _COUNT, _COUNT_POINTER, _CONFIG, _VARIABLE = range(1, 10)
#: r0 = XDP_PASS; return.
_PASS_ALL = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)


class _Strings:
    def __init__(self) -> None:
        self.data = b"\0"

    def add(self, text: str) -> int:
        at = len(self.data)
        self.data += text.encode() + b"\0"
        return at


def _type(name: int, kind: int, reference: int, *more: int, parts: int = 0) -> bytes:
    return _TYPE.pack(name, kind << 24 | parts, reference) + struct.pack(f"={len(more)}I", *more)


def describe(name: str, priority: int) -> bytes:
    """BTF of the function, and of what libxdp reads: an array with as many elements as the priority."""
    strings = _Strings()
    add = strings.add
    types = b"".join(
        (
            _type(add("int"), _INT, 4, _SIGNED_32),
            _type(add("xdp_md"), _STRUCT, 0),
            _type(0, _PTR, _CONTEXT),
            _type(0, _FUNC_PROTO, _INTEGER, add("ctx"), _POINTER, parts=1),
            _type(add(name), _FUNC, _PROTOTYPE, parts=_GLOBAL),
            _type(0, _ARRAY, 0, _INTEGER, _INTEGER, priority),
            _type(0, _PTR, _COUNT),
            _type(0, _STRUCT, _POINTER_BYTES, add("priority"), _COUNT_POINTER, 0, parts=1),
            _type(add(f"_{name}"), _VAR, _CONFIG, _GLOBAL),
            _type(add(_RUN_CONFIG), _DATASEC, _POINTER_BYTES, _VARIABLE, 0, _POINTER_BYTES, parts=1),
        )
    )
    header = _HEADER.pack(_MAGIC, _VERSION, 0, _HEADER.size, 0, len(types), len(types), len(strings.data))
    return header + types + strings.data


def load_extension(name: str, instructions: bytes, priority: int) -> int:
    """Loads a program of one function that any such function of an XDP program can be replaced with.

    Returns its descriptor. Raises BpfError where the kernel has no such programs, VerifierError otherwise.
    """
    btf = bpf.btf_load(describe(name, priority))
    try:
        typed = bpf.Typed(btf, FUNCTION)
        # The kernel wants one at the load already.
        replaced = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, name, _PASS_ALL, typed=typed)
        try:
            extends = bpf.Extended(replaced, FUNCTION)
            return bpf.prog_load(uapi.PROG_EXT, 0, name, instructions, typed=typed, extends=extends)
        finally:
            os.close(replaced)
    finally:
        os.close(btf)
