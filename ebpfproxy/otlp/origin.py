"""Who sends, and where."""

from __future__ import annotations

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

import ebpfproxy

NAME = "ebpfproxy"
SCOPE = InstrumentationScope(NAME, ebpfproxy.__version__)


def resource_of(node: str) -> Resource:
    """OTEL_RESOURCE_ATTRIBUTES adds to these."""
    return Resource.create(
        {
            "service.name": NAME,
            "service.version": ebpfproxy.__version__,
            "service.instance.id": node,
            "k8s.node.name": node,
        }
    )


def url(endpoint: str, signal: str) -> str:
    return f"{endpoint.rstrip('/')}/v1/{signal}"
