"""Tables of required kernel features, of the maps, and of the reasons by which packets are counted."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import ebpfproxy
from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import schema, uapi
from ebpfproxy.datapath.abi.node_layout import ACTIONS
from ebpfproxy.datapath.kernel import probe
from tools.docs.tables import table

_KINDS = {
    uapi.MAP_HASH: "hash",
    uapi.MAP_LRU_HASH: "LRU hash",
    uapi.MAP_ARRAY: "array",
    uapi.MAP_PERCPU_HASH: "per-CPU hash",
    uapi.MAP_PERCPU_ARRAY: "per-CPU array",
    uapi.MAP_LPM_TRIE: "LPM trie",
    uapi.MAP_RINGBUF: "ring buffer",
}
_HOLDS = {
    "services4": "IPv4 frontends: address, port, protocol, scope → id, algorithm, flags",
    "services6": "IPv6 frontends, in the same form",
    "frontend_cache": "what these two have, and the range to choose from, as programs at sockets need it",
    "frontend_generation": "a random number that each change of both replaces: what was cached before is invalid",
    "range_generations": "the same for ranges, counted up: one for each 256th id",
    "selections": "id and policy → range of slots; one 8-byte word",
    "slots": "backend ids and weights, or a Maglev table",
    "turns": "the next backend with `round-robin`",
    "random_state": "the last of a CPU's random numbers, of packets' programs and of sockets'",
    "members": "the backends of a selection, to check a remembered one",
    "affinity": "client and service port → backend",
    "client_namespaces": "pod address → network namespace, for session affinity",
    "drained": "requests of `ebpfproxy backend drain`",
    "backends": "id → address, port, protocol, state, and what was and is open to it",
    "node_addresses": "addresses that answer on NodePorts",
    "sock_peers": "unconnected UDP sockets: the backend of each frontend after the first",
    "port_clashes": "flows that sockets leave to packets: another frontend has the port and the backend",
    "sock_origin": "sockets, by the lower bits of their cookie: the first requested frontend and its backend",
    "sock_origin_overflow": "connected sockets whose place in `sock_origin` another socket has",
    "mptcp_subflows": "MPTCP sockets: the subflow that connected to a Service",
    "sock_redirects": "connected UDP sockets of a deleted backend: the frontend whose backends get their packets",
    "service_choices": "connections and datagrams, in 16 rows, each of some neighbouring CPUs",
    "service_rejections": "connections and datagrams refused, dropped",
    "service_names": "id → namespace, name, port, for commands and metrics",
    "conntrack": "flows of packets: the translation of both directions",
    "flow_cache": "copies of the entries of flows that have many packets, by a hash; see lib/flow_cache.h",
    "flow_hops": "the next hops of the same flows where XDP forwards them; otherwise it has one element",
    "flow_tags": "for groups of flows, until when one may be in `flow_cache`; for each of its places, 16 bits of the hash of "
    "the flow that has it",
    "epochs": "number of changes of a Service, which flows compare",
    "departures": "backends that left a Service, until their flows and sockets are ended",
    "fragments": "ports of a fragmented datagram, and the new id of its fragments",
    "fragment_ids": "the last of those ids",
    "icmp_bucket": "until when ICMP errors that reject packets have used up their rate",
    "next_hops": "when the kernel last sent a packet to a next hop that programs send to, by a hash",
    "source_ranges": "`loadBalancerSourceRanges`",
    "cidrs": "CIDRs of Services, and of pods if options name them",
    "cidr_filter": "bits: whether an address may be in a Service CIDR",
    "unallocated": "number of packets and sockets to addresses of Service CIDRs that no Service has",
    "devices": "the node's devices and their roles",
    "xdp_devices": "uplinks between which XDP can forward",
    "address_filter": "bits: whether an address may be a frontend's",
    "backend_ports": "the same of a port alone",
    "backend_filter": "bits: whether an address and port may be, or may have been, a backend's",
    "port_filter": "bits: whether a port may be a NodePort",
    "flow_filter": "bytes: whether a pair of addresses may be a flow's",
    "sweep": "the agent and the programs of its sweep",
    "sweep_keys": "a batch of flows, for the sweep",
    "sweep_values": "their translation",
    "crc32c": "table for SCTP's checksum",
    "packet_events": "number of packets by result",
    "scratch": "temporary memory of a program",
    "programmed": "when the maps were last changed, for `ebpfproxy status`",
    "decisions": "decisions of programs, for `ebpfproxy trace`; in bytes",
    "decision_state": "its rate on each CPU, and what it has lost",
    "tracing": "which decisions it wants, and until when",
    "traced_services": "the Services that it wants them of",
    "connects": "with `measureConnections`: how long a service port's connections took, and how many failed",
    "no_connects": "zeros: what an entry of it begins with",
    "connect_failures": "service port and backend → how many connections failed, by reason",
    "service_traffic": "with `measureTraffic`: bytes and packets of a service port, on each CPU",
    "pod_names": "endpoint address → pod, while it runs",
    "agent_state": "the agent's state, for `ebpfproxy status`, and where commands ask it",
}
_REASONS = {
    "no-endpoint": "the Service has no endpoint",
    "no-such-port": "a cluster IP that has no such port",
    "no-flow": "a TCP segment or SCTP chunk to a Service that opens no connection and belongs to none; while flows are "
    "copied from maps of another size it is dropped, and sent again",
    "backend-gone": "the flow's backend was deleted",
    "no-local-endpoint": "policy Local without an endpoint on this node",
    "source-range": "the client is in none of `loadBalancerSourceRanges`",
    "no-such-service": "an address in a Service CIDR that no Service has",
    "fragment": "a fragment whose first fragment was not seen",
    "ports-taken": "no free source port for masquerading towards this backend: `--masquerade-ports`",
    "table-full": "the flow could not be stored",
    "unroutable": "`--bypass-netfilter`: no route to the backend",
    "hops": "the packet's hop limit is exhausted",
    "rewrite": "the packet could not be changed",
    "martian": "an invalid source address",
    "malformed": "headers that end too early",
    "sockets-full": "datagrams of a socket that does not fit (`--max-connections`, `--max-datagram-sockets`), "
    "translated in packets instead",
    "xdp": "by the XDP program (`--xdp`)",
    "dsr": "an option of DSR that no node of the cluster can have sent (`externalTrafficMode`)",
    "icmp-rate-limit": "to be rejected with an ICMP error, of which there were too many: see [limits](limits.md#floods)",
}


def must_haves() -> str:
    return table(("needed", "Linux"), ((each.what, each.since) for each in probe._MUST_HAVES))


def maps() -> str:
    return table(
        ("map", "type", "entries", "content"),
        (
            (f"`{each.name}`", _KINDS[each.kind], str(each.max_entries), _HOLDS[each.name])
            for each in schema.map_specs(Capacity())
        ),
    )


def reasons() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for action, events in ACTIONS.items():
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
