"""The agent without the extra ``otlp``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ebpfproxy.agent.from_config import agent_options
from ebpfproxy.config.load import Configuration, effective
from ebpfproxy.otlp import libraries
from ebpfproxy.otlp.libraries import OtlpError, require_libraries

#: What an agent imports, and what it does with its options.
_AGENT = """
import sys
from prometheus_client import CollectorRegistry
from ebpfproxy.agent.from_config import agent_options
from ebpfproxy.agent.telemetry import Telemetry
from ebpfproxy.cli import run, trace
from ebpfproxy.config.load import Configuration, effective
options, _ = agent_options(effective(Configuration(), {"otlp-endpoint": sys.argv[1]}))
Telemetry(options, CollectorRegistry()).close()
print([name for name in ("opentelemetry", "google.protobuf", "requests") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("endpoint", "imported"),
    [("", []), ("http://127.0.0.1:9", ["opentelemetry", "google.protobuf", "requests"])],
)
def test_libraries_are_imported_only_where_there_is_an_endpoint(endpoint: str, imported: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AGENT, endpoint], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{imported}\n"


def test_missing_libraries_are_an_error_of_the_field_that_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    require_libraries("x")
    monkeypatch.setattr(libraries, "_MODULES", ("no.such.library",))
    with pytest.raises(OtlpError, match=r"otlpEndpoint needs .* pip install 'ebpfproxy\[otlp\]'"):
        agent_options(effective(Configuration(), {"otlp-endpoint": "http://127.0.0.1:4318"}))
    agent_options(effective(Configuration(), {}))
