"""Removes our programs while something else serves new connections: the last step of rollback and cleanup."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ebpfproxy.datapath.abi.schema import SCHEMA_VERSION
from ebpfproxy.datapath.dump import Dump, NothingPinnedError, open_maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.node.packets import begin_nothing
from ebpfproxy.datapath.programs.detach import ANSWER_SECONDS, choose_no_more, remove_everything
from ebpfproxy.netlink import ctnetlink
from ebpfproxy.operator.migrate.node import kube_proxy_frontends
from ebpfproxy.operator.migrate.node.reserved_ports import HeldPorts
from ebpfproxy.operator.migrate.node.takeover import Draining
from ebpfproxy.operator.waiting import NODE_SECONDS

#: Replies to flows that nothing has answered yet are waited for, and a busy node is slow.
_MARGIN_SECONDS = 10.0


def remove_programs(bpf_root: Path, drain: float = 0.0) -> Iterator[str]:
    """Yields a line for each thing done. The caller holds the root's lock.

    First no new flow is created; then replies on their way still arrive, and connections that packet
    programs translate have ``drain`` seconds to end; then everything is removed. Maps that this version
    cannot read are removed at once.
    """
    pins = pin_folder(bpf_root)
    maps = _readable(bpf_root)
    draining = None
    if maps is not None:
        if ended := ctnetlink.remove(_untranslated_datagrams(maps), translated=False):
            yield f"ended {ended} UDP flows that netfilter did not translate"
        table = maps["conntrack"]
        held = HeldPorts(drain + ANSWER_SECONDS + _MARGIN_SECONDS)
        held.hold(table.items())
        begin_nothing(maps)
        entries = list(table.items())
        held.hold(entries)
        draining = Draining(maps)
        # kube-proxy masquerades by any port from now on, those of flows that have ended among them.
        draining.step(entries)
    detached = choose_no_more(pins)
    yield from detached
    now = time.monotonic()
    answered = now + ANSWER_SECONDS if detached else now
    if draining is not None and (living := _drain(draining, now + drain)):
        yield f"{living} connections that packet programs translated end now"
    time.sleep(max(0.0, answered - time.monotonic()))
    yield from remove_everything(pins)


def _readable(bpf_root: Path) -> MapSet | None:
    try:
        maps = open_maps(bpf_root)
    except (NothingPinnedError, OSError):
        return None
    return maps if maps.folder.name.startswith(f"v{SCHEMA_VERSION}-") else None


def _untranslated_datagrams(maps: MapSet) -> Callable[[ctnetlink.Flow], bool]:
    """Returns a test for UDP flows of the host to frontends, which packet programs translate after netfilter.

    Conntrack applies NAT rules to the first packet of a flow only: such a flow would have no endpoint for as
    long as its client sends. kube-proxy ends them at its first sync, but not before 1.32.
    """
    frontends = {row.frontend for row in Dump(maps).frontends()}

    def is_untranslated(flow: ctnetlink.Flow) -> bool:
        return (
            flow.protocol == socket.IPPROTO_UDP and kube_proxy_frontends.name(*flow.asked, "UDP") in frontends
        )

    return is_untranslated


def _drain(draining: Draining, deadline: float) -> int:
    """Waits; returns the number of connections that are still open."""
    while (living := draining.step()) or draining.waits_for_replies:
        if time.monotonic() >= deadline and not draining.waits_for_replies:
            break
        time.sleep(NODE_SECONDS)
    return living
