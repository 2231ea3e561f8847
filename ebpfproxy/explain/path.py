"""Which hook handles a connection, which frontend it finds, and what becomes of it.

It follows bpf/sock.c, bpf/tc.c and bpf/loopback.c branch by branch, up to the choice among several backends.
bpf/xdp.c decides nothing: it follows flows, and :func:`forwards_at` says which.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple, Protocol

from ebpfproxy.datapath.abi.layout import Scope, ServiceEntry, ServiceFlags
from ebpfproxy.datapath.abi.node_layout import CidrFlags, DeviceFlags, XdpFlags
from ebpfproxy.datapath.lookup import Selected
from ebpfproxy.datapath.programs.devices import LOOPBACK
from ebpfproxy.datapath.programs.loader import Options
from ebpfproxy.services.model import FrontendKind, Policy, format_address
from ebpfproxy.services.model import Protocol as Transport


class Place(enum.StrEnum):
    """Where a client is."""

    HOST = "host"
    POD = "pod"
    OUTSIDE = "outside"


class Client(NamedTuple):
    """Who connects. ``addresses`` packed, of both families.

    ``netns``: the cookie of its network namespace, 0 if unknown. ``ifindex``: the device of this node by
    which its packets come in, None if no route leads to it.
    """

    place: Place
    name: str
    addresses: tuple[bytes, ...]
    netns: int = 0
    ifindex: int | None = None

    def address(self, family: int) -> bytes:
        """Its first address with so many bytes; empty without one."""
        return next((each for each in self.addresses if len(each) == family), b"")


class Target(NamedTuple):
    address: bytes
    port: int
    protocol: Transport


class Programs(NamedTuple):
    """What runs on this node. ``socket_hooks``: names of those that have our programs.

    ``devices``: indexes of those with a program at ingress; of the loopback, at egress. ``xdp``: those with
    one at XDP. ``source_towards``: the packed source by which this host reaches an address, empty without a
    route. ``device_to``: the device that leads there.
    """

    options: Options
    socket_hooks: frozenset[str]
    devices: frozenset[int]
    xdp: frozenset[int]
    source_towards: Callable[[bytes], bytes]
    device_to: Callable[[bytes], int | None]


class Tables(Protocol):
    """The maps' look-ups; :class:`ebpfproxy.datapath.lookup.Lookup` is one."""

    def frontend(
        self, address: bytes, port: int, protocol: Transport | None, scope: Scope
    ) -> ServiceEntry | None: ...
    def node_port(self, family: int, port: int, protocol: Transport, scope: Scope) -> ServiceEntry | None: ...
    def is_cluster_ip(self, address: bytes) -> bool: ...
    def is_node_address(self, address: bytes) -> bool: ...
    def source_allowed(self, service_id: int, source: bytes) -> bool: ...
    def cidr_flags(self, address: bytes) -> CidrFlags: ...
    def device_flags(self, ifindex: int) -> DeviceFlags: ...
    def xdp_flags(self, ifindex: int) -> XdpFlags: ...
    def masquerade_address(self, ifindex: int, family: int) -> bytes: ...
    def selection(self, service_id: int, policy: Policy) -> list[Selected]: ...


class Hook(enum.StrEnum):
    """Where it is decided."""

    SOCKET = "socket"
    XDP = "xdp"
    INGRESS = "tc-ingress"
    EGRESS = "tc-egress"
    LOOPBACK = "loopback"
    NONE = "none"


class Outcome(enum.StrEnum):
    """What becomes of a new connection."""

    TRANSLATED = "translated"
    REFUSED = "refused"
    DROPPED = "dropped"
    #: The node itself answers at a frontend, such as a DNS cache.
    OWN = "own"
    UNTOUCHED = "untouched"
    #: It needs a program that is not attached.
    UNSERVED = "unserved"

    @property
    def works(self) -> bool:
        return self in (Outcome.TRANSLATED, Outcome.OWN, Outcome.UNTOUCHED)


class Ranges(enum.StrEnum):
    """What loadBalancerSourceRanges say of the client."""

    NONE = "none"
    ALLOWED = "allowed"
    DENIED = "denied"


class Masquerade(NamedTuple):
    """Whether backends see an address of this node instead of the client's, and why."""

    applies: bool
    why: str
    #: A backend that is the client itself is an exception.
    hairpin: bool = False
    #: Backends' nodes answer the client themselves (DSR), but where a tunnel leads to them.
    dsr: bool = False


class Path(NamedTuple):
    """``entry`` is the frontend's, None if the address is none. ``why``: one sentence without its end."""

    hook: Hook
    outcome: Outcome
    why: str
    scope: Scope = Scope.INTERNAL
    entry: ServiceEntry | None = None
    selected: tuple[Selected, ...] = ()
    ranges: Ranges = Ranges.NONE
    masquerade: Masquerade = Masquerade(applies=False, why="nothing is translated")
    #: Why earlier hooks leave it to this one.
    steps: tuple[str, ...] = ()


def find_path(client: Client, target: Target, tables: Tables, programs: Programs) -> Path:
    """Follows a new connection, or the first datagram of a flow."""
    steps: list[str] = []
    if client.place is not Place.OUTSIDE:
        path = _at_socket(client, target, tables, programs, steps)
        if path is not None:
            return path._replace(steps=tuple(steps))
    find = _of_host if client.place is Place.HOST else _at_ingress
    return find(client, target, tables, programs)._replace(steps=tuple(steps))


def _is_loopback(address: bytes) -> bool:
    """``addr_is_loopback``: the unspecified address, too, reaches this host."""
    if len(address) == 4:
        return address[0] == 127 or not any(address)
    return not any(address[:-1]) and address[-1] <= 1


# -- sock.c


def _at_socket(
    client: Client, target: Target, tables: Tables, programs: Programs, steps: list[str]
) -> Path | None:
    """Decides as connect() and sendmsg() do; None where the socket's packets are translated instead."""
    if target.protocol is Transport.SCTP:
        steps.append("SCTP passes no socket hook")
        return None
    missing = _hooks_of(target) - programs.socket_hooks
    if missing:
        steps.append(f"the socket has no program at {' and '.join(sorted(missing))}")
        return None
    if client.place is Place.POD and not programs.options.pod_sockets:
        steps.append("pods' sockets are left to their packets (podSockets is off)")
        return None
    entry = _frontend_of_socket(client, target, tables, programs)
    if entry is None:
        return _to_no_frontend(Hook.SOCKET, target, tables)
    if entry.flags & ServiceFlags.OWN:
        return _own(Hook.SOCKET, entry)
    ranges = Ranges.NONE
    if entry.flags & ServiceFlags.SOURCES:
        if client.place is Place.POD or not entry.flags & ServiceFlags.HOST:
            steps.append(
                "the Service has source ranges: the socket leaves it to the packets, which have a source"
            )
            return None
        ranges = Ranges.ALLOWED
    masquerade = Masquerade(
        applies=False, why="a socket is translated, not a packet: backends see the client"
    )
    return _chosen(Hook.SOCKET, Scope.INTERNAL, entry, tables)._replace(ranges=ranges, masquerade=masquerade)


def _hooks_of(target: Target) -> set[str]:
    """A datagram socket may be connected, or not."""
    family = 4 if len(target.address) == 4 else 6
    connect = {f"connect{family}"}
    return connect | {f"sendmsg{family}"} if target.protocol is Transport.UDP else connect


def _frontend_of_socket(
    client: Client, target: Target, tables: Tables, programs: Programs
) -> ServiceEntry | None:
    entry = tables.frontend(*target, Scope.INTERNAL)
    if entry is not None:
        return entry
    if _is_loopback(target.address):
        is_here = programs.options.node_ports_on_loopback and client.place is Place.HOST
    else:
        is_here = tables.is_node_address(target.address)
    if not is_here:
        return None
    return tables.node_port(len(target.address), target.port, target.protocol, Scope.INTERNAL)


def _to_no_frontend(hook: Hook, target: Target, tables: Tables) -> Path:
    if tables.is_cluster_ip(target.address):
        return Path(hook, Outcome.REFUSED, "this cluster IP does not have the port")
    flags = tables.cidr_flags(target.address)
    if flags & CidrFlags.SERVICES and not flags & CidrFlags.TAKEN:
        where = Hook.EGRESS if hook is Hook.INGRESS else hook
        return Path(where, Outcome.DROPPED, "the address is in a ServiceCIDR, but no Service has it")
    return Path(hook, Outcome.UNTOUCHED, "no Service has this address and port: nothing is translated")


def _own(hook: Hook, entry: ServiceEntry) -> Path:
    return Path(hook, Outcome.OWN, "the node itself has the address, and answers there", entry=entry)


# -- tc.c


def _at_ingress(client: Client, target: Target, tables: Tables, programs: Programs) -> Path:
    address = client.address(len(target.address))
    if client.ifindex is None or client.ifindex not in programs.devices:
        why = "no program is attached to the device by which its packets come in"
        return Path(Hook.NONE, Outcome.UNSERVED, why)
    if tables.device_flags(0) & DeviceFlags.NO_NEW_FLOWS:
        return Path(
            Hook.INGRESS, Outcome.UNTOUCHED, "new flows are kube-proxy's until programs are everywhere"
        )
    device = tables.device_flags(client.ifindex)
    if programs.options.pods_by_cidr:
        is_inside = bool(tables.cidr_flags(address) & CidrFlags.PODS)
    else:
        is_inside = bool(device & DeviceFlags.PODS)
    is_here = is_inside and (not programs.options.pods_by_cidr or bool(device & DeviceFlags.LOCAL))
    scope = Scope.INTERNAL if is_here else Scope.EXTERNAL
    entry = _frontend_of_packet(target, tables, scope)
    if entry is None:
        return _to_no_frontend(Hook.INGRESS, target, tables)._replace(scope=scope)
    if entry.flags & ServiceFlags.OWN:
        return _own(Hook.INGRESS, entry)._replace(scope=scope)
    ranges = _ranges(entry, tables, address)
    if ranges is Ranges.DENIED:
        return _denied(Hook.INGRESS, scope, entry, address)
    is_at_home = is_here or (is_inside and entry.kind is FrontendKind.CLUSTER_IP)
    masquerade = _masquerade(entry, programs.options, is_inside=is_inside, is_at_home=is_at_home)
    return _chosen(Hook.INGRESS, scope, entry, tables)._replace(ranges=ranges, masquerade=masquerade)


def _frontend_of_packet(target: Target, tables: Tables, scope: Scope) -> ServiceEntry | None:
    """``find_service`` and ``outside_service`` of frontend.h."""

    def by_node_port(scope: Scope) -> ServiceEntry | None:
        return tables.node_port(len(target.address), target.port, target.protocol, scope)

    entry = tables.frontend(*target, Scope.INTERNAL)
    if entry is None and tables.is_node_address(target.address):
        entry = by_node_port(Scope.INTERNAL)
    if entry is None or scope is Scope.INTERNAL or not entry.flags & ServiceFlags.TWO_SCOPES:
        return entry
    if entry.kind is FrontendKind.NODE_PORT:
        return by_node_port(scope) or entry
    return tables.frontend(*target, scope) or entry


def _masquerade(entry: ServiceEntry, options: Options, *, is_inside: bool, is_at_home: bool) -> Masquerade:
    """``must_masquerade``, but for the backend, which is the client itself in a hairpin."""
    if options.masquerade_all and not entry.flags & ServiceFlags.TWO_SCOPES:
        return Masquerade(applies=True, why="masqueradeAll is set")
    if is_at_home:
        return Masquerade(applies=False, why="a pod of this node keeps its address", hairpin=True)
    if entry.kind is FrontendKind.CLUSTER_IP:
        why = "traffic from outside to a cluster IP: replies have to come back here"
        return Masquerade(applies=True, why=why)
    if entry.policy is Policy.LOCAL:
        return Masquerade(applies=False, why="traffic policy Local keeps the client's address", hairpin=True)
    if is_inside:
        return Masquerade(applies=True, why="a pod of another node: replies have to come back here")
    if options.dsr_sends:
        return Masquerade(applies=False, why="DSR: the backend's node answers", hairpin=True, dsr=True)
    return Masquerade(
        applies=True, why="traffic from outside under policy Cluster: replies have to come back here"
    )


def forwards_at(client: Client, out: int, target: Target, tables: Tables, programs: Programs) -> Hook | None:
    """Where packets of a masqueraded flow to the device ``out`` are forwarded without netfilter, as
    ``find_source`` of flow.h decides; None where they are not.
    """
    if client.ifindex is None:
        return None
    takes = XdpFlags.TAKES | (XdpFlags.SENDS_BACK if out == client.ifindex else 0)
    can_send = tables.xdp_flags(client.ifindex) & XdpFlags.FORWARDS and tables.xdp_flags(out) & takes
    if not can_send or target.protocol is Transport.SCTP:
        return Hook.INGRESS if programs.options.bypass_netfilter else None
    return Hook.XDP if client.ifindex in programs.xdp else Hook.INGRESS


def _of_host(client: Client, target: Target, tables: Tables, programs: Programs) -> Path:
    """``create_host_flow``: packets of this host's sockets that no socket hook has handled."""
    options = programs.options
    is_here = _is_loopback(target.address) or target.address in client.addresses
    hook = Hook.LOOPBACK if is_here else Hook.EGRESS
    device = LOOPBACK.ifindex if is_here else programs.device_to(target.address)
    if is_here and not options.node_ports_on_loopback:
        why = "packets to this node's own addresses pass no program (localhostNodePorts is off)"
        return Path(Hook.NONE, Outcome.UNTOUCHED, why)
    if device is None:
        return Path(Hook.NONE, Outcome.UNSERVED, "this host has no route to the address")
    if device not in programs.devices:
        return Path(Hook.NONE, Outcome.UNSERVED, "no program is attached to the device that leads there")
    if tables.device_flags(0) & DeviceFlags.NO_NEW_FLOWS:
        return Path(hook, Outcome.UNTOUCHED, "new flows are kube-proxy's until programs are everywhere")
    if not is_here:
        entry = tables.frontend(*target, Scope.INTERNAL)
    elif _is_loopback(target.address):
        entry = tables.node_port(len(target.address), target.port, target.protocol, Scope.INTERNAL)
    else:
        entry = _frontend_of_packet(target, tables, Scope.INTERNAL)
    if entry is None:
        if is_here:
            return Path(hook, Outcome.UNTOUCHED, "no NodePort has this port: nothing is translated")
        return _to_no_frontend(hook, target, tables)
    if entry.flags & ServiceFlags.OWN:
        return _own(hook, entry)
    source = programs.source_towards(target.address) or client.address(len(target.address))
    ranges = _ranges(entry, tables, source)
    if ranges is Ranges.DENIED and is_here and source == target.address and entry.flags & ServiceFlags.HOST:
        ranges = Ranges.ALLOWED
    if ranges is Ranges.DENIED:
        return _denied(hook, Scope.INTERNAL, entry, source)
    masquerade = Masquerade(applies=True, why="this host's packets get its address towards the backend")
    return _chosen(hook, Scope.INTERNAL, entry, tables)._replace(ranges=ranges, masquerade=masquerade)


# -- service.h


def _ranges(entry: ServiceEntry, tables: Tables, source: bytes) -> Ranges:
    if not entry.flags & ServiceFlags.SOURCES:
        return Ranges.NONE
    return Ranges.ALLOWED if tables.source_allowed(entry.id, source) else Ranges.DENIED


def _denied(hook: Hook, scope: Scope, entry: ServiceEntry, source: bytes) -> Path:
    why = f"{format_address(source)} is in none of the loadBalancerSourceRanges"
    return Path(hook, Outcome.DROPPED, why, scope, entry, ranges=Ranges.DENIED)


def _chosen(hook: Hook, scope: Scope, entry: ServiceEntry, tables: Tables) -> Path:
    """``service_choose``, but for the choice itself."""
    selected = tuple(tables.selection(entry.id, entry.policy))
    if selected:
        return Path(hook, Outcome.TRANSLATED, "", scope, entry, selected)
    if entry.policy is Policy.LOCAL and tables.selection(entry.id, Policy.CLUSTER):
        why = "traffic policy Local, and all usable endpoints are on other nodes"
        return Path(hook, Outcome.DROPPED, why, scope, entry)
    return Path(hook, Outcome.REFUSED, "no endpoint can serve", scope, entry)
