"""What pages of dashboards are made of, without a Prometheus."""

from __future__ import annotations

from typing import Any

import pytest

from tests.monitoring.drawing import Series, name_of, page, series_of
from tests.monitoring.files import NODES, SERVICE, dashboard, panels
from tests.monitoring.units import shown

VALUES = (0, 0.000345678, 0.5, 1, 2.1333, 12.34, 1234.6, 150000, 2.5e7)


@pytest.mark.parametrize(
    ("unit", "texts"),
    [
        ("none", "0 | 0.000346 | 0.500 | 1 | 2.13 | 12.3 | 1235 | 150000 | 25000000"),
        ("short", "0 | 0.000346 | 0.500 | 1 | 2.13 | 12.3 | 1.23 K | 150 K | 25 Mil"),
        (
            "cps",
            "0 c/s | 0.000346 c/s | 0.500 c/s | 1 c/s | 2.13 c/s | 12.3 c/s | 1.23K c/s | 150K c/s | 25M c/s",
        ),
        (
            "count:p/s",
            "0 p/s | 0.000346 p/s | 0.500 p/s | 1 p/s | 2.13 p/s | 12.3 p/s | 1.23K p/s | 150K p/s | 25M p/s",
        ),
        ("s", "0 s | 346 µs | 500 ms | 1 s | 2.13 s | 12.3 s | 20.6 mins | 1.74 days | 41.3 weeks"),
        ("percentunit", "0% | 0.0346% | 50% | 100% | 213% | 1234% | 123460% | 15000000% | 2500000000%"),
        ("Bps", "0 B/s | 346 µB/s | 500 mB/s | 1 B/s | 2.13 B/s | 12.3 B/s | 1.23 kB/s | 150 kB/s | 25 MB/s"),
        ("bytes", "0 B | 0.000346 B | 0.500 B | 1 B | 2.13 B | 12.3 B | 1.21 KiB | 146 KiB | 23.8 MiB"),
    ],
)
def test_values_are_shown_as_by_grafanas_library(unit: str, texts: str) -> None:
    """``getValueFormat`` of @grafana/data 13.2.3 has answered this."""
    assert [shown(value, unit) for value in VALUES] == texts.split(" | ")


def test_every_panel_has_a_unit_that_is_known() -> None:
    for name in (NODES, SERVICE):
        for panel in panels(name):
            assert shown(1, panel["fieldConfig"]["defaults"]["unit"]), panel["title"]


def test_a_legend_names_labels_and_leaves_out_what_is_missing() -> None:
    assert name_of("{{ns}}/{{ service }} {{backend}}", {"ns": "shop", "service": "web"}) == "shop/web "


def test_series_have_names_and_no_nan() -> None:
    answer: list[dict[str, Any]] = [
        {"metric": {"le": "1"}, "values": [[1, "2"], [2, "NaN"], [3, "+Inf"]]},
        {"metric": {"le": "2"}, "values": [[1, "NaN"]]},
    ]
    (found,) = series_of({"legendFormat": "up to {{le}}"}, answer)
    assert found == Series("up to 1", [(1.0, 2.0), (3.0, float("inf"))])


@pytest.mark.parametrize("name", [NODES, SERVICE])
def test_a_page_has_every_panel_and_what_is_in_it(name: str) -> None:
    data = {panel["title"]: [Series("<b>", [(0.0, 1.0), (1.0, 0.25)])] for panel in panels(name)}
    text = page(dashboard(name), data)
    assert text.count("<h2>") == len(data)
    assert "<b>" not in text
    assert "No data" not in text
    empty = page(dashboard(name), dict.fromkeys(data, ()))
    assert empty.count("No data") == len(data)
