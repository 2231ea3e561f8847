"""Single values: addresses, which of them are usable, and times."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.services.values import (
    parse_address,
    parse_port,
    parse_prefix,
    parse_time,
    unusable_address,
    unusable_name,
    valid_port,
)


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("1", 1),
        ("65535", 65535),
        ("00080", 80),
        ("0", None),
        ("65536", None),
        ("1" * 5000, None),
        ("", None),
        ("-1", None),
        (" 1", None),
        ("²", None),
        ("http", None),
    ],
)
def test_ports_are_read(text: str, port: int | None) -> None:
    """Python refuses to convert thousands of digits, with an exception of its own."""
    assert parse_port(text) == port


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0",
        "10.0.0.256",
        "010.0.0.256",
        "0256.0.0.1",
        "::ffff:010.0.0.1",
        "00x.0.0.1",
        "10.0.0.1 ",
        "10.0.0.1\0",
        "10.0.0.1/32",
        "0x0a.0.0.1",
        "\u0661.0.0.1",  # a digit one that is not ASCII
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "::FFFF:a00:1",
        "1::2::3",
        "1:2:3:4::5:6:7:8",
        "12345::",
        "[fd00::1]",
        "\ud800",
        "example.com",
    ],
)
def test_invalid_addresses(text: str) -> None:
    assert parse_address(text) is None


@pytest.mark.parametrize(
    "text", ["10.0.0.1", "0.0.0.0", "fd00::1", "::", "1:2:3:4:5:6:7::", "64:ff9b::10.0.0.1"]
)
def test_valid_addresses(text: str) -> None:
    assert parse_address(text) == ipaddress.ip_address(text).packed


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("010.00.000.01", "10.0.0.1"),
        ("0000000010.0.0.1", "10.0.0.1"),
        ("fd00::00001", "fd00::1"),
        ("64:ff9b::010.0.0.1", "64:ff9b::10.0.0.1"),
    ],
)
def test_leading_zeros_of_addresses_are_decimal(text: str, plain: str) -> None:
    """Some parsers read them as octal (CVE-2021-29923), Kubernetes as decimal."""
    assert parse_address(text) == parse_address(plain) == ipaddress.ip_address(plain).packed
    length = "012" if "." in text else "0112"
    found = parse_prefix(f"{text}/{length[-3:]}")
    assert found == parse_prefix(f"{plain}/{int(length)}") is not None


texts = st.one_of(
    st.text("0123456789abcF:.% ", max_size=24),
    st.lists(st.sampled_from(["0", "01", "1", "255", "256", ""]), min_size=3, max_size=5).map(".".join),
    st.lists(st.sampled_from(["", "0", "ffff", "12345", "1.2.3.4"]), min_size=2, max_size=9).map(":".join),
    st.ip_addresses().map(str),
)


@given(texts)
def test_addresses_agree_with_the_standard_library_except_zones_and_mapped_ones(text: str) -> None:
    parts = [part.lstrip("0") or part[-1:] for part in re.split(r"([.:])", text)]
    try:
        known = ipaddress.ip_address("".join(parts))
    except ValueError:
        known = None
    if isinstance(known, ipaddress.IPv6Address) and (known.scope_id is not None or known.ipv4_mapped):
        known = None
    assert parse_address(text) == (known.packed if known is not None else None)


SPECIAL = {
    "is unspecified": ["0.0.0.0/32", "::/128"],
    "is loopback": ["127.0.0.0/8", "::1/128"],
    "is link-local": ["169.254.0.0/16", "fe80::/10"],
    "is multicast": ["224.0.0.0/4", "ff00::/8"],
    "is broadcast": ["255.255.255.255/32"],
}
NETWORKS = [(reason, ipaddress.ip_network(text)) for reason, texts in SPECIAL.items() for text in texts]


@given(
    st.one_of(
        st.ip_addresses(),
        st.sampled_from(NETWORKS).flatmap(lambda each: st.ip_addresses(network=each[1])),
        st.sampled_from(
            ["126.255.255.255", "128.0.0.0", "169.253.255.255", "169.255.0.0", "223.255.255.255"]
        ).map(ipaddress.ip_address),
        st.sampled_from(["240.0.0.0", "255.255.255.254", "::2", "fe7f::", "fec0::", "feff::"]).map(
            ipaddress.ip_address
        ),
    )
)
def test_special_addresses_are_unusable_and_all_others_usable(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    reasons = [reason for reason, net in NETWORKS if net.version == address.version and address in net]
    assert unusable_address(address.packed) == (reasons[0] if reasons else None)


def test_240_0_0_0_4_is_usable() -> None:
    assert unusable_address(bytes([240, 0, 0, 1])) is None


@pytest.mark.parametrize(
    ("number", "valid"), [(-1, False), (0, False), (1, True), (65535, True), (65536, False)]
)
def test_ports_are_1_to_65535(number: int, valid: bool) -> None:
    assert valid_port(number) is valid


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", None),
        ("a" * 63, None),
        ("a" * 64, "is longer than 63 bytes"),
        ("ä" * 32, "is longer than 63 bytes"),
        ("a\x1b[31m", "has characters that cannot be printed"),
        ("a\0", "has characters that cannot be printed"),
    ],
)
def test_names_have_up_to_63_bytes_that_can_be_printed(name: str, reason: str | None) -> None:
    assert unusable_name(name) == reason


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-11-20T10:00:00Z", 1795168800.0),
        ("2026-11-20T11:00:00+01:00", 1795168800.0),
        ("2026-11-20T10:00:00.123456789Z", 1795168800.123456),  # Go writes nanoseconds
        ("2026-11-20T10:00:00", None),
        ("2026-11-20", None),
        ("0001-01-01", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_times_are_rfc_3339_with_an_offset(text: str, seconds: float | None) -> None:
    assert parse_time(text) == seconds
