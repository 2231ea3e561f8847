"""Our dashboards as pages, from what a Prometheus answers: as Grafana reads them, as far as ours go.

Grafana is under a licence, and of a size, that keeps it out of these tests. What is compared with it by eye is
what its JSON says: places, names of series, units, thresholds, and what a legend sums up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from tests.monitoring.units import shown

Panel = Mapping[str, Any]

#: Pixels of a column and of a row of the grid, and of the frame around a panel.
_COLUMN, _ROW, _GAP = 65, 38, 8
#: Grafana's palette, as far as a few series go.
_COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#fade2a", "#1f60c4")
#: What a legend sums up, as it is headed.
_CALCULATIONS: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "lastNotNull": ("Last *", lambda values: values[-1]),
    "max": ("Max", max),
}
_STYLE = """
body { margin: 0; background: #f4f5f5; font: 12px Inter, Roboto, sans-serif; color: #24292e; }
.panel, .row { position: absolute; box-sizing: border-box; overflow: hidden; }
.panel { background: #fff; border: 1px solid #dcdee0; padding: 6px 8px; display: flex; flex-direction: column; }
.row { font-weight: 500; font-size: 16px; padding: 6px; }
h2 { font-size: 14px; font-weight: 500; margin: 0 0 4px; white-space: nowrap; }
.values { flex: 1; display: flex; align-items: center; justify-content: space-around; font-size: 28px; }
.values small { display: block; font-size: 13px; color: #24292e; }
svg { flex: 1; min-height: 0; width: 100%; } .nothing { margin: auto; color: #777; }
.legend { max-height: 35%; overflow: hidden; flex: none; } table { width: 100%; border-spacing: 0; }
td, th { padding: 0 4px; white-space: nowrap; text-align: right; font-weight: normal; line-height: 17px; }
th { color: #1f62e0; } .name { text-align: left; width: 100%; } .name b { display: inline-block; width: 14px;
height: 4px; margin-right: 6px; border-radius: 2px; vertical-align: middle; }
"""


class Series(NamedTuple):
    """``points``: times in Unix seconds, and values that are numbers."""

    name: str
    points: list[tuple[float, float]]

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points]


def name_of(legend: str, labels: Mapping[str, str]) -> str:
    """What a legend makes of a series; a label that it has not is empty."""
    return re.sub(r"\{\{\s*(.+?)\s*\}\}", lambda found: labels.get(found[1], ""), legend)


def series_of(target: Mapping[str, Any], matrix: Sequence[Mapping[str, Any]]) -> list[Series]:
    """The series of a query of a panel, of what Prometheus has answered to it. NaN is no value."""
    found = []
    for each in matrix:
        pairs = [(float(at), float(value)) for at, value in each["values"]]
        points = [(at, value) for at, value in pairs if not math.isnan(value)]
        if points:
            found.append(Series(name_of(target["legendFormat"], each["metric"]), points))
    return found


def page(dashboard: Mapping[str, Any], data: Mapping[str, Sequence[Series]]) -> str:
    """A dashboard as HTML. ``data``: the series of each panel that is no row, by its title."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    body = "".join(_placed(panel, data) for panel in dashboard["panels"])
    size = f"width:{24 * _COLUMN}px;height:{height * _ROW}px"
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(dashboard['title'])}</title>"
        f'<style>{_STYLE}</style><div style="position:relative;{size}">{body}</div>'
    )


def _placed(panel: Panel, data: Mapping[str, Sequence[Series]]) -> str:
    at = panel["gridPos"]
    width, height = at["w"] * _COLUMN - _GAP, at["h"] * _ROW - _GAP
    style = f"left:{at['x'] * _COLUMN}px;top:{at['y'] * _ROW}px;width:{width}px;height:{height}px"
    title = escape(panel["title"])
    if panel["type"] == "row":
        return f'<div class="row" style="{style}">⌄ {title}</div>'
    found = data[panel["title"]]
    draw = {"stat": _stat, "timeseries": _timeseries}[panel["type"]]
    inside = draw(panel, found, width - 18) if found else '<p class="nothing">No data</p>'
    return f'<div class="panel" style="{style}" title="{title}"><h2>{title}</h2>{inside}</div>'


def _stat(panel: Panel, found: Sequence[Series], _: int) -> str:
    defaults, options = panel["fieldConfig"]["defaults"], panel["options"]
    assert options["reduceOptions"]["calcs"] == ["lastNotNull"]
    cells = []
    for each in found:
        value = each.values[-1]
        colour = "#24292e" if options["colorMode"] == "none" else _threshold(defaults["thresholds"], value)
        name = f"<small>{escape(each.name)}</small>" if options["textMode"] == "value_and_name" else ""
        cells.append(f'<div style="color:{colour}">{name}{shown(value, defaults["unit"])}</div>')
    return f'<div class="values">{"".join(cells)}</div>'


def _threshold(thresholds: Mapping[str, Any], value: float) -> str:
    colours = {"green": "#1b855e", "red": "#e0226e"}
    steps = thresholds["steps"]
    return colours[[step for step in steps if step["value"] is None or value >= step["value"]][-1]["color"]]


def _timeseries(panel: Panel, found: Sequence[Series], width: int) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    legend = "".join(_legend(panel, found))
    rows = min(len(found) + 1, int(0.35 * panel["gridPos"]["h"] * _ROW) // 17)
    height = panel["gridPos"]["h"] * _ROW - _GAP - 36 - 17 * rows
    plot = "".join(_plot(defaults, found, width, height))
    svg = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{plot}</svg>'
    return f'{svg}<div class="legend"><table>{legend}</table></div>'


def _legend(panel: Panel, found: Sequence[Series]) -> Iterator[str]:
    calculations = [_CALCULATIONS[each] for each in panel["options"]["legend"]["calcs"]]
    heads = "".join(f"<th>{name}</th>" for name, _ in calculations)
    yield f'<tr><th class="name">Name</th>{heads}</tr>'
    unit = panel["fieldConfig"]["defaults"]["unit"]
    (order,) = (_CALCULATIONS[each] for each in _CALCULATIONS if _is_order(panel, each))
    ordered = sorted(enumerate(found), key=lambda pair: order[1](pair[1].values), reverse=True)
    for at, each in ordered:
        cells = "".join(f"<td>{shown(of(each.values), unit)}</td>" for _, of in calculations)
        colour = _COLOURS[at % len(_COLOURS)]
        yield (
            f'<tr><td class="name"><b style="background:{colour}"></b>{escape(each.name)}</td>{cells}</tr>'
        )


def _is_order(panel: Panel, calculation: str) -> bool:
    """The lines of a legend are in the order of this, the largest first."""
    legend = panel["options"]["legend"]
    return bool(legend["sortDesc"]) and legend["sortBy"] == _CALCULATIONS[calculation][0]


def _plot(defaults: Mapping[str, Any], found: Sequence[Series], width: int, height: int) -> Iterator[str]:
    values = [value for each in found for value in each.values if math.isfinite(value)] or [0.0]
    low = defaults.get("min", min(values))
    ticks = list(_ticks(low, max(*values, low)))
    times = [at for each in found for at, _ in each.points]
    begin, end = min(times), max(times)
    left, bottom = 76, height - 6

    def x(at: float) -> float:
        return left + (at - begin) / ((end - begin) or 1) * (width - left - 4)

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - 8)

    for tick in ticks:
        yield f'<path d="M{left} {y(tick):.1f}H{width}" stroke="#e4e5e6"/>'
        yield f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" font-size="11">'
        yield f"{escape(shown(tick, defaults['unit']))}</text>"
    if defaults["custom"].get("thresholdsStyle"):
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is not None and step["value"] <= ticks[-1]:
                yield f'<path d="M{left} {y(step["value"]):.1f}H{width}" stroke="#e0226e" stroke-dasharray="6"/>'
    for number, each in enumerate(found):
        line = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in each.points if math.isfinite(value))
        colour = _COLOURS[number % len(_COLOURS)]
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        if defaults["custom"]["showPoints"] == "auto" and len(each.points) == 1:
            yield f'<circle cx="{x(each.points[0][0]):.1f}" cy="{y(each.points[0][1]):.1f}" r="3" fill="{colour}"/>'


def _ticks(low: float, high: float) -> Iterator[float]:
    """Four or five even ones, that include both."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude * 4 >= span)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    yield from (place * step for place in range(first, last + 1))
