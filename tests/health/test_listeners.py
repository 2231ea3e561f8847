"""Listening sockets that go from one process to the next."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ebpfproxy.health.listeners import Listeners, inherited
from ebpfproxy.health.node_port import NodePortHealth, ServiceHealth


def _port(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def test_socket_of_an_earlier_agent_is_used_for_its_address_alone() -> None:
    earlier = Listeners().listen("", 0)
    listeners = Listeners([earlier])
    assert listeners.has_inherited
    other = listeners.listen("127.0.0.1", 0)
    assert other.fileno() != earlier.fileno()
    assert listeners.listen("", _port(earlier)) is earlier
    assert not listeners.has_inherited
    assert set(listeners.sockets()) == {earlier, other}
    for each in listeners.sockets():
        each.close()
    assert listeners.sockets() == []


@pytest.mark.parametrize(
    ("before", "now"), [("", "127.0.0.1"), ("127.0.0.1", ""), ("0.0.0.0", "::"), ("::", "::1"), ("::1", "::")]
)
def test_socket_of_an_earlier_agent_gives_way_to_another_address_with_its_port(before: str, now: str) -> None:
    """So it does if another process has it, as systemd and an agent that is replaced do."""
    elsewhere = Listeners().listen(before, 0)
    port = _port(elsewhere)
    listeners = Listeners([elsewhere.dup()])
    with pytest.raises(OSError, match="in use"):
        listeners.listen(now, port)
    found = listeners.listen_instead(now, port)
    assert not listeners.has_inherited
    assert listeners.sockets() == [found]
    with socket.create_connection((now or "127.0.0.1", port), 5):
        connection, _ = found.accept()
        connection.close()
    found.close()
    elsewhere.close()


def test_socket_that_excludes_no_other_address_stays() -> None:
    """Health checks and metrics may have one port at two addresses, of which one changes."""
    kept = Listeners().listen("127.0.0.1", 0)
    listeners = Listeners([kept])
    listeners.listen_instead("127.0.0.2", _port(kept)).close()
    assert listeners.listen_instead("127.0.0.1", _port(kept)) is kept
    # An address of another process is as taken as before.
    with pytest.raises(OSError, match="in use"):
        Listeners().listen_instead("127.0.0.1", _port(kept))
    kept.close()


def test_address_is_known_by_each_of_its_notations() -> None:
    earlier = Listeners().listen("::1", 0)
    assert Listeners([earlier]).listen("0:0::1", _port(earlier)) is earlier
    earlier.close()


def test_connection_waits_in_a_socket_that_nobody_accepts_at() -> None:
    first = Listeners()
    sock = first.listen("127.0.0.1", 0)
    with socket.create_connection(sock.getsockname(), 5) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        following = Listeners([sock.dup()])
        sock.close()
        taken = following.listen("127.0.0.1", client.getpeername()[1])
        connection, _ = taken.accept()
        assert connection.recv(100).startswith(b"GET")
        connection.close()
        taken.close()


def test_released_sockets_refuse_connections_in_every_process_that_has_them() -> None:
    sock = Listeners().listen("127.0.0.1", 0)
    listeners = Listeners([sock.dup()])
    listeners.release_inherited()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname(), 5)
    # A socket that was shut down meanwhile is not taken over.
    assert not Listeners([sock]).has_inherited
    assert sock.fileno() == -1


def test_sockets_are_left_to_the_program_that_replaces_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBPFPROXY_LISTENERS", "")
    sock = Listeners().listen("127.0.0.1", 0)
    listeners = Listeners([sock])
    copies = listeners.leave_to_next()
    script = (
        "from ebpfproxy.health.listeners import inherited; print([s.getsockname()[1] for s in inherited()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], pass_fds=copies, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([_port(sock)])
    (again,) = inherited()
    assert again.getsockname() == sock.getsockname()
    assert not again.get_inheritable()
    assert inherited() == []
    again.close()
    sock.close()


def test_systemds_sockets_are_those_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert inherited() == []


def test_systemd_is_given_each_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        sock = Listeners().listen("127.0.0.1", 0)
        data, numbers, _, _ = socket.recv_fds(systemd, 100, 10)
    assert data == b"FDSTORE=1\nFDNAME=listener"
    with socket.socket(fileno=numbers[0]) as kept:
        assert kept.getsockname() == sock.getsockname()
    # Without a systemd that listens, the socket serves all the same.
    Listeners().listen("127.0.0.1", 0).close()
    sock.close()


def test_client_that_has_connected_gets_its_answer_at_the_end() -> None:
    health = NodePortHealth(lambda: True)
    with socket.create_server(("", 0)) as spare:
        port = _port(spare)
    health.update([ServiceHealth("shop", "web", port, 1)])
    health.start()
    with (
        socket.create_connection(("127.0.0.1", port), 5) as idle,
        socket.create_connection(("127.0.0.1", port), 5) as late,
    ):
        idle.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b" 200 OK" in idle.recv(4096)
        late.sendall(b"GET / HT")
        stopping = threading.Thread(target=health.stop)
        stopping.start()
        while idle.recv(4096):
            pass
        late.sendall(b"TP/1.1\r\n\r\n")
        assert b" 200 OK" in late.recv(4096)
        stopping.join()
