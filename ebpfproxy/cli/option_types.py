"""Types of option values: kube-proxy's notation, and what names endpoints, clients and Services."""

from __future__ import annotations

from typing import NamedTuple

import click

from ebpfproxy.config.durations import parse_duration
from ebpfproxy.services.model import Prefix, format_address, format_endpoint
from ebpfproxy.services.values import parse_address, parse_port, parse_prefix


class Seconds(click.ParamType[float]):
    """A duration in Go's notation, ``1h30m``, converted to seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            found = parse_duration(str(value)).seconds
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if found < 0:
            self.fail(f"{value!r} is negative", param, ctx)
        return found


class Endpoint(NamedTuple):
    """An address, and a port unless it is 0: then any port."""

    address: bytes
    port: int

    def __str__(self) -> str:
        return format_endpoint(*self) if self.port else format_address(self.address)

    def is_of(self, text: str) -> bool:
        """If the text, as lists show an endpoint, is of this address and port."""
        if self.port:
            return text == format_endpoint(*self)
        return text.rpartition(":")[0].strip("[]") == format_address(self.address)


class EndpointType(click.ParamType[Endpoint]):
    """``ADDRESS[:PORT]``, in any notation of the address; an IPv6 address with a port is in brackets."""

    name = "endpoint"

    def __init__(self, *, needs_port: bool = False) -> None:
        self._needs_port = needs_port

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Endpoint:
        if isinstance(value, Endpoint):
            return value
        text = str(value)
        if text.startswith("["):
            host, closing, rest = text[1:].partition("]")
            colon, port_text = rest[:1], rest[1:]
            is_whole = bool(closing) and colon in ("", ":")
        else:
            is_whole = True
            host, colon, port_text = text.partition(":") if text.count(":") == 1 else (text, "", "")
        address = parse_address(host)
        port = parse_port(port_text) if colon else 0
        if not is_whole or address is None or port is None or (self._needs_port and not port):
            notation = "ADDRESS:PORT" if self._needs_port else "ADDRESS or ADDRESS:PORT"
            self.fail(f"{text!r} is not {notation} (an IPv6 address in brackets)", param, ctx)
        return Endpoint(address, port)


class NonEmpty(click.ParamType[str]):
    """What a script takes from a variable may be empty."""

    name = "text"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not (text := str(value)).strip():
            self.fail("it is empty", param, ctx)
        return text


class ServiceName(click.ParamType[str]):
    """``NAMESPACE/NAME``, as lists show it."""

    name = "service"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        parts = str(value).split("/")
        if len(parts) != 2 or not all(parts):
            self.fail(f"{value!r} is not NAMESPACE/NAME", param, ctx)
        return str(value)


class ClientName(click.ParamType[str]):
    """An address in any notation, or the name or cookie of a network namespace, as lists show it."""

    name = "client"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text:
            self.fail("the name is empty", param, ctx)
        address = parse_address(text.strip("[]"))
        return text if address is None else format_address(address)


def split(text: str) -> tuple[str, ...]:
    """The parts of a list separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def prefixes(option: str, text: str) -> tuple[Prefix, ...]:
    """CIDRs separated by commas. Raises UsageError with the option's name."""
    found = []
    for part in split(text):
        prefix = parse_prefix(part)
        if prefix is None:
            raise click.UsageError(f"{option}: {part!r} is not a CIDR")
        found.append(prefix)
    return tuple(found)
