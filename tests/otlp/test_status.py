"""What ``ebpfproxy status`` says about a collector."""

from __future__ import annotations

import pytest

from ebpfproxy.agent.state import AgentState, SignalState, TelemetryState
from ebpfproxy.inspection.status import Status, facts

NOW = 1000.0
URL = "http://127.0.0.1:4318"
FRESH = SignalState()


def said(telemetry: TelemetryState | None) -> dict[str, str]:
    agent = AgentState(
        pid=1, version="0", node="n", source="s", started=1.0, written=NOW, telemetry=telemetry
    )
    status = Status(
        kernel="6.1",
        agent_running=True,
        agent_ended=False,
        agent=agent,
        healthy=True,
        problems=(),
        attachments=(),
        devices=(),
        packets=(),
        services=0,
        frontends=0,
        backends=0,
        maps=(),
    )
    return {name: text for name, text in facts(status, NOW) if name.startswith("otlp")}


def test_nothing_is_said_without_an_endpoint() -> None:
    assert said(None) == {}


def test_what_keeps_from_sending_is_said_beside_the_endpoint() -> None:
    found = said(TelemetryState(URL, "otlpEndpoint needs OpenTelemetry"))
    assert found == {"otlp endpoint": f"{URL}; NOTHING IS SENT: otlpEndpoint needs OpenTelemetry"}


@pytest.mark.parametrize(
    ("signal", "text"),
    [
        (FRESH, "never sent"),
        (SignalState(last_sent=997.0), "last sent 3s ago"),
        (SignalState(None, 998.0, "refused"), "FAILED 2s ago: refused; never sent"),
        (SignalState(400.0, 998.0, "refused"), "FAILED 2s ago: refused; last sent 10m ago"),
        (SignalState(998.0, 400.0, "refused"), "last sent 2s ago; last failure 10m ago: refused"),
    ],
)
def test_each_signal_has_its_last_success_and_its_last_failure(signal: SignalState, text: str) -> None:
    assert said(TelemetryState(URL, log=signal, metrics=FRESH)) == {
        "otlp endpoint": URL,
        "otlp log": f"{text}; lines lost: 0",
        "otlp metrics": "never sent; times missed: 0",
    }


def test_what_is_lost_is_counted_for_each() -> None:
    found = said(TelemetryState(URL, log=SignalState(lost=512), metrics=SignalState(lost=3)))
    assert found["otlp log"].endswith("; lines lost: 512")
    assert found["otlp metrics"].endswith("; times missed: 3")
