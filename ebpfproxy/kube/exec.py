"""A command in a pod's container, over the API server: a WebSocket with a channel for each stream.

``v5.channel.k8s.io`` (KEP-4006) can close standard input alone; servers before 1.30 have ``v4`` only, where
the whole connection is closed instead. The user needs to ``get`` and, of later servers, to ``create``
``pods/exec``.
"""

from __future__ import annotations

import re
import selectors
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec
from websocket import (
    ABNF,
    WebSocket,
    WebSocketBadStatusException,
    WebSocketConnectionClosedException,
    WebSocketException,
    WebSocketTimeoutException,
    create_connection,
)

from ebpfproxy.kube import access, failures
from ebpfproxy.kube.client import KEEPALIVE, USER_AGENT, ApiConnection
from ebpfproxy.kube.decode import decode_status
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.kube.failures import Failure

_V5, _V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
_CLOSE = 255
_CONNECT_SECONDS = 30.0
#: What comes may be TLS's own, as session tickets are: a read after it would wait. Parts of frames are kept.
_READ_SECONDS = 1.0
#: Signs of a proxy's that websocket-client takes from the environment: any name, and none.
_NO_PROXY, _ANY_HOST = ["*"], ["-"]


class Channel(IntEnum):
    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3


class _Cause(msgspec.Struct):
    reason: str = ""
    message: str = ""


class _Details(msgspec.Struct):
    causes: list[_Cause] = []


class _Ended(msgspec.Struct):
    """The Status with which a command ends."""

    status: str = ""
    message: str = ""
    details: _Details | None = None


_STATUS = msgspec.json.Decoder(_Ended)
_EXIT_CODE = re.compile("[0-9]{1,9}")


class Exec:
    """A running command. :meth:`output` belongs to one thread, :meth:`end_input` to any.

    Only :meth:`output` uses the connection, as OpenSSL's do not take two threads.
    """

    def __init__(
        self, connection: ApiConnection, namespace: str, pod: str, container: str, command: Sequence[str]
    ) -> None:
        """Starts the command. Raises Failure."""
        #: Once :meth:`output` has ended: the command's exit code; None where it was not waited for.
        self.code: int | None = None
        self._ended = b""
        self._socket = _connect(connection, namespace, pod, container, command)
        self._waiting, self._waking = socket.socketpair()

    def output(self) -> Iterator[tuple[Channel, bytes]]:
        """Standard output and error as they come, until the command ends. Raises Failure."""
        try:
            yield from self._frames()
        except WebSocketConnectionClosedException:
            # Without a status the connection was lost, or closed by end_input().
            pass
        except (WebSocketException, OSError) as error:
            raise failures.of_exception(error) from error
        finally:
            with suppress(WebSocketException, OSError):
                self._socket.close()
            self._waiting.close()
        self.code = _code(self._ended)

    def _frames(self) -> Iterator[tuple[Channel, bytes]]:
        while self._goes_on():
            try:
                kind, data = self._socket.recv_data()
            except WebSocketTimeoutException:
                continue
            if kind == ABNF.OPCODE_CLOSE:
                return
            channel, payload = data[:1], data[1:]
            if channel in (b"\x01", b"\x02") and payload:
                yield Channel(channel[0]), payload
            elif channel == b"\x03":
                self._ended += payload

    def _goes_on(self) -> bool:
        """Waits until something has come; False where the connection ends with the command's input."""
        while True:
            connected = self._socket.sock
            if connected is None or (isinstance(connected, ssl.SSLSocket) and connected.pending()):
                return True
            with selectors.DefaultSelector() as selector:
                selector.register(connected, selectors.EVENT_READ)
                selector.register(self._waiting, selectors.EVENT_READ)
                ready = {key.fileobj for key, _ in selector.select()}
            if self._waiting in ready:
                self._waiting.recv(1)
                if self._socket.getsubprotocol() != _V5:
                    return False
                self._socket.send(bytes([_CLOSE, Channel.STDIN]), ABNF.OPCODE_BINARY)
            if connected in ready:
                return True

    def end_input(self) -> None:
        """Closes standard input: a command that ends with it does."""
        with suppress(OSError):
            self._waking.send(b".")


def _code(ended: bytes) -> int | None:
    """Raises Failure where the command was not started, in the kubelet's words."""
    if not ended:
        return None
    try:
        status = _STATUS.decode(ended)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Failure("exec", f"not a command's status: {error}") from error
    if status.status == "Success":
        return 0
    for cause in status.details.causes if status.details is not None else ():
        if cause.reason == "ExitCode" and _EXIT_CODE.fullmatch(cause.message):
            return int(cause.message)
    raise Failure("exec", " ".join(status.message.split()) or "the command was not started")


def _connect(
    connection: ApiConnection, namespace: str, pod: str, container: str, command: Sequence[str]
) -> WebSocket:
    found = connection.access
    query = [("container", container), *(("command", word) for word in command)]
    query += [(stream, "true") for stream in ("stdin", "stdout", "stderr")]
    path = f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(pod)}/exec?{urlencode(query)}"
    try:
        authorization = found.authorization()
        made: WebSocket = create_connection(
            f"ws{found.server.removeprefix('http')}{path}",
            timeout=_CONNECT_SECONDS,
            header=[f"User-Agent: {USER_AGENT}", *[f"Authorization: {authorization}"] * bool(authorization)],
            subprotocols=[_V5, _V4],
            suppress_origin=True,
            # It would send the credentials wherever a redirect points.
            redirect_limit=0,
            sockopt=list(KEEPALIVE),
            sslopt={"context": found.tls, "server_hostname": found.server_name},
            **_proxy(found),
        )
    except ConfigError as error:
        raise Failure("credentials", str(error)) from error
    except WebSocketBadStatusException as error:
        body = error.resp_body or b""
        raise failures.of_status(decode_status(body, error.status_code)) from error
    except (WebSocketException, ssl.SSLError, OSError) as error:
        raise failures.of_exception(error) from error
    made.settimeout(_READ_SECONDS)
    return made


def _proxy(found: access.Access) -> dict[str, Any]:
    """What websocket-client needs to know of a proxy, and that it is not to look for one by itself."""
    url = access.proxy_of(found)
    if url is None:
        return {"http_no_proxy": _NO_PROXY}
    proxy = urlsplit(url)
    return {
        "http_no_proxy": _ANY_HOST,
        "http_proxy_host": proxy.hostname,
        "http_proxy_port": proxy.port or 80,
        "http_proxy_auth": (proxy.username, proxy.password) if proxy.username else None,
        "proxy_type": proxy.scheme,
    }
