"""New backends and slots of a service port: written where no program looks yet, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ebpfproxy.config.datapath import MAGLEV_SIZES
from ebpfproxy.datapath.abi.arrays import Range, backend_ids
from ebpfproxy.datapath.services import plan
from ebpfproxy.datapath.services.backends import Backends
from ebpfproxy.datapath.services.ids import IdsExhaustedError
from ebpfproxy.datapath.services.plan import BackendSets, Published
from ebpfproxy.datapath.services.ranges import RangesExhaustedError
from ebpfproxy.datapath.services.selection_table import NO_SLOTS, SelectionTable
from ebpfproxy.services.model import Algorithm, Backend, ServicePort

ExhaustedError = IdsExhaustedError, RangesExhaustedError


def no_room(error: Exception) -> str:
    """The text for one of ``ExhaustedError``."""
    what = "slots" if isinstance(error, RangesExhaustedError) else "backends or the service"
    return f"no room for its {what}: {error}"


class Placed(NamedTuple):
    """The backends and slots of a service port. ``before`` and ``after`` are ranges of slots by policy."""

    ids: BackendSets
    before: tuple[Range, Range]
    after: list[Range]
    #: The backends in the slots as they are.
    selected: set[int]
    made_from: tuple[int | None, int | None]


class Placer:
    """Takes ids of backends and ranges of slots."""

    def __init__(self, selections: SelectionTable, backends: Backends, maglev_size: int) -> None:
        self._selections = selections
        self._backends = backends
        self.maglev_size = maglev_size

    def smaller_sizes(self, port: ServicePort) -> Iterator[int]:
        """Sizes to try: a Maglev table that is smaller than it should be is better than none."""
        if port.algorithm is Algorithm.MAGLEV:
            for size in reversed(MAGLEV_SIZES):
                if len(port.cluster) <= size < self.maglev_size and self._selections.fits(size):
                    yield size

    def place(
        self, port: ServicePort, known: Published, maglev_size: int, new_id: Callable[[], int]
    ) -> Placed:
        """Places a service port. Raises one of ``ExhaustedError``, as ``new_id`` may; then nothing has
        changed.

        A service port without an id gets a new one last, so that one that does not fit leaves nothing behind.
        """
        before = self._selections.ranges(known.id) if known.id >= 0 else (NO_SLOTS, NO_SLOTS)
        current = [self._selections.slots(each) for each in before]
        after = list(before)
        try:
            sets = plan.selected_sets(port)
            ids = self._ids_of(port, sets)
            sources = plan.slot_sources(port, sets, ids.selected, maglev_size)
            made_from = sources[0].fingerprint, sources[1].fingerprint
            for policy, source in enumerate(sources):
                if made_from[policy] is None or made_from[policy] != known.made_from[policy]:
                    words = self._selections.make(source)
                    if words != current[policy]:
                        after[policy] = self._selections.place(words)
            if known.id < 0:
                known.id = new_id()
        except ExhaustedError:
            for old, new in zip(before, after, strict=True):
                if new != old:
                    self._selections.release(new)
            self._backends.drop_fresh()
            raise
        self._backends.keep_fresh()
        selected = {number for words in current if words for number in backend_ids(words)}
        return Placed(ids, before, after, selected, made_from if any(made_from) else plan.NOTHING_MADE)

    def _ids_of(self, port: ServicePort, sets: Sequence[Sequence[Backend]]) -> BackendSets:
        """The ids of all backends of a service port. Raises IdsExhaustedError."""
        ids_of, set_of = self._backends.ids_of, self._backends.set_of
        return BackendSets(
            selected=(ids_of(sets[0]), ids_of(sets[1])),
            draining=set_of((*port.draining, *plan.unused(port, sets))),
            terminating=set_of(port.terminating),
            idle=set_of(port.idle),
            drained=set_of(port.drained),
        )
