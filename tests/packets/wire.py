"""Runs a pinned program on a packet by BPF_PROG_TEST_RUN, in a node's network namespace.

scapy makes the packets, and the checksums that results are compared with: nothing here shares code with the
programs under test.
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from scapy.compat import raw
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6, _ICMPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import ProgRunOpts
from tests.lab import LabNode

R = TypeVar("R")

PASS, DROP, REDIRECT = -1, 2, 7
XDP_PASS, XDP_TX, XDP_REDIRECT = 2, 3, 4
_ROOM = 1024
_CLONE_NEWNET = 0x40000000
_libc = ct.CDLL(None, use_errno=True)
_libbpf = ct.CDLL("libbpf.so.1", use_errno=True)


class Result(NamedTuple):
    verdict: int
    bytes: bytes

    @property
    def packet(self) -> Any:
        return Ether(self.bytes)


class PreparedRun:
    """A run that can be repeated with nothing else to do: ``ifindex`` is valid in this thread's namespace."""

    def __init__(
        self,
        program: int,
        data: bytes,
        ifindex: int,
        ingress_ifindex: int = 0,
        repeat: int = 1,
        *,
        is_xdp: bool = False,
        gso_size: int = 0,
    ) -> None:
        self._program = program
        if is_xdp:
            self._context = ct.create_string_buffer(24)  # struct xdp_md
            struct.pack_into("=IIII", self._context, 0, 0, len(data), 0, ifindex)
        else:
            self._context = ct.create_string_buffer(192)  # struct __sk_buff
            struct.pack_into("=II", self._context, 36, ingress_ifindex, ifindex)
            struct.pack_into("=I", self._context, 176, gso_size)
        self._out = ct.create_string_buffer(len(data) + _ROOM)
        self._source = ct.create_string_buffer(data, len(data))
        self._options = ProgRunOpts(
            sz=ct.sizeof(ProgRunOpts),
            data_in=ct.addressof(self._source),
            data_out=ct.addressof(self._out),
            data_size_in=len(data),
            ctx_in=ct.addressof(self._context),
            ctx_size_in=len(self._context),
            repeat=repeat,
        )

    def __call__(self) -> int:
        """Runs the program once more, on the same packet; returns the verdict."""
        options = self._options
        options.data_size_out = len(self._out)
        if _libbpf.bpf_prog_test_run_opts(self._program, ct.byref(options)) < 0:
            raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))
        return ct.c_int32(options.retval).value

    def change(self, at: int, data: bytes) -> None:
        """Changes bytes of the packet that goes in."""
        ct.memmove(ct.addressof(self._source) + at, data, len(data))

    @property
    def packet(self) -> bytes:
        """What the last run has made of it."""
        return self._out.raw[: self._options.data_size_out]

    @property
    def nanoseconds(self) -> int:
        """The average time of one of ``repeat``."""
        return int(self._options.duration)


def run_xdp(program: int, data: bytes, ifindex: int) -> tuple[int, bytes]:
    """Returns verdict and frame. The device has an XDP program, which registers its queues."""
    run = PreparedRun(program, data, ifindex, is_xdp=True)
    return run(), run.packet


def run_program(
    program: int, data: bytes, ifindex: int, ingress_ifindex: int = 0, repeat: int = 1, gso_size: int = 0
) -> tuple[int, bytes, int]:
    """Returns verdict, packet, and nanoseconds per run. ``ifindex`` is valid in this thread's namespace."""
    run = PreparedRun(program, data, ifindex, ingress_ifindex, repeat, gso_size=gso_size)
    verdict = run()
    return verdict, run.packet, run.nanoseconds


class Wire:
    """Runs a node's programs on packets; ``devices`` has the ifindex and MAC address of each."""

    def __init__(self, node: LabNode) -> None:
        self.node = node
        self._netns = node.netns
        self.programs = next((node.bpf_root / "ebpfproxy").glob("v*/progs-*"))
        self._thread = ThreadPoolExecutor(1, initializer=self.enter)
        self._fds: dict[str, int] = {}
        self.devices = {
            line.split(": ")[1].split("@")[0]: (int(line.split(": ")[0]), line.split("link/ether ")[1][:17])
            for line in node.run(["ip", "-o", "link"]).splitlines()
            if "link/ether" in line
        }

    def enter(self) -> None:
        """Takes the calling thread into the node's network namespace, where prepared runs have to be."""
        fd = os.open(f"/run/netns/{self._netns}", os.O_RDONLY)
        assert _libc.setns(fd, _CLONE_NEWNET) == 0
        os.close(fd)

    def close(self) -> None:
        self._thread.shutdown()
        for fd in self._fds.values():
            os.close(fd)

    def _program(self, name: str) -> int:
        if name not in self._fds:
            self._fds[name] = bpf.get_pinned(Path(self.programs, name))
        return self._fds[name]

    def mac(self, device: str) -> str:
        return self.devices[device][1]

    def send_bytes(
        self, program: str, device: str, data: bytes, *, iif: str = "", gso_size: int = 0
    ) -> Result:
        """``iif``: the ingress device of a forwarded packet; empty for one of a process of the host.

        With ``gso_size`` it is one that the kernel has merged of several with so many bytes each.
        """
        ifindex = self.devices[device][0]
        ingress = self.devices[iif][0] if iif else 0
        fd = self._program(program)
        verdict, out, _ = self._thread.submit(run_program, fd, data, ifindex, ingress, 1, gso_size).result()
        return Result(verdict, out)

    def send(self, program: str, device: str, packet: Packet, *, iif: str = "") -> Result:
        if not packet.haslayer(Ether):
            packet = Ether(dst=self.mac(device), src="02:00:00:00:00:99") / packet
        return self.send_bytes(program, device, raw(packet), iif=iif)

    def prepared(self, program: str, device: str, packet: Packet, *, iif: str = "") -> PreparedRun:
        """A run for a thread that has entered the namespace."""
        data = raw(Ether(dst=self.mac(device), src="02:00:00:00:00:99") / packet)
        ingress = self.devices[iif][0] if iif else 0
        return PreparedRun(self._program(program), data, self.devices[device][0], ingress)

    def within(self, function: Callable[[], R]) -> R:
        """Calls a function in the node's network namespace."""
        return self._thread.submit(function).result()

    def ingress(self, packet: Packet, device: str = "eth0") -> Result:
        return self.send("from_device", device, packet)

    def egress(self, packet: Packet, device: str = "eth0", *, iif: str = "") -> Result:
        return self.send("to_device", device, packet, iif=iif)

    def xdp(self, packet: Packet, device: str = "eth0") -> Result:
        """Runs the XDP program. A packet without a link layer is addressed to the device."""
        if not packet.haslayer(Ether):
            packet = Ether(dst=self.mac(device), src="02:00:00:00:00:99") / packet
        ifindex, program = self.devices[device][0], self._program("forward")
        return Result(*self._thread.submit(run_xdp, program, raw(packet), ifindex).result())

    def nanoseconds(self, program: str, device: str, packet: Packet, repeat: int) -> int:
        """The average time of one run."""
        data = raw(Ether(dst=self.mac(device), src="02:00:00:00:00:99") / packet)
        fd = self._program(program)
        ifindex = self.devices[device][0]
        found: int = self._thread.submit(run_program, fd, data, ifindex, ifindex, repeat).result()[2]
        return found


_CHECKED = (
    (IP, "chksum"),
    (TCP, "chksum"),
    (UDP, "chksum"),
    (ICMP, "chksum"),
    (SCTP, "chksum"),
    (_ICMPv6, "cksum"),
    (ICMPv6DestUnreach, "cksum"),
)


def with_right_checksums(packet: Packet) -> bytes:
    """The packet as scapy makes it: every checksum is recomputed from its bytes.

    A packet that an ICMP message quotes may be truncated, and is left as it is.
    """
    copy = packet.__class__(raw(packet))
    layer: Any = copy
    while layer and layer.__class__.__name__ != "NoPayload":
        for kind, field in _CHECKED:
            if isinstance(layer, kind) and field in layer.fields:
                delattr(layer, field)
        if isinstance(layer, (ICMP, _ICMPv6)) and layer.payload:
            quoted = layer.payload.original
            layer.remove_payload()
            layer.add_payload(Raw(quoted))
            break
        layer = layer.payload
    return bytes(raw(copy))


def earlier(when: int, seconds: float) -> int:
    """A time of CLOCK_MONOTONIC, ns. The test is skipped on a machine that has not been up for so long."""
    found = when - int(seconds * 10**9)
    if found < 0:
        pytest.skip(f"this machine has not been up for {seconds:.0f} s")
    return found


def ip_of(packet: Packet) -> Any:
    return packet[IPv6] if IPv6 in packet else packet[IP]
