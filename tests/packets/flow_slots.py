"""The slots of the flow cache: where a flow's is, what it has, and slots that are good for as long as a test takes."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable

from ebpfproxy.datapath.abi.flow_layout import FLOW, Nat, unpack_nat, with_check
from ebpfproxy.datapath.abi.schema import FLOW_GROUPS
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.maps import MapSet

_MASK64 = (1 << 64) - 1
_FACTORS = (
    *(0x1B873593, 0x2C1B3C6D, 0x297A2D39, 0x3C6EF363, 0x5BD1E995),
    *(0x64E6D7B3, 0x6B43A9B5, 0x7FEB352D, 0x52DCE729, 0x38495AB5, 0x2545F491, 0x1D872B41, 0x45D9F3B1),
)
LAST_AT, CREATED_AT, NUMBERS_AT = 48, 56, 64
_SECOND = 10**9
#: So long ago a slot was filled that a packet makes valid; a quarter of a second ago is too long.
_WAIT = _SECOND // 40
_HOUR = 3600 * _SECOND


def _sum(*parts: bytes) -> int:
    words = struct.unpack("=" + "Q" * (sum(map(len, parts)) // 8), b"".join(parts))
    return sum(int(word) * factor for word, factor in zip(words, _FACTORS, strict=False)) & _MASK64


def _slot_sum(key: bytes, value: bytes) -> int:
    """Of all words but the sequence numbers and the check."""
    return _sum(key, value[:NUMBERS_AT])


def _group_at(key: bytes) -> int:
    """Where the time of a flow's group is: its ports tell."""
    ports: int = struct.unpack_from("=I", key, 32)[0]
    return (ports * 0x9E3779B1 & 0xFFFFFFFF) * FLOW_GROUPS >> 32 << 2


def _tag_at(number: int) -> int:
    """Where the tag of a slot is, behind the times of groups."""
    return 4 * FLOW_GROUPS + 2 * number


def changed(value: bytes, **fields: int) -> bytes:
    """An entry's value with other times: ``last``, ``created``. Its check is not computed anew."""
    made = bytearray(value)
    for name, time_ns in fields.items():
        struct.pack_into("=Q", made, {"last": LAST_AT, "created": CREATED_AT}[name], time_ns)
    return bytes(made)


class FlowSlots:
    """The flow cache of a set of maps."""

    def __init__(self, maps: MapSet) -> None:
        self._conntrack, self._tags = maps["conntrack"], maps["flow_tags"]
        # Where it is mapped, a window at a time, nothing can be stored.
        self._slots = Map(maps["flow_cache"].fd, maps["flow_cache"].spec)

    def place(self, key: bytes) -> tuple[int, int]:
        """The number of a flow's slot, and its tag."""
        found = _sum(key)
        found = (found ^ found >> 32) * 0xD6E8FEB86659FD93 & _MASK64
        return found >> 43 & (self._slots.spec.max_entries - 1), found >> 27 & 0xFFFF | 1

    def value(self, key: bytes) -> bytes | None:
        """What a flow's slot has of its entry, as an entry's value; ``last`` is the time until which it is good."""
        number, tag = self.place(key)
        slot = self._slots.lookup(struct.pack("=I", number))
        tags = self._tags.lookup(struct.pack("=I", 0))
        assert slot is not None
        assert tags is not None
        flow, value, found = slot[: FLOW.size], slot[FLOW.size : -8], struct.unpack("=Q", slot[-8:])[0]
        is_there = struct.unpack_from("=H", tags, _tag_at(number))[0] == tag and flow == key
        return value if is_there and found == _slot_sum(key, value) else None

    def sum(self, key: bytes) -> int:
        """That of the flow's slot."""
        value = self.value(key)
        assert value is not None
        return _slot_sum(key, value)

    def nat(self, key: bytes) -> Nat | None:
        value = self.value(key)
        return unpack_nat(value) if value else None

    def store(self, key: bytes, value: bytes, until: int | None = None) -> None:
        """Puts a flow into its slot; it is good for an hour, or until another time."""
        number, tag = self.place(key)
        value = changed(value, last=until or time.monotonic_ns() + _HOUR)
        slot = key + value + struct.pack("=Q", _slot_sum(key, value))
        self._slots.update(struct.pack("=I", number), slot)
        self._set_tag(number, tag)
        self.keep_group(key)

    def _set_tag(self, number: int, tag: int) -> None:
        tags = bytearray(self._tags.lookup(struct.pack("=I", 0)) or b"")
        struct.pack_into("=H", tags, _tag_at(number), tag)
        self._tags.update(struct.pack("=I", 0), bytes(tags))

    def keep_group(self, key: bytes) -> None:
        """The flow's group counts as having a slot that is good, for ten minutes."""
        self.set_group(key, _HOUR // 6)

    def end_group(self, key: bytes) -> None:
        """No slot of the flow's group counts as good."""
        self.set_group(key, -_SECOND)

    def set_group(self, key: bytes, ahead: int) -> None:
        """A slot of the flow's group counts as good for so many nanoseconds."""
        tags = bytearray(self._tags.lookup(struct.pack("=I", 0)) or b"")
        struct.pack_into("=I", tags, _group_at(key), time.monotonic_ns() + ahead >> 20 & 0xFFFFFFFF)
        self._tags.update(struct.pack("=I", 0), bytes(tags))

    def group_seconds(self, key: bytes) -> float:
        """For how long a slot of the flow's group counts as good."""
        tags = self._tags.lookup(struct.pack("=I", 0)) or b""
        until: int = struct.unpack_from("=I", tags, _group_at(key))[0]
        ahead = until - (time.monotonic_ns() >> 20) & 0xFFFFFFFF
        # The nearer of the times that it may be, of which one is to come.
        return (ahead - (ahead >> 31 << 32)) * (1 << 20) / _SECOND

    def clear(self, key: bytes) -> None:
        """Takes a flow out of its slot."""
        number, _ = self.place(key)
        self._slots.update(struct.pack("=I", number), bytes(self._slots.spec.value_size))
        self._set_tag(number, 0)

    def keep(self, key: bytes) -> None:
        """What is in the flow's slot is good for an hour."""
        value = self.value(key)
        assert value is not None
        self.store(key, value)

    def expire(self, key: bytes, ago: float) -> None:
        """It was good until so many seconds ago."""
        value = self.value(key)
        assert value is not None
        self.store(key, value, time.monotonic_ns() - int(ago * _SECOND))

    def make_last(self, key: bytes) -> bytes:
        """The flow has lasted, and seems to have many packets; returns the entry's value."""
        value = self._conntrack.lookup(key)
        assert value is not None
        now = time.monotonic_ns()
        lasted = with_check(key, changed(value, created=now - 10 * _SECOND, last=now + _HOUR))
        self._conntrack.update(key, lasted)
        return lasted

    def admit(self, key: bytes, *, keeps_group: bool = False) -> None:
        """The flow's next packet makes its slot valid: one before has filled that a while ago."""
        self.fill(key, self.make_last(key), time.monotonic_ns() - _WAIT, keeps_group=keeps_group)

    def admit_by(self, keys: Iterable[bytes], send: Callable[[], object]) -> None:
        """Sends packets of these flows that make their slots valid; again, where they came too late for that."""
        keys = [*keys]
        for _ in range(20):
            for key in keys:
                self.admit(key)
            send()
            if None not in map(self.value, keys):
                return
        raise AssertionError("packets make no slot valid, or take too long")

    def fill(self, key: bytes, value: bytes, filled: int, *, keeps_group: bool = False) -> None:
        """The slot has the entry since then, but is not valid."""
        number, tag = self.place(key)
        self._slots.update(struct.pack("=I", number), key + changed(value, last=filled) + bytes(8))
        self._set_tag(number, tag)
        if not keeps_group:
            self.keep_group(key)


class FlowHops:
    """Where XDP sends flows that are in their slots."""

    def __init__(self, maps: MapSet, slots: FlowSlots) -> None:
        self._slots, self._hops = slots, Map(maps["flow_hops"].fd, maps["flow_hops"].spec)

    def keep(self, key: bytes, seconds: float = 3600) -> None:
        """What is known of a flow, in both maps, is good for an hour; or has not been for so many seconds."""
        at, before = struct.pack("=I", self._slots.place(key)[0]), self._slots.sum(key)
        hop = self._hops.lookup(at)
        assert hop is not None
        assert struct.unpack_from("=Q", hop)[0] == before + _sum(hop[8:48]) & _MASK64
        self._slots.keep(key)
        rest = struct.pack("=Q", time.monotonic_ns() + int(seconds * _SECOND)) + hop[16:48]
        self._hops.update(
            at, struct.pack("=Q", self._slots.sum(key) + _sum(rest) & _MASK64) + rest + hop[48:]
        )
