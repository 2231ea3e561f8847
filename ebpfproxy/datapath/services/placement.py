"""New backends and slots of a service port: written where no program looks yet, or not at all."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ebpfproxy.config.datapath import MAGLEV_SIZES
from ebpfproxy.datapath.abi.arrays import Range, backend_ids
from ebpfproxy.datapath.services import plan
from ebpfproxy.datapath.services.backends import Backends
from ebpfproxy.datapath.services.ids import IdsExhaustedError
from ebpfproxy.datapath.services.plan import NO_IDS, BackendSets, Published
from ebpfproxy.datapath.services.ranges import RangesExhaustedError
from ebpfproxy.datapath.services.selection_table import NO_SLOTS, SelectionTable
from ebpfproxy.services.model import Algorithm, Backend, ServicePort

ExhaustedError = IdsExhaustedError, RangesExhaustedError
#: What a new service port has had before. Nobody changes it.
_NO_WORDS = array("Q")
_NOTHING, _NO_RANGES = (_NO_WORDS, _NO_WORDS), (NO_SLOTS, NO_SLOTS)


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
        before, current = _NO_RANGES, _NOTHING
        if known.id >= 0:
            before = self._selections.ranges(known.id)
            current = self._selections.slots(before[0]), self._selections.slots(before[1])
        after = list(before)
        made_from: list[int | None] = [None, None]
        try:
            sets = plan.selected_sets(port)
            ids = self._ids_of(port, sets)
            for policy, numbers in enumerate(ids.selected):
                words = numbers
                if (source := plan.slot_source(port, sets[policy], numbers, maglev_size)) is not None:
                    made_from[policy] = source.fingerprint
                    if made_from[policy] is not None and made_from[policy] == known.made_from[policy]:
                        continue
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
        kept = (made_from[0], made_from[1]) if any(made_from) else plan.NOTHING_MADE
        return Placed(ids, before, after, selected, kept)

    def _ids_of(self, port: ServicePort, sets: Sequence[Sequence[Backend]]) -> BackendSets:
        """The ids of all backends of a service port. Raises IdsExhaustedError."""
        ids_of, set_of = self._backends.ids_of, self._backends.set_of
        selected = ids_of(sets[0]), ids_of(sets[1]) if sets[1] else _NO_WORDS
        if not (port.draining or port.terminating or port.idle or port.drained):
            return BackendSets(selected, NO_IDS, NO_IDS, NO_IDS, NO_IDS)
        return BackendSets(
            selected=selected,
            draining=set_of((*port.draining, *plan.unused(port, sets))),
            terminating=set_of(port.terminating),
            idle=set_of(port.idle),
            drained=set_of(port.drained),
        )
