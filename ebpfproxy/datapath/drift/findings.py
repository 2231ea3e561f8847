"""Differences in words: which entry it is, what follows from it, and how it is mended."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import msgspec

from ebpfproxy.datapath.abi import flow_layout, layout, node_layout
from ebpfproxy.datapath.abi.layout import POLICIES, U32
from ebpfproxy.datapath.drift.compare import Difference, Kind
from ebpfproxy.datapath.kernel.bpf_map import SharedArray
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Policy, Prefix, ServicePortKey, format_address, format_endpoint

REPAIR = "ebpfproxy check --repair"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be. The JSON of ``ebpfproxy check``: these names stay."""

    #: A map, ``programs`` (of sockets), ``devices`` (packet programs), ``pins``, or ``node``.
    where: str
    #: ``missing``, ``foreign`` or ``changed``; of programs ``detached``, ``replaced``, or ``overtaken`` where
    #: another has come before them; else ``setting``.
    kind: str
    what: str
    #: The Service that it is about, if any: ``namespace/name:port``.
    service: str = ""
    consequence: str = ""
    #: The command, or what else mends it.
    mend: str = REPAIR
    #: A warning does not make the check fail.
    warning: bool = False


class Repaired(msgspec.Struct, frozen=True):
    """What the agent has repaired, and when (Unix seconds)."""

    when: float
    finding: Finding


class Report(msgspec.Struct, frozen=True):
    """One comparison of the agent's, for a command that has asked for it."""

    #: What is not as it should be, and has not been repaired.
    findings: tuple[Finding, ...] = ()
    repaired: tuple[Finding, ...] = ()
    #: How many more there are, which are not told of.
    more: int = 0
    #: The last that were repaired, latest first.
    earlier: tuple[Repaired, ...] = ()


_FILTERED = "packets to some Services pass untranslated, or all packets are looked up"
_CONSEQUENCES = {
    "crc32c": "SCTP packets leave with wrong checksums",
    "devices": "packets are masqueraded with a wrong address, or not at all",
    "xdp_devices": "packets that only pass through this node take tc's longer way, or are lost",
    "node_addresses": "NodePorts do not answer at an address, or at one too many",
    "client_namespaces": "a pod is two clients for session affinity",
    "cidrs": "packets to unused cluster IPs pass, or packets to others are dropped",
    "cidr_filter": "packets to unused cluster IPs pass, or packets to others are dropped",
    "backend_filter": "a socket's peer is not shown as its Service",
    "backend_ports": "a socket's peer is not shown as its Service",
    "address_filter": _FILTERED,
    "port_filter": _FILTERED,
    "service_names": "commands name a wrong Service, and the next start of the agent writes all of it again",
    "slots": "new connections go to a wrong backend, or to none",
    "backends": "new connections go to a wrong address, or fail",
    "members": "clients with session affinity leave their backend, or stay with one that is gone",
    "selections": "new connections go to wrong backends, or are refused",
    "departures": "flows stay with a backend that is gone, or leave one that is not",
    "epochs": "flows do not notice that their backend is gone",
    "source_ranges": "clients are refused that may connect, or others are let in",
}
_OF_FRONTENDS = {
    Kind.MISSING: "connections to it are not translated, and fail",
    Kind.FOREIGN: "connections to it are translated that are no Service's",
    Kind.CHANGED: "connections to it go to another Service, or follow other rules",
}


def consequence_at(device: str) -> str:
    """What follows where the program at a device, with the direction or ``xdp``, is not ours."""
    if device.endswith("xdp"):
        return _CONSEQUENCES["xdp_devices"]
    return "packets of clients outside, and replies to them, are not translated there"


class Describer:
    """Tells of differences by the names that the agent knows."""

    def __init__(self, maps: MapSet, names: Mapping[int, ServicePortKey]) -> None:
        self._maps = maps
        self._names = names
        self._tellers: dict[str, Callable[[Difference], tuple[str, int | None]]] = {
            "services4": self._frontend,
            "services6": self._frontend,
            "service_names": self._name,
            "selections": self._selection,
            "slots": self._slot,
            "backends": self._backend,
            "members": self._member,
            "epochs": self._epoch,
            "departures": self._departure,
            "source_ranges": self._source_range,
            "node_addresses": self._address,
            "client_namespaces": self._address,
            "devices": self._device,
            "xdp_devices": self._device,
            "cidrs": lambda each: (_cidr(node_layout.unpack_cidr(each.key)), None),
            "crc32c": lambda _: ("the table", None),
        }

    def finding(self, each: Difference) -> Finding:
        what, service = self._told(each)
        consequence = _CONSEQUENCES.get(each.map) or _OF_FRONTENDS[each.kind]
        return Finding(
            where=each.map,
            kind=str(each.kind),
            what=what,
            service=self.service(service),
            consequence=consequence,
        )

    def _told(self, each: Difference) -> tuple[str, int | None]:
        teller = self._tellers.get(each.map, self._element)
        try:
            return teller(each)
        except (ValueError, struct.error):
            # Somebody may write anything.
            return f"key {each.key.hex()}", None

    def service(self, number: int | None) -> str:
        """``namespace/name:port`` of a service id, empty where no Service has it."""
        key = self._names.get(number) if number is not None else None
        if key is None:
            return ""
        return f"{key.namespace}/{key.name}" + (f":{key.port_name}" if key.port_name else "")

    def _frontend(self, each: Difference) -> tuple[str, int | None]:
        value = each.wanted if each.wanted is not None else each.found
        assert value is not None
        service_id, *_ = layout.SERVICE.unpack(value)
        key = layout.unpack_service_key(each.key)
        return f"{key} ({key.scope})", service_id if key.protocol is not None else None

    def _name(self, each: Difference) -> tuple[str, int | None]:
        (number,) = U32.unpack(each.key)
        return f"service id {number}", number

    def _selection(self, each: Difference) -> tuple[str, int | None]:
        number, policy = divmod(self._index(each), POLICIES)
        return f"the backends of service id {number} with policy {Policy(policy).name}", number

    def _slot(self, each: Difference) -> tuple[str, int | None]:
        at, selections = self._index(each), self._maps.selections()
        for number in self._names:
            if any(base <= at < base + count for base, count in selections.ranges(number)):
                return f"slot {at}", number
        return f"slot {at}, which is not in use", None

    def _backend(self, each: Difference) -> tuple[str, int | None]:
        known = next(
            (
                one
                for packed in (each.wanted, each.found)
                if packed and (one := layout.unpack_backend(packed))
            ),
            None,
        )
        address = f", {format_endpoint(known[0].address, known[0].port)}" if known else ""
        return f"backend id {self._index(each)}{address}", None

    def _member(self, each: Difference) -> tuple[str, int | None]:
        selection, backend_id = layout.unpack_member(each.key)
        return f"backend id {backend_id} of service id {selection // POLICIES}", selection // POLICIES

    def _departure(self, each: Difference) -> tuple[str, int | None]:
        use = flow_layout.unpack_departure(each.key)
        return f"backend id {use.backend_id} of service id {use.service_id}", use.service_id

    def _epoch(self, each: Difference) -> tuple[str, int | None]:
        return f"service id {self._index(each)}", self._index(each)

    def _source_range(self, each: Difference) -> tuple[str, int | None]:
        service_id, prefix = layout.unpack_source_range(each.key)
        return _cidr(prefix), service_id

    def _device(self, each: Difference) -> tuple[str, int | None]:
        return f"device {U32.unpack(each.key)[0]}", None

    def _address(self, each: Difference) -> tuple[str, int | None]:
        return format_address(layout.unpack_address(each.key)), None

    def _element(self, each: Difference) -> tuple[str, int | None]:
        return f"word {self._index(each)}", None

    def _index(self, each: Difference) -> int:
        array = self._maps[each.map]
        assert isinstance(array, SharedArray)
        return int.from_bytes(each.key, "big") // array.kept_size


def _cidr(prefix: Prefix) -> str:
    return f"{format_address(prefix.address)}/{prefix.length}"
