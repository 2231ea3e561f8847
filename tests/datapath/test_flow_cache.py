"""The flow cache: what fills a slot, what clears it, and where a flow's sequence numbers are meanwhile."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi.flow_layout import Flow, Nat, NatFlags, Seen, pack_flow, pack_nat, unpack_nat
from ebpfproxy.datapath.abi.hooks import PACKETS
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.schema import FLOW_FILTER_BITS
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs import bytecode, loader
from tests.datapath.altered import altered_sources
from tests.datapath.test_loading import OPTIONS
from tests.datapath.test_pressure import OnOtherCpu, ends
from tests.packets.flow_slots import FlowSlots
from tests.packets.wire import PASS, PreparedRun, run_program

pytestmark = pytest.mark.root

SERVICE, REMOVED_BACKEND = 1, 77
FRONTEND, BACKEND = bytes((192, 0, 2, 80)), bytes((10, 0, 0, 1))
ENDED = Seen.RST
#: The sequence numbers of both directions when a flow comes in.
CLIENT_SENT, BACKEND_SENT = 1000, 5000


def keys_of(number: int) -> tuple[bytes, bytes]:
    """The keys of a flow's original and reply direction."""
    client, port = struct.pack(">I", 0x64000000 + number), 1024 + number
    original = pack_flow(Flow(client, FRONTEND, port, 80, 6, egress=False))
    return original, pack_flow(Flow(BACKEND, client, 8080, port, 6, egress=True))


class Flows:
    """A client's TCP flows to one backend, each with its two entries, and programs for their packets."""

    def __init__(self, opened: MapSet) -> None:
        self.maps = opened
        self.slots = FlowSlots(opened)
        #: Flows whose next packet is to make their slot valid.
        self.admitted: set[bytes] = set()
        home = loader.ensure_loaded(opened, OPTIONS, (PACKETS,))
        self.fds = {name: bpf.get_pinned(home / name) for name in ("from_device", "to_device")}

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)

    def insert(self, number: int, *, admitted: bool = True) -> tuple[bytes, bytes]:
        """The keys of the original and the reply direction. ``admitted``: their next packets fill slots."""
        client, port = struct.pack(">I", 0x64000000 + number), 1024 + number
        now = time.monotonic_ns()
        original, reply = keys_of(number)
        common = (SERVICE, REMOVED_BACKEND)
        there = Nat(client, BACKEND, port, 8080, *common, NatFlags(0), Seen(0), now, now)
        back = Nat(FRONTEND, client, 80, port, *common, NatFlags.REPLY, Seen.REPLY, now, now)
        numbers = (CLIENT_SENT, BACKEND_SENT), (BACKEND_SENT, CLIENT_SENT)
        for key, nat, (end, acked) in zip((original, reply), (there, back), numbers, strict=True):
            self.maps["conntrack"].update(key, pack_nat(key, nat._replace(end=end, acked=acked)))
            if admitted:
                self.slots.admit(key)
                self.admitted.add(key)
        return original, reply

    def _frame(self, number: int, *, reply: bool, flags: str, seq: int, ack: int, size: int) -> bytes:
        client, port = f"100.0.{number >> 8}.{number & 255}", 1024 + number
        there = IP(src=client, dst="192.0.2.80") / TCP(sport=port, dport=80, flags=flags, seq=seq, ack=ack)
        back = IP(src="10.0.0.1", dst=client) / TCP(sport=8080, dport=port, flags=flags, seq=seq, ack=ack)
        return bytes(raw(Ether(dst="00:00:00:00:00:00") / (back if reply else there) / bytes(size)))

    def send(self, number: int, *, flags: str = "A", seq: int = CLIENT_SENT, ack: int = BACKEND_SENT) -> bool:
        """The client sends; says if that was translated."""
        frame = self._frame(number, reply=False, flags=flags, seq=seq, ack=ack, size=0)
        _, out = self._run("from_device", frame, keys_of(number)[0])
        return ends(out)[1] == BACKEND

    def reply(
        self, number: int, *, flags: str = "A", seq: int = BACKEND_SENT, ack: int = CLIENT_SENT, size: int = 0
    ) -> bool:
        """The backend sends; says if that was translated."""
        frame = self._frame(number, reply=True, flags=flags, seq=seq, ack=ack, size=size)
        verdict, out = self._run("to_device", frame, keys_of(number)[1])
        assert verdict == PASS
        return ends(out)[0] == FRONTEND

    def _run(self, program: str, frame: bytes, key: bytes) -> tuple[int, bytes]:
        """The first packet of a flow that is admitted is sent again where it came too late to make its slot valid."""
        for _ in range(20):
            verdict, out, _ = run_program(self.fds[program], frame, 1, 1)
            if key not in self.admitted or self.slots.value(key) is not None:
                break
            self.slots.admit(key)
        self.admitted.discard(key)
        return verdict, out

    def prepared_reply(self, number: int) -> PreparedRun:
        frame = self._frame(number, reply=True, flags="A", seq=BACKEND_SENT, ack=CLIENT_SENT, size=0)
        return PreparedRun(self.fds["to_device"], frame, 1, 1)

    def prepared_request(self, number: int) -> PreparedRun:
        frame = self._frame(number, reply=False, flags="A", seq=CLIENT_SENT, ack=BACKEND_SENT, size=0)
        return PreparedRun(self.fds["from_device"], frame, 1, 1)

    def entry(self, key: bytes) -> Nat | None:
        value = self.maps["conntrack"].lookup(key)
        return unpack_nat(value) if value else None

    def age(self, *keys: bytes) -> None:
        """Conntrack has noted the last packet two seconds ago."""
        before = time.monotonic_ns() - 2 * 10**9
        for key in keys:
            nat = self.entry(key)
            assert nat is not None
            self.maps["conntrack"].update(key, pack_nat(key, nat._replace(last=before)))

    def epoch(self, value: int) -> None:
        """Something has left the Service, if that is another value."""
        self.maps["epochs"].update(U32.pack(SERVICE), struct.pack("=Q", value))

    def rivals(self) -> tuple[int, int]:
        """Two flows whose reply directions have one slot."""
        seen: dict[int, int] = {}
        for number in range(1000):
            client = struct.pack(">I", 0x64000000 + number)
            key = pack_flow(Flow(BACKEND, client, 8080, 1024 + number, 6, egress=True))
            first = seen.setdefault(self.slots.place(key)[0], number)
            if first != number:
                return first, number
        raise AssertionError("there are fewer slots than flows")


@pytest.fixture(scope="module")
def opened(module_pins: Path) -> Iterator[MapSet]:
    few = dict.fromkeys(("services", "backends", "connected", "unconnected", "conntrack", "slots"), 1024)
    made = maps.open_or_create(module_pins, Capacity(**few))
    made["flow_filter"].update(U32.pack(0), b"\3" * (1 << FLOW_FILTER_BITS))
    made["address_filter"].update(U32.pack(0), b"\xff" * made["address_filter"].spec.value_size)
    yield made
    made.close()


@pytest.fixture(scope="module")
def loaded(opened: MapSet) -> Iterator[Flows]:
    made = Flows(opened)
    yield made
    made.close()


@pytest.fixture
def flows(loaded: Flows) -> Flows:
    """There are none, and nothing has left the Service."""
    loaded.maps["flow_tags"].update(U32.pack(0), bytes(loaded.maps["flow_tags"].spec.value_size))
    for key in list(loaded.maps["conntrack"].keys()):
        loaded.maps["conntrack"].delete(key)
    loaded.epoch(0)
    loaded.admitted.clear()
    return loaded


def test_packets_of_a_flow_that_has_lasted_are_translated_by_its_slot(flows: Flows) -> None:
    original, reply = flows.insert(1)
    assert flows.send(1)
    assert flows.reply(1)
    for key in (original, reply):
        entry, copy = flows.entry(key), flows.slots.nat(key)
        assert entry is not None
        assert copy is not None
        assert copy == entry._replace(last=copy.last)
        flows.slots.keep(key)
        # Nothing else has it now.
        flows.maps["conntrack"].delete(key)
    assert flows.send(1)
    assert flows.reply(1)


def test_slot_is_valid_some_time_after_it_was_filled(flows: Flows) -> None:
    """Until then conntrack has the sequence numbers."""
    _, reply = flows.insert(1)
    flows.admitted.clear()
    value = flows.maps["conntrack"].lookup(reply)
    assert value is not None
    flows.slots.fill(reply, value, time.monotonic_ns() + 10**9)
    assert flows.reply(1, size=100)
    assert flows.slots.nat(reply) is None
    flows.slots.fill(reply, value, time.monotonic_ns() - 10**8)
    assert flows.reply(1, size=100)
    copy = flows.slots.nat(reply)
    assert copy is not None
    assert copy.end == BACKEND_SENT + 100


def test_packets_fill_the_slot_of_a_flow_that_has_lasted(flows: Flows) -> None:
    _, reply = flows.insert(1)
    flows.slots.clear(reply)
    for _ in range(100):
        assert flows.reply(1)
        if flows.slots.nat(reply) is not None:
            break
        time.sleep(0.02)
    assert flows.slots.nat(reply) is not None


def test_slot_is_good_for_a_moment(flows: Flows) -> None:
    """What the agent has deleted ends with it."""
    original, reply = flows.insert(1)
    assert flows.send(1)
    assert flows.reply(1)
    for key in (original, reply):
        flows.slots.expire(key, 1)
        flows.maps["conntrack"].delete(key)
    assert not flows.send(1)
    assert not flows.reply(1)


def test_slot_of_a_group_whose_time_has_passed_is_not_used(flows: Flows) -> None:
    """What replaces an entry need not clear the tag then. A packet that finds the entry makes both good again."""
    for number, is_deleted in ((1, False), (2, True)):
        original, reply = flows.insert(number)
        assert flows.send(number)
        assert flows.reply(number)
        for key in (original, reply):
            flows.slots.keep(key)
            flows.slots.end_group(key)
            if is_deleted:
                flows.maps["conntrack"].delete(key)
        assert flows.send(number) is not is_deleted
        assert flows.reply(number) is not is_deleted
        for key in (original, reply):
            assert (flows.slots.group_seconds(key) > 0) is not is_deleted


def test_group_counts_as_used_for_longer_than_its_slots(flows: Flows) -> None:
    """A slot may be renewed until half a second after it was filled or renewed."""
    _, reply = flows.insert(1)
    flows.admitted.clear()
    flows.slots.clear(reply)
    flows.slots.end_group(reply)
    for wanted in ("filled", "valid"):
        for _ in range(100):
            assert flows.reply(1)
            if flows.slots.group_seconds(reply) > 0 and (
                wanted == "filled" or flows.slots.nat(reply) is not None
            ):
                break
            time.sleep(0.02)
        assert 0.5 < flows.slots.group_seconds(reply) < 1.1
        if wanted == "filled":
            flows.slots.end_group(reply)


@pytest.mark.parametrize("ahead", [-3600, 10**6, 3 * 10**6, -3 * 10**6])
def test_time_of_a_group_that_passed_long_ago_is_set_anew(flows: Flows, ahead: int) -> None:
    """It has 32 bits, for 52 days: weeks later it may look like one to come."""
    _, reply = flows.insert(1)
    assert flows.reply(1)
    for _ in range(20):
        flows.slots.set_group(reply, ahead * 10**9)
        flows.slots.admit(reply, keeps_group=True)
        assert flows.reply(1)
        # On a busy machine it comes too late.
        if flows.slots.nat(reply) is not None:
            break
    assert flows.slots.nat(reply) is not None
    assert 0.5 < flows.slots.group_seconds(reply) < 1.1


def test_flow_that_begins_has_no_slot(flows: Flows) -> None:
    original, reply = flows.insert(1, admitted=False)
    assert flows.send(1)
    assert flows.reply(1)
    assert flows.slots.nat(original) is flows.slots.nat(reply) is None


def test_flow_with_few_packets_leaves_its_slot(flows: Flows) -> None:
    _, reply = flows.insert(1)
    assert flows.reply(1)
    flows.slots.keep(reply)
    assert flows.reply(1, seq=BACKEND_SENT, size=100)
    flows.slots.expire(reply, 2)
    assert flows.reply(1, seq=BACKEND_SENT)
    entry = flows.entry(reply)
    assert flows.slots.nat(reply) is None
    assert entry is not None
    assert entry.end == BACKEND_SENT + 100


def test_slot_in_use_is_renewed(flows: Flows) -> None:
    _, reply = flows.insert(1)
    for _ in range(100):
        flows.slots.admit(reply)
        assert flows.reply(1)
        # The next packet has to come soon after each of these steps, which it does not on a busy machine.
        if flows.slots.nat(reply) is None:
            continue
        flows.slots.expire(reply, 0.05)
        expired = flows.slots.nat(reply)
        assert expired is not None
        assert flows.reply(1)
        renewed = flows.slots.nat(reply)
        if renewed is not None and renewed.last > expired.last:
            break
    else:
        raise AssertionError("it is not renewed")


def test_slot_that_another_flow_uses_is_left_to_it(flows: Flows) -> None:
    first, second = flows.rivals()
    (_, one), (_, other) = flows.insert(first), flows.insert(second, admitted=False)
    assert flows.reply(first)
    flows.slots.keep(one)
    flows.slots.make_last(other)
    assert flows.reply(second)
    assert flows.slots.nat(one) is not None
    assert flows.reply(first)


def test_idle_flow_loses_its_slot_but_no_sequence_numbers(flows: Flows) -> None:
    first, second = flows.rivals()
    (_, one), (_, other) = flows.insert(first), flows.insert(second, admitted=False)
    assert flows.reply(first)
    flows.slots.keep(one)
    assert flows.reply(first, size=100)
    before = flows.entry(one)
    flows.slots.expire(one, 2)
    flows.slots.make_last(other)
    assert flows.reply(second)
    assert flows.slots.nat(one) is None
    after = flows.entry(one)
    assert before is not None
    assert after is not None
    assert (before.end, after.end) == (BACKEND_SENT, BACKEND_SENT + 100)
    # A flow has not got the other's numbers.
    assert flows.reply(first, flags="R", seq=BACKEND_SENT + 100)
    ended = flows.entry(one)
    assert ended is not None
    assert ended.seen & ENDED


@pytest.mark.parametrize("is_due", [False, True])
@pytest.mark.parametrize("from_backend", [True, False])
@pytest.mark.parametrize(("off", "ends_it"), [(0, True), (-100, False), (1, False)])
def test_rst_is_compared_with_the_numbers_in_slots(
    flows: Flows, from_backend: bool, off: int, ends_it: bool, is_due: bool
) -> None:
    """Both directions have sent 100 bytes since the flow came in, and have acknowledged them.

    ``is_due``: the RST is the packet that does what is done once a second.
    """
    original, reply = flows.insert(1)
    assert flows.send(1)
    assert flows.reply(1)
    flows.slots.keep(original)
    flows.slots.keep(reply)
    assert flows.reply(1, size=100)
    assert flows.send(1, seq=CLIENT_SENT + 100, ack=BACKEND_SENT + 100)
    assert flows.reply(1, seq=BACKEND_SENT + 100, ack=CLIENT_SENT + 100)
    entry, copy = flows.entry(reply), flows.slots.nat(reply)
    assert entry is not None
    assert copy is not None
    assert (entry.end, entry.acked) == (BACKEND_SENT, CLIENT_SENT)
    assert (copy.end, copy.acked) == (BACKEND_SENT + 100, CLIENT_SENT + 100)
    if is_due:
        flows.age(original, reply)
    if from_backend:
        assert flows.reply(1, flags="R", seq=BACKEND_SENT + 100 + off)
    else:
        assert flows.send(1, flags="R", seq=CLIENT_SENT + 100 + off)
    for key in (original, reply):
        entry = flows.entry(key)
        assert entry is not None
        assert bool(entry.seen & ENDED) is ends_it
    entry = flows.entry(reply)
    assert entry is not None
    assert (entry.end, entry.acked) == (BACKEND_SENT + 100, CLIENT_SENT + 100)


@pytest.mark.parametrize(("flags", "seq"), [("FA", BACKEND_SENT), ("SA", 900_000_000)])
def test_syn_and_fin_end_the_copy(flows: Flows, flags: str, seq: int) -> None:
    """What they change in conntrack counts from then on."""
    _, reply = flows.insert(1)
    assert flows.reply(1)
    flows.slots.keep(reply)
    assert flows.reply(1, flags=flags, seq=seq)
    assert flows.slots.nat(reply) is None
    entry = flows.entry(reply)
    assert entry is not None
    assert entry.end == seq + 1
    assert bool(entry.seen & Seen.REPLY_FIN) is (flags == "FA")


def test_flow_whose_backend_has_left_ends_at_once(flows: Flows) -> None:
    """The slots of both directions are cleared with the entries."""
    original, reply = flows.insert(1)
    assert flows.send(1)
    assert flows.reply(1)
    flows.slots.keep(original)
    flows.slots.keep(reply)
    flows.epoch(1)
    assert not flows.send(1)
    assert flows.entry(original) is flows.entry(reply) is None
    assert flows.slots.nat(original) is flows.slots.nat(reply) is None
    assert not flows.reply(1)


def test_slot_of_an_entry_that_was_replaced_is_not_used_again(flows: Flows) -> None:
    """It comes from a CPU that was late; the next look-up finds that the flow has another entry."""
    _, reply = flows.insert(1)
    assert flows.reply(1)
    former = flows.slots.value(reply)
    assert former is not None
    time.sleep(0.001)
    flows.insert(1)
    flows.slots.store(
        reply, former[:64] + struct.pack("=II", 9, 9) + former[72:], time.monotonic_ns() - 10**9
    )
    assert flows.reply(1)
    entry, copy = flows.entry(reply), flows.slots.nat(reply)
    assert entry is not None
    assert entry.end == BACKEND_SENT
    assert copy is None or copy.created == entry.created


@pytest.fixture
def racing(flows: Flows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flows]:
    """Each packet makes the slot valid anew, and the other CPU has more time to delete the entry meanwhile."""
    sources = altered_sources(tmp_path)
    monkeypatch.setattr(loader, "source_folder", lambda: sources)
    # In an emulator clang takes minutes.
    monkeypatch.setattr(bytecode, "_SECONDS", 800)
    made = Flows(flows.maps)
    yield made
    made.close()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_slot_filled_on_one_cpu_while_another_deletes_the_entry_is_cleared(
    racing: Flows, cpus: tuple[int, int]
) -> None:
    """One CPU has replies of a flow; the other one finds that its backend has left, and ends it."""
    replies, request = racing.prepared_reply(1), racing.prepared_request(1)
    filled = 0
    with OnOtherCpu(cpus[1], lambda: ignore(replies())):
        for _ in range(300):
            racing.epoch(0)
            original, reply = racing.insert(1)
            filled += any(racing.slots.nat(reply) for _ in range(100))
            racing.epoch(1)
            request()
            assert racing.entry(original) is racing.entry(reply) is None
            # What was begun before is over after two more runs there.
            assert all(_is_cleared(racing.slots, reply) for _ in range(3))
    assert filled


def ignore(_: object) -> None:
    pass


def _is_cleared(slots: FlowSlots, key: bytes) -> bool:
    return any(slots.nat(key) is None for _ in range(1000))
