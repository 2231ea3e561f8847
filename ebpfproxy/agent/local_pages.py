"""What the agent answers to commands: what it knows of objects, and maps do not hold.

And its configuration and metrics, whether and wherever its server of metrics listens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ebpfproxy.agent.local_socket import OTHER_VERSION, SECONDS, NoAgentError, Reply, ask
from ebpfproxy.health.http import Answer, Respond, json_answer, text_answer
from ebpfproxy.kube.objects import ObjectKey
from ebpfproxy.services.model import format_address
from ebpfproxy.services.reasons import ServiceReasons

if TYPE_CHECKING:
    # Commands, which import this to ask, need none of the agent.
    from ebpfproxy.agent.drift import DriftCheck
    from ebpfproxy.agent.messages import Messages
    from ebpfproxy.services.tracker import Tracker

#: The page with a Service's :class:`~ebpfproxy.services.reasons.ServiceReasons`: ``services/NAMESPACE/NAME``.
_SERVICES = "services"
#: Those with a :class:`~ebpfproxy.datapath.drift.findings.Report`, made at once; the second repairs.
CHECK, REPAIR = "check", "repair"
#: Its configuration, and its metrics.
CONFIG, METRICS = "configz", "metrics"
#: The page with the drain requests that are carried out: each an address and a port.
_DRAINED = "drained"
_REQUESTS = msgspec.json.Decoder(frozenset[tuple[str, int]])
_REASONS = msgspec.json.Decoder(ServiceReasons)


def pages(
    messages: Messages,
    tracker: Tracker,
    drift: DriftCheck,
    configz: Mapping[str, object],
    metrics: Callable[[], bytes],
) -> Mapping[str, Respond]:
    """The pages of the local server. The reconciler alone reads its tracker, and compares."""

    def service(name: str) -> Future[Answer]:
        key = ObjectKey(*name.split("/", 1)) if "/" in name else ObjectKey("", name)
        return messages.ask(lambda answer: answer.set_result(_service(tracker, key)))

    def compared(*, repairs: bool) -> Future[Answer]:
        return messages.ask(
            lambda answer: drift.ask(lambda report: answer.set_result(json_answer(report)), repairs=repairs)
        )

    def drained(_: str) -> Future[Answer]:
        # The reconciler has programmed what it has told its tracker before it answers.
        return messages.ask(lambda answer: answer.set_result(_drained(tracker)))

    return {
        _SERVICES: service,
        _DRAINED: drained,
        CHECK: lambda _: compared(repairs=False),
        REPAIR: lambda _: compared(repairs=True),
        CONFIG: lambda _: json_answer(dict(configz)),
        METRICS: lambda _: Answer(200, "text/plain", metrics()),
    }


def ask_reasons(bpf_root: Path, namespace: str, name: str, seconds: float = SECONDS) -> ServiceReasons | None:
    """Asks the agent about a Service; None where it knows none of this name. Raises NoAgentError."""
    reply = ask(bpf_root, f"{_SERVICES}/{namespace}/{name}", seconds)
    return decode_reasons(reply)


def decode_reasons(reply: Reply) -> ServiceReasons | None:
    """Raises NoAgentError."""
    if reply.status == 200:
        try:
            return _REASONS.decode(reply.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise NoAgentError(OTHER_VERSION) from error
    if reply.status != 404:
        raise NoAgentError(reply.body.decode(errors="replace"))
    return None


def ask_drained(bpf_root: Path, seconds: float = SECONDS) -> frozenset[tuple[bytes, int]]:
    """Asks the agent for the drain requests that it carries out. Raises NoAgentError."""
    reply = ask(bpf_root, _DRAINED, seconds)
    if reply.status != 200:
        raise NoAgentError(reply.body.decode(errors="replace"))
    try:
        return frozenset((ip_address(text).packed, port) for text, port in _REQUESTS.decode(reply.body))
    except (msgspec.DecodeError, ValueError) as error:
        raise NoAgentError(OTHER_VERSION) from error


def _drained(tracker: Tracker) -> Answer:
    if not tracker.synced:
        return text_answer("the agent has not received all Services yet", 503)
    return json_answer([(format_address(address), port) for address, port in tracker.drained])


def _service(tracker: Tracker, key: ObjectKey) -> Answer:
    if not tracker.synced:
        return text_answer("the agent has not received all Services yet", 503)
    found = tracker.reasons(key)
    return json_answer(found) if found is not None else text_answer("no such Service", 404)
