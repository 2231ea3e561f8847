"""The page in Chromium: by keyboard alone, light, dark and narrow.

EBPFPROXY_PICTURES names a folder that keeps the pictures, to be looked at.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.lab import clients
from tests.lab.browser import Browser, needs_chromium
from tests.ui.page import VIEWS, WEB, go

pytestmark = [pytest.mark.root, needs_chromium]

_PICTURES = os.environ.get("EBPFPROXY_PICTURES", "")


# -- the keyboard


def focused(page: Browser) -> str:
    return str(
        page.evaluate(
            "document.activeElement.innerText || document.activeElement.id || document.activeElement.tagName"
        )
    )


def test_everything_is_reached_by_keyboard(page: Browser) -> None:
    page.evaluate("document.activeElement.blur()")
    page.press("Tab")
    assert focused(page) == "To the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    seen = []
    for _ in range(6):
        page.press("Tab")
        seen.append(focused(page))
    assert seen == ["Services", "Live", "Refusals", "Explain", "Check", "Node"]
    page.press("Enter")
    page.wait_text("endpointslices")
    # The heading has the focus, for who hears the page.
    assert focused(page) == "Node"
    page.press("/")
    page.wait("document.activeElement.id", lambda found: found == "search")
    page.type("web")
    page.wait("document.querySelectorAll('main tbody tr').length", lambda found: found == 1)
    page.press("Enter")
    assert focused(page) == "shop/web"
    page.press("Enter")
    page.wait_text("Frontends")
    outline = page.evaluate(
        "(() => { const link = document.querySelector('main a'); link.focus({focusVisible: true});"
        " return getComputedStyle(link).outlineStyle; })()"
    )
    assert outline == "solid"


def test_the_focus_stays_where_it_is_when_numbers_change(
    page: Browser, cluster: OutsideClientCluster
) -> None:
    page.press("/")
    page.press("Tab")
    assert focused(page) == "shop/elsewhere"
    before = page.evaluate("document.querySelector('main tbody').innerText")
    cluster.client.call(clients.ask_tcp, WEB, 80)
    page.wait("document.querySelector('main tbody').innerText", lambda text: text != before)
    assert focused(page) == "shop/elsewhere"


def test_parts_have_names_and_roles(page: Browser) -> None:
    for view in VIEWS:
        go(page, view)
        assert page.evaluate("document.title").endswith("· ebpfproxy")
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input, select')].filter(each => !each.labels.length).length"
        )
        assert unnamed == 0
        assert page.evaluate("[...document.querySelectorAll('th')].every(each => each.scope === 'col')")
    assert page.evaluate("document.documentElement.lang") == "en"


# -- how it looks


def _channel(value: float) -> float:
    value /= 255
    return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2 of two colours, ``rgb(…)``."""
    found = []
    for colour in (one, other):
        red, green, blue = map(_channel, map(float, re.findall(r"[\d.]+", colour)[:3]))
        found.append(0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)
    return max(found) / min(found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark is (scheme == "dark")
    for view in VIEWS:
        go(page, view)
        pairs = page.evaluate(
            """[...document.querySelectorAll('body *')].filter(each => each.checkVisibility() && each.innerText).map(each => {
              let behind = each;
              while (behind && getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
              return [each.tagName, getComputedStyle(each).color, getComputedStyle(behind ?? document.body).backgroundColor];
            })"""
        )
        assert [pair for pair in pairs if contrast(pair[1], pair[2]) < 4.5] == []


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_only_tables_are_wider_than_the_page(page: Browser, width: int) -> None:
    page.size(width, 800)
    for view in VIEWS:
        go(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view


#: Whoever looks at them wants all.
_SCREENS = [("light", 1200), ("dark", 390), ("dark", 1200), ("light", 390)]


@pytest.mark.parametrize(("scheme", "width"), _SCREENS if _PICTURES else _SCREENS[:2])
def test_pictures(
    page: Browser, cluster: OutsideClientCluster, tmp_path: Path, scheme: str, width: int
) -> None:
    """Each view has a picture; light and dark are not the same."""
    folder = Path(_PICTURES or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.prefer(scheme)
    page.size(width, 900)
    for view in VIEWS:
        go(page, view)
        if view == "live":
            page.wait_text("tracing")
            for _ in range(8):
                cluster.client.call(clients.ask_tcp, WEB, 80)
            cluster.client.call(clients.connect_error, "10.96.0.20", 80)
            page.wait("document.querySelectorAll('main tbody tr').length", lambda found: found >= 9)
        name = re.sub(r"\W+", "-", view)
        data = page.picture(folder / f"{name}-{scheme}-{width}.png")
        assert data.startswith(b"\x89PNG")
    background: Any = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(background, "rgb(0, 0, 0)") > 10) is (scheme == "light")
