"""The queue at which other threads meet the reconciler, and the workers that it gives slow work to."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import msgspec

from ebpfproxy.kube.objects import Event
from ebpfproxy.node.facts import Facts

R = TypeVar("R")


class NetworkChanged(msgspec.Struct, frozen=True):
    """The node's devices, addresses or routes have changed."""

    facts: Facts


class Call(msgspec.Struct, frozen=True):
    """What the reconciler is to do, as a worker is done, or somebody asks."""

    what: Callable[[], None]


class Failed(msgspec.Struct, frozen=True):
    """A worker has failed, and the agent with it."""

    error: BaseException


class Stop(msgspec.Struct, frozen=True):
    """The agent ends; ``reason`` is empty where a signal asks for it."""

    reason: str = ""


Message = Event | NetworkChanged | Call | Failed | Stop


class Messages:
    """The queue. Any thread may :meth:`put`; the reconciler takes."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="worker")
        self.put = self._queue.put

    def take(self, seconds: float) -> list[Message]:
        """Waits for one, and takes all that are there by then: many events become one change."""
        try:
            found = [self._queue.get(timeout=seconds)]
        except queue.Empty:
            return []
        while not self._queue.empty():
            found.append(self._queue.get())
        return found

    def run(self, work: Callable[[], R], then: Callable[[R], None]) -> None:
        """Runs ``work`` in a worker, and ``then`` with its result in the reconciler. Its failure is ours."""

        def done(future: Future[R]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                self.put(Call(lambda: then(future.result())))
            else:
                self.put(Failed(error))

        self._workers.submit(work).add_done_callback(done)

    def call(self, what: Callable[[], None]) -> None:
        """Has the reconciler call this. A worker's calls come before the result of its work."""
        self.put(Call(what))

    def ask(self, question: Callable[[Future[R]], object]) -> Future[R]:
        """Has the reconciler call ``question`` with what this returns: it sets the result, now or later."""
        answer: Future[R] = Future()

        def reply() -> None:
            # From now on it cannot be cancelled: whoever has a result may set it.
            if answer.set_running_or_notify_cancel():
                try:
                    question(answer)
                except Exception as error:
                    answer.set_exception(error)

        self.put(Call(reply))
        return answer

    def close(self) -> None:
        """Starts no more work. What runs is left to itself."""
        self._workers.shutdown(wait=False, cancel_futures=True)
