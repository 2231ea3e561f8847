"""The order in which the reconciler gets what its workers give it."""

from __future__ import annotations

import threading

from ebpfproxy.agent.messages import Call, Messages


def test_what_a_worker_hands_over_comes_before_its_result() -> None:
    """Even while all other workers are busy: who reads the log relies on it."""
    messages = Messages()
    busy = threading.Event()
    order: list[str] = []
    for _ in range(3):
        messages.run(busy.wait, lambda _: order.append("busy"))
    messages.run(lambda: messages.call(lambda: order.append("handed over")), lambda _: order.append("done"))
    while "done" not in order:
        for message in messages.take(1.0):
            assert isinstance(message, Call)
            message.what()
    busy.set()
    messages.close()
    assert order == ["handed over", "done"]
