"""A decision with names: the JSON of ``ebpfproxy trace``, and its line of text."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath.abi.decision_layout import SUCCESSES, DecisionKind
from ebpfproxy.services.policy import Basis


class ClientRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who asked. ``pod``: ``namespace/name``, or a uid. ``netns``: the lower half of its network namespace's
    cookie. At a socket the address is that of the namespace; a packet has no process.
    """

    pod: str = ""
    #: The network namespace, as the container runtime calls it; ``host`` for the node's own.
    name: str = ""
    address: str = ""
    process: str = ""
    pid: int = 0
    netns: int = 0
    cgroup: int = 0
    socket: int = 0

    def __str__(self) -> str:
        return self.pod or self.name or self.address or f"netns:{self.netns}"


class BackendRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """``pod``: ``namespace/name``, empty where the endpoint is none."""

    address: str
    pod: str = ""


class DecisionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One decision. ``time`` in Unix seconds; ``reason`` is empty for those that go well.

    ``candidates``: backends that it could have been, and ``basis``: the rule that says which these are
    (``services.policy.Basis``), empty where that is not known. ``algorithm`` is empty where
    none was selected.
    """

    time: float
    kind: str
    reason: str
    place: str
    client: ClientRow
    namespace: str
    service: str
    port: str
    protocol: str
    frontend: str
    backend: BackendRow | None
    candidates: int
    basis: str
    algorithm: str


_OUTCOMES = {
    DecisionKind.REFUSED: "refused",
    DecisionKind.DROPPED: "dropped",
    DecisionKind.MASQUERADE_FAILED: "masquerade failed",
    DecisionKind.BACKEND_LEFT: "backend left",
    DecisionKind.STALE_SOCKET_ENDED: "socket closed",
    DecisionKind.BIND_REFUSED: "bind refused",
}
#: All that are ready need no word.
_BASES = {
    str(Basis.NODE_HINTS): ("node hint",),
    str(Basis.ZONE_HINTS): ("zone hint",),
    str(Basis.TERMINATING): ("none is ready",),
}
_TEXTS = {str(kind): text for kind, text in _OUTCOMES.items()}
_GOOD = {str(kind) for kind in SUCCESSES}


@functools.lru_cache(2)
def _clock(seconds: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


class Words(NamedTuple):
    """A decision in words, as its line has them."""

    client: str
    service: str
    frontend: str
    outcome: str
    details: str


def words(row: DecisionRow) -> Words:
    name = f"{row.namespace}/{row.service}" if row.service else "no Service"
    if row.port:
        name += f":{row.port}"
    frontend = row.frontend if row.protocol == "TCP" else f"{row.frontend}/{row.protocol}"
    backend = ""
    if row.backend is not None:
        pod = row.backend.pod.removeprefix(f"{row.namespace}/")
        backend = f"{row.backend.address} {pod}" if pod else row.backend.address
    details = []
    if row.kind in _GOOD:
        outcome = f"⇒ {backend}"
        how = "affinity" if row.kind == str(DecisionKind.AFFINITY_HIT) else row.algorithm
        details.append(", ".join([f"1 of {row.candidates}", *_BASES.get(row.basis, ()), how]))
    else:
        outcome = f"✗ {_TEXTS[row.kind]}"
        outcome += f": {row.reason}" if row.reason else ""
        outcome += f" {backend}" if backend else ""
    if row.client.process:
        details.append(f"{row.client.process}[{row.client.pid}]")
    return Words(str(row.client), name, frontend, outcome, "; ".join(details))


def is_good(row: DecisionRow) -> bool:
    """A backend was chosen."""
    return row.kind in _GOOD


def sentence(row: DecisionRow) -> str:
    """``shop/client → shop/web:http 10.96.0.10:80 ⇒ 10.244.1.3:8080 web-1 (1 of 3, random)``."""
    found = words(row)
    line = f"{found.client} → {found.service} {found.frontend} {found.outcome}"
    return f"{line} ({found.details})" if found.details else line


def text(row: DecisionRow) -> str:
    """The sentence after the time, ``12:00:01.234``."""
    return f"{_clock(int(row.time))}.{int(row.time % 1 * 1000):03} {sentence(row)}"
