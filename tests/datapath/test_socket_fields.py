"""Fields of the kernel's structures, found by its BTF."""

from __future__ import annotations

import platform
import re

import msgspec
import pytest

from ebpfproxy.datapath.kernel.btf import FUNCTION, STRUCT, MissingTypeError, kernel_types
from ebpfproxy.datapath.kernel.socket_fields import (
    NO_SOCKET_FIELDS,
    SocketFields,
    are_readable,
    find_socket_fields,
)

pytestmark = pytest.mark.root


def test_fields_are_found_where_programs_may_read_them() -> None:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    assert found is not None
    fields = find_socket_fields()
    assert (fields is not None) == ((int(found[1]), int(found[2])) >= (6, 2))
    if fields is not None:
        assert fields.constants().keys() == NO_SOCKET_FIELDS.constants().keys()


@pytest.mark.parametrize("field", SocketFields.__struct_fields__)
def test_fields_are_used_only_if_the_verifier_permits_each_of_them(field: str) -> None:
    """Also those that only connect() needs: otherwise its programs would not load, and nothing would replace them."""
    fields = find_socket_fields()
    if fields is None:
        pytest.skip("this kernel lets programs read no fields")
    assert are_readable(fields)
    is_type = field in ("rdonly_cast", "sock_common", "tcp_sock")
    # There are not so many types, and no structure has so many bytes.
    assert not are_readable(msgspec.structs.replace(fields, **{field: 1 << 30 if is_type else 0x7FF8}))


def test_field_of_another_size_is_not_taken_for_it() -> None:
    with kernel_types() as types:
        assert types.offset("sock_common", "skc_cookie", 8) % 8 == 0
        with pytest.raises(MissingTypeError, match=r"sock_common\.skc_cookie"):
            types.offset("sock_common", "skc_cookie", 4)


@pytest.mark.parametrize(
    ("structure", "field", "size"),
    [
        ("task_struct", "comm", 16),  # an array of characters
        ("ethhdr", "h_dest", 6),
        ("in6_addr", "in6_u", 16),  # a union
        ("flowi6", "daddr", 16),  # a structure
        ("bpf_prog", "type", 4),  # an enum
        ("socket", "state", 4),  # another name for an enum
        ("bpf_prog", "aux", 8),  # a pointer
    ],
)
def test_sizes_of_fields(structure: str, field: str, size: int) -> None:
    with kernel_types() as types:
        types.offset(structure, field, size)
        with pytest.raises(MissingTypeError):
            types.offset(structure, field, 8 if size != 8 else 4)


def test_bit_field_is_not_taken_for_a_field() -> None:
    with kernel_types() as types, pytest.raises(MissingTypeError, match=r"sock_common\.skc_reuse"):
        types.offset("sock_common", "skc_reuse", 1)


def test_field_of_a_nameless_union_counts_from_the_structure_s_begin() -> None:
    with kernel_types() as types:
        inner = types.offset("sock_common", "skc_rcv_saddr", 4)
        assert inner == types.offset("sock_common", "skc_daddr", 4) + 4


@pytest.mark.parametrize(("name", "kind"), [("no_such_thing", STRUCT), ("sock_common", FUNCTION)])
def test_missing_type_is_named(name: str, kind: int) -> None:
    with kernel_types() as types, pytest.raises(MissingTypeError, match=name):
        types.id_of(name, kind)
