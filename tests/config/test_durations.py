"""Durations are parsed and formatted as by Go's package time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.config.durations import Duration, parse_duration, seconds

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    # The values are from Go's table of tests (time_test.go, parseDurationTests).
    [
        ("0", 0),
        ("+0", 0),
        ("5s", 5 * 10**9),
        ("1478s", 1478 * 10**9),
        ("-5s", -5 * 10**9),
        ("+5s", 5 * 10**9),
        ("5.0s", 5 * 10**9),
        ("5.6s", 5_600_000_000),
        ("5.s", 5 * 10**9),
        (".5s", 5 * 10**8),
        ("1.004s", 1_004_000_000),
        ("10ns", 10),
        ("11us", 11_000),
        ("12µs", 12_000),
        ("12μs", 12_000),
        ("13ms", 13 * 10**6),
        ("3h30m", 12600 * 10**9),
        ("10.5s4m", 250_500_000_000),
        ("-2m3.4s", -123_400_000_000),
        ("1h2m3s4ms5us6ns", 3723_004_005_006),
        ("52763797000ns", 52763797000),
        ("0.3333333333333333333h", 20 * 60 * 10**9 - 1),
        ("9223372036854775807ns", (1 << 63) - 1),
        ("-9223372036854775808ns", -(1 << 63)),
        ("00000000000000000000000001s", 10**9),
    ],
)
def test_durations_that_go_accepts_are_accepted(text: str, nanoseconds: int) -> None:
    assert parse_duration(text).nanoseconds == nanoseconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "3", "-", "s", ".", "-.", ".s", "+.s", "1d", "1 s", " 1s", "1s ", "1h-2m", "--1s", "٣s", "30S"),
        *("inf", "9223372036854775808ns", "2562048h", "1" * 5000 + "s"),
    ],
)
def test_durations_that_go_rejects_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    # time_test.go, durationTests
    [
        (0, "0s"),
        (1, "1ns"),
        (1100, "1.1µs"),
        (2_200_000, "2.2ms"),
        (3_300_000_000, "3.3s"),
        (245 * 10**9, "4m5s"),
        (245_001_000_000, "4m5.001s"),
        (5 * 3600 * 10**9 + 6 * 60 * 10**9 + 7_001_000_000, "5h6m7.001s"),
        (8 * 60 * 10**9 + 1, "8m0.000000001s"),
        ((1 << 63) - 1, "2562047h47m16.854775807s"),
        (-(1 << 63), "-2562047h47m16.854775808s"),
        (15 * 60 * 10**9, "15m0s"),
        (24 * 3600 * 10**9, "24h0m0s"),
        (30 * 10**9, "30s"),
    ],
)
def test_durations_are_written_as_go_writes_them(nanoseconds: int, text: str) -> None:
    assert str(Duration(nanoseconds)) == text


@given(INT64)
def test_written_durations_can_be_read_back(nanoseconds: int) -> None:
    assert parse_duration(str(Duration(nanoseconds))) == Duration(nanoseconds)


@given(st.text("0123456789.smhnuµ-+ ", max_size=12))
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    try:
        found = parse_duration(text)
    except ValueError:
        return
    assert parse_duration(str(found)) == found


def test_durations_compare_by_value() -> None:
    assert seconds(1.5) == Duration(1_500_000_000)
    assert seconds(1.5).seconds == 1.5
    assert Duration(1) < Duration(2) <= Duration(2)
    assert {Duration(1), Duration(1)} == {Duration(1)}
    assert not Duration()
    assert repr(seconds(90)) == "Duration(1m30s)"
    assert Duration(1) != 1
