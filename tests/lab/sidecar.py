"""The sidecar proxy of a service mesh in a pod: ``python -m tests.lab.sidecar``.

Connections of the pod's processes to TCP port 80 are redirected to it. It prints the original destination of
each (SO_ORIGINAL_DST), and forwards to it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading

from tests.lab.spaces import Space

USER, PORT = 1337, 15001
_SO_ORIGINAL_DST = 80
_RULES = f"""
table ip mesh {{
    chain output {{
        type nat hook output priority -100
        meta skuid != {USER} tcp dport 80 counter redirect to :{PORT}
    }}
}}
"""


class Sidecar:
    """Starts the proxy in a pod, with the netfilter rules that redirect to it."""

    def __init__(self, pod: Space) -> None:
        self._process = pod.popen(
            [sys.executable, "-m", "tests.lab.sidecar"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert self.next() == "ready"
        pod.run(["sh", "-c", f"echo '{_RULES}' | nft -f -"])

    def next(self) -> str:
        """The original destination of the next connection, as ``10.96.0.10:80``."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()


def _forward(client: socket.socket) -> None:
    packed = client.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
    port, address = struct.unpack_from("!2xH4s", packed)
    host = socket.inet_ntoa(address)
    print(f"{host}:{port}", flush=True)
    with contextlib.suppress(OSError), client, socket.create_connection((host, port), 3) as server:
        while data := server.recv(4096):
            client.sendall(data)


def _main() -> None:
    listener = socket.create_server(("127.0.0.1", PORT))
    os.setuid(USER)
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_forward, args=(client,), daemon=True).start()


if __name__ == "__main__":
    _main()
