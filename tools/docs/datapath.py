"""Tables of what the kernel has to have, of the maps, and of the reasons that packets are counted by."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import ebpfproxy
from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import schema, uapi
from ebpfproxy.datapath.abi.node_layout import DROPPED, PASSED, REJECTED
from ebpfproxy.datapath.kernel import probe
from tools.docs.tables import table

_KINDS = {
    uapi.MAP_HASH: "hash",
    uapi.MAP_LRU_HASH: "LRU hash",
    uapi.MAP_ARRAY: "array",
    uapi.MAP_PERCPU_ARRAY: "per-CPU array",
    uapi.MAP_LPM_TRIE: "LPM trie",
}
_HOLDS = {
    "services4": "IPv4 frontends: address, port, protocol, scope → id, algorithm, flags",
    "services6": "IPv6 frontends, likewise",
    "selections": "id and policy → range of slots; one 8-byte word",
    "slots": "backend ids and weights, or a Maglev table",
    "turns": "whose turn it is with `round-robin`",
    "members": "which backends a selection has: whether a remembered one is still good",
    "affinity": "client and service port → backend",
    "loads": "connections that are open to a backend",
    "client_namespaces": "pod address → network namespace, for session affinity",
    "drained": "orders of `ebpfproxy backend drain`",
    "backends": "id → address, port, protocol, state, weight",
    "node_addresses": "addresses at which NodePorts answer",
    "sock_peers": "unconnected UDP sockets: which backend stands for which frontend",
    "port_clashes": "flows that sockets leave to packets: another frontend has the port and the backend",
    "sock_origin": "connected sockets: what was asked for, and which backend it became",
    "mptcp_subflows": "MPTCP sockets: which of their subflows asked for a Service",
    "sock_redirects": "connected UDP sockets whose backend is gone: which frontend their packets ask again",
    "service_stats": "connections chosen, refused, dropped",
    "backend_stats": "connections chosen",
    "service_names": "id → namespace, name, port, for commands and metrics",
    "conntrack": "flows of packets: what a packet becomes, both ways",
    "epochs": "changes of a Service, by which flows notice",
    "departures": "backends that left a Service, until their flows and sockets are ended",
    "fragments": "ports of a fragmented datagram, and the id that its fragments get",
    "fragment_ids": "how many of those ids were given",
    "source_ranges": "`loadBalancerSourceRanges`",
    "cidrs": "CIDRs of Services, and of pods where options name them",
    "cidr_filter": "bits: may an address be in a Service CIDR",
    "unallocated": "what went to addresses of Service CIDRs that nobody has",
    "devices": "the node's devices and their roles",
    "address_filter": "bits: may an address be a frontend's",
    "port_filter": "bits: may a port be a NodePort",
    "flow_filter": "counts: may a pair of addresses be a flow's",
    "crc32c": "table for SCTP's checksum",
    "packet_events": "packets by what befell them",
    "scratch": "memory of a program",
    "programmed": "when the maps were last changed, for `ebpfproxy status`",
    "agent_state": "the agent's account of itself, for `ebpfproxy status`",
}
_REASONS = {
    "no-endpoint": "the Service has no endpoint",
    "no-such-port": "a cluster IP that has no such port",
    "no-flow": "a TCP segment or SCTP chunk to a Service that opens nothing, and of no known connection",
    "backend-gone": "the flow's backend is gone",
    "no-local-endpoint": "policy Local, and no endpoint on this node",
    "source-range": "the client is in none of `loadBalancerSourceRanges`",
    "no-such-service": "an address in a Service CIDR that no Service has",
    "fragment": "a fragment whose first part was not seen",
    "ports-taken": "no source port is left to masquerade this client to this backend: `--masquerade-ports`",
    "table-full": "the flow could not be noted",
    "unroutable": "`--bypass-netfilter`: no route to the backend",
    "hops": "the packet's hop limit is at its end",
    "rewrite": "the packet could not be changed",
    "martian": "a source address that cannot be one",
    "malformed": "headers that end too early",
    "sockets-full": "datagrams of a socket that there is no room for: `--max-datagram-sockets`; packets are "
    "translated instead",
}


def must_haves() -> str:
    return table(("needed", "Linux"), ((each.what, each.since) for each in probe._MUST_HAVES))


def maps() -> str:
    return table(
        ("map", "type", "places", "what it holds"),
        (
            (f"`{each.name}`", _KINDS[each.kind], str(each.max_entries), _HOLDS[each.name])
            for each in schema.map_specs(Capacity())
        ),
    )


def reasons() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for action, events in (("rejected", REJECTED), ("dropped", DROPPED), ("passed", PASSED)):
            for event in sorted(events):
                yield action, f"`{event}`", _REASONS[str(event)]

    return table(("action", "reason", "what"), rows())


def packages() -> str:
    folder = Path(ebpfproxy.__file__).parent
    names = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/**/__init__.py"))
    return table(
        ("package", "what"),
        (
            (
                f"`ebpfproxy/{name}/`",
                _first(importlib.import_module(f"ebpfproxy.{name}".replace("/", ".")).__doc__ or ""),
            )
            for name in names
        ),
    )


def _first(text: str) -> str:
    return text.split("\n\n", maxsplit=1)[0].replace("``", "`")
