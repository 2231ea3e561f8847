"""What pins tell of dispatchers of libxdp. Dispatchers themselves: tests/field/test_xdp_chain.py."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import XDP_ATTACH
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.programs import xdp_chain
from ebpfproxy.datapath.programs.attach import LINKS
from ebpfproxy.datapath.programs.xdp_places import Place, is_attached, place_of, xdp_attachments

#: r0 = XDP_PASS; return.
PASS_ALL = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of bpffs in place of the machine's own."""
    folder = BPFFS / f"epl{os.getpid()}x-chain"
    (folder / "xdp").mkdir(parents=True)
    monkeypatch.setenv("LIBXDP_BPFFS", str(folder))
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def pin(name: str, *paths: Path) -> int:
    """Pins a new program; returns its id."""
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, name, PASS_ALL)
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        bpf.pin(program, path)
    number = int(bpf.prog_info(program).id)
    os.close(program)
    return number


@pytest.mark.root
def test_programs_of_a_dispatcher_are_in_the_order_of_their_run(root: Path) -> None:
    folder, own = root / "xdp/dispatch-7-12", root / LINKS / "xdp-7-native-chained"
    assert xdp_chain.members(7, 12) is None
    last = pin("last", folder / "prog10-prog")
    first = pin("first", folder / "prog0-prog", folder / "prog0-link")
    ours = pin(xdp_chain.NAME, folder / "prog2-prog", own)
    pin("other", root / "xdp/dispatch-70-12/prog0-prog", root / "xdp/dispatch-7-x/prog0-prog")
    assert xdp_chain.members(7, 12) == [first, ours, last]
    (found,) = xdp_attachments(root)
    assert (found.place, found.program_id) == (Place(7, found.place.mode, is_chained=True), ours)
    assert found.earlier == [first]
    assert found.state == "native, in libxdp's dispatcher with first, last"
    assert is_attached(found.state)
    (folder / "prog2-prog").unlink()
    assert xdp_attachments(root) == []


def test_pins_are_named_after_the_place() -> None:
    for name in ("xdp-7-native", "xdp-12-generic-chained"):
        place = place_of(Path(name))
        assert place is not None
        assert place.pin == name
    assert place_of(Path("connect4")) is None
    assert place_of(Path("xdp-7-native-chained-new")) == place_of(Path("xdp-7-native-chained"))
    assert not is_attached("no native XDP: Invalid argument")


def test_nothing_is_changed_without_libxdp(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    xdp_chain._library.cache_clear()
    try:
        assert xdp_chain.obstacle() == "libxdp.so.1 is not installed, which could chain ours"
        with pytest.raises(xdp_chain.ChainError, match="not installed"):
            xdp_chain.leave(7, 1, is_native=True)
    finally:
        xdp_chain._library.cache_clear()
