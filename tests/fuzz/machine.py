"""Tracker and writer as one machine on real maps, against the naive implementation of the rules.

Objects come, change and go, endpoints are drained, lists are repeated, connections begin and end; agents are restarted,
and killed in the middle of a change. After every few steps the tracker agrees with the rules, and the maps hold what the
rules say and nothing else.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
from hypothesis import HealthCheck, Phase, given, settings

import ebpfproxy.datapath
from ebpfproxy.config.datapath import BPFFS, Capacity
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.roots import ensure_bpffs
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.kube.objects import (
    RECORD_TYPES,
    Deleted,
    EndpointSlice,
    Node,
    Object,
    ObjectKey,
    Resource,
    Service,
)
from ebpfproxy.services.model import Backend, Policy, ServicePort
from ebpfproxy.services.tracker import Update
from tests.datapath.writing import Bench, KilledError, check_selection, expected_states, uses_local
from tests.recordings import RecordTracker, changed, replaced
from tests.services import naive, test_rules
from tests.services.test_cases import NODE

#: Ids are few, so that they are used again soon, and enough for all Services of ``test_rules``.
CAPACITY = Capacity(
    services=40,
    backends=64,
    connected=16,
    unconnected=16,
    slots=32768,
    conntrack=1024,
    affinity=64,
    source_ranges=64,
)
#: Maps whose writes kill an agent.
_KILLED_AT = ("service_names", "members", "services4", "services6")
#: What an agent does when it is killed, and within how many of its lines that happens, as a power of 2. Between two
#: lines is every store to an array that is mapped into memory: backends, slots, selections.
_KILLED_WITHIN = {"change": 11, "reclaim": 8, "restart": 14}
_WRITERS = str(Path(ebpfproxy.datapath.__file__).parent)
_KINDS: dict[Resource, type[Object]] = {
    Resource.SERVICES: Service,
    Resource.ENDPOINTSLICES: EndpointSlice,
    Resource.NODES: Node,
}
_REQUESTS = (("10.244.0.1", 0), ("10.244.0.2", 8080), ("fd00:244::1", 8081), ("10.244.0.9", 0))


class Known(NamedTuple):
    resource: Resource
    key: ObjectKey
    record: Object


def population(count: int) -> list[Known]:
    """Objects as ``test_rules`` makes them, always the same."""
    found: list[Known] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(test_rules.objects)
    def collect(drawn: tuple[Resource, dict[str, Any]]) -> None:
        resource, each = drawn
        key = ObjectKey(each["metadata"].get("namespace", ""), each["metadata"]["name"])
        found.append(Known(resource, key, msgspec.convert(each, RECORD_TYPES[resource])))

    collect()
    return found


class Machine:
    """``steps`` counts what was done, by name, and ``killed_in`` where agents were killed, by file."""

    def __init__(self, bench: Bench, objects: list[Known], seed: int) -> None:
        self._bench = bench
        self._objects = objects
        self._chance = random.Random(seed)
        self._writer: Writer = bench.empty(CAPACITY)
        self._tracker = RecordTracker(NODE)
        self._stored: dict[tuple[Resource, ObjectKey], Object] = {}
        self._drained: frozenset[naive.DrainRequest] = frozenset()
        self._opened: dict[int, tuple[Backend, bool]] = {}
        self.steps: Counter[str] = Counter()
        self.killed_in: Counter[str] = Counter()

    def run(self, steps: int, *, check_every: int = 8) -> None:
        for number in range(1, steps + 1):
            self._step()
            if number % check_every == 0:
                self.check()
        self.check()

    def _step(self) -> None:
        names = (
            "set",
            "delete",
            "drain",
            "relist",
            "reclaim",
            "open",
            "close",
            "restart",
            "kill",
            "kill_anywhere",
        )
        (name,) = self._chance.choices(names, (50, 12, 4, 3, 8, 6, 6, 2, 1, 2))
        self.steps[name] += 1
        getattr(self, f"_{name}")()

    # -- what happens in the cluster

    def _set(self) -> None:
        resource, key, record = self._chance.choice(self._objects)
        self._stored[resource, key] = record
        self._tracker.apply(changed(resource, record))
        self._program()

    def _delete(self) -> None:
        resource, key, _ = self._chance.choice(self._objects)
        self._stored.pop((resource, key), None)
        self._tracker.apply(Deleted(resource, key))
        self._program()

    def _drain(self) -> None:
        self._drained = frozenset(self._chance.sample(_REQUESTS, self._chance.randrange(3)))
        self._tell_drained()
        self._program()

    def _tell_drained(self) -> None:
        self._tracker.set_drained(frozenset((ip_address(a).packed, port) for a, port in self._drained))

    def _relist(self) -> None:
        self._list(self._chance.choice(list(_KINDS)))
        self._program()

    def _list(self, resource: Resource) -> None:
        listed = [each for (kind, _), each in self._stored.items() if kind is resource]
        self._chance.shuffle(listed)
        self._tracker.apply(replaced(resource, listed))

    # -- what happens on the node

    def _program(self) -> None:
        update = self._tracker.drain()
        assert self._writer.apply(update.changed, update.removed) == []

    def _reclaim(self) -> None:
        self._writer.reclaim(self._writer.take_retired())

    def _restart(self) -> None:
        """A new agent lists everything, in any order, and takes over what is in the maps."""
        self._tracker = RecordTracker(NODE)
        for resource in self._chance.sample(list(_KINDS), len(_KINDS)):
            self._list(resource)
        self._tell_drained()
        self._writer = self._bench.reopen()
        self._tracker.drain()
        assert self._writer.apply(self._tracker.service_ports(), complete=True) == []

    def _kill(self) -> None:
        """The agent is killed when it writes to a map, if this change does."""
        update = self._changed()
        assert self._bench.maps is not None
        table = self._bench.maps[self._chance.choice(_KILLED_AT)]
        with patch.object(table, "update_many", side_effect=KilledError):
            try:
                self._writer.apply(update.changed, update.removed)
            except KilledError:
                self.steps["killed"] += 1
        self._restart()

    def _changed(self) -> Update:
        resource, key, record = self._chance.choice(self._objects)
        self._stored[resource, key] = record
        self._tracker.apply(changed(resource, record))
        return self._tracker.drain()

    def _kill_anywhere(self) -> None:
        """A process of its own is killed at any line of those that write maps."""
        what, within = self._chance.choice(list(_KILLED_WITHIN.items()))
        update = self._changed()
        work: Callable[[], object] = self._restart
        if what == "change":
            work = partial(self._writer.apply, update.changed, update.removed)
        elif what == "reclaim":
            self._writer.apply(update.changed, update.removed)
            work = self._reclaim
        file = killed_at(int(2 ** self._chance.uniform(0, within)), work)
        if file:
            self.steps["killed"] += 1
            self.killed_in[file] += 1
        self._restart()

    def _open(self) -> None:
        """Programs select backends by slots. Few connections are open, so that ids suffice."""
        if len(self._opened) >= 6:
            return
        ids = {
            number
            for service in self._bench.service_ids.values()
            for policy in Policy
            for number, _ in self._bench.slots(service, policy)
        }
        unused = sorted(ids - self._opened.keys())
        if unused:
            number = self._chance.choice(unused)
            is_flow = self._chance.random() < 0.5
            self._opened[number] = self._bench.records[number][0], is_flow
            self._bench.count_open(number, 1, flow=is_flow)

    def _close(self) -> None:
        if self._opened:
            number = self._chance.choice(sorted(self._opened))
            _, is_flow = self._opened.pop(number)
            self._bench.count_open(number, -1, flow=is_flow)

    # -- what must hold

    def check(self) -> None:
        objects = list(self._stored.values())
        test_rules.agree(self._tracker, objects, requests=self._drained)
        assert self._bench.drift() == [], "the maps hold what the writer has written"
        expected = self._table(objects)
        assert dict(self._rows()) == {
            row: used if isinstance(used, frozenset) else frozenset() for row, used in expected.rows.items()
        }
        self._check_backends(list(self._tracker.service_ports()))

    def _table(self, objects: list[Object]) -> naive.Table:
        plain = {
            resource: [msgspec.to_builtins(each) for each in objects if isinstance(each, kind)]
            for resource, kind in _KINDS.items()
        }
        return naive.table(
            plain[Resource.SERVICES],
            plain[Resource.ENDPOINTSLICES],
            plain[Resource.NODES],
            NODE,
            self._drained,
        )

    def _rows(self) -> Iterator[tuple[naive.Row, frozenset[str]]]:
        assert self._bench.maps is not None
        for row in Dump(self._bench.maps).frontends():
            key = f"{row.namespace}/{row.name}", row.port_name, row.type, row.scope, row.frontend
            yield key, frozenset(each.address for each in row.backends)

    def _check_backends(self, ports: list[ServicePort]) -> None:
        records, ids_of = self._bench.records, self._bench.service_ids
        assert ids_of.keys() == {port.key for port in ports}
        states = expected_states(ports)
        assert set(states.items()) <= set(records.values()), "each backend has its state"
        for port in ports:
            for policy in Policy:
                slots = self._bench.slots(ids_of[port.key], policy)
                ids = {records[number][0]: number for number, _ in slots}
                check_selection(port, policy, slots, ids)
                wanted = port.cluster if policy is Policy.CLUSTER else port.local if uses_local(port) else ()
                assert ids.keys() == set(wanted)
        for number, (backend, _) in self._opened.items():
            assert records[number][0] == backend, "what connections use keeps its id"


def killed_at(line: int, work: Callable[[], object]) -> str:
    """Does it in a child, which ends without any cleaning up at the so manieth line of modules that write maps.

    Returns the name of the module; empty where there were fewer lines.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        left = line

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            file = frame.f_code.co_filename
            if not file.startswith(_WRITERS):
                return None
            left -= event == "line"
            if left <= 0:
                os.write(writer, Path(file).name.encode())
                os._exit(0)
            return trace

        try:
            sys.settrace(trace)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    file = os.read(reader, 256).decode()
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the change failed before it was killed"
    return file


@contextmanager
def bench() -> Iterator[Bench]:
    """Maps in a pin folder of this process."""
    ensure_bpffs(BPFFS)
    folder = BPFFS / f"test-machine-{os.getpid()}"
    folder.mkdir()
    made = Bench(folder)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


def run(bench: Bench, steps: int, seed: int, objects: list[Known]) -> Machine:
    """Runs a machine; raises AssertionError where something does not hold."""
    machine = Machine(bench, objects, seed)
    machine.run(steps)
    return machine
