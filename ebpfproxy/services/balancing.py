"""The algorithm and the weights that a Service's annotations ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ebpfproxy.services.model import Algorithm
from ebpfproxy.services.values import parse_address

ALGORITHM_ANNOTATION = "ebpfproxy.io/lb-algorithm"
WEIGHTS_ANNOTATION = "ebpfproxy.io/weights"
#: IPVS has the same limit (ip_vs.h).
MAX_WEIGHT = 65535
#: Remarks show so many characters of a text, and so many wrong parts of an annotation.
_SHOWN, _SAID = 80, 10
_NOT_IN_NAMES = frozenset("=/")

#: Our own names and IPVS's (ipvsadm(8), --scheduler). The weighted ones are the same: weights always count.
ALGORITHMS: Mapping[str, Algorithm] = {
    **{str(algorithm): algorithm for algorithm in Algorithm},
    "rr": Algorithm.ROUND_ROBIN,
    "wrr": Algorithm.ROUND_ROBIN,
    "lc": Algorithm.LEAST_CONNECTIONS,
    "wlc": Algorithm.LEAST_CONNECTIONS,
    "sed": Algorithm.SHORTEST_DELAY,
    "nq": Algorithm.NEVER_QUEUE,
    "dh": Algorithm.DESTINATION_HASH,
    "sh": Algorithm.SOURCE_HASH,
    "mh": Algorithm.MAGLEV,
}
#: What comes nearest to those that we do not have: a Service has one destination, so that locality by
#: destination leaves least connections; and two random choices are how least connections are found here.
NEAREST: Mapping[str, Algorithm] = {
    "lblc": Algorithm.LEAST_CONNECTIONS,
    "lblcr": Algorithm.LEAST_CONNECTIONS,
    "twos": Algorithm.LEAST_CONNECTIONS,
}


def parse_algorithm(text: str) -> tuple[Algorithm | None, str]:
    """The algorithm (None if the name is unknown), and a remark, which may be empty."""
    name = text.strip().lower()
    found = ALGORITHMS.get(name)
    if found is not None:
        return found, ""
    nearest = NEAREST.get(name)
    if nearest is not None:
        return nearest, f"{name} is not here, the nearest is used: {nearest}"
    return None, f"unknown algorithm {_cut(text)}, known are {', '.join(sorted(ALGORITHMS))}"


def _weight(digits: str) -> int | None:
    # An annotation may be long, and int() has a limit.
    digits = digits.lstrip("0") or digits[:1]
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 5 or int(digits) > MAX_WEIGHT:
        return None
    return int(digits)


def _cut(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}…"


class Weights(NamedTuple):
    """Weights of endpoints by the most specific that is named: address, node, zone, all others (1)."""

    addresses: Mapping[bytes, int] = {}
    nodes: Mapping[str, int] = {}
    zones: Mapping[str, int] = {}
    others: int = 1

    def of(self, address: bytes, node: str, zone: str) -> int:
        found = self.addresses.get(address)
        if found is None:
            found = self.nodes.get(node)
        if found is None:
            found = self.zones.get(zone)
        return self.others if found is None else found


def parse_weights(text: str) -> tuple[Weights | None, list[str]]:
    """``10.0.0.7=3, node/worker-1=5, zone/eu-1a=10, *=2``: keys, each with a weight of 0 to 65535.

    Parts are separated by commas or white space. A part that cannot be read is left out, and named in the
    list. None where nothing is left.
    """
    addresses: dict[bytes, int] = {}
    nodes: dict[str, int] = {}
    zones: dict[str, int] = {}
    others: int | None = None
    problems = []
    for part in text.replace(",", " ").split():
        key, equals, digits = part.rpartition("=")
        weight = _weight(digits) if equals else None
        if weight is None:
            problems.append(f"{_cut(part)} is not KEY=WEIGHT with a weight of 0 to {MAX_WEIGHT}")
            continue
        kind, slash, name = key.partition("/")
        address = parse_address(key)
        if key == "*":
            others = weight
        elif address is not None:
            addresses[address] = weight
        elif slash and name and kind in ("node", "zone") and not _NOT_IN_NAMES.intersection(name):
            (nodes if kind == "node" else zones)[name] = weight
        else:
            problems.append(f"{_cut(part)} names neither an address nor node/NAME, zone/NAME or *")
    if len(problems) > _SAID:
        problems[_SAID:] = [f"and {len(problems) - _SAID} parts more"]
    if not addresses and not nodes and not zones and others is None:
        return None, problems
    return Weights(addresses, nodes, zones, 1 if others is None else others), problems
