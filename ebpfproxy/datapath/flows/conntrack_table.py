"""The conntrack map: whom an entry belongs to, how long it lives, and the sweep that ends the others.

Programs make entries and note what they see of a flow (``bpf/lib/conntrack.h``); they never look for old
ones. A sweep reads the whole map in batches and deletes the pairs of entries that have outlived what their
state allows. An entry whose other half is still in use stays.
"""

from __future__ import annotations

import math
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import msgspec

from ebpfproxy.datapath.abi.flow_layout import (
    Departure,
    Flow,
    Nat,
    NatFlags,
    Seen,
    partner_key,
    unpack_flow,
    unpack_nat,
)
from ebpfproxy.datapath.abi.layout import LOAD_BEGUN, LOAD_CORRECTED, LOAD_ENDED, LOAD_WORDS, unpack_address
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.flows.removed_backends import Departed
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import Map, MapSet
from ebpfproxy.services.model import Family, Protocol, format_endpoint

_NS = 1_000_000_000
#: RFC 3828. It uses UDP's Services.
UDPLITE = 136
_STREAM_SECONDS = 1.0
_BOTH_FIN = Seen.FIN | Seen.REPLY_FIN
_PROTOCOL_NAMES = {**{p.value: p.name for p in Protocol}, UDPLITE: "UDPLITE"}
#: Entries a system call. Small: a batch in Python holds up the reconciler's thread.
_BATCH = 1024
#: Looked at once more, then deleted: well under a millisecond from one to the other.
_DELETED_AT_ONCE = 64
#: Offsets in ``struct flow`` and ``struct nat``.
_PROTOCOL = 36
_IDS_AT = 36
_BACKEND_AT = 40
_FLAGS_AT = 44
_SEEN_AT = 45
_LAST = struct.Struct("=Q")
_ID = struct.Struct("=I")
_LAST_AT = 48
_CREATED_AT = 56


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds without a packet after which a flow ends. Names as kube-proxy's conntrack settings."""

    #: Both sides have spoken and none has closed.
    tcp_established: float = 86400.0
    #: One side has closed.
    tcp_close_wait: float = 3600.0
    #: No answer yet.
    tcp_unreplied: float = 60.0
    #: Both sides have closed: late packets still find their way.
    tcp_closed: float = 30.0
    udp: float = 30.0
    #: Both sides have spoken, and not only in the first moment.
    udp_stream: float = 120.0
    sctp: float = 300.0

    def of(self, protocol: int, seen: int, lasted: float = math.inf) -> float:
        """How long a flow in this state may be silent; ``lasted``: seconds from its first to its last packet.

        One question and its answer are no stream: with as many as a resolver gets there would soon be no port
        left. As netfilter since Linux 5.0 (nf_conntrack_proto_udp.c), with one second for its two, because
        entries have the time of the last packet to the second.
        """
        if protocol == Protocol.TCP:
            both = Seen.FIN | Seen.REPLY_FIN
            if seen & Seen.RST or seen & both == both:
                return self.tcp_closed
            if seen & both:
                return self.tcp_close_wait
            return self.tcp_established if seen & Seen.REPLY else self.tcp_unreplied
        if protocol in (Protocol.UDP, UDPLITE):
            return self.udp_stream if seen & Seen.REPLY and lasted >= _STREAM_SECONDS else self.udp
        return self.sctp


class Sweep(msgspec.Struct, frozen=True):
    """What one sweep found. ``evicted`` since the one before: inserted, but neither there nor deleted.

    ``departed``: flows among the expired that were ended because their backend had gone.
    """

    entries: int
    expired: int
    evicted: int
    seconds: float
    departed: Mapping[Family, int] = {}


class Sweeper:
    """Ends flows that are over. One thread uses it."""

    def __init__(
        self,
        maps: MapSet,
        timeouts: Timeouts,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """``clock`` is CLOCK_MONOTONIC in ns; ``rest`` is called between batches."""
        self._map = maps["conntrack"]
        self._loads = maps.shared("loads").bytes.cast("I")
        #: Backends whose flows were seen by the sweep before.
        self._busy: set[int] = set()
        self._events = maps["packet_events"]
        self._clock = clock
        self._rest = rest
        self._timeouts = timeouts
        #: For most entries the shorter time alone is looked at.
        self._limits: dict[tuple[int, int], int] = {
            (protocol, seen): int(min(timeouts.of(protocol, seen), timeouts.of(protocol, seen, 0)) * _NS)
            for protocol in _PROTOCOL_NAMES
            for seen in range(16)
        }
        self._deleted = 0
        #: Inserted less deleted less present, when this sweeper began.
        self._missing: int | None = None

    def sweep(self, departures: Mapping[bytes, Departed] | None = None, backends: int = 0) -> Sweep:
        """Deletes what is over now, and the flows of backends that have departed.

        What changes meanwhile may be counted twice or not at all. ``backends``: one more than the highest id
        in use. What is open to each is counted, and its ``loads`` put right.
        """
        began = time.monotonic()
        self._departures = {key: departed.why for key, departed in (departures or {}).items()}
        entries = 0
        old: dict[bytes, bytes] = {}
        self._departed: dict[bytes, bytes] = {}
        self._open: Counter[int] = Counter()
        before = {number: self._begun_and_ended(number) for number in self._busy}
        for keys, values, count in self._batches():
            entries += count
            self._collect(keys, values, count, old)
            self._rest()
        over, deleted = self._delete(self._over(old) | self._departed)
        self._deleted += deleted
        for value in over:
            if is_open_question(value[_FLAGS_AT], value[_SEEN_AT]):
                self._open[_backend_of(value, 0)] -= 1
        self._correct_loads(before)
        evicted = self._evicted(entries - deleted)
        if evicted:
            self._busy.update(_not_zero(self._loads, backends))
        seconds = time.monotonic() - began
        return Sweep(entries - deleted, deleted, evicted, seconds, self._departed_flows())

    def _batches(self) -> Iterator[tuple[memoryview, memoryview, int]]:
        spec = self._map.spec
        return bpf.map_lookup_batches(self._map.fd, spec.key_size, spec.value_size, _BATCH)

    def _collect(self, keys: memoryview, values: memoryview, count: int, old: dict[bytes, bytes]) -> None:
        """Adds the entries that have been silent for too long."""
        now, limits = self._clock(), self._limits
        key_size, value_size = self._map.spec.key_size, self._map.spec.value_size
        last_of = _LAST.unpack_from
        departures = self._departures
        for i in range(count):
            at, key_at = i * value_size, i * key_size
            if is_open_question(values[at + _FLAGS_AT], values[at + _SEEN_AT]):
                self._open[_backend_of(values, at)] += 1
            why = departures.get(bytes(values[at + _IDS_AT : at + _IDS_AT + 8])) if departures else None
            # A connection of one that is only not ready goes on.
            if why is Departure.GONE or (why and keys[key_at + _PROTOCOL] != Protocol.TCP):
                self._departed[bytes(keys[key_at : key_at + key_size])] = bytes(values[at : at + value_size])
                continue
            limit = limits.get((keys[key_at + _PROTOCOL], values[at + _SEEN_AT]), 0)
            if now - last_of(values, at + _LAST_AT)[0] > limit:
                key, value = bytes(keys[key_at : key_at + key_size]), bytes(values[at : at + value_size])
                if self._is_silent(key, value, value[_SEEN_AT], now):
                    old[key] = value

    def _is_silent(self, key: bytes, value: bytes, seen: int, now: int) -> bool:
        """``seen``: what both halves have."""
        (last,), (created,) = _LAST.unpack_from(value, _LAST_AT), _LAST.unpack_from(value, _CREATED_AT)
        if key[_PROTOCOL] not in _PROTOCOL_NAMES:
            return True
        return bool((now - last) / _NS > self._timeouts.of(key[_PROTOCOL], seen, (last - created) / _NS))

    def _over(self, old: dict[bytes, bytes]) -> dict[bytes, bytes]:
        """Those whose other half is silent, too, or gone; and that half, if only this one saw the end."""
        over = {}
        now = self._clock()
        for key, value in old.items():
            partner = partner_key(key, value)
            other = self._map.lookup(partner) if partner not in old else None
            if other is not None and partner_key(partner, other) == key:
                if not self._is_silent(partner, other, other[_SEEN_AT] | value[_SEEN_AT], now):
                    continue
                over[partner] = other
            over[key] = value
        for key in [each for each, value in over.items() if value[_FLAGS_AT] & NatFlags.SOURCE]:
            self._keep_masquerade(key, over)
        return over

    def _keep_masquerade(self, key: bytes, over: dict[bytes, bytes]) -> None:
        """A masquerade stays as long as its flow: without it the backend would see the client."""
        value = over.get(key)
        if value is None or value[_FLAGS_AT] & NatFlags.REPLY:
            return
        answers = _swapped(key)
        if answers not in over and self._map.lookup(answers) is not None:
            del over[key]
            over.pop(partner_key(key, value), None)

    def _delete(self, over: Mapping[bytes, bytes]) -> tuple[list[bytes], int]:
        """Deletes those that are still as they were found; their values, and how many were there.

        Reading a large map takes long enough for a port to be used again: such an entry is another flow's, or
        goes on. Both halves go together, and masquerades after the flows that they belong to: a packet in
        between begins anew, and does not meet one half.
        """
        gone: list[bytes] = []
        deleted = 0
        doomed: list[bytes] = []
        for pair in _pairs(over):
            if all(self._is_as_found(key, over[key]) for key in pair):
                doomed += pair
                gone += (over[key] for key in pair)
            if len(doomed) >= _DELETED_AT_ONCE:
                deleted += self._map.delete_many(doomed)
                doomed = []
                self._rest()
        return gone, deleted + self._map.delete_many(doomed)

    def _is_as_found(self, key: bytes, found: bytes) -> bool:
        """The same flow, and silent since, unless its backend has departed."""
        now = self._map.lookup(key)
        if now is None:
            return True
        if now[_CREATED_AT : _CREATED_AT + 8] != found[_CREATED_AT : _CREATED_AT + 8]:
            return False
        if key in self._departed:
            return now[_IDS_AT : _IDS_AT + 8] == found[_IDS_AT : _IDS_AT + 8]
        return now[_LAST_AT : _LAST_AT + 8] == found[_LAST_AT : _LAST_AT + 8]

    def _departed_flows(self) -> Mapping[Family, int]:
        """Of the two or four entries of a flow one is its question."""
        return Counter(
            Family.IPV4 if len(unpack_address(key[:16])) == 4 else Family.IPV6
            for key, value in self._departed.items()
            if not value[_FLAGS_AT] & (NatFlags.REPLY | NatFlags.SOURCE)
        )

    def _begun_and_ended(self, number: int) -> tuple[int, int]:
        at = number * LOAD_WORDS
        return self._loads[at + LOAD_BEGUN], self._loads[at + LOAD_ENDED]

    def _correct_loads(self, before: dict[int, tuple[int, int]]) -> None:
        """Flows that ended without a packet, or were pushed out, are no load any more.

        What began or ended during the sweep may or may not be among the open ones: only a count that
        cannot be right is changed, to the nearest that can. A backend that had no flows at the sweep before
        has its turn at the next one.
        """
        self._busy = set(self._open)
        for number, (begun_before, ended_before) in before.items():
            begun, ended = self._begun_and_ended(number)
            seen = self._open[number]
            at = number * LOAD_WORDS + LOAD_CORRECTED
            known = (begun - ended + self._loads[at] + 0x80000000 & 0xFFFFFFFF) - 0x80000000
            right = min(max(known, seen - (ended - ended_before)), seen + (begun - begun_before))
            if right != known:
                self._loads[at] = self._loads[at] + right - known & 0xFFFFFFFF
            if right:
                self._busy.add(number)

    def _evicted(self, present: int) -> int:
        """How many have vanished from the LRU map since the last time."""
        events = counters(self._events)
        made, ended = events[PacketEvent.FLOWS_MADE], events[PacketEvent.FLOWS_ENDED]
        missing = made - ended - self._deleted - present
        if self._missing is None:
            self._missing = missing
        evicted = max(0, missing - self._missing)
        self._missing = max(missing, self._missing)
        return evicted


def _swapped(key: bytes) -> bytes:
    """A flow's answers, where they leave, by its masquerade's question, and the other way round."""
    return key[16:32] + key[:16] + key[34:36] + key[32:34] + key[36:37] + b"\1\0\0"


def _pairs(entries: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, ...]]:
    """Keys, both halves together if both are there; those of masquerades last."""
    for masquerades in (False, True):
        done: set[bytes] = set()
        for key, value in entries.items():
            if bool(value[_FLAGS_AT] & NatFlags.SOURCE) is not masquerades or key in done:
                continue
            partner = partner_key(key, value)
            if partner in entries and partner != key:
                done.add(partner)
                yield key, partner
            else:
                yield (key,)


def _not_zero(loads: memoryview, backends: int) -> Iterator[int]:
    """The ids below ``backends`` that have counted flows."""
    for number in range(backends):
        if loads[number * LOAD_WORDS + LOAD_BEGUN]:
            yield number


def is_open_question(flags: int, seen: int) -> bool:
    """Whether an entry stands for a flow that is a load: one of the pair, and not of a masquerade's."""
    if flags & (NatFlags.REPLY | NatFlags.SOURCE) or seen & Seen.RST:
        return False
    return seen & _BOTH_FIN != _BOTH_FIN


def _backend_of(values: memoryview | bytes, at: int) -> int:
    (number,) = _ID.unpack_from(values, at + _BACKEND_AT)
    return int(number)


def counters(events: Map) -> dict[PacketEvent, int]:
    """Every reason with its count, of all CPUs since the map was made."""
    found = dict.fromkeys(PacketEvent, 0)
    for number, (count,) in events.nonzero_counters():
        found[PacketEvent(number)] = count
    return found


# -- what is there


class FlowRow(msgspec.Struct, frozen=True):
    """A flow: both halves of a pair, or all four of a masqueraded one. Times in seconds.

    The JSON of ``ebpfproxy conntrack list``: these names stay.

    ``masquerade`` is the address and port that the backend sees, empty where it is the client's own.
    """

    protocol: str
    state: str
    client: str
    frontend: str
    backend: str
    masquerade: str
    service: str
    idle: float
    age: float
    expires: float


def state_of(protocol: int, seen: int) -> str:
    """In netfilter's words."""
    if protocol == Protocol.TCP:
        if seen & Seen.RST:
            return "CLOSE"
        both = seen & (Seen.FIN | Seen.REPLY_FIN)
        if both:
            return "TIME_WAIT" if both == Seen.FIN | Seen.REPLY_FIN else "CLOSE_WAIT"
        return "ESTABLISHED" if seen & Seen.REPLY else "SYN_SENT"
    return "REPLIED" if seen & Seen.REPLY else "UNREPLIED"


class Entry(msgspec.Struct, frozen=True):
    """One entry, decoded, with its packed key."""

    key: bytes
    flow: Flow
    nat: Nat


def decode(key: bytes, value: bytes) -> Entry:
    return Entry(key, unpack_flow(key), unpack_nat(value))


def flows_of(
    entries: list[tuple[bytes, bytes]], timeouts: Timeouts, now: int, names: Mapping[int, str]
) -> list[tuple[FlowRow, tuple[bytes, ...]]]:
    """Pairs put together, each with the keys of its entries.

    ``now`` is CLOCK_MONOTONIC in ns, ``names`` are of Services by id.
    """
    packed = dict(entries)
    found = []
    for key, value in entries:
        entry = decode(key, value)
        nat, flow = entry.nat, entry.flow
        if nat.flags & (NatFlags.REPLY | NatFlags.SOURCE):
            continue
        keys = [key]
        last = nat.last
        seen = nat.seen
        partner = partner_key(key, value)
        if partner in packed:
            keys.append(partner)
            other = unpack_nat(packed[partner])
            last, seen = max(last, other.last), seen | other.seen
        masquerade = ""
        if nat.flags & NatFlags.HOST:
            masquerade = format_endpoint(nat.source, nat.source_port)
        else:
            # From client to backend, where the packet leaves.
            between = _swapped(partner)
            if between in packed:
                source = unpack_nat(packed[between])
                if source.flags & NatFlags.SOURCE:
                    keys.append(between)
                    masquerade = format_endpoint(source.source, source.source_port)
                    answers = partner_key(between, packed[between])
                    if answers in packed:
                        keys.append(answers)
        limit = timeouts.of(flow.protocol, seen, (last - nat.created) / _NS)
        idle = max(0.0, (now - last) / _NS)
        row = FlowRow(
            protocol=_PROTOCOL_NAMES[flow.protocol],
            client=format_endpoint(flow.source, flow.source_port),
            frontend=format_endpoint(flow.destination, flow.destination_port),
            backend=format_endpoint(nat.destination, nat.destination_port),
            masquerade=masquerade,
            state=state_of(flow.protocol, seen),
            service=names.get(nat.service_id, "?"),
            idle=round(idle, 3),
            age=round(max(0.0, (now - nat.created) / _NS), 3),
            expires=round(max(0.0, limit - idle), 3),
        )
        found.append((row, tuple(keys)))
    return found
