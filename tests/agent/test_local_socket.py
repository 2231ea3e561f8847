"""The socket by which commands ask the agent."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import msgspec
import pytest

from ebpfproxy.agent import local_pages
from ebpfproxy.agent.local_socket import LocalServer, NoAgentError, _name, ask
from ebpfproxy.agent.messages import Finished, Messages, Stop
from ebpfproxy.health.http import text_answer
from ebpfproxy.kube.manifests import parse
from ebpfproxy.services.reasons import ServiceReasons
from tests.recordings import RecordTracker
from tests.services.test_cases import CASES, NODE, replaced

pytestmark = pytest.mark.root


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    made = LocalServer(tmp_path, {"echo": text_answer})
    made.start()
    yield made
    made.stop()


def test_the_folder_names_the_agent(server: LocalServer, tmp_path: Path) -> None:
    assert ask(tmp_path, "echo/a/b") == (200, b"a/b")
    assert ask(tmp_path, "nothing/a").status == 404
    beside = tmp_path / "link"
    beside.symlink_to(tmp_path)
    assert ask(beside, "echo/c").body == b"c", "the same folder by another path"


def test_without_an_agent_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoAgentError, match="no agent runs"):
        ask(tmp_path, "echo/a")
    with pytest.raises(NoAgentError, match="does not answer"):
        ask(tmp_path / "nowhere", "echo/a")


def _as_nobody(folder: Path) -> bool:
    """Returns True if another user gets an answer."""
    pid = os.fork()
    if pid == 0:
        name = _name(folder)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5)
            peer.connect(name)
            try:
                peer.sendall(b"GET /echo/a HTTP/1.0\r\n\r\n")
                answered = bool(peer.recv(100))
            except OSError:
                answered = False
        os._exit(answered)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def test_only_root_gets_an_answer(server: LocalServer, tmp_path: Path) -> None:
    assert not _as_nobody(tmp_path)
    assert ask(tmp_path, "echo/a").status == 200


def test_a_name_that_somebody_else_took_is_not_trusted(tmp_path: Path) -> None:
    name = _name(tmp_path)
    taken, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
            listener.listen()
            os.write(done, b"x")
            listener.accept()
        os._exit(0)
    os.read(taken, 1)
    with pytest.raises(NoAgentError, match="not root"):
        ask(tmp_path, "echo/a")
    # An agent that does not get the name goes on without it.
    server = LocalServer(tmp_path, {})
    server.start()
    server.stop()
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
                assert isinstance(message, Finished)
                message.then()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_reasons_come_from_the_reconciler(tmp_path: Path) -> None:
    tracker, messages = RecordTracker(NODE), Messages()
    thread = reconciler(messages)
    server = LocalServer(tmp_path, local_pages.pages(messages, tracker))
    server.start()
    assert ask(tmp_path, "services/shop/web") == (503, b"the agent has not received all Services yet")
    (case,) = (path for path in CASES if path.stem == "zone-hints")
    for event in replaced(list(parse(case.read_text()))):
        tracker.apply(event)
    found = msgspec.json.decode(ask(tmp_path, "services/shop/web").body, type=ServiceReasons)
    assert (found.node, found.zone) == (NODE, "zone-a")
    assert [each.address for each in found.ports[0].endpoints] == ["10.244.1.2:8080", "10.244.2.2:8080"]
    assert ask(tmp_path, "services/shop/none").status == 404
    messages.put(Stop())
    thread.join()
    messages.close()
    assert ask(tmp_path, "services/shop/web").status == 503, "nobody waits for a reconciler that has ended"
    server.stop()


def test_a_question_that_raises_is_the_askers_problem() -> None:
    messages = Messages()
    thread = reconciler(messages)
    with pytest.raises(ZeroDivisionError):
        messages.ask(lambda: 1 // 0, 5)
    assert messages.ask(lambda: "still there", 5) == "still there"
    messages.put(Stop())
    thread.join()
    with pytest.raises(TimeoutError):
        messages.ask(lambda: None, 0.01)
    messages.close()
    with pytest.raises(CancelledError):
        messages.ask(lambda: None, 5)
