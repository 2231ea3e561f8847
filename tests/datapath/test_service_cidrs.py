"""The filter of service CIDRs, and flags of addresses in several CIDRs."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import CidrFlags, pack_cidr
from ebpfproxy.datapath.node.service_cidrs import Cidrs, filter_bits
from ebpfproxy.services.model import Prefix
from ebpfproxy.services.values import parse_prefix
from tests.datapath.writing import Bench


def prefix(text: str) -> Prefix:
    found = parse_prefix(text)
    assert found is not None
    return found


@given(st.ip_addresses(), st.integers(0, 128), st.data())
def test_filter_has_the_bit_of_every_address_of_the_cidr(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, length: int, data: st.DataObject
) -> None:
    length = min(length, address.max_prefixlen)
    network = ipaddress.ip_network((address, length), strict=False)
    bits = filter_bits(Prefix(network.network_address.packed, length))
    inside = data.draw(st.ip_addresses(network=network)).packed
    own = filter_bits(Prefix(inside, 8 * len(inside)))
    assert own is not None
    assert bits is None or set(own) <= set(bits)


@pytest.mark.root
def test_longest_prefix_has_the_flags_of_all_prefixes_that_contain_it(bench: Bench) -> None:
    bench.empty()
    assert bench.maps is not None
    cidrs = Cidrs(bench.maps)
    cidrs.set_pods([prefix("10.0.0.0/8"), prefix("fd00::/48")])
    taken = [bytes([10, 96, 0, 7]), bytes([192, 0, 2, 1])]
    assert cidrs.set_services([prefix("10.96.0.0/12"), prefix("fd00:0:0:1::/108")], taken)
    both = CidrFlags.PODS | CidrFlags.SERVICES

    def flags(text: str) -> CidrFlags:
        assert bench.maps is not None
        found = bench.maps["cidrs"].lookup(pack_cidr(prefix(text)))
        return CidrFlags(U32.unpack(found)[0]) if found is not None else CidrFlags(0)

    assert flags("10.96.0.7/32") == both | CidrFlags.TAKEN
    assert flags("10.97.3.4/32") == both
    assert flags("10.1.2.3/32") == CidrFlags.PODS
    assert flags("192.0.2.1/32") == CidrFlags(0)
    assert flags("fd00:0:0:1::9/128") == both
    bench.reopen()
    again = Cidrs(bench.maps)
    assert set(again.adopted) == {prefix("10.96.0.0/12"), prefix("fd00:0:0:1::/108")}
    again.set_pods([])
    again.set_services([], [])
    assert list(bench.maps["cidrs"].items()) == []
    assert not any(bench.maps.shared("cidr_filter").bytes)
