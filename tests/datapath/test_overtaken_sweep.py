"""Flows that begin again on another CPU while a sweep ends them; each time at the same moment (``altered``)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from pathlib import Path

import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import flow_layout
from ebpfproxy.datapath.abi.flow_layout import Entry, Flow, Nat, NatFlags, Seen
from ebpfproxy.datapath.kernel import maps
from ebpfproxy.datapath.programs import bytecode, loader
from ebpfproxy.services.model import Protocol
from tests.datapath.altered import OVERTAKEN_SWEEP, altered_sources
from tests.datapath.test_conntrack import BACKEND, CLIENT, NODE, Bench

pytestmark = pytest.mark.root

#: The client's port tells what happens to a flow.
EVENTS = {
    1: "a packet",
    2: "a packet of the other direction",
    3: "another element",
    4: "another element of the other direction",
    5: "another entry",
    6: "another entry of the other direction",
}
#: Nothing happens to a flow of this port.
PORT = 1000


@pytest.fixture
def bench(pins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    sources = altered_sources(tmp_path, OVERTAKEN_SWEEP)
    monkeypatch.setattr(loader, "source_folder", lambda: sources)
    # In an emulator clang takes minutes.
    monkeypatch.setattr(bytecode, "_SECONDS", 800)
    opened = maps.open_or_create(pins, Capacity(conntrack=8192))
    made = Bench(opened)
    yield made
    made.sweeper.close()
    # It refers to the arrays' memory.
    del made.sweeper
    opened.close()


def entries(bench: Bench) -> list[Entry]:
    """Those that programs find."""
    found = starmap(Entry, bench.maps["conntrack"].items())
    return [each for each in found if each.key == flow_layout.pack_flow(each.flow)]


@pytest.mark.parametrize("port", EVENTS, ids=EVENTS.values())
def test_flow_that_begins_again_keeps_its_entries(bench: Bench, port: int) -> None:
    """Nor is its port claimed for ever, so that it ends later."""
    for each in (port, PORT):
        bench.pair(each, protocol=Protocol.UDP, idle=31)
    assert bench.sweeper.sweep().expired == 2
    left = entries(bench)
    assert len(left) == 2
    assert {each.flow.source_port for each in left} == {port, 8080}
    assert not any(each.seen & Seen.CLAIMED for each in left)


def masquerade(bench: Bench, port: int, idle: float) -> None:
    last = bench.now - int(idle * 1e9)
    out = Nat(NODE, BACKEND, 9000 + port, 8080, 1, 1, NatFlags.SOURCE, Seen(0), last, last)
    bench.add(Flow(CLIENT, BACKEND, port, 8080, Protocol.UDP, True), out)
    flags = NatFlags.SOURCE | NatFlags.REPLY
    back = Nat(BACKEND, CLIENT, 8080, port, 1, 1, flags, Seen(0), last, last)
    bench.add(Flow(BACKEND, NODE, 8080, 9000 + port, Protocol.UDP, False), back)


def put_aside(bench: Bench, entry: Entry) -> None:
    """The altered program finds it there (``pad`` of the key)."""
    bench.maps["conntrack"].update(entry.key[:-2] + b"\1\0", entry.value)


@pytest.mark.parametrize(
    "has_masquerade", [False, True], ids=["without its masquerade", "with its masquerade"]
)
def test_flow_that_begins_again_while_its_masquerade_ends(bench: Bench, *, has_masquerade: bool) -> None:
    """Without one the backend would see the client: it ends, and begins anew with its next packet."""
    ports = range(PORT, PORT + 8)
    for port in ports:
        bench.pair(port, protocol=Protocol.UDP)
        masquerade(bench, port, 0)
    for each in entries(bench):
        is_masquerade = bool(each.flags & NatFlags.SOURCE)
        # The reply direction of the masquerade is of no importance here.
        if not is_masquerade or (has_masquerade and not each.flags & NatFlags.REPLY):
            put_aside(bench, each)
        if not is_masquerade:
            bench.maps["conntrack"].delete(each.key)
    for port in ports:
        # Some still have the Service's pair, which ends with the masquerade.
        if port % 2:
            bench.pair(port, protocol=Protocol.UDP, idle=31)
        masquerade(bench, port, 31)
    bench.sweeper.sweep()
    left = entries(bench)
    assert len(left) == (3 * len(ports) if has_masquerade else 0)
