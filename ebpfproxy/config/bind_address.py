"""Listen addresses in the notation of kube-proxy's fields."""

from __future__ import annotations

from ebpfproxy.services.values import parse_port


class BindAddressError(Exception):
    """An address that is not ``IP:port``; the message names the option's value."""


def parse_bind_address(text: str) -> tuple[str, int]:
    """``10.0.0.1:10256``; ``0.0.0.0:10256``, ``[::]:10256`` and ``:10256`` are all of both families,
    as for Go's ``net.Listen("tcp", …)``. Raises BindAddressError.
    """
    host, colon, port = text.rpartition(":")
    # Port 0 is any, and whoever serves says which.
    number = 0 if port == "0" else parse_port(port)
    if not colon or number is None or ("[" not in host and ":" in host):
        raise BindAddressError(f"{text!r} is not IP:port, such as 0.0.0.0:10256 or [::]:10256")
    host = host.strip("[]")
    return "::" if host in ("", "0.0.0.0") else host, number
