"""A process of a pod that does socket operations, and says what programs took for them.

An operation is done in batches of ``BATCH``. Programs' counters are read before and after the timed part of a
batch and at no other time: what prepares it and what follows it is not counted. That tells apart what one
program does for several reasons, as for the close of a client's socket and of an accepted one.
"""

from __future__ import annotations

import json
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.kernel import bpf
from tests.lab.processes import read_line
from tests.lab.spaces import Space
from tools.bench.runtime import Runs, runs
from tools.bench.sockets import ON_ONE_CPU

BATCH = 50
#: Seconds for a reply. A datagram that was lost ends the benchmark.
_TIMEOUT = 5
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: no TIME_WAIT uses up the ports
_REQUEST = b"x" * 64

Address = tuple[str, int]
#: Stops twice for each batch: where its timed part begins, and where it ends.
Operation = Callable[[Sequence[Sequence[Address]]], Iterator[None]]


class Task(NamedTuple):
    """An operation with one of the names in ``OPERATIONS``, and a peer for each time that it is done."""

    operation: str
    peers: Sequence[Address]


def _socket(peer: Address, kind: socket.SocketKind) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in peer[0] else socket.AF_INET, kind)
    made.settimeout(_TIMEOUT)
    if kind == socket.SOCK_STREAM:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _close(sockets: Sequence[socket.socket]) -> None:
    for each in sockets:
        each.close()


def connect_and_close(batches: Sequence[Sequence[Address]]) -> Iterator[None]:
    """TCP: a batch of sockets is connected, then closed."""
    for peers in batches:
        sockets = [_socket(peer, socket.SOCK_STREAM) for peer in peers]
        yield
        for sock, peer in zip(sockets, peers, strict=True):
            sock.connect(peer)
        _close(sockets)
        yield


def close_accepted(batches: Sequence[Sequence[Address]]) -> Iterator[None]:
    """TCP: accepted sockets are closed, while those that connected to them stay open. Peers are own addresses."""
    for peers in batches:
        family = socket.AF_INET6 if ":" in peers[0][0] else socket.AF_INET
        with socket.create_server(peers[0], family=family, backlog=len(peers)) as listener:
            clients, accepted = [], []
            for peer in peers:
                clients.append(_socket(peer, socket.SOCK_STREAM))
                clients[-1].connect(peer)
                accepted.append(listener.accept()[0])
            yield
            _close(accepted)
            yield
            _close(clients)


def connect_datagrams(batches: Sequence[Sequence[Address]]) -> Iterator[None]:
    """UDP: sockets are connected; those of all batches stay open to the end."""
    sockets = [[_socket(peer, socket.SOCK_DGRAM) for peer in peers] for peers in batches]
    for batch, peers in zip(sockets, batches, strict=True):
        yield
        for sock, peer in zip(batch, peers, strict=True):
            sock.connect(peer)
        yield
    for batch in sockets:
        _close(batch)


def exchange_and_close(batches: Sequence[Sequence[Address]]) -> Iterator[None]:
    """UDP: each socket of a batch, unconnected, sends a request and receives its response; all are then closed."""
    for peers in batches:
        sockets = [_socket(peer, socket.SOCK_DGRAM) for peer in peers]
        yield
        for sock, peer in zip(sockets, peers, strict=True):
            sock.sendto(_REQUEST, peer)
            sock.recvfrom(len(_REQUEST))
        _close(sockets)
        yield


def take_turns(batches: Sequence[Sequence[Address]]) -> Iterator[None]:
    """TCP: requests on one connection, to the first peer; each waits for the response to the last."""
    peer = batches[0][0]
    with _socket(peer, socket.SOCK_STREAM) as sock:
        sock.connect(peer)

        def exchange(count: int) -> None:
            for _ in range(count):
                sock.send(_REQUEST)
                sock.recv(len(_REQUEST))

        # Each of the first segments is acknowledged at once; later acknowledgements go with the next request.
        exchange(BATCH)
        for peers in batches:
            yield
            exchange(len(peers))
            yield


OPERATIONS: Mapping[str, Operation] = {
    each.__name__: each
    for each in (
        connect_and_close,
        close_accepted,
        connect_datagrams,
        exchange_and_close,
        take_turns,
    )
}


def timed(programs: Mapping[str, int], steps: Iterator[None]) -> list[dict[str, Runs]]:
    """Goes through an operation; what each of the programs (names and descriptors) did in each batch."""

    def read() -> dict[str, Runs]:
        return {name: runs(fd) for name, fd in programs.items()}

    found = []
    for _ in steps:
        before = read()
        next(steps)
        after = read()
        found.append({name: after[name].since(before[name]) for name in programs})
    return found


def perform(programs: Mapping[str, int], task: Task) -> list[dict[str, Runs]]:
    batches = [task.peers[first : first + BATCH] for first in range(0, len(task.peers), BATCH)]
    return timed(programs, OPERATIONS[task.operation](batches))


class Client:
    """That process, in a space of a lab; ``programs`` by name, where they are pinned."""

    def __init__(self, space: Space, programs: Mapping[str, Path]) -> None:
        command = [*ON_ONE_CPU, sys.executable, "-m", "tools.bench.operations"]
        command += [f"{name}={pin}" for name, pin in programs.items()]
        self._process = space.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def perform(self, task: Task) -> list[dict[str, Runs]]:
        """What each of the programs did in each batch."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(read_line(self._process))
        return [{name: Runs(*each) for name, each in batch.items()} for batch in answer]


def main() -> None:
    """For each line, a task, one with its answer."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    named = (each.split("=") for each in sys.argv[1:])
    programs = {name: bpf.get_pinned(Path(pin)) for name, pin in named}
    for line in sys.stdin:
        operation, peers = json.loads(line)
        task = Task(operation, [(host, port) for host, port in peers])
        print(json.dumps(perform(programs, task)), flush=True)


if __name__ == "__main__":
    main()
