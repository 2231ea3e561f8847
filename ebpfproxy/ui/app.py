"""What the page asks, and the page itself. Nothing here changes anything."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from ebpfproxy.agent.local_pages import CHECK
from ebpfproxy.datapath.abi.decision_layout import SUCCESSES, DecisionKind
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.explain.report import Report
from ebpfproxy.inspection import explanation
from ebpfproxy.inspection.agent import ask_agent
from ebpfproxy.inspection.failures import FAILURES, QuestionError, WrongNamespaceError, told
from ebpfproxy.inspection.inquiry import explained
from ebpfproxy.inspection.services import Services
from ebpfproxy.inspection.status import Status, facts, read_status
from ebpfproxy.node.pod_names import pods
from ebpfproxy.operator.check.all_checks import Check, check
from ebpfproxy.services.model import Protocol
from ebpfproxy.trace.session import Filter
from ebpfproxy.ui.guard import DATA, Guard
from ebpfproxy.ui.live import Live, Viewer
from ebpfproxy.ui.shared import Shared

T = TypeVar("T")
_STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: A page shows no more Services at once.
_MOST_SERVICES = 200
_AGENT_SECONDS = 15.0
#: What names in a question may consist of: they become a part of one to the agent.
_NAME = re.compile("[A-Za-z0-9._-]{1,253}")
_KINDS = frozenset(DecisionKind)


class NodeStatus(msgspec.Struct, frozen=True):
    """``facts``: what ``ebpfproxy status`` prints, in pairs."""

    status: Status
    facts: tuple[tuple[str, str], ...]
    now: float


class Told(msgspec.Struct, frozen=True):
    """One explanation in words."""

    headline: str
    facts: tuple[tuple[str, str], ...]


class Explained(msgspec.Struct, frozen=True):
    """``told`` has one for each of the report's explanations."""

    report: Report
    told: tuple[Told, ...]


class NotFoundError(Exception):
    """There is no such thing; the message says what."""


class Pages:
    """What is read for one request. Each reads the maps as they are then."""

    def __init__(self, bpf_root: Path, cni_results: Path) -> None:
        self._bpf_root = bpf_root
        self._cni_results = cni_results

    def status(self) -> NodeStatus:
        now = time.time()
        found = self._with_maps(lambda maps: read_status(self._bpf_root, maps))
        return NodeStatus(found, tuple(facts(found, now)), now)

    def search(self, request: Request) -> object:
        text, rejected = request.query_params.get("q", ""), "rejected" in request.query_params
        return self._with_maps(
            lambda maps: Services(maps, self._bpf_root).search(text, _MOST_SERVICES, rejected=rejected)
        )

    def service(self, request: Request) -> object:
        namespace, name = request.path_params["namespace"], request.path_params["name"]
        known = _NAME.fullmatch(namespace) and _NAME.fullmatch(name)
        found = (
            self._with_maps(lambda maps: Services(maps, self._bpf_root).view(namespace, name))
            if known
            else None
        )
        if found is None:
            raise NotFoundError(f"no Service {namespace}/{name} is known on this node")
        return found

    def clients(self, _: Request) -> list[str]:
        """Names for the FROM of explain."""
        return ["host", *sorted({f"{each.namespace}/{each.name}" for each in pods(self._cni_results)})]

    def explain(self, request: Request) -> Explained:
        source, target, name = (request.query_params.get(each, "") for each in ("from", "to", "protocol"))
        if name and name not in Protocol.__members__:
            raise QuestionError(f"{name!r} is no protocol")
        protocol = Protocol[name] if name else None
        report = self._with_maps(
            lambda maps: explained(
                maps,
                source.strip(),
                target.strip(),
                protocol,
                bpf_root=self._bpf_root,
                cni_results=self._cni_results,
            )
        )
        told_each = (
            Told(explanation.headline(each), tuple(explanation.facts(each))) for each in report.explanations
        )
        return Explained(report, tuple(told_each))

    def check(self) -> Check:
        return self._with_maps(
            lambda maps: check(self._bpf_root, maps, *ask_agent(self._bpf_root, CHECK, _AGENT_SECONDS))
        )

    def _with_maps(self, read: Callable[[MapSet], T]) -> T:
        maps = open_maps(self._bpf_root)
        try:
            return read(maps)
        finally:
            maps.close()


def _answer(read: Callable[[Request], object]) -> Callable[[Request], Response]:
    """Starlette calls what is no coroutine in a thread."""
    return lambda request: _response(_answered(lambda: read(request)))


def _shared(read: Callable[[], object]) -> Callable[[Request], Awaitable[Response]]:
    """Of what takes a while, such as the agent's comparison, and is the same for all who ask."""
    shared = Shared(lambda: _answered(read))

    async def respond(_: Request) -> Response:
        return _response(await shared.get())

    return respond


class _Answer(NamedTuple):
    body: bytes
    status: int = 200


def _answered(read: Callable[[], object]) -> _Answer:
    try:
        return _Answer(msgspec.json.encode(read()))
    except QuestionError as error:
        return _error(str(error), 400)
    except NotFoundError as error:
        return _error(str(error), 404)
    except WrongNamespaceError as error:
        return _error(str(error), 503)
    except (OSError, *FAILURES) as error:
        return _error(told(error), 503)


def _error(text: str, status: int) -> _Answer:
    return _Answer(msgspec.json.encode({"error": text}), status)


def _response(answer: _Answer) -> Response:
    return Response(answer.body, answer.status, media_type="application/json")


def _file(path: Path) -> Callable[[Request], Response]:
    body, kind = path.read_bytes(), _TYPES[path.suffix]
    return lambda _: Response(body, headers={"content-type": kind})


def _wanted(given: Mapping[str, str]) -> Filter:
    return Filter(
        namespace=given.get("namespace") or None,
        service=given.get("service") or None,
        kinds=_KINDS - SUCCESSES if "errors" in given else _KINDS,
    )


def make(bpf_root: Path, cni_results: Path, key: str, live: Live) -> ASGIApp:
    """The application. ``key``: what a request for data has to have."""
    pages = Pages(bpf_root, cni_results)

    async def decisions(request: Request) -> Response:
        kind = "text/event-stream"
        if request.method == "HEAD":
            return Response(media_type=kind)

        async def events() -> AsyncIterator[bytes]:
            viewer = Viewer(_wanted(request.query_params), request.query_params.get("viewer", ""))
            live.join(viewer)
            try:
                async for event in viewer.events():
                    yield event
            finally:
                live.leave(viewer)

        return StreamingResponse(events(), media_type=kind)

    async def look(request: Request) -> Response:
        live.look(request.path_params["viewer"])
        return Response(status_code=204)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        live.end_streams()
        live.wait()

    routes = [
        Route("/", _file(_STATIC / "index.html")),
        *(Route(f"/{name}", _file(_STATIC / name)) for name in ("page.js", "page.css", "icon.svg")),
        Route(f"{DATA}status", _shared(pages.status)),
        Route(f"{DATA}services", _answer(pages.search)),
        Route(f"{DATA}services/{{namespace}}/{{name}}", _answer(pages.service)),
        Route(f"{DATA}clients", _answer(pages.clients)),
        Route(f"{DATA}explain", _answer(pages.explain)),
        Route(f"{DATA}check", _shared(pages.check)),
        Route(f"{DATA}decisions", decisions),
        Route(f"{DATA}viewers/{{viewer}}", look),
    ]
    return Guard(Starlette(routes=routes, lifespan=lifespan), key)
