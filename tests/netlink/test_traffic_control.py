"""tc filters are added, replaced atomically and deleted, beside a filter of another program."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import pytest

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.netlink import traffic_control as tc
from ebpfproxy.netlink.rtnetlink import Rtnetlink, device_indexes
from ebpfproxy.netlink.traffic_control import EGRESS, INGRESS, Filter, Place
from tests.lab import Lab

pytestmark = pytest.mark.root

_PASS = bytes.fromhex("b7000000ffffffff 9500000000000000")


def _shown(direction: str) -> list[tuple[int, str, int, bool]]:
    """Returns priority, name, program id and direct-action flag of eth0's filters with a program."""
    text = subprocess.run(
        ["tc", "-j", "filter", "show", "dev", "eth0", direction], check=True, capture_output=True, text=True
    ).stdout
    return [
        (
            each["pref"],
            each["options"]["bpf_name"],
            each["options"]["prog"]["id"],
            each["options"]["direct-action"],
        )
        for each in json.loads(text)
        if "options" in each and each["kind"] == "bpf"
    ]


def _program() -> tuple[int, int]:
    """Returns a descriptor and the id of the program."""
    program = bpf.prog_load(uapi.PROG_SCHED_CLS, 0, "test", _PASS)
    return program, bpf.prog_info(program).id


def _live() -> None:
    index = socket.if_nametoindex("eth0")
    (first, first_id), (second, second_id) = _program(), _program()
    place = Place(index, INGRESS, 3)
    with Rtnetlink() as netlink:
        assert set(device_indexes(netlink)) == {number for number, _ in socket.if_nameindex()}
        assert tc.filters(netlink, index, INGRESS) == []
        tc.put_filter(netlink, place, first, "ours:1")
        assert _shown("ingress") == [(3, "ours:1", first_id, True)]
        tc.put_filter(netlink, place, second, "ours:2")
        assert _shown("ingress") == [(3, "ours:2", second_id, True)]
        tc.put_filter(netlink, place._replace(priority=7), first, "cni")
        tc.put_filter(netlink, place._replace(parent=EGRESS), first, "ours:3")
        assert tc.filters(netlink, index, INGRESS) == [Filter(3, "ours:2"), Filter(7, "cni")]
        assert tc.filters(netlink, index, EGRESS) == [Filter(3, "ours:3")]

        tc.put_filter(netlink, place._replace(priority=7, handle=9), second, "before")
        assert tc.filters(netlink, index, INGRESS)[1:] == [Filter(7, "before", 9), Filter(7, "cni")]
        tc.delete_filter(netlink, place._replace(priority=7, handle=9))

        tc.delete_filter(netlink, place)
        assert tc.filters(netlink, index, INGRESS) == [Filter(7, "cni")]
        with pytest.raises(FileNotFoundError):
            tc.delete_filter(netlink, place)
        tc.delete_clsact(netlink, index)
        assert tc.filters(netlink, index, INGRESS) == tc.filters(netlink, index, EGRESS) == []
        with pytest.raises(OSError, match="No such device"):
            tc.put_filter(netlink, place._replace(ifindex=9999), first, "nowhere")
        assert tc.filters(netlink, 9999, INGRESS) == []
    os.close(first)
    os.close(second)


def test_add_replace_and_delete_a_filter() -> None:
    with Lab() as lab:
        lab.node("node-a").call(_live)
