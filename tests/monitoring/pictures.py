"""Pictures of our dashboards in Chromium, of what a Prometheus has at this moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab.browser import Browser
from tests.monitoring.drawing import Series, page, series_of
from tests.monitoring.files import as_grafana, dashboard, panels
from tests.monitoring.prometheus import Prometheus

Data = Mapping[str, Sequence[Series]]


def read(prometheus: Prometheus, name: str, seconds: float, interval: str) -> Data:
    """The series of each panel of a dashboard, by its title, of the last ``seconds``."""
    found: dict[str, list[Series]] = {}
    for panel in panels(name):
        series = found[panel["title"]] = []
        for target in panel["targets"]:
            expression = as_grafana(target["expr"], interval=interval)
            if target.get("instant"):
                answer = [{**each, "values": [each["value"]]} for each in prometheus.query(expression)]
            else:
                answer = prometheus.history(expression, seconds)
            series += series_of(target, answer)
    return found


def take(browser: Browser, name: str, data: Data, folder: Path) -> Path:
    """Shows a dashboard in the browser, and keeps its page and its picture."""
    html = folder / Path(name).with_suffix(".html")
    html.write_text(page(dashboard(name), data))
    browser.open("about:blank")
    browser.open(html.as_uri())
    height = browser.evaluate("document.body.firstElementChild.offsetHeight")
    browser.size(browser.evaluate("document.body.firstElementChild.offsetWidth"), height)
    picture = html.with_suffix(".png")
    browser.picture(picture)
    return picture
