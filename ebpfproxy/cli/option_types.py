"""Types of option values, in the notation of kube-proxy's flags."""

from __future__ import annotations

import re

import click

from ebpfproxy.services.model import Prefix
from ebpfproxy.services.values import parse_prefix

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Seconds(click.ParamType[float]):
    """A duration in Go's notation, ``1h30m``, converted to seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        parts = _PART.findall(text)
        if not parts or "".join(map("".join, parts)) != text:
            self.fail(f"{text!r} is not a duration such as 30s or 1h30m", param, ctx)
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)


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
