"""One run of ``ebpfproxy trace``: from what is asked for to rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ebpfproxy.datapath.abi.decision_layout import (
    DEFAULT_RATE,
    Client,
    DecisionKind,
    Lost,
    TracingPrograms,
    Wanted,
)
from ebpfproxy.datapath.decisions import DecisionReader, Tracing, lease, lost, trace_services
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import ServicePortKey
from ebpfproxy.services.values import parse_address
from ebpfproxy.trace.naming import AskReasons, Naming
from ebpfproxy.trace.rows import DecisionRow

#: The agent loads programs, if they are not pinned, and replaces those of every device.
_START_SECONDS = 60.0
#: The ring is read so often: many at once cost less, and nobody waits for it.
_READ_SECONDS = 0.05
_RENEW_SECONDS = 1.0
#: Services that begin to match are found so often.
_SERVICES_SECONDS = 5.0


class TraceError(Exception):
    """Nothing can be traced; the message says why."""


class EndedError(TraceError):
    """Nobody wants the trace any more that was waited for."""


def always() -> bool:
    return True


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for; None: all. ``one_in``: one in so many decisions that go well.

    ``rate``: decisions a second, of each CPU. ``pod``: ``namespace/name``, a network namespace's name, or an
    address.
    """

    namespace: str | None = None
    service: str | None = None
    pod: str | None = None
    kinds: frozenset[DecisionKind] = frozenset(DecisionKind)
    one_in: int = 1
    rate: int = DEFAULT_RATE

    @property
    def is_by_service(self) -> bool:
        return self.namespace is not None or self.service is not None

    def matches(self, key: ServicePortKey | None) -> bool:
        if key is None:
            return not self.is_by_service
        return self.namespace in (None, key.namespace) and self.service in (None, key.name)


class Session:
    """Reads rows while it holds the lease; :func:`session` makes it."""

    def __init__(self, maps: MapSet, tracing: Tracing, naming: Naming, wanted: Filter) -> None:
        self._maps = maps
        self._tracing = tracing
        self._naming = naming
        self._filter = wanted
        self._reader = DecisionReader(maps)
        # A command before this one may have left some.
        self._reader.read()
        self._lost = lost(maps)
        self._next_services = 0.0
        self._services: frozenset[int] | None = None
        #: What may be missing of the client that is asked for; empty where nothing is.
        self.doubt = ""

    def begin(self) -> None:
        """Asks for what is wanted. Raises TraceError."""
        self._set_services()
        wanted = self._filter
        self._tracing.want(
            Wanted(wanted.kinds, wanted.one_in, wanted.rate, wanted.is_by_service, self._client())
        )

    def change(self, wanted: Filter) -> None:
        """Asks for something else from now on, of the same programs. Raises TraceError."""
        self._filter, self._services = wanted, None
        self.begin()

    def rows(self) -> Iterator[list[DecisionRow]]:
        """What has come, again and again; empty where nothing has. It ends with the caller.

        Raises TraceError where an agent has begun to use other maps: nothing would come any more.
        """
        renewed = time.monotonic()
        while True:
            now = time.monotonic()
            if now - renewed >= _RENEW_SECONDS:
                if not self._maps.folder.exists():
                    raise TraceError("the agent has made other maps: start the trace again")
                self._tracing.renew()
                renewed = now
                if now >= self._next_services:
                    self._set_services()
            yield self._read()
            time.sleep(_READ_SECONDS)

    def rest(self) -> list[DecisionRow]:
        """What has come since :meth:`rows` was left."""
        return self._read()

    @property
    def is_reported(self) -> bool:
        """True while programs report decisions: an agent that ends replaces them. Raises TraceError."""
        return _report(self._tracing)

    def newly_lost(self) -> Lost:
        """Decisions that were lost since the last time."""
        before, self._lost = self._lost, lost(self._maps)
        return Lost(self._lost.limited - before.limited, self._lost.full - before.full)

    def close(self) -> None:
        self._reader.close()

    def _read(self) -> list[DecisionRow]:
        naming = self._naming
        found = self._reader.read()
        if not found:
            return []
        naming.begin_round()
        return [naming.row(each) for each in found if self._filter.matches(naming.service_of(each))]

    def _set_services(self) -> None:
        """Programs know Services by their ids only."""
        if not self._filter.is_by_service:
            return
        found = frozenset(n for n, key in Dump(self._maps).names.items() if self._filter.matches(key))
        if found != self._services:
            trace_services(self._maps, found)
            self._services = found
        self._next_services = time.monotonic() + _SERVICES_SECONDS

    def _client(self) -> Client | None:
        pod = self._filter.pod
        if pod is None:
            return None
        address = parse_address(pod)
        addresses = [address] if address is not None else self._naming.pods_addresses(pod)
        clients = self._naming.clients
        netns = clients.cookie_with(addresses[0]) if addresses else clients.cookie_named(pod)
        if not addresses and netns is not None:
            namespace = clients.namespace(netns)
            addresses = list(namespace.addresses) if namespace is not None else []
        if netns is None and (why := clients.why_unknown()):
            if not addresses:
                raise TraceError(f"a pod {pod!r} is not looked for: {why}")
            self.doubt = f"if {pod} is a pod, what its sockets ask is not shown: {why}"
        if not addresses and netns is None:
            raise TraceError(f"no pod, network namespace or address {pod!r} is known on this node")
        # A pod has one of each family.
        by_family = {len(each): each for each in addresses}
        return Client(tuple(by_family.values()), netns or 0)


@contextmanager
def session(
    maps: MapSet,
    cgroup_root: Path,
    wanted: Filter,
    reasons: AskReasons,
    goes_on: Callable[[], bool] = always,
) -> Iterator[Session]:
    """Takes the lease and waits until programs report, while ``goes_on`` says so.

    Raises TraceError and TracingInUseError.
    """
    with lease(maps) as tracing:
        _wait_for_programs(tracing, goes_on)
        made = Session(maps, tracing, Naming(maps, cgroup_root, reasons), wanted)
        try:
            made.begin()
            yield made
        finally:
            made.close()


def _wait_for_programs(tracing: Tracing, goes_on: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _report(tracing):
        if not goes_on():
            raise EndedError("nobody wants the trace any more")
        if time.monotonic() > deadline:
            raise TraceError(f"the agent has attached no such programs within {_START_SECONDS:.0f} s")
        tracing.renew()
        time.sleep(_READ_SECONDS)


def _report(tracing: Tracing) -> bool:
    if tracing.programs is TracingPrograms.FAILED:
        raise TraceError("programs that report decisions do not load: the agent's log says why")
    return tracing.programs is TracingPrograms.REPORTING
