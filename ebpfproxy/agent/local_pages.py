"""What the agent answers to commands, as JSON: what it knows of objects, and maps do not hold."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import CancelledError

from ebpfproxy.agent.messages import Messages
from ebpfproxy.health.http import Answer, Respond, json_answer, text_answer
from ebpfproxy.kube.objects import ObjectKey
from ebpfproxy.services.tracker import Tracker

#: The page with a Service's :class:`~ebpfproxy.services.reasons.ServiceReasons`: ``services/NAMESPACE/NAME``.
SERVICES = "services"
#: Less than a command waits, so that it gets an answer.
_SECONDS = 8.0


def pages(messages: Messages, tracker: Tracker) -> Mapping[str, Respond]:
    """The pages of the local server. The reconciler alone reads its tracker."""

    def service(name: str) -> Answer:
        key = ObjectKey(*name.split("/", 1)) if "/" in name else ObjectKey("", name)
        try:
            synced, found = messages.ask(lambda: (tracker.synced, tracker.reasons(key)), _SECONDS)
        except (TimeoutError, CancelledError):
            return text_answer("the agent is busy", 503)
        if not synced:
            return text_answer("the agent has not received all Services yet", 503)
        return json_answer(found) if found is not None else text_answer("no such Service", 404)

    return {SERVICES: service}
