"""The socket by which commands ask the agent."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
import pytest

from ebpfproxy.agent import local_pages
from ebpfproxy.agent.drift import DriftCheck
from ebpfproxy.agent.local_socket import LocalServer, NoAgentError, Reply, ask, ask_at
from ebpfproxy.agent.messages import Call, Messages, Stop
from ebpfproxy.datapath.drift.findings import Report
from ebpfproxy.health.http import text_answer
from ebpfproxy.kube.manifests import parse
from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.services.reasons import ServiceReasons
from tests.lab.waiting import until
from tests.recordings import RecordTracker
from tests.services.test_cases import CASES, NODE, replaced

pytestmark = pytest.mark.root


NETNS = netns_cookie()


@pytest.fixture
def server() -> Iterator[LocalServer]:
    made = LocalServer({"echo": text_answer})
    made.start()
    yield made
    made.stop()


def test_a_page_gets_the_rest_of_the_path(server: LocalServer) -> None:
    assert ask_at(server.name, NETNS, "echo/a/b") == (200, b"a/b")
    assert ask_at(server.name, NETNS, "nothing/a") == (501, b"the agent is of another version")


def test_reasons_of_another_version_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is said as what another version does not know."""
    made = LocalServer({"services": lambda _: text_answer('{"ports": 1}')})
    made.start()
    monkeypatch.setattr(local_pages, "ask", lambda _, page, seconds: ask_at(made.name, NETNS, page, seconds))
    with pytest.raises(NoAgentError, match="the agent is of another version"):
        local_pages.ask_reasons(Path("/nowhere"), "shop", "web")
    made.stop()


def test_a_name_is_one_of_its_network_namespace(server: LocalServer) -> None:
    """A command enters the agent's for a moment, whichever it runs in."""
    program = f"""
from ebpfproxy.agent.local_socket import NoAgentError, ask_at
from ebpfproxy.netlink.namespaces import netns_cookie
own = netns_cookie()
assert own != {NETNS} and ask_at("{server.name}", {NETNS}, "echo/a") == (200, b"a") and own == netns_cookie()
try:
    ask_at("{server.name}", {1 << 60}, "echo/a")
except NoAgentError as error:
    assert "cannot be seen" in str(error)
else:
    raise AssertionError
"""
    subprocess.run(["unshare", "--net", sys.executable, "-c", program], check=True)


def test_without_an_agent_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoAgentError, match="no agent runs"):
        ask(tmp_path, "echo/a")
    with pytest.raises(NoAgentError, match="is starting"):
        ask_at("ebpfproxy/nobody", NETNS, "echo/a")


def _as_nobody(name: str) -> bool:
    """Returns True if another user gets an answer."""
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5)
            peer.connect(f"\0{name}")
            try:
                peer.sendall(b"GET /echo/a HTTP/1.0\r\n\r\n")
                answered = bool(peer.recv(100))
            except OSError:
                answered = False
        os._exit(answered)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def test_only_root_gets_an_answer(server: LocalServer) -> None:
    assert not _as_nobody(server.name)
    assert ask_at(server.name, NETNS, "echo/a").status == 200


def test_who_is_not_root_is_not_trusted() -> None:
    """Its name is known once an agent has ended, and anybody may take it."""
    taken, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("\0ebpfproxy/taken")
            listener.listen()
            os.write(done, b"x")
            listener.accept()
        os._exit(0)
    os.read(taken, 1)
    with pytest.raises(NoAgentError, match="not root"):
        ask_at("ebpfproxy/taken", NETNS, "echo/a")
    os.waitpid(pid, 0)
    os.close(taken)
    os.close(done)


def reconciler(messages: Messages) -> threading.Thread:
    """Answers as the reconciler does, until Stop."""

    def run() -> None:
        while True:
            for message in messages.take(1):
                if isinstance(message, Stop):
                    return
                assert isinstance(message, Call)
                message.what()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


class Drift:
    """Keeps what is asked for, as the agent's does until it can compare."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[tuple[Callable[[Report], object], bool]] = queue.SimpleQueue()

    def ask(self, answer: Callable[[Report], object], *, repairs: bool) -> None:
        self.asked.put((answer, repairs))


class Served(NamedTuple):
    server: LocalServer
    messages: Messages
    tracker: RecordTracker
    drift: Drift
    thread: threading.Thread

    def ask(self, page: str, seconds: float = 5) -> Reply:
        return ask_at(self.server.name, NETNS, page, seconds)


@pytest.fixture
def served() -> Iterator[Served]:
    tracker, messages, drift = RecordTracker(NODE), Messages(), Drift()
    pages = local_pages.pages(messages, tracker, cast("DriftCheck", drift), {"a": 1}, lambda: b"m 1")
    made = Served(LocalServer(pages), messages, tracker, drift, reconciler(messages))
    made.server.start()
    yield made
    messages.put(Stop())
    made.thread.join()
    messages.close()


def test_reasons_come_from_the_reconciler(served: Served) -> None:
    assert served.ask("services/shop/web") == (503, b"the agent has not received all Services yet")
    (case,) = (path for path in CASES if path.stem == "zone-hints")
    for event in replaced(list(parse(case.read_text()))):
        served.tracker.apply(event)
    found = msgspec.json.decode(served.ask("services/shop/web").body, type=ServiceReasons)
    assert (found.node, found.zone) == (NODE, "zone-a")
    assert [each.address for each in found.ports[0].endpoints] == ["10.244.1.2:8080", "10.244.2.2:8080"]
    assert served.ask("services/shop/none").status == 404
    assert served.ask("configz") == (200, b'{"a":1}')
    assert served.ask("metrics") == (200, b"m 1")
    served.server.stop()


def test_who_waits_keeps_nobody_else_waiting(served: Served) -> None:
    """Several commands ask at once, and one answer comes later than those to other questions."""
    replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
    waiting = [
        threading.Thread(target=lambda page=page: replies.put(served.ask(page)))
        for page in ("check", "repair")
    ]
    for each in waiting:
        each.start()
    asked = [served.drift.asked.get(timeout=5) for _ in waiting]
    assert sorted(repairs for _, repairs in asked) == [False, True]
    assert served.ask("services/shop/web").status == 503
    for answer, repairs in asked:
        answer(Report(more=int(repairs)))
    for each in waiting:
        each.join()
    found = [msgspec.json.decode(replies.get().body, type=Report).more for _ in waiting]
    assert sorted(found) == [0, 1]
    served.server.stop()


def test_who_gives_up_is_forgotten(served: Served) -> None:
    with pytest.raises(NoAgentError, match="timed out"):
        served.ask("check", 0.05)
    answer, _ = served.drift.asked.get(timeout=5)
    answer(Report())
    assert served.ask("services/shop/web").status == 503
    served.server.stop()


def test_nobody_waits_for_an_agent_that_has_ended(served: Served) -> None:
    """The question was not answered yet, or not even heard."""
    failures: queue.SimpleQueue[NoAgentError] = queue.SimpleQueue()

    def give_up(page: str) -> None:
        try:
            served.ask(page)
        except NoAgentError as error:
            failures.put(error)

    waiting = [threading.Thread(target=give_up, args=("check",))]
    waiting[0].start()
    served.drift.asked.get(timeout=5)
    served.messages.put(Stop())
    served.thread.join()
    waiting.append(threading.Thread(target=give_up, args=("services/shop/web",)))
    waiting[1].start()
    until(lambda: not served.messages._queue.empty())
    served.server.stop()
    for each in waiting:
        each.join()
        assert "does not answer" in str(failures.get())


def test_a_question_that_raises_is_the_askers_problem(served: Served) -> None:
    with pytest.raises(ZeroDivisionError):
        served.messages.ask(lambda _: 1 // 0).result(5)
    assert served.ask("services/shop/web").status == 503, "it goes on"
    served.server.stop()
