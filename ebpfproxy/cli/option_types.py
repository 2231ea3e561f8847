"""Types of option values, in the notation of kube-proxy's flags."""

from __future__ import annotations

import click

from ebpfproxy.config.durations import parse_duration
from ebpfproxy.services.model import Prefix
from ebpfproxy.services.values import parse_prefix


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
