"""Who may ask the page, and what browsers are told about it.

Any process of the node reaches its loopback, and any web site reaches that of whoever visits it. So data
needs a key, which only the address that the command prints has: in its fragment, which browsers do not send;
the page sends it in a header, which pages of other origins cannot. A name that somebody else's DNS leads to
this address (DNS rebinding) is refused, whoever asks.
"""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Paths below this are data.
DATA = "/api/"
#: Nothing is loaded from elsewhere, and no text becomes markup or script, not even by an error of ours.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def is_own_host(host: str | None) -> bool:
    """True for ``localhost`` and for addresses, with or without a port: no DNS has these."""
    if host is None:
        return False
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname, parts.port
        if name is None or parts.netloc != host or "@" in host:
            return False
        if name != "localhost":
            ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """Stands before the application."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        if not is_own_host(headers.get("host")):
            return PlainTextResponse("this page has no name: ask by localhost, or by its address\n", 421)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("nothing can be changed here\n", 405, {"allow": "GET, HEAD"})
        given = headers.get("authorization", "").encode()
        if scope["path"].startswith(DATA) and not hmac.compare_digest(given, self._key):
            return PlainTextResponse("the key is missing that the printed address has\n", 401)
        return None
