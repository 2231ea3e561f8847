"""The libraries of the extra ``otlp``, without importing them."""

from __future__ import annotations

from importlib.util import find_spec

_MODULES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class OtlpError(Exception):
    """Nothing can be sent; the message says why."""


def require_libraries(wanted_by: str) -> None:
    """Raises OtlpError, which names ``wanted_by``, where they are not installed."""
    try:
        are_there = all(find_spec(name) is not None for name in _MODULES)
    except ModuleNotFoundError:
        are_there = False
    if not are_there:
        raise OtlpError(
            f"{wanted_by} needs OpenTelemetry, which the image's target full has: "
            "pip install 'ebpfproxy[otlp]'"
        )
