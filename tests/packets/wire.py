"""Runs a pinned program on a packet, inside a node's namespace, and looks at what comes out.

Packets are scapy's; so are the checksums that results are compared with: nothing here shares code with
what it tests.
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scapy.all import Ether, IPv6, Packet, Raw, raw
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, _ICMPv6
from scapy.layers.sctp import SCTP

from ebpfproxy.datapath.kernel import bpf
from tests.lab import LabNode

PASS, DROP, REDIRECT = -1, 2, 7
_ROOM = 1024
_CLONE_NEWNET = 0x40000000
_libc = ct.CDLL(None, use_errno=True)
_libbpf = ct.CDLL("libbpf.so.1", use_errno=True)


class _TestRun(ct.Structure):
    _fields_ = (
        ("sz", ct.c_size_t),
        ("data_in", ct.c_void_p),
        ("data_out", ct.c_void_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    )


class Result(NamedTuple):
    verdict: int
    bytes: bytes

    @property
    def packet(self) -> Any:
        return Ether(self.bytes)


def run_program(
    program: int, data: bytes, ifindex: int, ingress_ifindex: int = 0, repeat: int = 1
) -> tuple[int, bytes, int]:
    """Verdict, packet, and nanoseconds a run. ``ifindex`` is of the device, in this thread's namespace."""
    context = bytearray(192)  # struct __sk_buff
    struct.pack_into("=II", context, 36, ingress_ifindex, ifindex)
    context_in = (ct.c_char * len(context)).from_buffer(context)
    out = ct.create_string_buffer(len(data) + _ROOM)
    source = ct.create_string_buffer(data, len(data))
    options = _TestRun(
        sz=ct.sizeof(_TestRun),
        data_in=ct.addressof(source),
        data_out=ct.addressof(out),
        data_size_in=len(data),
        data_size_out=len(out),
        ctx_in=ct.addressof(context_in),
        ctx_size_in=len(context),
        repeat=repeat,
    )
    if _libbpf.bpf_prog_test_run_opts(program, ct.byref(options)) < 0:
        raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))
    verdict = ct.c_int32(options.retval).value
    return verdict, out.raw[: options.data_size_out], options.duration


class Wire:
    """A node's devices as tests see them: by name, with their MAC addresses."""

    def __init__(self, node: LabNode) -> None:
        self._netns = node.netns
        self._programs = next((node.bpf_root / "ebpfproxy").glob("v*/progs-*"))
        self._thread = ThreadPoolExecutor(1, initializer=self._enter)
        self._fds: dict[str, int] = {}
        self.devices = {
            line.split(": ")[1].split("@")[0]: (int(line.split(": ")[0]), line.split("link/ether ")[1][:17])
            for line in node.run(["ip", "-o", "link"]).splitlines()
            if "link/ether" in line
        }

    def _enter(self) -> None:
        fd = os.open(f"/run/netns/{self._netns}", os.O_RDONLY)
        assert _libc.setns(fd, _CLONE_NEWNET) == 0
        os.close(fd)

    def close(self) -> None:
        self._thread.shutdown()
        for fd in self._fds.values():
            os.close(fd)

    def _program(self, name: str) -> int:
        if name not in self._fds:
            self._fds[name] = bpf.get_pinned(Path(self._programs, name))
        return self._fds[name]

    def mac(self, device: str) -> str:
        return self.devices[device][1]

    def send_bytes(self, program: str, device: str, data: bytes, *, came_by: str = "") -> Result:
        """``came_by``: the device by which a forwarded packet entered; empty for the host's own."""
        ifindex = self.devices[device][0]
        ingress = self.devices[came_by][0] if came_by else 0
        fd = self._program(program)
        verdict, out, _ = self._thread.submit(run_program, fd, data, ifindex, ingress).result()
        return Result(verdict, out)

    def send(self, program: str, device: str, packet: Packet, *, came_by: str = "") -> Result:
        if not packet.haslayer(Ether):
            packet = Ether(dst=self.mac(device), src="02:00:00:00:00:99") / packet
        return self.send_bytes(program, device, raw(packet), came_by=came_by)

    def arrive(self, packet: Packet, device: str = "eth0") -> Result:
        return self.send("from_device", device, packet)

    def leave(self, packet: Packet, device: str = "eth0", *, came_by: str = "") -> Result:
        return self.send("to_device", device, packet, came_by=came_by)

    def nanoseconds(self, program: str, device: str, packet: Packet, repeat: int) -> int:
        """Of one run, on average."""
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
    """The packet as scapy would have made it: every checksum computed from its bytes again.

    What an ICMP message carries is bytes to it: a packet quoted there may be cut.
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


def ip_of(packet: Packet) -> Any:
    return packet[IPv6] if IPv6 in packet else packet[IP]
