"""The XDP programs of devices, and what drivers say of one that they refuse."""

from __future__ import annotations

import os
import socket
import struct
import subprocess

import pytest

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import XDP_ATTACH
from ebpfproxy.datapath.kernel import bpf, extension
from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.netlink.xdp_state import xdp_program, xdp_refusal
from tests.lab.spaces import leave_namespace, namespace_restored

pytestmark = pytest.mark.root

_NATIVE, _GENERIC = 1 << 2, 1 << 1
#: r0 = XDP_PASS; return.
_PASS_ALL = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)


def test_refusal_has_the_words_of_the_driver() -> None:
    """A link has none. What the driver does take is not left behind."""
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, "passes", _PASS_ALL)
    with namespace_restored():
        leave_namespace()
        subprocess.run(
            ["ip", "link", "add", "one", "type", "veth", "peer", "name", "two", "mtu", "9000"], check=True
        )
        index = socket.if_nametoindex("one")
        assert xdp_refusal(index, program, _NATIVE) == "veth: Peer MTU is too large to set XDP"
        subprocess.run(["ip", "link", "set", "two", "mtu", "1500"], check=True)
        assert xdp_refusal(index, program, _NATIVE) == ""
        assert xdp_refusal(index + 1000, program, _NATIVE) == os.strerror(19)
        with Rtnetlink() as netlink:
            assert xdp_program(netlink, index) == (0, False)
            link = bpf.link_create(program, index, XDP_ATTACH, _GENERIC)
            assert xdp_program(netlink, index) == (bpf.prog_info(program).id, True)
            os.close(link)
    os.close(program)


def test_kernel_reads_the_type_of_an_extension() -> None:
    """Its other uses need BPF_PROG_TYPE_EXT, see tests/field/test_xdp_chain.py."""
    btf = bpf.btf_load(extension.describe("ebpfproxy", 100))
    typed = bpf.Typed(btf, extension.FUNCTION)
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, "ebpfproxy", _PASS_ALL, typed=typed)
    os.close(program)
    os.close(btf)
