"""UDP frontends that services lose while agents are killed: flows and connected sockets do not stay with them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from ebpfproxy.config.datapath import StaleTcp
from ebpfproxy.datapath.abi.flow_layout import BackendUse
from ebpfproxy.datapath.abi.layout import Scope, pack_service_key
from ebpfproxy.datapath.abi.socket_layout import with_origin_ids
from ebpfproxy.datapath.flows.map_migration import MapMigration
from ebpfproxy.datapath.flows.origins import stale_sockets
from ebpfproxy.datapath.flows.removed_backends import RemovedBackends
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.services.former import former_backends, with_former, without_service
from ebpfproxy.datapath.services.retirement import Retirement
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.services.model import Backend, Family, FrontendKind, Protocol, ServicePort
from tests.datapath.test_socket_records import COOKIE, Sockets, origin
from tests.datapath.writing import KilledError, backend, port

pytestmark = pytest.mark.root

OWN = bytes((10, 96, 0, ord("a")))
#: An external IP that Services a and b have in turn.
MOVING = bytes((203, 0, 113, 60))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def _udp(name: str, *, has: bool) -> ServicePort:
    made = port(name, [1 if name == "a" else 2])
    frontends = [each._replace(protocol=Protocol.UDP) for each in made.frontends]
    if has:
        frontends.append(frontends[0]._replace(kind=FrontendKind.EXTERNAL_IP, address=MOVING, port=53))
    return msgspec.structs.replace(
        made,
        key=made.key._replace(protocol=Protocol.UDP),
        frontends=tuple(frontends),
        cluster=tuple(msgspec.structs.replace(each, protocol=Protocol.UDP) for each in made.cluster),
    )


BEFORE = [_udp("a", has=True), _udp("b", has=False)]
AFTER = {
    "moved": [_udp("a", has=False), _udp("b", has=True)],
    "removed": [_udp("a", has=False), _udp("b", has=False)],
    "deleted": [_udp("b", has=False)],
}
KILLED_AT = {
    "before flows are told": (RemovedBackends, "look_again"),
    "without its name": (Retirement, "add_service"),
    "before the search": None,
}


class _Agent(Sockets):
    def __init__(self, pins: Path, stack: ExitStack, slots: int = 64) -> None:
        super().__init__(pins, stack, slots)
        grace = Grace()
        stack.callback(grace.close)
        self.writer = Writer(self.maps, grace.wait)

    @property
    def epoch(self) -> int:
        return self.maps.shared("epochs").words()[0]

    def backend(self, number: int) -> Backend:
        found = self.maps.backends().read(number)
        assert found is not None
        return found[0]

    def connect(self, frontend: bytes, port_number: int, cookie: int, number: int = 0) -> None:
        """Records a socket of Service a that is connected to the backend with this number."""
        record = origin(frontend, self.backend(number).address, port=port_number, cookie=cookie)
        assert self.programs.restore([with_origin_ids(record, BackendUse(0, number), 0)]) == 1

    def start(self, pins: Path, stack: ExitStack, wanted: list[ServicePort]) -> None:
        """Programs all, and copies what maps of other sizes have, which then go."""
        former = former_backends(pins, self.maps)
        self.writer.apply(list(with_former(wanted, former)))
        self.writer.apply(wanted, complete=True)
        gone = list(without_service(wanted, former))
        self.writer.apply(gone)
        migration = MapMigration(pins, self.maps, self.programs)
        stack.callback(migration.close)
        migration.copy()
        self.writer.apply((), [each.key for each in gone])
        for other in pins.iterdir():
            if other != self.maps.folder:
                shutil.rmtree(other)

    def stale(self, tcp: StaleTcp = StaleTcp.NEVER) -> set[int]:
        """The cookies of sockets that are found to have lost their frontend, or their backend."""
        removed, losers = self.writer.take_removed_backends(), self.writer.take_losers()
        found = stale_sockets(
            self.maps,
            removed,
            tcp,
            losers,
            is_current=self.writer.is_current,
            has_frontend=self.writer.has_udp_frontend,
        )
        return {cookie for cookies in found.values() for cookie in cookies}


@pytest.mark.parametrize(
    ("after", "killed_at"),
    [(after, at) for after in AFTER for at in KILLED_AT if after == "deleted" or at != "without its name"],
)
def test_frontend_is_lost_though_the_agent_is_killed(
    pins: Path, stack: ExitStack, after: str, killed_at: str
) -> None:
    agent = _Agent(pins, stack)
    agent.writer.apply(BEFORE, complete=True)
    agent.connect(MOVING, 53, COOKIE)
    agent.connect(OWN, 80, COOKIE + 1)
    assert agent.stale() == set()
    epoch = agent.epoch
    target = KILLED_AT[killed_at]
    gone = [each.key for each in BEFORE if each.key not in {other.key for other in AFTER[after]}]
    if target is None:
        agent.writer.apply(AFTER[after], gone)
    else:
        with patch.object(*target, side_effect=KilledError), pytest.raises(KilledError):
            agent.writer.apply(AFTER[after], gone)
    successor = _Agent(pins, stack)
    assert successor.maps.adopted
    successor.writer.apply(AFTER[after], complete=True)
    assert successor.epoch > epoch
    assert successor.stale() == ({COOKIE, COOKIE + 1} if after == "deleted" else {COOKIE})
    assert successor.stale() == set(), "the search is done"


def test_frontend_that_is_back_before_the_search_is_not_lost(pins: Path, stack: ExitStack) -> None:
    agent = _Agent(pins, stack)
    agent.writer.apply(BEFORE, complete=True)
    assert agent.stale() == set()
    agent.connect(MOVING, 53, COOKIE)
    agent.writer.apply(AFTER["moved"])
    agent.writer.apply(BEFORE)
    assert agent.stale() == set()
    agent.writer.apply(AFTER["moved"])
    assert agent.stale() == {COOKIE}


_FAMILIES: dict[Family, tuple[str, bytes, bytes]] = {
    Family.IPV4: ("services4", bytes((203, 0, 113, 1)), bytes(4)),
    Family.IPV6: ("services6", bytes.fromhex("20010db8011300000000000000000001"), bytes(16)),
}


@pytest.mark.parametrize("kind", [FrontendKind.EXTERNAL_IP, FrontendKind.NODE_PORT])
@pytest.mark.parametrize("family", _FAMILIES)
def test_frontend_that_somebody_has_deleted_from_the_map_is_not_lost(
    pins: Path, stack: ExitStack, family: Family, kind: FrontendKind
) -> None:
    """The agent puts it back. Meanwhile its Service loses another one."""
    table, address, every = _FAMILIES[family]
    key = every if kind is FrontendKind.NODE_PORT else address
    a = BEFORE[0]
    moving = a.frontends[-1]
    frontend = moving._replace(kind=kind, address=key, port=30053)
    before, after = (msgspec.structs.replace(a, frontends=each) for each in ((frontend, moving), (frontend,)))
    agent = _Agent(pins, stack)
    agent.writer.apply([before], complete=True)
    assert agent.stale() == set()
    agent.connect(address, 30053, COOKIE)
    assert agent.maps[table].delete(pack_service_key(key, 30053, Protocol.UDP, Scope.INTERNAL))
    agent.writer.apply([after])
    assert agent.stale() == set()
    agent.writer.apply([a])
    assert agent.stale() == {COOKIE}


@pytest.mark.parametrize("tcp_ends", [StaleTcp.GONE, StaleTcp.UNREADY])
@pytest.mark.parametrize("has_moved", [False, True], ids=["deleted", "moved"])
@pytest.mark.parametrize("slots", [64, 128], ids=["same size", "other size"])
def test_sockets_of_a_service_that_was_deleted_while_no_agent_ran(
    pins: Path, stack: ExitStack, slots: int, has_moved: bool, tcp_ends: StaleTcp
) -> None:
    """Datagrams leave it, also if the search is an agent's that has found everything copied. TCP stays, unless it
    leaves whatever is not ready."""
    tcp = port("t", [3])
    agent = _Agent(pins, stack)
    agent.start(pins, stack, [BEFORE[0], BEFORE[1], tcp])
    agent.connect(MOVING, 53, COOKIE)
    ids = agent.writer.names().items()
    service = next(number for number, key in ids if key == tcp.key)
    number = next(n for n in agent.maps.backends().ids() if agent.backend(n) == tcp.cluster[0])
    record = origin(OWN, agent.backend(number).address, cookie=COOKIE + 1)
    assert agent.programs.restore([with_origin_ids(record, BackendUse(service, number), 7)]) == 1
    ended = {COOKIE} if tcp_ends is StaleTcp.GONE else {COOKIE, COOKIE + 1}
    for each in (slots, slots, 2 * slots):
        successor = _Agent(pins, stack, each)
        successor.start(pins, stack, [_udp("b", has=has_moved)])
        assert successor.stale(tcp_ends) == ended


@pytest.mark.parametrize("protocol", [Protocol.UDP, Protocol.TCP])
@pytest.mark.parametrize("slots", [64, 128], ids=["same size", "other size"])
def test_sockets_of_a_backend_that_was_removed_right_before_a_kill(
    pins: Path, stack: ExitStack, slots: int, protocol: Protocol
) -> None:
    """Nothing has searched for them."""
    made = _udp("a", has=True) if protocol is Protocol.UDP else port("a", [1])
    gone = msgspec.structs.replace(backend(7), protocol=protocol)
    agent = _Agent(pins, stack)
    agent.start(pins, stack, [msgspec.structs.replace(made, cluster=(*made.cluster, gone))])
    assert agent.stale() == set()
    number = next(n for n in agent.maps.backends().ids() if agent.backend(n) == gone)
    agent.connect(OWN, 80, COOKIE, number)
    agent.writer.apply([made])
    successor = _Agent(pins, stack, slots)
    successor.start(pins, stack, [made])
    assert successor.stale(StaleTcp.GONE) == {COOKIE}
