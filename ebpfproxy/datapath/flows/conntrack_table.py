"""The conntrack map as it is: how long entries live, and flows as commands show them.

Programs make entries and note what they see of a flow (``bpf/lib/conntrack.h``); ``sweeper`` deletes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from ebpfproxy.datapath.abi.flow_layout import Entry, Nat, NatFlags, Seen, reversed_at_egress
from ebpfproxy.datapath.abi.layout import NSEC_PER_SEC
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.services.model import Protocol, format_endpoint

#: RFC 3828. It uses UDP's Services.
UDPLITE = 136
_STREAM_SECONDS = 1.0
BOTH_FIN = Seen.FIN | Seen.REPLY_FIN
PROTOCOL_NAMES = {**{p.value: p.name for p in Protocol}, UDPLITE: "UDPLITE"}


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds without a packet after which a flow ends. Names as kube-proxy's conntrack settings."""

    #: Both sides have spoken and none has closed.
    tcp_established: float = 86400.0
    #: One side has closed.
    tcp_close_wait: float = 3600.0
    #: There is no reply yet, or the client has not acknowledged it.
    tcp_unreplied: float = 60.0
    #: Both sides have closed. The backend may be in TIME_WAIT for 60 s, and for up to 5 s more, since the
    #: kernel's timers are coarse; so long no other client is to get the masquerade port. Netfilter has 120 s.
    tcp_time_wait: float = 70.0
    #: One side has reset the other: late packets still find their way.
    tcp_reset: float = 30.0
    udp: float = 30.0
    #: Both sides have spoken, and not only in the first moment.
    udp_stream: float = 120.0
    sctp: float = 300.0

    def of(self, protocol: int, seen: int, lasted: float = math.inf) -> float:
        """How long a flow in this state may be silent, in seconds.

        ``lasted``: seconds from its first to its last packet.

        A datagram and its reply are no stream: with as many as a resolver gets there would soon be no port
        left. Netfilter does so since Linux 5.0 (nf_conntrack_proto_udp.c), after two seconds; it is one here,
        because entries have the time of the last packet to the second.
        """
        if protocol == Protocol.TCP:
            if seen & Seen.RST:
                return self.tcp_reset
            if seen & BOTH_FIN == BOTH_FIN:
                return self.tcp_time_wait
            if seen & BOTH_FIN:
                return self.tcp_close_wait
            return self.tcp_established if seen & Seen.REPLY else self.tcp_unreplied
        if protocol in (Protocol.UDP, UDPLITE):
            return self.udp_stream if seen & Seen.REPLY and lasted >= _STREAM_SECONDS else self.udp
        return self.sctp


def counters(events: Map) -> dict[PacketEvent, int]:
    """The count of every event, on all CPUs, since the map was created."""
    found = dict.fromkeys(PacketEvent, 0)
    for number, (count,) in events.nonzero_counters():
        found[PacketEvent(number)] = count
    return found


class FlowRow(msgspec.Struct, frozen=True):
    """A flow: both halves of a pair, or all four of a masqueraded one. Times in seconds.

    The JSON of ``ebpfproxy conntrack list``: these names stay.

    ``masquerade`` is the address and port that the backend sees, empty where it is the client's own. ``dsr``:
    "sent" where replies do not pass this node, "received" at the backend's node, which replies; else empty.
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
    dsr: str


def is_half_open(protocol: int, original: Nat, reply: Nat) -> bool:
    """True if a client has not acknowledged what the backend has answered to its SYN; as in tcp_state.h."""
    is_silent = not original.acked and not original.seen & Seen.REPLY
    return protocol == Protocol.TCP and is_silent and bool(reply.seen & Seen.REPLY)


#: The states that :func:`state_of` returns.
STATES = ("SYN_SENT", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "TIME_WAIT", "CLOSE", "UNREPLIED", "REPLIED")


def state_of(protocol: int, seen: int, *, half_open: bool = False) -> str:
    """The state of a flow, by the name that netfilter has for it."""
    if protocol == Protocol.TCP:
        if seen & Seen.RST:
            return "CLOSE"
        closed = seen & BOTH_FIN
        if closed:
            return "TIME_WAIT" if closed == BOTH_FIN else "CLOSE_WAIT"
        if half_open:
            return "SYN_RECV"
        return "ESTABLISHED" if seen & Seen.REPLY else "SYN_SENT"
    return "REPLIED" if seen & Seen.REPLY else "UNREPLIED"


def _dsr(flags: NatFlags) -> str:
    return "sent" if flags & NatFlags.DSR else "received" if flags & NatFlags.DSR_BACKEND else ""


def _masquerade_of(entry: Entry, there: Mapping[bytes, Entry]) -> tuple[str, list[bytes]]:
    """What the backend sees of the client of an original direction, and the keys of the pair that says so.

    Without such a pair the backend sees the client itself, and the text is empty.
    """
    # The key of the pair's original direction: from client to backend, where the packet leaves.
    source = there.get(reversed_at_egress(entry.partner))
    if source is None or not source.flags & NatFlags.SOURCE:
        return "", []
    keys = [source.key]
    reply = there.get(source.partner)
    if reply is not None and reply.partner == source.key:
        keys.append(reply.key)
    return format_endpoint(source.nat.source, source.nat.source_port), keys


def flows_of(
    entries: list[tuple[bytes, bytes]], timeouts: Timeouts, now: int, names: Mapping[int, str]
) -> list[tuple[FlowRow, tuple[bytes, ...]]]:
    """Combines entries to flows, each with the keys of its entries.

    ``entries`` as the map has them; ``now`` is CLOCK_MONOTONIC in ns, ``names`` are those of Services by id.
    Where a later flow has the reply direction's entry of a closed one (``take_port`` in masquerade.h), that
    entry is the later flow's alone.
    """
    there = {key: Entry(key, value) for key, value in entries}
    found = []
    for key, entry in there.items():
        if entry.flags & (NatFlags.REPLY | NatFlags.SOURCE):
            continue
        nat, flow = entry.nat, entry.flow
        keys = [key]
        last, seen, half_open = entry.last, entry.seen, False
        partner = there.get(entry.partner)
        is_replaced = partner is not None and partner.partner != key
        if partner is not None and not is_replaced:
            keys.append(partner.key)
            last, seen = max(last, partner.last), seen | partner.seen
            half_open = is_half_open(flow.protocol, nat, partner.nat)
        masquerade = format_endpoint(nat.source, nat.source_port) if nat.flags & NatFlags.HOST else ""
        if not masquerade and not is_replaced:
            masquerade, more = _masquerade_of(entry, there)
            keys += more
        lasting = seen & ~Seen.REPLY if half_open else seen
        limit = timeouts.of(flow.protocol, lasting, (last - nat.created) / NSEC_PER_SEC)
        idle = max(0.0, (now - last) / NSEC_PER_SEC)
        row = FlowRow(
            protocol=PROTOCOL_NAMES[flow.protocol],
            client=format_endpoint(flow.source, flow.source_port),
            frontend=format_endpoint(flow.destination, flow.destination_port),
            backend=format_endpoint(nat.destination, nat.destination_port),
            masquerade=masquerade,
            state=state_of(flow.protocol, seen, half_open=half_open),
            service=names.get(nat.service_id, "?"),
            idle=round(idle, 3),
            age=round(max(0.0, (now - nat.created) / NSEC_PER_SEC), 3),
            expires=round(max(0.0, limit - idle), 3),
            dsr=_dsr(nat.flags),
        )
        found.append((row, tuple(keys)))
    return found
