"""What tests do with the page in Chromium."""

from __future__ import annotations

import re

from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab.browser import Browser

WEB = SERVICE_IPS["v4"]
EVIL = "<img src=x onerror=\"window.hacked='zone'\"><script>window.hacked='script'</script>"
QUESTION = "explain?from=shop/client&to=shop/elsewhere:http"
VIEWS = [
    "services",
    "services/shop/web",
    "services/shop/odd",
    "live",
    "refusals",
    "explain",
    QUESTION,
    "check",
    "node",
]


def go(page: Browser, view: str) -> None:
    """Goes to a view, and waits for what it is about."""
    address = f"#/{view}"
    page.evaluate(f"void (location.hash = {address!r})")
    link = f"#/{re.split('[/?]', view)[0]}"
    page.wait("document.querySelector('nav a[aria-current]')?.hash", lambda found: found == link)
    page.wait("!document.querySelector('main').ariaBusy && document.querySelectorAll('h1').length === 1")


def rows(page: Browser, at: str = "main") -> list[list[str]]:
    """The cells of all rows of tables."""
    found: list[list[str]] = page.evaluate(
        f"[...document.querySelectorAll('{at} tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    return found


def without_complaints(page: Browser) -> None:
    assert page.complaints == []
