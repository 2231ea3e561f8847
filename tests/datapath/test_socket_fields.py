"""Fields of the kernel's structures, found by its BTF."""

from __future__ import annotations

import platform
import re

import pytest

from ebpfproxy.datapath.kernel.btf import FUNCTION, STRUCT, MissingTypeError, kernel_types
from ebpfproxy.datapath.kernel.socket_fields import NO_SOCKET_FIELDS, find_socket_fields

pytestmark = pytest.mark.root


def test_fields_are_found_where_programs_may_read_them() -> None:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    assert found is not None
    fields = find_socket_fields()
    assert (fields is not None) == ((int(found[1]), int(found[2])) >= (6, 2))
    if fields is not None:
        assert fields.constants().keys() == NO_SOCKET_FIELDS.constants().keys()


def test_field_of_another_size_is_not_taken_for_it() -> None:
    with kernel_types() as types:
        assert types.offset("sock_common", "skc_cookie", 8) % 8 == 0
        with pytest.raises(MissingTypeError, match=r"sock_common\.skc_cookie"):
            types.offset("sock_common", "skc_cookie", 4)


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
