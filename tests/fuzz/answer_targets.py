"""What comes in by HTTP and other connections: requests of anybody, and answers of nodes, agents and the API server."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from ebpfproxy.agent import local_pages, state
from ebpfproxy.agent.local_socket import NoAgentError, Reply
from ebpfproxy.cli import kubectl_top
from ebpfproxy.datapath.drift.findings import Report
from ebpfproxy.health import http
from ebpfproxy.inspection import agent, inquiry
from ebpfproxy.inspection.failures import QuestionError
from ebpfproxy.kube import control_plane, exec
from ebpfproxy.kube.failures import Failure
from ebpfproxy.services.reasons import ServiceReasons
from ebpfproxy.top.rows import PacketRow, Top
from ebpfproxy.ui import app, guard
from tests.fuzz.target import Target, printable

_KEY = "key"


def http_request(data: bytes) -> None:
    """Requests to any of the agent's servers, until the connection ends."""
    asked: list[str] = []

    def respond(path: str) -> http.Answer:
        asked.append(path)
        return http.text_answer("ok\n")

    async def all_of_them() -> None:
        received = data
        while (end := http._HEAD_END.search(received)) is not None:
            head, received = received[: end.start()], received[end.end() :]
            answer, goes_on = await http._answered(head, respond)
            first, _, rest = answer.partition(b"\r\n")
            assert first in (b"HTTP/1.1 200 OK", b"HTTP/1.1 400 Bad Request"), first
            assert rest.count(b"\r\n\r\n") == 1, "no header ends the answer"
            if not goes_on:
                return

    asyncio.run(all_of_them())


_REQUESTS = (
    b"GET /healthz?verbose HTTP/1.1\r\nHost: a\r\n\r\nHEAD /livez HTTP/1.1\nConnection: close\n\n",
    b"GET /metrics HTTP/1.0\r\nAccept: */*\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
)


def page_request(data: bytes) -> None:
    """A request to the page: lines of method, path, query, host and authorization."""
    method, path, query, host, key = (*data.split(b"\n", 4), b"", b"", b"", b"", b"")[:5]
    scope: dict[str, Any] = {
        "type": "http",
        "method": method.decode(errors="replace"),
        "path": path.decode(errors="replace"),
        "query_string": query,
        "headers": [(b"host", host), (b"authorization", key)],
    }
    refusal = guard.Guard(_unused, _KEY)._refusal(scope)
    if guard.is_own_host(host.decode("latin-1")):
        assert refusal is None or refusal.status_code in (401, 405)
    else:
        assert refusal is not None
        assert refusal.status_code == 421
    given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    app._wanted(given)
    try:
        inquiry.parse(given.get("to", ""), "default", None)
    except QuestionError as error:
        printable(str(error))


async def _unused(*_: Any) -> None:
    raise AssertionError("the request goes on")


_PAGE_REQUESTS = (
    b"GET\n/api/status\nto=shop/web:http&errors=\nlocalhost:9000\nBearer key",
    b"GET\n/\nto=10.96.0.10:80\n[::1]:80\n",
    b"POST\n/api/x\nto=[fd00::1]:80&service=a\n127.0.0.1\nBearer x",
)


def exec_status(data: bytes) -> None:
    """The Status with which a kubelet ends a command."""
    try:
        exec._code(data)
    except Failure as error:
        str(error)


_ENDED = (
    b'{"status":"Success"}',
    b'{"status":"Failure","message":"command terminated","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}',
)


def cluster_info(data: bytes) -> None:
    """The ConfigMap kube-public/cluster-info, which anybody in the way can write."""
    control_plane._server_of_config_map(data)


_CLUSTER_INFO = (
    b'{"data":{"kubeconfig":"clusters:\\n- cluster: {server: https://172.18.0.2:6443}\\n  name: \\"\\"\\n"}}',
    b'{"data":{}}',
)


def agent_record(data: bytes) -> None:
    """The record that another agent, of any version, has left in a map, with its time of the last change."""
    state._decode(data[16:], data[:16].ljust(16, b"\0") if data else None)


def _record_seeds() -> Iterator[bytes]:
    when = struct.pack("=dd", 1e9, 0.5)
    record = state.AgentState(pid=1, version="0.1.0", node="a", source="b", started=1.0, written=2.0)
    yield when + msgspec.json.encode(record).ljust(2000, b"\0")
    yield when + b"{}"


def agent_answer(data: bytes) -> None:
    """What an agent of another version answers commands: reasons, and a report."""
    try:
        local_pages.decode_reasons(Reply(200, data))
    except NoAgentError as error:
        printable(str(error))
    agent.decode_report(data)


def top_line(data: bytes) -> None:
    """A line of `top` on a node, which may have another version."""
    try:
        kubectl_top.decode_top(data)
    except Failure as error:
        str(error)


def _answers() -> Iterator[bytes]:
    reasons = ServiceReasons("shop", "web", "node-a", "", "Cluster", "Cluster", warnings=("x",))
    yield msgspec.json.encode(reasons)
    yield msgspec.json.encode(Report(more=1))


def _tops() -> Iterator[bytes]:
    packets = (PacketRow(action="dropped", reason="hops", per_second=1.0, recently=2),)
    yield msgspec.json.encode(
        Top(
            services=1,
            active=1,
            packets=packets,
            trouble=(),
            rows=(),
            time=1.0,
            seconds=1.0,
            connections_per_second=1.0,
            refused_per_second=0.0,
            dropped_per_second=0.0,
        )
    )


TARGETS = (
    Target(http_request, lambda: _REQUESTS),
    Target(page_request, lambda: _PAGE_REQUESTS),
    Target(exec_status, lambda: _ENDED),
    Target(cluster_info, lambda: _CLUSTER_INFO),
    Target(agent_record, _record_seeds),
    Target(agent_answer, _answers),
    Target(top_line, _tops),
)
