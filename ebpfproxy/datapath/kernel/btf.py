"""The kernel's own types (BTF): ids of functions and structures, and where fields are."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterator
from contextlib import contextmanager

from ebpfproxy.datapath.kernel.libbpf import lib

# enum in linux/btf.h
STRUCT, FUNCTION = 4, 12
_INT, _POINTER, _ARRAY, _UNION, _ENUM = 1, 2, 3, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FLOAT, _TYPE_TAG, _ENUM64 = 8, 9, 10, 11, 16, 18, 19
_ALIASES = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG)
#: Kinds whose btf_type has a size.
_SIZED = (_INT, STRUCT, _UNION, _ENUM, _FLOAT, _ENUM64)
_HAS_BIT_FIELDS = 1 << 31


class _Type(ct.Structure):
    """struct btf_type. ``info``: the number of members, the kind, and if there are bit fields among them."""

    _fields_ = (("name", ct.c_uint32), ("info", ct.c_uint32), ("size_or_type", ct.c_uint32))

    @property
    def kind(self) -> int:
        return int(self.info) >> 24 & 0x1F


class _Array(ct.Structure):
    """struct btf_array, behind the type."""

    _fields_ = (("type", ct.c_uint32), ("index_type", ct.c_uint32), ("count", ct.c_uint32))


class _Member(ct.Structure):
    """struct btf_member. ``offset`` is in bits; its highest byte is a bit field's size, if there are any."""

    _fields_ = (("name", ct.c_uint32), ("type", ct.c_uint32), ("offset", ct.c_uint32))


class MissingTypeError(Exception):
    """The kernel does not have what was looked for, or does not say so."""


class KernelTypes:
    def __init__(self, btf: int) -> None:
        self._btf = btf

    def id_of(self, name: str, kind: int) -> int:
        found = int(lib.btf__find_by_name_kind(self._btf, name.encode(), kind))
        if found <= 0:
            raise MissingTypeError(name)
        return found

    def offset(self, structure: str, field: str, size: int) -> int:
        """The byte at which a field of this size begins; it may be a field of a field without a name."""
        found = self._offset(self.id_of(structure, STRUCT), field.encode(), size)
        if found is None:
            raise MissingTypeError(f"{structure}.{field}")
        return found

    def _type(self, number: int) -> _Type:
        found = lib.btf__type_by_id(self._btf, number)
        if not found:
            raise MissingTypeError(str(number))
        return _Type.from_address(found)

    def _plain(self, number: int) -> int:
        while self._type(number).kind in _ALIASES:
            number = int(self._type(number).size_or_type)
        return number

    def _offset(self, number: int, field: bytes, size: int) -> int | None:
        """The offset in bytes; None where there is no such field, or another kind of field."""
        structure = self._type(number)
        if structure.kind not in (STRUCT, _UNION):
            return None
        first = ct.addressof(structure) + ct.sizeof(_Type)
        for member in (_Member * (structure.info & 0xFFFF)).from_address(first):
            name = lib.btf__name_by_offset(self._btf, member.name)
            bits, is_bit_field = int(member.offset), False
            if structure.info & _HAS_BIT_FIELDS:
                bits, is_bit_field = bits & 0xFFFFFF, bits >> 24 != 0
            if name == field:
                return None if is_bit_field or self._size(member.type) != size else bits // 8
            if not name:
                inner = self._offset(self._plain(member.type), field, size)
                if inner is not None:
                    return bits // 8 + inner
        return None

    def _size(self, number: int) -> int | None:
        """The size in bytes; None for what has none, such as a function."""
        found = self._type(self._plain(number))
        if found.kind in _SIZED:
            return int(found.size_or_type)
        if found.kind == _POINTER:
            return ct.sizeof(ct.c_void_p)
        if found.kind != _ARRAY:
            return None
        array = _Array.from_address(ct.addressof(found) + ct.sizeof(_Type))
        size = self._size(array.type)
        return None if size is None else int(array.count) * size


@contextmanager
def kernel_types() -> Iterator[KernelTypes]:
    """Raises MissingTypeError where the kernel does not tell its types (CONFIG_DEBUG_INFO_BTF)."""
    btf = lib.btf__load_vmlinux_btf()
    if not btf:
        raise MissingTypeError("BTF")
    try:
        yield KernelTypes(btf)
    finally:
        lib.btf__free(btf)
