"""The operations of the benchmark of hooks, run without programs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tools.bench.hooks import FORWARD, OPEN_AND_CLOSE, PASS_THROUGH, ROWS, WORKS, Sample
from tools.bench.operations import BATCH, OPERATIONS, Task, perform


def _echo_segments(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            try:
                while data := connection.recv(2048):
                    connection.sendall(data)
            except ConnectionResetError:
                pass


def _echo_datagrams(server: socket.socket) -> None:
    while True:
        data, peer = server.recvfrom(2048)
        if not data:
            return
        server.sendto(data, peer)


@pytest.fixture
def port() -> Iterator[int]:
    """Runs echo servers of both protocols at 127.0.0.1."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=BATCH) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        address = listener.getsockname()
        server.bind(address)
        threads = [
            threading.Thread(target=_echo_segments, args=(listener,), daemon=True),
            threading.Thread(target=_echo_datagrams, args=(server,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        yield address[1]
        listener.shutdown(socket.SHUT_RDWR)
        server.sendto(b"", address)
        for thread in threads:
            thread.join(10)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_has_a_timed_part_for_each_batch(operation: str, port: int) -> None:
    host = "127.0.0.2" if operation == "close_accepted" else "127.0.0.1"
    assert perform({}, Task(operation, [(host, port)] * (2 * BATCH))) == [{}, {}]


def test_every_row_names_programs_that_run_for_it() -> None:
    for row in ROWS:
        assert set(row.programs) <= set(row.work.programs), row.what
    assert {work.operation for work in WORKS} <= {*OPERATIONS, PASS_THROUGH, OPEN_AND_CLOSE, FORWARD}


def test_sample_is_the_median_of_the_sums_of_batches() -> None:
    sample = Sample([{"a": 1.0, "b": 9.0}, {"a": 5.0, "b": 1.0}, {"a": 2.0, "b": 5.0}])
    assert sample.of(("a",)) == 2.0
    assert sample.of(("a", "b")) == 7.0
