"""A DNS server that resolves every name to 127.0.0.1: ``python -m tests.field.dns_server PORT``."""

from __future__ import annotations

import socket
import sys


def main(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", port))
        print("ready", flush=True)
        while True:
            query, client = server.recvfrom(512)
            end = query.index(b"\0", 12) + 5
            is_a = query[end - 4 : end - 2] == b"\0\1"
            header = query[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_a else b"\0\0") + bytes(4)
            answer = b"\xc0\x0c\0\1\0\1" + b"\0\0\0\1" + b"\0\4\x7f\0\0\1"
            server.sendto(header + query[12:end] + (answer if is_a else b""), client)


if __name__ == "__main__":
    main(int(sys.argv[1]))
