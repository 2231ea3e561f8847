"""Sockets whose backend is no more: found in the maps, ended in whatever network namespace they are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import msgspec

from ebpfproxy.datapath.departures import Departed
from ebpfproxy.datapath.grace import Grace
from ebpfproxy.datapath.maps import MapSet
from ebpfproxy.datapath.origins import StaleTcp, stale_sockets
from ebpfproxy.node.sockets import Peer, end_sockets
from ebpfproxy.services.model import Protocol

#: Seconds before each look: a socket may be between its hook and its connection.
_PAUSES = (0.0, 0.05, 0.25)


class Ended(msgspec.Struct, frozen=True):
    """What became of the sockets of some departures. ``unseen`` were not found connected anywhere.

    Those have lost their connection already, or are in a namespace that this process cannot enter.
    """

    departures: Mapping[bytes, Departed]
    ended: Mapping[str, int]
    unseen: int


def end_stale_sockets(
    maps: MapSet, grace: Grace, departures: Mapping[bytes, Departed], tcp: StaleTcp
) -> Ended:
    """Ends them. Takes some time: for a thread of its own."""
    # A connect() that chose before the change has noted its choice after this.
    grace.wait()
    ended: Counter[str] = Counter()
    known: set[int] = set()
    unseen = 0
    for pause in _PAUSES:
        time.sleep(pause)
        stale = stale_sockets(maps, departures, tcp, rest=lambda: time.sleep(0))
        left = {Peer(*backend): cookies - known for backend, cookies in stale.items() if not cookies <= known}
        if left:
            done = end_sockets(left)
            for peer, cookies in left.items():
                ended[Protocol(peer.protocol).name] += len(cookies & done)
            known |= done
        unseen = sum(len(cookies - known) for cookies in stale.values())
        if not unseen:
            break
    return Ended(departures, dict(ended), unseen)
