"""The agent without the extra ``otlp``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry

from ebpfproxy.agent.from_config import agent_options
from ebpfproxy.agent.state import TelemetryState
from ebpfproxy.agent.telemetry import Telemetry
from ebpfproxy.config.load import Configuration, effective
from ebpfproxy.logs import event_of
from ebpfproxy.otlp import libraries

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


@pytest.mark.parametrize(
    ("missing", "variables", "error"),
    [
        (True, {}, "otlpEndpoint needs OpenTelemetry"),
        (False, {"OTEL_ATTRIBUTE_COUNT_LIMIT": "many"}, "otlpEndpoint: variables of OpenTelemetry"),
    ],
)
def test_what_keeps_from_sending_keeps_from_nothing_else(
    missing: bool,
    variables: dict[str, str],
    error: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if missing:
        monkeypatch.setattr(libraries, "_MODULES", ("no.such.library",))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options, _ = agent_options(effective(Configuration(), {"otlp-endpoint": "http://127.0.0.1:4318"}))

    telemetry = Telemetry(options, CollectorRegistry())
    telemetry.start()
    state = telemetry.state
    telemetry.stop()
    telemetry.close()

    (record,) = (each for each in caplog.records if each.levelname == "ERROR")
    event, facts = event_of(record)
    assert event == "sending nothing to a collector"
    assert facts["error"].startswith(error)
    assert state == TelemetryState("http://127.0.0.1:4318", error=facts["error"])


def test_without_an_endpoint_there_is_nothing_to_say() -> None:
    options, _ = agent_options(effective(Configuration(), {}))
    assert Telemetry(options, CollectorRegistry()).state is None
