"""A server for pods: it sends its name and the client's address for every TCP connection and datagram.

Datagrams that begin with "echo", and all further data of a connection, come back as they are.
"""

from __future__ import annotations

import json
import selectors
import socket
from typing import Any

from tests.lab.processes import read_line
from tests.lab.spaces import HAS_IPV6, Space


def start(space: Space, name: str, *ports: int, address: str = "::") -> None:
    """Serves TCP and UDP on ``ports`` until the lab ends; returns when the sockets are open.

    ``address``: IPv6 or IPv4-mapped; the default is any address of both families.
    """
    assert read_line(space.fork(main, name, address, ports)) == "ready"


def _answer(name: str, peer: Any) -> bytes:
    return json.dumps({"name": name, "peer": peer[0].removeprefix("::ffff:"), "port": peer[1]}).encode()


def main(name: str, address: str, ports: tuple[int, ...]) -> None:
    selector = selectors.DefaultSelector()
    for port in ports:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            listener = socket.socket(socket.AF_INET6 if HAS_IPV6 else socket.AF_INET, kind)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if HAS_IPV6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((address if HAS_IPV6 else address.removeprefix("::"), port))
            if kind == socket.SOCK_STREAM:
                listener.listen(1024)
            selector.register(listener, selectors.EVENT_READ, kind)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            sock: Any = key.fileobj
            if key.data == socket.SOCK_DGRAM:
                data, peer = sock.recvfrom(65535)
                sock.sendto(data if data.startswith(b"echo") else _answer(name, peer), peer)
            elif key.data == socket.SOCK_STREAM:
                connection, peer = sock.accept()
                try:
                    connection.sendall(_answer(name, peer) + b"\n")
                except OSError:
                    connection.close()
                    continue
                selector.register(connection, selectors.EVENT_READ, None)
            else:
                # Data is echoed until the client closes the connection.
                try:
                    data = sock.recv(65536)
                    if data:
                        sock.sendall(data)
                        continue
                except OSError:
                    pass
                selector.unregister(sock)
                sock.close()
