"""Addresses of servers."""

from __future__ import annotations

from urllib.parse import urlsplit


def url_problem(text: str) -> str:
    """What is wrong with the URL of a server; empty for a good one. Nothing that may be secret is in it."""
    try:
        url = urlsplit(text)
        if "@" in url.netloc:
            return "names a user: use a header for what is secret"
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
            return f"{text!r} is not http://HOST:PORT or https://HOST:PORT"
    except ValueError as error:
        # A password may be where the port is looked for.
        return "is no URL" if "@" in text else f"{text!r} is no URL: {error}"
    if url.query or url.fragment:
        return "has more than a path"
    return "" if text.isascii() and text.isprintable() and " " not in text else f"{text!r} is no URL"
