"""Lets readers see a change: the order in which its parts are written, and the reasons for it.

Before a change is published, its new backends and slots are written where no program looks yet. Then:

1. *Names*: a start that finds an id also finds its service port, even after a kill in the middle.
2. *Members*: session affinity keeps a client with members only, so a backend is one before it can be chosen.
3. *Returns*: a backend that has come back is no longer removed before it can be chosen, or what begins with
   it would be ended with what had to leave it.
4. *Selections*: one word for all frontends of a service port and a policy. A reader sees the old set or the
   new one, never a mixture; everything that the word leads to is in place.
5. *Members that go*: nothing chooses these backends any more.
6. *Removals*: flows are told to leave a backend. Not earlier, or they could choose the same once more. Then
   *states* of backends: a start that finds one takes the removal that it came with for done.
7. *Source ranges*, then *frontends*: a frontend is found only when its selection and its ranges are there. A
   frontend that moves to another Service is overwritten, and never missing.
8. *Frontends that go*, then their source ranges: a client that still finds one is checked.
9. *Service ports that go*: step 6 for their backends, then their names, without which a start would not
   repeat that.

What was replaced is retired by the writer: ids and ranges are used again after a grace period, when no
program can still hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from itertools import islice
from typing import NamedTuple

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.flows.removed_backends import RemovedBackends
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned
from ebpfproxy.datapath.services.backends import Backends
from ebpfproxy.datapath.services.frontend_table import Frontends
from ebpfproxy.datapath.services.plan import NO_MEMBERS, Change, Member, Published
from ebpfproxy.datapath.services.selection_table import SelectionTable
from ebpfproxy.services.model import ServicePortKey

_PRESENT = U32.pack(1)
#: How many names are packed at a time, since all of a first list take megabytes.
_NAMES = 1024


class Tables(NamedTuple):
    """The modules that each write a part of what is published."""

    selections: SelectionTable
    backends: Backends
    frontends: Frontends
    removed: RemovedBackends


class Publisher:
    """Publishes changes of service ports, as nothing else does. One thread uses it."""

    def __init__(self, maps: MapSet, tables: Tables) -> None:
        self._names, self._members, self._sources = (
            maps[name] for name in ("service_names", "members", "source_ranges")
        )
        self._selections, self._backends, self._frontends, self._removed_backends = tables
        #: Names that the kernel had no memory for, by service id: they are written with the next change.
        self._unnamed: dict[int, ServicePortKey] = {}
        #: True once a map has got room since this was last set to False.
        self.has_freed = False

    def publish(self, change: Change) -> None:
        """Lets readers see a change, each step after what it refers to. ``change`` gets what is refused."""
        self.publish_sets(change)
        self._open(change)
        self._close(change)

    def publish_sets(self, change: Change) -> None:
        """Steps 1 to 6, which say what there is to choose from. They are taken out of ``change``."""
        self._write_names(change)
        self._write_members(change)
        for each in change.removals:
            self._removed_backends.withdraw(each.service_id, each.back)
        self._selections.select(change.selections)
        self.has_freed |= bool(change.excluded)
        for member in change.excluded:
            self._members.delete(_packed(member))
        change.names, change.members, change.selections, change.excluded = {}, [], {}, []
        self.settle(change)

    def settle(self, change: Change) -> None:
        """Steps 6 and 9."""
        for each in change.removals:
            self._removed_backends.withdraw(each.service_id, each.back)
            self._removed_backends.note(each.service_id, each.removed)
        change.removals = []
        self._backends.settle()
        for service_id in change.deleted:
            self._forget_name(service_id)
        change.deleted = []

    def _write_names(self, change: Change) -> None:
        """Step 1."""
        names = iter(change.names.items())
        while some := dict(islice(names, _NAMES)):
            packed = {U32.pack(number): layout.pack_name(name) for number, name in some.items()}
            for key in self._names.update_many(packed):
                # There are as many places as ids: the kernel had no memory.
                self.has_freed = True
                number = U32.unpack(key)[0]
                self._unnamed[number] = some[number]
                change.refused.append((number, "no memory for its name"))

    def unnamed(self, service_id: int) -> ServicePortKey | None:
        """Takes the name that is still to be written: the next change has to bring it."""
        return self._unnamed.pop(service_id, None)

    def _write_members(self, change: Change) -> None:
        """Step 2."""
        for key in self._members.update_many(dict.fromkeys(map(_packed, change.members), _PRESENT)):
            selection, backend_id = layout.unpack_member(key)
            service_id, policy = divmod(selection, layout.POLICIES)
            _, known = change.placed[service_id]
            members = list(known.members)
            members[policy] -= {backend_id}
            known.members = (members[0], members[1])
            change.refused.append((service_id, "no room in members"))

    def _open(self, change: Change) -> None:
        """Step 7."""
        packed = {layout.pack_source_range(*each): _PRESENT for each in change.sources}
        for key in self._sources.update_many(packed):
            service_id, prefix = layout.unpack_source_range(key)
            _, known = change.placed[service_id]
            known.sources -= {prefix}
            change.refused.append((service_id, "no room in source_ranges"))
        for frontend, problem in self._frontends.write(change.entries).items():
            change.refused.append((change.entries[frontend].id, problem))

    def _close(self, change: Change) -> None:
        """Step 8."""
        self.has_freed |= bool(change.withdrawn or change.closed)
        for service_id, key in change.withdrawn:
            self._frontends.withdraw(service_id, key)
        for service_id, prefix in change.closed:
            self._sources.delete(layout.pack_source_range(service_id, prefix))

    def _forget_name(self, service_id: int) -> None:
        """Deletes a name: nothing that readers find has the id any more."""
        self._names.delete(U32.pack(service_id))
        self._unnamed.pop(service_id, None)

    def drop_members(self, of: Iterable[Member]) -> None:
        """Deletes members that a killed agent left behind."""
        for member in of:
            self._members.delete(_packed(member))

    def drop_sources(self, of: Set[int]) -> None:
        """Deletes the source ranges of these ids, which no service port has."""
        if of:
            found = [key for key, _ in self._sources.items() if layout.unpack_source_range(key)[0] in of]
            for key in found:
                self._sources.delete(key)

    def owned(
        self,
        names: Callable[[], list[tuple[ServicePortKey, int]]],
        published: Mapping[ServicePortKey, Published],
    ) -> list[Owned]:
        """The maps that nothing else writes, with what they should hold.

        ``names``: the service ports that have ids. ``published``: what is known of each, as it is later, too.
        """

        def named() -> Iterable[tuple[bytes, bytes]]:
            unnamed = frozenset(self._unnamed)
            return (
                (U32.pack(number), layout.pack_name(name))
                for name, number in names()
                if number not in unnamed
            )

        def members() -> Iterable[tuple[bytes, bytes]]:
            found = [(each.id, each.members) for each in published.values() if each.members != NO_MEMBERS]
            return (
                (layout.pack_member(number * layout.POLICIES + policy, backend_id), _PRESENT)
                for number, both in found
                for policy, backend_ids in enumerate(both)
                for backend_id in backend_ids
            )

        def sources() -> Iterable[tuple[bytes, bytes]]:
            found = [(each.id, each.sources) for each in published.values() if each.sources]
            return (
                (layout.pack_source_range(number, prefix), _PRESENT)
                for number, prefixes in found
                for prefix in prefixes
            )

        return [Owned(self._names, named), Owned(self._members, members), Owned(self._sources, sources)]


def _packed(member: Member) -> bytes:
    return layout.pack_member(member.service_id * layout.POLICIES + member.policy, member.backend_id)
